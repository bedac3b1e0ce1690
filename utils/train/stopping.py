"""Why a run ends before its end, and with which status: a signal, a launcher that has gone, time that is nearly up."""

import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from utils.data.liveness import born_at
from utils.train.triggers import Decision

# The scheduler's or the launcher's grace period may be short (DeepSpeed's launcher kills after 30 s), so a signal asks
# for the checkpoint only: it holds all that an export needs.
AT_ONCE = Decision.CHECKPOINT | Decision.QUIT
SIGNALS: dict[int, Decision] = {
    signal.SIGTERM: Decision.TERMINATED,
    signal.SIGINT: Decision.INTERRUPTED,
    signal.SIGUSR1: Decision.WARNED,
    signal.SIGHUP: Decision.HUNG_UP,
}
REASONS: dict[Decision, str] = {
    Decision.TERMINATED: "SIGTERM came",
    Decision.INTERRUPTED: "Ctrl-C",
    Decision.WARNED: "SIGUSR1 came",
    Decision.HUNG_UP: "SIGHUP came (the terminal has gone)",
    Decision.ORPHANED: "the launcher has ended",
    Decision.TIME_UP: "max_runtime_minutes is nearly over",
}
# Whoever asked for one of these will not wait for anything but a checkpoint.
HURRIED = Decision(sum(REASONS))
# A job that only ran out of time is to be queued again; one that somebody ended is not.
REQUEUED = Decision.WARNED | Decision.TIME_UP

INTERRUPTED_STATUS = 128 + signal.SIGINT
ENDED_STATUSES = {Decision.INTERRUPTED: INTERRUPTED_STATUS, Decision.HUNG_UP: 128 + signal.SIGHUP}
LAUNCHERS = frozenset({"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "accelerate"})
RECENT_ROUNDS, RECENT_LOOKS = 100, 10
SPARE_S = 20.0  # for the last words, and for processes to end


def reason(asked: Decision) -> str:
    """What is told of a stop; empty where a signal file asked for it, which is told by the file's name."""
    if asked & (Decision.INTERRUPTED | Decision.HUNG_UP):
        asked &= ~(Decision.TERMINATED | Decision.ORPHANED)  # launchers pass it on so, and end
    return " and ".join(words for cause, words in REASONS.items() if asked & cause)


def is_hurried(asked: Decision) -> bool:
    """Whether nothing but a checkpoint may be waited for."""
    return bool(asked & HURRIED)


def exit_status(asked: Decision, requeue_exit_code: int, finished: bool) -> int:
    """Of a run that came to its end or was stopped."""
    return requeue_exit_code if asked & REQUEUED and not finished else 0


class TooEarly(KeyboardInterrupt):
    """The job is to end before its first step; says why, and what is kept. `status` is the one to leave with."""

    def __init__(self, words: str, status: int = INTERRUPTED_STATUS) -> None:
        super().__init__(words)
        self.status = status


def early_status(first: Decision, requeue_exit_code: int) -> int:
    """Of a start that was stopped before its first step: 128 and the signal's number, as shells have it, where somebody
    ended it, for unlike a run that leaves a checkpoint it has nothing to show.

    Args:
        first: what it was asked for before anything else.
    """
    return requeue_exit_code if first & REQUEUED else ENDED_STATUSES.get(first, 128 + signal.SIGTERM)


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
        self._looked_at = -math.inf
        self._gaps: deque[float] = deque(maxlen=RECENT_LOOKS)

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
        return self._decide(now, max(self._rounds))

    def look(self, to_leave: int) -> Decision:
        """Asked meanwhile, between micro-batches: whether there may be no time but for a checkpoint.

        Args:
            to_leave: further looks until all ranks have left what they are at.
        """
        now = self._clock()
        if self._looked_at < self._asked_at:
            self._gaps.clear()  # of another round
        if to_leave:
            self._gaps.append(now - max(self._looked_at, self._asked_at))
        self._looked_at = now
        return self._decide(now, max(self._gaps, default=0.0) * to_leave)

    def _decide(self, now: float, more_s: float) -> Decision:
        if self._ends_at is None or now + more_s + self._save_s + SPARE_S < self._ends_at:
            return Decision.NONE
        return AT_ONCE | Decision.TIME_UP
