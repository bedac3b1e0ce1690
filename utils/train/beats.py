"""Signs of life: a small file a rank that says what it does, and the words for who waits for whom."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from utils.data.liveness import born_at
from utils.train.activity import Activity, Doing

FOLDER = "alive"
LEFT_S = 24 * 3600.0  # without a beat: nobody comes back to look at why a start in a folder of its own has ended


class Beat(NamedTuple):
    """What a rank told last."""

    rank: int
    host: str  # `liveness.machine`: ranks of one host see each other's processes
    pid: int
    born: str  # tells the process from a later one of the same id; "" where the system does not say
    stage: int | None
    phase: str
    what: str
    micro_batch: int | None
    peers: tuple[int, ...] | None  # ranks that it waits for; None is all
    idle_s: float  # since it last moved, when this was written
    patience: float

    def sentence(self, silent_s: float, stages: Mapping[int, int | None]) -> str:
        """`rank 0 (stage 0) waits for gradients of micro-batch 1 from rank 1 (stage 1), for 605 s`."""
        micro = "" if self.micro_batch is None else f" of micro-batch {self.micro_batch}"
        me, time = named(self.rank, self.stage), f"for {silent_s:.0f} s"
        if self.peers is None:
            return f"{me} waits for all ranks at {self.what}{micro}, {time}"
        if not self.peers:
            return f"{me} has been in {self.what}{micro} {time}"
        others = " and ".join(named(peer, stages.get(peer)) for peer in self.peers)
        return f"{me} waits for {self.what}{micro} from {others}, {time}"


def named(rank: int, stage: int | None) -> str:
    return f"rank {rank}" if stage is None else f"rank {rank} (stage {stage})"


def beat_of(rank: int, host: str, activity: Activity, now: float) -> Beat:
    doing: Doing = activity.doing
    idle_s = round(activity.idle_s(now), 1)
    pid = os.getpid()
    try:
        born = _birth(pid)
    except OSError:  # too many open files: that is no reason to be silent
        born = ""
    return Beat(
        rank, host, pid, born, activity.stage, activity.phase, doing.what, doing.micro_batch, doing.peers, idle_s,
        doing.patience,
    )  # fmt: skip


_birth = cache(born_at)  # of this process: it does not change


def write_beat(folder: Path, beat: Beat) -> None:
    """Raises OSError: what that means is for the caller to know."""
    path = folder / f"rank_{beat.rank}.json"
    staged = path.with_name(f"tmp-{path.name}")
    staged.write_text(json.dumps(beat._asdict()))
    os.replace(staged, path)


def read_beat(folder: Path, rank: int) -> tuple[Beat, float] | None:
    """What rank `rank` told last and when, by the file server's clock. None: it has ended, or not begun."""
    path = folder / f"rank_{rank}.json"
    with suppress(OSError, ValueError, TypeError):
        with path.open(encoding="utf-8") as file:  # opening it is what makes a network disk look at the server
            content, when = json.load(file), os.fstat(file.fileno()).st_mtime
        peers = content.pop("peers")
        return Beat(**content, peers=None if peers is None else tuple(peers)), when
    return None


def is_gone(beat: Beat, host: str) -> bool:
    """Whether the process of a rank on this host has ended: there is none of its id, or one that began later. False
    where that cannot be seen."""
    with suppress(OSError):
        if beat.host == host:
            born = born_at(beat.pid)
            return not born or (beat.born != "" and beat.born != born)
    return False


def clear_left(parent: Path, prefix: str) -> None:
    """Take away the folders of starts that were killed, a day after they last moved."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest > LEFT_S:
                shutil.rmtree(folder, ignore_errors=True)


def who_waits(beats: Sequence[tuple[Beat, float]], world: int) -> str:
    """What every rank does, those that wait for nobody last: that is where to look.

    Args:
        beats: with the seconds since each rank last moved.
    """
    stages = {beat.rank: beat.stage for beat, _ in beats}
    waiting = [(beat, silent) for beat, silent in beats if beat.peers != ()]
    busy = [(beat, silent) for beat, silent in beats if beat.peers == ()]
    lines = [beat.sentence(silent, stages) for beat, silent in waiting + busy]
    missing = [rank for rank in range(world) if rank not in stages]
    if missing:
        lines.append(f"no sign of {', '.join(f'rank {rank}' for rank in missing)}")
    if busy and waiting:
        lines.append(f"look at {', '.join(f'rank {beat.rank}' for beat, _ in busy)} first")
    return "".join(f"\n  {line}" for line in lines)
