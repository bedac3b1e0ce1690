"""Checkpoints written by a thread beside training, from a copy of what is trained.

The ranks agree on the main thread alone, between steps: that there is room, that all have written their files, that
the whole is in its place. So no collective runs beside those of the engine, and what a step waits for is the copy.
"""

import json
import logging
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.headers import DTYPES
from utils import dist
from utils.monitor.console import short_bytes
from utils.train.activity import Activity
from utils.train.beside import LOOK_S, Beside
from utils.train.checkpoint import (
    DOOMED,
    POINTER,
    STAGED,
    STATE,
    Part,
    complete_staged,
    manifest_of,
    parts_folder,
    parts_of,
    prune,
    put_in_place,
    sweep,
    write_json,
)
from utils.train.disk import Disk, HashedFile, attempt, first_trouble
from utils.train.host_copies import HostCopies
from utils.train.optimizers import map_tensors, optimizer_state_by_name
from utils.train.parking import tensor_bytes
from utils.train.state import TrainState

SPARE_BYTES = 64 << 20  # left free on the disk, so that logs can still be written
CODES = {dtype: code for code, dtype in DTYPES.items() if dtype is not None}

Payload = dict[str, dict[str, Any]]  # file name -> what goes into it
logger = logging.getLogger(__name__)


class Ended(NamedTuple):
    """What became of a checkpoint."""

    step: int
    folder: Path | None  # None: it could not be written, and earlier ones are as they were
    seconds: float  # since it was begun


