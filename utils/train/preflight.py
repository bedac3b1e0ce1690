"""What could end a run hours later, tried within seconds before anything is encoded."""

import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist

from models.base import ModelFamily
from utils import dist
from utils.config.load import config_digest
from utils.data.room import free_memory, unwritable
from utils.monitor.console import short_bytes
from utils.train.activity import Activity, Batch
from utils.train.build import EngineSettings
from utils.train.estimate import Held, Load, estimate, largest_load
from utils.train.memory import advice
from utils.train.setup import Job, engine_settings
from utils.train.trial import trial

MEETING_S = 120.0  # NCCL takes tens of seconds to connect many GPUs for the first time
SHARED_S = 30.0  # network file systems may remember for so long that a file is not there

logger = logging.getLogger(__name__)


class Check(NamedTuple):
    """One thing that was tried, on all ranks."""

    name: str
    wrong: tuple[str, ...]  # messages; none when all is well
    doubts: tuple[str, ...] = ()  # what an estimate says will go wrong; estimates end no run


def preflight(job: Job) -> list[Check]:
    """Every quick check, on all ranks together; the same list on each of them.

    Whether weights are complete, and formats and settings fit, `read_config` has found out by now.
    """
    config, told = job.config, f"{socket.gethostname()} (rank {dist.rank()})"
    folders = {"output_dir": config.output_dir, "cache_dir": config.cache_dir}
    settings, load = engine_settings(config), largest_load(job.loaded, job.family)
    stages = estimate(job.family, settings, load)
    mine = dist.rank() * config.pipeline_stages // dist.world_size()
    job.activity.begin("the checks before the start")
    return [
        _agreed("all ranks reach each other", within(MEETING_S, meet, told)),
        Check("all ranks have the same config", tuple(differing(config_digest(job.loaded), told))),
        Check("all ranks share the folders", tuple(unshared(_written(folders), told, SHARED_S))),
        _block_runs(job.family, settings),
        _agreed("the disk has room for a checkpoint", list(_room(stages, config.output_dir))),
        _agreed("the memory has room for weights and optimizer", too_much(mine, stages[mine], room_here())),
        _agreed("the memory has room for a step, by estimate", [], doubtful(job, mine, stages[mine], load)),
    ]


def require(checks: Sequence[Check]) -> None:
    """Raises `ValueError` with all that is wrong, and tells what is doubtful."""
    if dist.is_main():
        for doubt in (doubt for check in checks for doubt in check.doubts):
            logger.warning(doubt)
    if wrong := [message for check in checks for message in check.wrong]:
        raise ValueError("\n".join(wrong))


def _agreed(name: str, wrong: Sequence[str], doubts: Sequence[str] = ()) -> Check:
    """What any rank found wrong, or doubtful, on all of them, each message once."""
    of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([list(wrong), list(doubts)]))]
    joined = ([message for rank in of_ranks for message in rank[kind]] for kind in (0, 1))
    return Check(name, *(tuple(dict.fromkeys(messages)) for messages in joined))


# --- ranks ------------------------------------------------------------------------------------------------------------


def within(seconds: float, action: Callable[[], str | None], told: str) -> list[str]:
    """What `action` says is wrong; or that it did not end in time, which is how a network says so.

    Args:
        told: who we are, for the message.
    """
    said: list[str | None] = []

    def run() -> None:
        try:
            said.append(action())
        except (RuntimeError, ValueError) as error:
            said.append(str(error).splitlines()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    before = (dist.rank() - 1) % dist.world_size()
    silent = f"nothing came from rank {before} within {seconds:g} s"
    wrong = [silent] if not said else [text for text in said if text]
    mend = "look at the firewall, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and try NCCL_P2P_DISABLE=1"
    return [f"{told}: ranks do not reach each other: {text}; {mend}" for text in wrong]


def meet() -> str | None:
    """A number from each rank to the next, round all of them, and a sum over all. What is wrong, if anything."""
    ranks, rank, device = dist.world_size(), dist.rank(), dist.device()
    if ranks == 1 or not torch_dist.is_initialized():
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread has a current device of its own
    mine, heard = (torch.full((1,), float(rank), device=device) for _ in range(2))
    exchange = [
        torch_dist.P2POp(torch_dist.isend, mine, (rank + 1) % ranks),
        torch_dist.P2POp(torch_dist.irecv, heard, (rank - 1) % ranks),
    ]
    for work in torch_dist.batch_isend_irecv(exchange):
        work.wait()
    total = mine.clone()
    torch_dist.all_reduce(total)
    if (int(heard.item()), int(total.item())) != ((rank - 1) % ranks, ranks * (ranks - 1) // 2):
        return f"rank {(rank - 1) % ranks} sent {heard.item():g}, and all together make {total.item():g}"
    return None


def differing(digest: str, told: str) -> Iterator[str]:
    """Ranks that were given another config than rank 0: nodes with copies of the file that are not equal."""
    of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([digest, told]))]
    others = [who for its, who in of_ranks if its != of_ranks[0][0]]
    if others:
        yield (
            f"--config: {', '.join(others)} read other settings than {of_ranks[0][1]}: all ranks must be given the "
            "same run and dataset TOML, and the same --set; copy the files, or start from a shared folder"
        )


