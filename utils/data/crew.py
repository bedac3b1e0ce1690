"""The ranks of one job in a shared folder: each shows that it lives, and learns when another has ended."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple

from utils.data.cache import write_whole
from utils.data.liveness import born_at, machine

JOBS_FOLDER = "jobs"  # in the cache's root: one folder a job that is caching
BEAT_S = 2.0
STALE_S = 20.0  # a process of another machine that has not beaten for so long is dead
LOST_S = 60.0  # for a rank of this job: its end would be that of all
GRACE_S = 8.0  # for a rank to end in order, or by its watchdog, once it knows that another is lost
_OLD_S = 3600.0  # a job's folder without a living rank is of no use after that


class PeerLost(RuntimeError):
    """Another rank of this job has ended; the message says which, and why if it could tell."""


class Member(NamedTuple):
    """Who beats in a file."""

    machine: str  # the same for processes that can see each other
    host: str
    pid: int
    born: str  # tells the process from a later one of the same id; "" where the system does not say
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Crew:
    """One rank's view of its job. As a context manager it beats, in a thread, and looks after the others.

    Nothing but the folder is shared, so it works where no connection would tell: a machine that lost its power closes
    no sockets. Times of files are compared with each other only, since the clocks of machines differ. The
    folder goes with a job of one rank; where there are several, whoever knows that all are done takes it away.

    Args:
        folder: the same on every rank, and no other job's.
        end: called from the thread when this rank has not ended by itself `GRACE_S` after another was lost, since it
            waits for that one in a library, say. None: nothing.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1, end: Callable[[str], None] | None = None) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.beat = folder / _beat(rank)
        self._end = end
        self._lost = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="crew", daemon=True)
        self._known: dict[Path, tuple[float, str]] = {}  # beat -> when it was looked at, and what was found
        self._unmoved: dict[int, tuple[float, int]] = {}  # rank elsewhere -> its last beat, this one's beats since

    @classmethod
    def alone(cls, root: Path) -> "Crew":
        """A job of one rank, on the cache at `root`."""
        return cls(root / JOBS_FOLDER / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}")

    def __enter__(self) -> "Crew":
        write_whole(self.beat, json.dumps(_this_process(self.rank)).encode())
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # a full or vanished disk must not hide the error itself
            if error is not None and not isinstance(error, PeerLost):  # that one has said it, or could not
                write_whole(self.folder / _failure(self.rank), str(error or type(error).__name__).encode())
            self.beat.unlink(missing_ok=True)
        if self.world == 1:  # else others may still read in it
            shutil.rmtree(self.folder, ignore_errors=True)

    def check(self) -> None:
        """Raises `PeerLost` once another rank has ended before its time."""
        if self._lost:
            raise PeerLost(self._lost)

    def meet(self, barrier: Callable[[], None]) -> None:
        """Wait for all ranks at `barrier`. Raises `PeerLost` where it breaks since one of them has ended."""
        try:
            barrier()
        except RuntimeError:
            deadline = monotonic() + 2 * BEAT_S  # a connection closes a moment before its process is gone
            while not self._lost and monotonic() < deadline:
                self._lost = self._find_lost()
                sleep(0.1)
            self.check()
            raise
        self.check()

    def post(self, name: str, value: int) -> None:
        """Leave a number for the others; give it before they meet, and read it with `total` after that."""
        write_whole(self.folder / f"{name}-{self.rank}.json", json.dumps(value).encode())

    def total(self, name: str) -> int:
        """Sum of what every rank posted."""
        return sum(json.loads((self.folder / f"{name}-{rank}.json").read_bytes()) for rank in range(self.world))

    def lives(self, beat: Path) -> bool:
        """Whether the process that beats in this file, of any job, is there. Looked up once in `BEAT_S`."""
        return not self._fate(beat)

    def age_s(self, path: Path) -> float:
        """How long before this rank's last beat a file was written, by the clock of the disk they are on."""
        return _touched(self.beat) - _touched(path)

    def _fate(self, beat: Path) -> str:
        """Why the process is taken for dead; "" while it lives."""
        when, fate = self._known.get(beat, (0.0, ""))
        if beat not in self._known or (not fate and monotonic() - when >= BEAT_S):
            fate = self._look(beat)
            self._known[beat] = (monotonic(), fate)
        return fate

    def _look(self, beat: Path) -> str:
        try:
            os.listdir(beat.parent)  # NFS may remember for half a minute that a file was not there; this makes it look
            member = Member(**json.loads(beat.read_bytes()))
            if member.machine == machine():
                return "" if _is_running(member) else _killed(member)
            age_s = self.age_s(beat)
            return "" if age_s < STALE_S else f"{member} has shown no life for {age_s:.0f} s"
        except FileNotFoundError:
            return "it has left"
        except (OSError, ValueError, TypeError):  # the disk hesitates: no proof of anything
            return ""

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        lost_since = 0.0
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self.beat)
                self._count_unmoved()
            if not self._lost:
                self._lost, lost_since = self._find_lost(), monotonic()
            if self._lost and self._end and monotonic() - lost_since >= GRACE_S:
                self._end(self._lost)

    def _find_lost(self) -> str:
        """What has become of a rank that is lost; "" where none is."""
        with contextlib.suppress(OSError, ValueError, TypeError):  # the disk hesitates: the next look will tell
            there = set(os.listdir(self.folder))
            for rank in range(self.world):
                if _failure(rank) in there and rank != self.rank:
                    return f"rank {rank} has stopped: {(self.folder / _failure(rank)).read_text()}"
                # without a beat it has not begun yet, or is done
                beat = self.folder / _beat(rank)
                if beat.name in there and (fate := self._fate_of_rank(rank, beat)) and beat.exists():
                    return fate
        return ""

    def _fate_of_rank(self, rank: int, beat: Path) -> str:
        """Why a rank of this job is lost. One of another machine is once this rank has beaten all of `LOST_S` without a
        sign of it: a file's age alone says as much of a disk that let nobody write for a minute, or of a machine that
        slept."""
        member = Member(**json.loads(beat.read_bytes()))
        if member.machine == machine():
            return "" if _is_running(member) else _killed(member)
        _, beats = self._unmoved.get(rank, (0.0, 0))
        return f"{member} has shown no life for {beats * BEAT_S:.0f} s" if beats * BEAT_S >= LOST_S else ""

    def _count_unmoved(self) -> None:
        for rank in range(self.world):
            with contextlib.suppress(OSError):
                when = _touched(self.folder / _beat(rank))
                last, beats = self._unmoved.get(rank, (when, -1))
                self._unmoved[rank] = (when, beats + 1 if when == last else 0)