class Checkpointer:
    """Writes the checkpoints of a run, one at a time. Every rank has one, and calls each method at the same point.

    Args:
        stage: of this rank; the first data rank of a stage writes it.
        keep_last: complete checkpoints that are kept; None keeps all.
        activity: told of each piece that is waited for: a file may take an hour.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        stage: int,
        data_rank: int,
        keep_last: int | None,
        activity: Activity | None = None,
        disk: Disk | None = None,
    ) -> None:
        self._run_dir, self._stage, self._writes, self._keep_last = run_dir, stage, data_rank == 0, keep_last
        self._activity, self._disk = activity or Activity(), disk or Disk()
        self._copies = HostCopies()
        self._flight: _Flight | None = None
        self._doing, self._moved, self._told = "", 0, (-1, "")

    @property
    def is_writing(self) -> bool:
        """The same on all ranks."""
        return self._flight is not None

    @property
    def is_busy(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._flight is not None and self._flight.is_busy

    def begin(self, state: TrainState, told: Mapping[str, Any], parts: Mapping[str, Part], *, wait: bool) -> bool:
        """Begin to write a checkpoint of now. No other may be under way.

        Args:
            told: what goes into `state.json` beside `state`; plain JSON values.
            parts: by expert; a model that is alone has no name.
            wait: nothing is copied, so nothing may change until `settle` was called.

        Returns:
            Whether training may go on beside it; otherwise `settle` must be called first. The same on all ranks.
        """
        assert self._flight is None, "one checkpoint at a time"
        self._flight = flight = _Flight(state.step, self._run_dir, {"state": state.to_dict(), **told})
        flight.goes_on = not wait
        payload: Payload = {}
        if self._writes:
            flight.experts, payload = _payload(self._stage, parts)
        flight.trouble = self._prepare(flight, payload)
        if flight.trouble is not None:
            return not wait
        copied = None if wait else self._copies.of(payload)
        goes_on = not dist.agree_on_max(int(copied is None))
        if not goes_on and not wait and dist.is_main():
            logger.warning(
                "the host has no room for a copy of what is trained; training waits until the checkpoint is written"
            )
        source = payload if copied is None else copied
        self._work(flight, lambda: self._write(flight, source))
        return goes_on

    def poll(self) -> Ended | None:
        """Look how far it is, without waiting for the disk: what became of the checkpoint, once that is known."""
        if self._flight is None or dist.agree_on_max(int(self._flight.is_busy)):
            return None
        return self._advance(self._flight)

    def settle(self) -> Ended | None:
        """The same, but wait for it. None where no checkpoint was being written."""
        while self._flight is not None:
            self._flight.wait(self._show)
            self._activity.note("the others to write their files", None)
            if (ended := self._advance(self._flight)) is not None:
                return ended
        return None

    def rescue(self, seconds: float, *, others_live: bool = True) -> None:
        """An exception ends this rank: wait until what is being written is on the disk, so that it is not lost. Other
        ranks may be anywhere, so they are not asked, but seen by the files that they leave.

        Args:
            seconds: waited at most.
            others_live: False where one has ended; its files are not waited for.
        """
        flight, self._flight = self._flight, None
        if flight is None or flight.trouble is not None:
            return
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._may_come(flight, others_live):
            self._show()
            time.sleep(LOOK_S)
        if dist.is_main() and not flight.is_busy:
            complete_staged(self._run_dir, self._disk)

    def _may_come(self, flight: "_Flight", others_live: bool) -> bool:
        """Whether it pays to wait for what a checkpoint lacks yet."""
        busy, folder = flight.is_busy, parts_folder(flight.staging)
        if busy and flight.is_written:
            return True
        lacking = flight.parts - len(list(folder.glob("rank_*.json")))
        if lacking > busy and not others_live:
            return False
        if not busy and self._leaves_part and not (folder / self._part).exists():
            return False  # it failed
        return busy or (others_live and flight.staging.exists() and parts_of(flight.staging) is None)

    def _prepare(self, flight: "_Flight", payload: Payload) -> str | None:
        """A clean staging folder and room for all; the same answer on every rank."""
        mine = torch.tensor([payload_bytes(payload), self._leaves_part], dtype=torch.int64)
        total, flight.parts = map(int, dist.sum_over_ranks(mine))
        need = total + SPARE_BYTES

        def prepare() -> None:
            sweep(self._run_dir, self._disk)
            free = self._disk.free(self._run_dir)
            if free < need:
                raise OSError(f"need {short_bytes(need)}, {short_bytes(free)} free at {self._run_dir}")
            self._disk.make(flight.staging)
            self._disk.make(parts_folder(flight.staging))

        return first_trouble(attempt(prepare) if dist.is_main() else None)

    def _work(self, flight: "_Flight", action: Callable[[], Any]) -> None:
        flight.work = Beside(lambda: attempt(action), "checkpoint")

    def _advance(self, flight: "_Flight") -> Ended | None:
        """The next phase, once every rank's thread is done with this one."""
        trouble = first_trouble(flight.trouble or flight.result())
        if trouble is not None:
            return self._fail(flight, trouble)
        if flight.is_written:
            return self._end(flight)
        flight.is_written = True
        for part in dist.gather_text(json.dumps(flight.files)):
            flight.files |= json.loads(part)
        if dist.is_main():
            self._work(flight, lambda: self._commit(flight))
        return None

    def _end(self, flight: "_Flight") -> Ended:
        self._flight = None
        return Ended(flight.step, flight.final, time.monotonic() - flight.begun)

    def _fail(self, flight: "_Flight", trouble: str) -> Ended:
        self._flight = None
        if dist.is_main():
            attempt(lambda: self._remove(parts_folder(flight.staging), flight.staging))
            whole = [p.name for p in self._run_dir.glob("global_step*") if manifest_of(p) is not None]
            kept = "keeping the previous one" if whole else "there is no earlier one"
            kept += ", training goes on" if flight.goes_on else ""
            logger.warning("checkpoint at step %d not written: %s; %s", flight.step, trouble, kept)
        return Ended(flight.step, None, time.monotonic() - flight.begun)

    # --- the thread -----------------------------------------------------------------------------------------------

    def _write(self, flight: "_Flight", payload: Payload) -> None:
        for name, content in payload.items():
            self._doing = f"writing {name}"
            with HashedFile(self._disk, flight.staging / name, self._count) as file:
                if name.endswith(".safetensors"):
                    write_tensors(file, content)
                else:
                    torch.save(content, file)
            tensors = sorted(content if name.endswith(".safetensors") else content["shapes"])
            expert = flight.experts[name]
            flight.files[name] = {**file.told(), "tensors": tensors, **({"expert": expert} if expert else {})}
        if dist.is_main():
            flight.files[STATE] = write_json(self._disk, flight.staging / STATE, flight.told, self._count)
        if self._leaves_part:
            told = {"parts": flight.parts, "files": flight.files}
            write_json(self._disk, parts_folder(flight.staging) / self._part, told, self._count)

    @property
    def _leaves_part(self) -> bool:
        return self._writes or dist.is_main()

    @property
    def _part(self) -> str:
        return f"rank_{dist.rank():04d}.json"

    def _commit(self, flight: "_Flight") -> None:
        """Rank 0's part when all files are written. Raises `OSError`, and then nothing has changed but the staging."""
        self._doing = "putting it in its place"
        put_in_place(self._disk, flight.staging, flight.final, flight.files, self._count)
        trouble = attempt(lambda: self._tidy(flight))
        if trouble is not None:  # it is there all the same
            logger.warning("after checkpoint %s was written: %s; earlier ones may be left over", flight.final, trouble)

    def _tidy(self, flight: "_Flight") -> None:
        """Say that it is the newest, and remove what it takes the place of: not before it would survive a power cut."""
        pointer = self._run_dir / f"{STAGED}{POINTER}"
        with HashedFile(self._disk, pointer) as file:
            file.write(f"{flight.final.name}\n".encode())
        self._disk.rename(pointer, self._run_dir / POINTER)
        self._disk.sync(self._run_dir)
        self._remove(parts_folder(flight.staging), flight.final.with_name(DOOMED + flight.final.name))
        prune(self._run_dir, self._keep_last, flight.step, self._disk)

    def _remove(self, *folders: Path) -> None:
        for folder in folders:
            if folder.exists():
                self._disk.remove(folder)

    def _count(self) -> None:
        self._moved += 1

    def _show(self) -> None:
        """Let the watchdog see that the thread moves."""
        if self._told != (self._moved, self._doing):
            self._told = self._moved, self._doing
            self._activity.note(self._doing)


