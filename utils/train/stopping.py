"""Why a run ends before its end: a signal, a launcher that has gone, time that is nearly up; each rank sees its own."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from utils.data.liveness import born_at
from utils.train.triggers import Decision

# The scheduler's or the launcher's grace period may be short (DeepSpeed's launcher kills after 30 s), so a signal asks
# for the checkpoint only: it holds all that an export needs.
AT_ONCE = Decision.CHECKPOINT | Decision.QUIT
SIGNALS: dict[int, Decision] = {
    signal.SIGTERM: AT_ONCE | Decision.TERMINATED,
    signal.SIGINT: AT_ONCE | Decision.INTERRUPTED,
    signal.SIGUSR1: AT_ONCE | Decision.WARNED,
}
REASONS: dict[Decision, str] = {
    Decision.TERMINATED: "SIGTERM came",
    Decision.INTERRUPTED: "Ctrl-C",
    Decision.WARNED: "SIGUSR1 came",
    Decision.ORPHANED: "the launcher has ended",
    Decision.TIME_UP: "max_runtime_minutes is nearly over",
}
# A job that only ran out of time is to be queued again; one that somebody ended is not.
REQUEUED = Decision.WARNED | Decision.TIME_UP

INTERRUPTED_STATUS = 130
STUCK_S = 3.0  # after a second Ctrl-C, before the process is ended whatever its main thread does
LAUNCHERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "accelerate"})
RECENT_ROUNDS = 100
SPARE_S = 20.0  # for the last words, and for processes to end


def reason(asked: Decision) -> str:
    """What is told of a stop; empty where a signal file asked for it, which is told by the file's name."""
    return " and ".join(words for cause, words in REASONS.items() if asked & cause)


def exit_status(asked: Decision, requeue_exit_code: int, finished: bool) -> int:
    """Of a run that came to its end or was stopped."""
    return requeue_exit_code if asked & REQUEUED and not finished else 0


class TooEarly(KeyboardInterrupt):
    """The job is to end before its first step: nothing to write, and it is to be queued again. Says why."""


@contextmanager
def before_training(max_runtime_minutes: float | None) -> Iterator[None]:
    """SIGUSR1, which would kill, and the end of the time raise `TooEarly` meanwhile: while caching and loading there is
    no step to wait for."""

    over = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        raise TooEarly(REASONS[Decision.TIME_UP if over.is_set() else Decision.WARNED])

    def wake() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGUSR1)

    left = (max_runtime_minutes or 0.0) * 60 - age_s() - SPARE_S
    timer = threading.Timer(max(left, 0.0), wake)
    timer.daemon = True
    previous = signal.signal(signal.SIGUSR1, end)
    try:
        if max_runtime_minutes is not None:
            timer.start()
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, previous)


@dataclass(slots=True)
class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C as a flag, read between steps. A second Ctrl-C stops at once.

    Use as a context manager around the loop, in the main thread. Any rank's flag counts: DeepSpeed's launcher signals
    rank 0 first and the others only after it has gone, Slurm signals all, a person may choose one.
    """

    asked: Decision = Decision.NONE
    launchers: dict[int, str] = field(default_factory=lambda: launchers_above())
    _interrupts: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _woken: tuple[int, int] = (-1, -1)  # the wakeup pipe, and what was there before

    def poll(self) -> Decision:
        """What this rank was asked for since it began; the end of its launcher asks too."""
        if any(has_gone(pid, born) for pid, born in self.launchers.items()):
            self.asked |= AT_ONCE | Decision.ORPHANED
        return self.asked

    def __enter__(self) -> "StopSignals":
        handlers: dict[int, Callable[[int, FrameType | None], None]] = dict.fromkeys(SIGNALS, self._note)
        for number, handler in {**handlers, signal.SIGINT: self._interrupt}.items():
            self._previous[number] = signal.signal(number, handler)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._woken = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._end_if_stuck, args=(reader,), name="second Ctrl-C", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        writer, before = self._woken
        signal.set_wakeup_fd(before)
        os.close(writer)
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)

    # Handlers only set a flag: logging from one can deadlock on a lock that the interrupted code holds.
    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.asked |= SIGNALS[number]

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self._note(number, frame)

    def _end_if_stuck(self, reader: int) -> None:
        """A main thread that waits in C code for another rank runs no handler; the interpreter still tells the pipe."""
        interrupts = 0
        while interrupts < 2 and (numbers := os.read(reader, 64)):
            interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1 and not self._over.wait(STUCK_S):
            os._exit(INTERRUPTED_STATUS)
        os.close(reader)


# --- the launcher -----------------------------------------------------------------------------------------------------


def launchers_above() -> dict[int, str]:
    """Process id and birth of the launchers that this process was started by, the nearest first.

    DeepSpeed has two: the `deepspeed` command passes no signal on to its own child, which starts the ranks, so a rank
    that would only ask for its parent would never know.
    """
    found: dict[int, str] = {}
    pid = os.getppid()
    with suppress(OSError, ValueError, IndexError):  # not Linux, or a process of somebody else's
        while pid > 1 and _is_launcher(pid):
            found[pid] = born_at(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return {pid: born for pid, born in found.items() if born}


def _is_launcher(pid: int) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    # python, its flags, and then a script or a module
    return any(word in LAUNCHERS or Path(word).name in LAUNCHERS for word in words[:5])


def has_gone(pid: int, born: str) -> bool:
    """Whether the process that started at `born` has ended; False where that cannot be seen."""
    with suppress(OSError):
        return born_at(pid) != born
    return False


# --- time -------------------------------------------------------------------------------------------------------------


def age_s() -> float:
    """Seconds since this process, or the launcher above it, was started: what a time limit of the job counts from."""
    try:
        born = min(map(int, [born_at(os.getpid()), *launchers_above().values()]))
        return time.clock_gettime(time.CLOCK_BOOTTIME) - born / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # not Linux: the imports are not counted
        return 0.0


class TimeLimit:
    """When to leave so that `minutes` after its start the process has ended, its checkpoint written.

    Args:
        minutes: None is no limit.
        save_s: what a checkpoint may take, as long as none was written.
        clock: s, monotonic.
    """

    def __init__(
        self, minutes: float | None, save_s: float = 0.0, clock: Callable[[], float] = time.monotonic, age: float = -1.0
    ) -> None:
        self._clock, self._save_s, self._asked_at = clock, save_s, clock()
        self._ends_at = None if minutes is None else self._asked_at - (age_s() if age < 0 else age) + minutes * 60
        self._rounds: deque[float] = deque(maxlen=RECENT_ROUNDS)

    def saved(self, seconds: float) -> None:
        """A checkpoint took so long, until it was complete."""
        self._save_s = seconds

    def poll(self) -> Decision:
        """Asked once a round of the loop: whether there may be no time for another one and a checkpoint.

        A round is a step and what came after it; the longest of the last ones counts, evaluations included.
        """
        now = self._clock()
        self._rounds.append(now - self._asked_at)
        self._asked_at = now
        if self._ends_at is None or now + max(self._rounds) + self._save_s + SPARE_S < self._ends_at:
            return Decision.NONE
        return AT_ONCE | Decision.TIME_UP