def _killed(member: Member) -> str:
    return f"{member} has ended without a word (killed: mostly memory that ran out)"


def _beat(rank: int) -> str:
    return f"rank-{rank}.json"


def _failure(rank: int) -> str:
    return f"rank-{rank}.failed"


def sweep(root: Path) -> None:
    """Take away what dead jobs have left in the cache at `root`; living ones lose nothing."""
    with Crew.alone(root) as crew:
        for folder in (root / JOBS_FOLDER).iterdir():
            with contextlib.suppress(OSError):  # another start sweeps too
                beats = list(folder.glob("rank-*.json"))
                # a silent job of another machine may only be stopped, so it too is given the hour
                ages_s = [crew.age_s(path) for path in (folder, *beats)]
                if min(ages_s) > _OLD_S and not any(crew.lives(beat) for beat in beats):
                    shutil.rmtree(folder)


def _touched(path: Path) -> float:
    # opened, since NFS answers a bare stat from memory that may be a minute old
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _this_process(rank: int) -> dict[str, Any]:
    return Member(machine(), socket.gethostname(), os.getpid(), born_at(os.getpid()), rank)._asdict()


def _is_running(member: Member) -> bool:
    return member.pid == os.getpid() or (bool(member.born) and born_at(member.pid) == member.born)