class _Flight:
    """A checkpoint on its way."""

    def __init__(self, step: int, run_dir: Path, told: Mapping[str, Any]) -> None:
        self.step, self.told = step, json.loads(json.dumps(told))
        self.final = run_dir / f"global_step{step}"
        self.staging = self.final.with_name(STAGED + self.final.name)
        self.files: dict[str, Any] = {}  # for the manifest: of this rank, then of all
        self.experts: dict[str, str] = {}  # file -> the expert that is in it
        self.parts = 1  # ranks that write something, and tell of it
        self.goes_on = True  # training, whatever becomes of this
        self.begun = time.monotonic()
        self.trouble: str | None = None
        self.is_written = False  # by all ranks
        self.work: Beside[str | None] | None = None  # of this rank, in this phase

    @property
    def is_busy(self) -> bool:
        return self.work is not None and self.work.is_busy

    def wait(self, meanwhile: Callable[[], None]) -> None:
        if self.work is not None:
            self.work.wait(meanwhile)

    def result(self) -> str | None:
        work, self.work = self.work, None
        return None if work is None else work.result()


def save(
    run_dir: Path,
    state: TrainState,
    *,
    epochs_done: int,
    course: Mapping[str, Any],
    meters: Mapping[str, Any],
    parts: Mapping[str, Part],
    stage: int,
    data_rank: int,
    keep_last: int | None,
    disk: Disk | None = None,
) -> Path | None:
    """Write one checkpoint and wait for it; every rank calls this. Arguments and result are `Checkpointer`'s."""
    writer = Checkpointer(run_dir, stage=stage, data_rank=data_rank, keep_last=keep_last, disk=disk)
    writer.begin(state, {"epochs_done": epochs_done, "course": course, "meters": meters}, parts, wait=True)
    ended = writer.settle()
    return None if ended is None else ended.folder


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file (https://github.com/huggingface/safetensors#format), piece by piece: the library's own writer
    makes a second copy of all of it in host memory first."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps each aligned
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor_bytes(tensor)
        header[name] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        file.write(flat.view(torch.uint8).numpy())


def _payload(stage: int, parts: Mapping[str, Part]) -> tuple[dict[str, str], Payload]:
    """The expert of each file, and its live tensors."""
    experts: dict[str, str] = {}
    files: Payload = {}
    for expert, (trained, optimizer) in parts.items():
        assert optimizer is not None, "a checkpoint without optimizer state cannot be gone on with"
        end = f"_{expert}_{stage:02d}" if expert else f"_{stage:02d}"
        weights, state = f"weights{end}.safetensors", f"optimizer{end}.pt"
        files[weights] = {name: p.detach() for name, p in trained.items()}
        files[state] = optimizer_state_by_name(optimizer, list(trained.items()))
        experts |= {weights: expert, state: expert}
    return experts, files


def payload_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor_bytes(tensor)
        return tensor

    map_tensors(value, count)
    return total
