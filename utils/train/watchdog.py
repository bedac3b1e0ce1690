"""A thread in every rank that ends the run when nothing moves any more, or when another rank has ended.

Every rank tells what it does in `<run>/alive/rank_N.json`. The run has stalled when no rank has moved for the stall
timeout: one that waits, for hours if need be, while another encodes or compiles is no stall. Then each rank writes its
stacks to `<run>/stalls/<UTC>_rank_N.txt`, the first of them says who waits for whom, and all end.

A rank that ends leaves `<run>/errors/rank_N.json` (see `utils.train.faults`); for one that is killed, a rank of the
same host writes it. Others may then be stuck where no error reaches them, as in NCCL: they follow.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from utils.data.liveness import machine
from utils.dist_meeting import tell_launcher
from utils.train import beats
from utils.train.activity import LONG, Activity
from utils.train.faults import FOLDER, Fault, clear_faults, read_faults, write_fault
from utils.train.run_folder import TIME_FORMAT
from utils.train.signals import STOP

STALLED = 3  # exit status
FAILED = 1
TICK_S = 2.0  # between two looks at what others have left
BEATS = 20  # of each rank in a stall timeout
FOLLOW_S = 6.0  # that a rank has to end by itself once another has
GATHER_S = 5.0  # that ranks have to write their stacks
LAST_RESORT_S = 60.0  # beyond the timeout, or for the last words

logger = logging.getLogger(__name__)


class Watchdog:
    """Watches over this rank and, through the files of the run folder, over the run.

    Args:
        run_dir: where all ranks can write; `prepare_folder` must have been called on it by rank 0, before the others.
        stall_timeout_s: 0 never takes silence for a stall.
        log_file: where the interpreter writes stacks when this thread cannot, since C code holds it up. None: stderr.
        here: ranks of this machine, one of which tells of the end of others. None: all.
    """

    def __init__(
        self,
        activity: Activity,
        run_dir: Path,
        *,
        rank: int,
        world: int,
        stall_timeout_s: float,
        log_file: Path | None = None,
        here: Sequence[int] | None = None,
    ) -> None:
        self.activity, self.run_dir, self.rank, self.world = activity, run_dir, rank, world
        self._timeout_s = stall_timeout_s
        self._here = range(world) if here is None else here
        self._host = machine()
        self._alive = run_dir / beats.FOLDER
        self._peers: dict[int, beats.Beat] = {}  # of this host, as last read
        self._tick_s = min(TICK_S, stall_timeout_s / 10) if stall_timeout_s else TICK_S
        self._stop = threading.Event()
        self._told_every_s = max(self._tick_s, stall_timeout_s / BEATS)
        self._last_told = -float("inf")
        self._suspected: float | None = None  # since when this looks like a stall
        self._fault_seen: float | None = None
        self._log: IO[str] = log_file.open("a") if log_file else sys.__stderr__  # type: ignore[assignment]
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> "Watchdog":
        self._tell()
        self._thread.start()
        return self

    @property
    def meeting_place(self) -> Path | None:
        """Where ranks leave word for each other; None where there is no other."""
        return self._alive if self.world > 1 else None

    def stop(self) -> None:
        """This rank leaves by itself: nobody is to miss it."""
        self._stop.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        if self._log is not sys.__stderr__:
            self._log.close()
        with suppress(OSError):
            (self._alive / f"rank_{self.rank}.json").unlink(missing_ok=True)
            (self._alive / f"tmp-rank_{self.rank}.json").unlink(missing_ok=True)  # there where the disk was full
            if not any(self._alive.glob("rank_*")):  # the last one
                (self._alive / STOP).unlink(missing_ok=True)
                if {path.name for path in self.run_dir.iterdir()} <= {beats.FOLDER, FOLDER}:
                    clear_faults(self.run_dir)  # the folder was made for the watch alone
        for folder in (self._alive, self.run_dir / FOLDER, self.run_dir):  # where empty; a run's never is
            with suppress(OSError):
                folder.rmdir()

    def hush(self) -> None:
        """This rank ends and says so itself; the thread must not end it meanwhile, unless it cannot."""
        self._stop.set()
        self._arm(LAST_RESORT_S)

    # --- what others have left ------------------------------------------------------------------------------------

    def record(self, text: str) -> None:
        """This rank ends by an error of its own."""
        if self.world > 1:
            time.sleep(0.2)  # the process of a rank may be there a moment longer than its connections
        self._look_for_gone()
        write_fault(self.run_dir, Fault(self.rank, text, self.activity.place()))

    def faults(self) -> list[Fault]:
        """Of all ranks, the first one first."""
        self._look_for_gone()
        return read_faults(self.run_dir)

    def first_of_others(self, wait_s: float) -> Fault | None:
        """Why another rank has ended, waiting for it to be told."""
        deadline = time.monotonic() + wait_s
        while True:
            found = [fault for fault in self.faults() if fault.rank != self.rank]
            if found or time.monotonic() > deadline:
                return found[0] if found else None
            time.sleep(0.2)

    def speaks_for(self, fault: Fault) -> bool:
        """Whether this rank is the one that tells of another's end on its machine: the lowest that is left there."""
        return self.rank == min(set(self._here) - {fault.rank}, default=0)

    def _look_for_gone(self) -> None:
        for rank in range(self.world):
            beat = self._peers.get(rank)
            if beat is None and rank != self.rank and (told := beats.read_beat(self._alive, rank)):
                beat = self._peers[rank] = told[0]
            if beat is None or not beats.is_gone(beat, self._host):
                continue
            if beats.read_beat(self._alive, rank) is not None:  # else it left by itself
                text = (
                    f"rank {rank} (process {beat.pid}) is gone without a word, as one that is killed: mostly host "
                    f"memory that ran out (dmesg -T | tail); its log is logs/rank_{rank}.log"
                )
                place = f"rank {self.rank} missed it {self.activity.place()}"  # its own last beat may be seconds old
                write_fault(self.run_dir, Fault(rank, text, place, told=False))

    # --- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(self._tick_s):
            now = time.monotonic()
            late_s, last = now - last - self._tick_s, now
            if late_s > 5 * self._tick_s + 5:
                # the whole process was held up (Ctrl-Z, C code): nothing could move, which says nothing
                self.activity.held_up_until = now
            if self._timeout_s:
                # with the longest patience: what is being done may change before this thread runs again
                self._arm(self._timeout_s * LONG + LAST_RESORT_S)
            with suppress(OSError):  # a disk that hesitates says nothing, and this thread must not end by it
                self._look()

    def _look(self) -> None:
        self._tell()
        if not self._follow() and self._timeout_s and (self._is_stalled() or self._marker.exists()):
            self._end_stalled()

    def _is_stalled(self) -> bool:
        """Whether silence was seen, and again once all who live have told anew: a single look is misled by a clock that
        jumps, by a process that is stopped in the middle of it, and by a disk that shows old files."""
        if self._silence_s() <= 0:
            self._suspected = None
            return False
        now = time.monotonic()
        self._suspected = now if self._suspected is None else self._suspected
        return now - self._suspected >= self._told_every_s + 2 * self._tick_s

    def _tell(self) -> None:
        if self.world == 1:
            return
        now = time.monotonic()
        if now - self._last_told >= self._told_every_s:
            self._last_told = now
            with suppress(OSError):  # on a full disk nothing is taken for a stall
                self._alive.mkdir(exist_ok=True)
                beats.write_beat(self._alive, beats.beat_of(self.rank, self._host, self.activity, now))
                if self._stop.is_set():  # `stop` waited for this write in vain: a beat left behind would be missed
                    (self._alive / f"rank_{self.rank}.json").unlink(missing_ok=True)

    def _follow(self) -> bool:
        """Whether another rank has ended; end too, if this one does not by itself."""
        found = [fault for fault in self.faults() if fault.rank != self.rank]
        if not found:
            return False
        self._fault_seen = self._fault_seen or time.monotonic()
        if time.monotonic() - self._fault_seen > FOLLOW_S and not self._stop.is_set():
            self._arm(LAST_RESORT_S)
            tell_launcher(found[0].words())
            logger.log(logging.ERROR if self.speaks_for(found[0]) else logging.DEBUG, "%s", found[0].words())
            self._leave(FAILED)
        return True

    def _silence_s(self) -> float:
        """Seconds beyond the timeout for which no rank has moved; below 0 where one has."""
        mine = self.activity.idle_s(time.monotonic()) - self._timeout_s * self.activity.doing.patience
        if mine <= 0 or self.world == 1:
            return mine
        self._last_told = -float("inf")
        self._tell()  # all clocks but the file server's may differ: this gives its time of now
        told = self._all_beats()
        if not told:
            return -1.0
        patience = max(beat.patience for beat, _ in told)
        return min(silent for _, silent in told) - self._timeout_s * patience

    def _all_beats(self) -> list[tuple[beats.Beat, float]]:
        """What the ranks do, with the seconds since each moved. A rank that holds its thread up tells nothing new."""
        if self.world == 1:
            beat = beats.beat_of(self.rank, self._host, self.activity, time.monotonic())
            return [(beat, beat.idle_s)]
        told = [told for rank in range(self.world) if (told := beats.read_beat(self._alive, rank))]
        now = next((when for beat, when in told if beat.rank == self.rank), None)
        return [] if now is None else [(beat, beat.idle_s + max(0.0, now - when)) for beat, when in told]

    # --- a stall --------------------------------------------------------------------------------------------------

    @property
    def _marker(self) -> Path:
        return self._alive / "stalled"

    def _end_stalled(self) -> None:
        """Write the stacks, tell who waits for whom, end."""
        if self._stop.is_set():
            return
        self._arm(LAST_RESORT_S)
        stamp = self._agree_on_stamp()
        told = self._all_beats()
        own_s = self.activity.idle_s(time.monotonic())
        folder = self.run_dir / "stalls"
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            (folder / f"{stamp}_rank_{self.rank}.txt").write_text(self._report(own_s), encoding="utf-8")
        narrator = self._gather(folder, stamp)
        silent_s = min((silent for _, silent in told), default=own_s)
        text = (
            f"no progress for {silent_s:.0f} s (stall_timeout_s = {self._timeout_s:g}) "
            f"{self.activity.place()}{beats.who_waits(told, self.world)}\n  stacks of all ranks: "
            f"{folder / stamp}_rank_*.txt; go on with --resume_from_checkpoint"
        )
        tell_launcher(text)
        if narrator == self.rank:
            with suppress(OSError):  # before it is told: a terminal that takes nothing may be the stall
                (folder / f"{stamp}.txt").write_text(text + "\n", encoding="utf-8")
            logger.error("%s", text)
        else:
            logger.debug("%s", text)
            deadline = time.monotonic() + GATHER_S
            while time.monotonic() < deadline and not (folder / f"{stamp}.txt").exists():
                time.sleep(0.1)  # the launcher ends all as soon as one has
        self._leave(STALLED)

    def _agree_on_stamp(self) -> str:
        """The time in the names of the files: of the rank that saw it first."""
        stamp = datetime.now(timezone.utc).strftime(TIME_FORMAT)
        with suppress(OSError), self._marker.open("x") as file:
            file.write(stamp)
            return stamp
        for _ in range(20):
            with suppress(OSError):
                if told := self._marker.read_text():
                    return told
            time.sleep(0.05)
        return stamp

    def _gather(self, folder: Path, stamp: str) -> int:
        """Wait until all ranks have written their stacks; the lowest that has."""
        deadline = time.monotonic() + GATHER_S
        while True:
            there = [rank for rank in range(self.world) if (folder / f"{stamp}_rank_{rank}.txt").exists()]
            if len(there) == self.world or time.monotonic() > deadline:
                return min(there, default=self.rank)
            time.sleep(0.1)

    def _report(self, silent_s: float) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        beat = beats.beat_of(self.rank, self._host, self.activity, time.monotonic())
        parts = [f"{beat.sentence(silent_s, {})}\n{self.activity.place()}\n"]
        main = threading.main_thread().ident
        for ident, frame in sorted(sys._current_frames().items(), key=lambda thread: thread[0] != main):
            name = names.get(ident, str(ident))
            parts.append(f"\nthread {name}:\n{''.join(traceback.format_stack(frame))}")
        return "".join(parts)

    # --- the end --------------------------------------------------------------------------------------------------

    def _arm(self, seconds: float) -> None:
        """The interpreter's own timer, which fires even where this thread cannot run: stacks to the log, and out."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=self._log)

    def _leave(self, status: int) -> None:
        """At once: the main thread is stuck, perhaps in C code that no exception reaches."""
        with suppress(OSError):
            (self._alive / f"rank_{self.rank}.json").unlink(missing_ok=True)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare_folder(run_dir: Path) -> None:
    """Take away what an earlier start left; rank 0 does it before any rank starts to watch."""
    clear_faults(run_dir)
    for path in (run_dir / beats.FOLDER).glob("*"):
        path.unlink(missing_ok=True)
