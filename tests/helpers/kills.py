"""Two ranks that do nothing but train and save, killed again and again; and what was left on the disk each time."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.helpers import forked
from tests.helpers.checkpoints import TOLD, optimizer_of, step
from tests.helpers.disks import CountedDisk
from utils.train import checkpoint, checkpoint_read
from utils.train.checkpoint import Part
from utils.train.checkpoint_write import Checkpointer
from utils.train.disk import Disk
from utils.train.state import TrainState

RANKS = 2
STAGES = ("abc", "defg")  # names of what each rank trains
ELEMENTS = 100_000  # of each tensor: a save takes some milliseconds
LONGEST_S = 0.5  # from the first save on until the kill
STEPS_A_SAVE = 3


class Kill(NamedTuple):
    """One round: what was killed and when, and what could be gone on with."""

    ranks: tuple[int, ...]
    after_s: float
    saved: int  # the last step whose checkpoint was said to be there; 0: none yet
    found: int  # the step that a start goes on from
    left: tuple[str, ...]  # what the save that was cut short left
    ended_s: float  # until all ranks had ended


def hammer(folder: Path, arguments: dict[str, Any]) -> list[Kill]:
    """In a process that may fork: `arguments["kills"]` rounds in one run folder, each going on from what is found.

    Raises AssertionError where anything that was saved is lost, damaged, or not as it was at its step.
    """
    step(warm := _fresh("a"), optimizer_of(warm))  # what that imports, once for all forks
    chance = random.Random(arguments["seed"])
    run_dir = folder / "run"
    run_dir.mkdir()
    kills = []
    for number in range(arguments["kills"]):
        ranks = ((0,), (1,), (0, 1))[number % 3]
        after_s = chance.uniform(0, arguments.get("longest_s", LONGEST_S))
        kills.append(_round(folder / "said", run_dir, ranks, after_s, arguments["synced"]))
    return kills


def _round(said: Path, run_dir: Path, ranks: tuple[int, ...], after_s: float, synced: bool) -> Kill:
    start = _newest(run_dir)
    started = forked.start(RANKS, said, lambda: _train(run_dir, said, start, synced))
    first = said / "first"
    while not first.exists():
        time.sleep(0.001)
    time.sleep(after_s)
    for rank in ranks:
        os.kill(started[rank].pid, signal.SIGKILL)
    killed = time.monotonic()
    ended = forked.statuses(started, timeout_s=30)
    ended_s = time.monotonic() - killed
    assert all(ended), "killed, or ended by an error since the other was"
    saved = max(map(int, (said / "saved").read_text().split()), default=0) if (said / "saved").exists() else 0
    left = tuple(sorted(path.name for path in run_dir.glob("tmp-*")))
    found = _newest(run_dir)
    assert found >= max(saved, start), f"step {found} of {saved} saved, {start} before"
    if found:
        _check(run_dir / f"global_step{found}", found)
        assert not list(run_dir.glob("tmp-*global_step*")), "cleared by a start"
    for path in (first, said / "saved"):
        path.unlink(missing_ok=True)
    return Kill(ranks, after_s, saved, found, left, ended_s)


def _newest(run_dir: Path) -> int:
    try:
        return checkpoint.step_of(checkpoint.find(run_dir))
    except checkpoint.CheckpointError:
        return 0


def _check(folder: Path, number: int) -> None:
    """All hashes are right, and so are all values, which follow from the step."""
    assert checkpoint_read.verify(folder) == []
    parameters = _fresh("".join(STAGES))
    loaded = checkpoint_read.load(folder, {"": Part(parameters, optimizer_of(parameters))})
    assert loaded.state.step == number
    for index, parameter in enumerate(parameters.values()):
        assert bool((parameter == _value(index, number)).all())


def _fresh(names: str) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(ELEMENTS)) for name in names}


def _value(index: int, number: int) -> float:
    return float(number + index / 8)


def _train(run_dir: Path, said: Path, number: int, synced: bool) -> None:
    """A rank: steps with a save beside them, for ever."""
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    first = sum(map(len, STAGES[:rank]))
    parameters = _fresh(STAGES[rank])
    optimizer = optimizer_of(parameters)
    step(parameters, optimizer)  # so that it has a state
    disk = Disk() if synced else CountedDisk()
    writer = Checkpointer(run_dir, stage=rank, data_rank=0, keep_last=2, disk=disk)
    saved = os.open(said / "saved", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        number += 1
        time.sleep(0.002)
        with torch.no_grad():
            for index, parameter in enumerate(parameters.values()):
                parameter.fill_(_value(first + index, number))
        ended = writer.poll()
        if number % STEPS_A_SAVE == 0:
            ended = writer.settle() or ended
            writer.begin(TrainState(number), TOLD, {"": Part(parameters, optimizer)}, wait=False)
            (said / "first").touch()
        if ended is not None and rank == 0:
            assert ended.folder is not None, "this disk has room"
            os.write(saved, f"{ended.step} ".encode())