def unshared(folders: Mapping[str, Path], told: str, seconds: float) -> Iterator[str]:
    """Ranks that do not see what rank 0 writes to one of `folders`, by their key."""
    if dist.world_size() == 1:
        return
    name = dist.text_from_main(f".shared-{secrets.token_hex(6)}")
    fault = ""
    try:
        if dist.is_main():
            fault = _leave_tokens(folders, name)
        fault = dist.text_from_main(fault)  # before anybody waits for what was never written
        missing = [] if dist.is_main() or fault else _not_seen(folders, name, seconds)
        of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([told, missing]))]
    finally:
        if dist.is_main():
            for folder in folders.values():
                (folder / name).unlink(missing_ok=True)
    if fault:
        yield fault
        return
    for key, folder in folders.items():
        if blind := [who for who, keys in of_ranks if key in keys]:
            see = "does" if len(blind) == 1 else "do"
            yield (
                f"{key} = '{folder}': {' and '.join(blind)} {see} not see what {of_ranks[0][0]} writes there: all "
                "nodes must share this folder; mount it on each of them, or name one that they share"
            )


def _written(folders: Mapping[str, Path]) -> dict[str, Path]:
    """Those that rank 0 writes to: a cache that has everything may be there to be read alone."""
    cache = folders.get("cache_dir")
    only_read = json.loads(dist.text_from_main(json.dumps(bool(cache and cache.is_dir() and unwritable(cache)))))
    return {key: folder for key, folder in folders.items() if key != "cache_dir" or not only_read}


def _leave_tokens(folders: Mapping[str, Path], name: str) -> str:
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            return f"{key} = '{folder}' cannot be written to ({error.strerror}); name a folder of yours"
    return ""


def _not_seen(folders: Mapping[str, Path], name: str, seconds: float) -> list[str]:
    deadline, missing = time.monotonic() + seconds, list(folders)
    while missing:
        missing = [key for key in missing if not _holds(folders[key], name)]
        if time.monotonic() > deadline:
            break
        time.sleep(0.05 if missing else 0)
    return missing


def _holds(folder: Path, name: str) -> bool:
    try:
        return name in os.listdir(folder)  # a listing asks the server anew where a look-up may be remembered
    except OSError:
        return False


# --- this machine -----------------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """What this rank may still take, bytes."""

    device: int
    host: int  # its share of this machine's; the same memory where the device is the CPU
    on_gpu: bool


def room_here() -> Room:
    host = free_memory() // dist.ranks_here()
    return Room(torch.cuda.mem_get_info()[0], host, True) if dist.on_gpu() else Room(host, host, False)


def _block_runs(family: ModelFamily, settings: EngineSettings) -> Check:
    name = f"a block of the model runs here in {str(family.compute_dtype).removeprefix('torch.')}"
    found = [trial(expert, settings) for expert in family.experts().values()]
    if None in found:
        name += f": left out, {family.title} knows no shapes of samples without clips"
    return _agreed(name, [message for each in found for message in each or ()])


def _room(stages: Sequence[Held], folder: Path) -> Iterator[str]:
    """Whether a checkpoint and what is saved beside it fit on the disk. Rank 0 looks: the folder is shared."""
    if not dist.is_main():
        return
    need = sum(each.checkpoint + each.trained for each in stages)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        yield (
            f"output_dir = '{folder}': a checkpoint and a saved model take about {short_bytes(need)}, and "
            f"{short_bytes(free)} are free; make room, or name a folder on another disk"
        )


def too_much(stage: int, held: Held, room: Room) -> list[str]:
    """Whether this rank cannot even hold what is certain: weights, gradients, optimizer state, and on the host the
    weights of experts that wait."""
    where = f"{socket.gethostname()}: stage {stage}"
    told = held._replace(activations=None, offloaded=0)
    if room.on_gpu and held.parked > room.host:
        return [
            f"{where} keeps {short_bytes(held.parked)} of weights of experts in host memory, and this rank's share of "
            f"it has {short_bytes(room.host)} free; train one expert after the other, or use more pipeline_stages"
        ]
    need = held.certain + (0 if room.on_gpu else held.parked)
    if need <= room.device:
        return []
    return [
        f"{where} holds {short_bytes(need)} before any clip is there ({told.words()}), and {_place(room)} has "
        f"{short_bytes(room.device)} free; use more pipeline_stages, transformer_dtype = 'float8', an [adapter] or one "
        "of a lower rank, an optimizer with a smaller state, or end what else runs there"
    ]


def doubtful(job: Job, stage: int, held: Held, load: Load) -> list[str]:
    """Whether a step of the largest bucket will not fit this rank, as far as a formula can tell."""
    return [f"{text}{advice(job.loaded, _in_step(stage, load))}" for text in too_full(stage, held, load, room_here())]


def too_full(stage: int, held: Held, load: Load, room: Room) -> Iterator[str]:
    if held.activations is None:
        return
    start = f"{socket.gethostname()}: stage {stage} may run out of memory in steps with {load}: by estimate"
    on_device = held.certain + held.activations + (0 if room.on_gpu else held.parked + held.offloaded)
    if on_device > room.device:
        yield (
            f"{start} it takes {short_bytes(on_device)} ({held.words()}), and {_place(room)} has "
            f"{short_bytes(room.device)} free"
        )
    on_host = held.parked + held.offloaded
    if room.on_gpu and on_host > room.host:
        yield (
            f"{start} {short_bytes(on_host)} wait in host memory, and this rank's share of it has "
            f"{short_bytes(room.host)} free"
        )


def _in_step(stage: int, load: Load) -> Activity:
    """As if that micro-batch was under way, for advice on what to change."""
    activity = Activity()
    activity.stage = stage
    activity.begin("a step", lambda _: Batch(str(load.bucket), ["clip"] * load.samples))
    activity.note_next("forward")
    return activity


def _place(room: Room) -> str:
    return "its GPU" if room.on_gpu else "its share of the host's memory"
