"""Signals, from the first line of train.py to its last: kept, then the end of a start, then a flag between steps."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

from utils.train.stopping import (
    AT_ONCE,
    INTERRUPTED_STATUS,
    SIGNALS,
    SPARE_S,
    TooEarly,
    age_s,
    early_status,
    has_gone,
    launchers_above,
    reason,
)
from utils.train.triggers import Decision

STUCK_S = 3.0  # after a second Ctrl-C, before the process is ended whatever its main thread does
PATIENCE_S = 8.0  # that a start has to end in order; launchers kill after 30 s, DeepSpeed's one rank after another
LOOK_S = 0.5  # between two looks at the launcher, the clock and the other ranks
STOP = "stop"  # file in the folder of the beats: what a rank was asked for, for the others

# What a start is for -> what it is stopped before, and what is left of it.
LEFT = {
    "train": ("before the first step", "what is encoded is kept"),
    "cache_only": ("before everything is encoded", "what is encoded is kept, and the next start goes on from there"),
    "plan": ("before the plan is complete", "what was found out about the files is remembered"),
    "preflight": ("before the checks are done", "nothing was changed"),
    "replay": ("before the step is done", "nothing was changed"),
}
MODES = tuple(LEFT)[1:]  # each a flag of the command line


class Stage(Enum):
    """Where a start is, which decides what a signal does."""

    LOADING = 1  # there is nothing to lose, and no rank waits for this one
    STARTING = 2  # the ranks have met: it is interrupted, and so are the others
    TRAINING = 3  # a flag, read between steps
    OVER = 4  # the last words are being said


class StopSignals:
    """SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C, as a context manager around everything, in the main thread.

    SIGUSR1 asks for an end in good time, as schedulers do before they kill: while libraries are loaded it is kept until
    the exit status for it is known. A SIGHUP that is ignored already stays so (nohup). A second Ctrl-C stops at once.
    Any rank's signal counts for all: DeepSpeed's launcher signals rank 0 first and the others only after it has gone,
    Slurm signals all, a person may choose one. A thread does what the main thread cannot while it waits in C code for
    another rank, or for a library to load.

    Attributes:
        asked: what this rank was asked for since it began.
        mode: a key of `LEFT`.
    """

    def __init__(self, mode: str = "train") -> None:
        self.asked, self.mode = Decision.NONE, mode
        self.launchers = launchers_above()
        self._first = Decision.NONE  # decides the exit status: what launchers send after it is no news
        self._asked_at = 0.0
        self._stage, self._since = Stage.LOADING, 0.0
        self._raised = self._by_thread = self._said = False
        self._requeue_status: int | None = None  # not known yet
        self._ends_at: float | None = None
        self._folder: Path | None = None
        self._interrupts = 0
        self._previous: dict[int, Any] = {}
        self._over = threading.Event()
        self._woken: tuple[int, int] | None = None  # the wakeup pipe, and what was there before

    # --- the stages ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> "StopSignals":
        ignored = {number for number in (signal.SIGHUP,) if signal.getsignal(number) == signal.SIG_IGN}
        for number in SIGNALS.keys() - ignored:
            self._previous[number] = signal.signal(number, self._note)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._woken = writer, signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})  # what came so far comes now
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        assert self._woken is not None
        writer, before = self._woken
        signal.set_wakeup_fd(before)
        os.close(writer)
        self._woken = None
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)

    def limit(self, requeue_status: int, max_runtime_minutes: float | None) -> None:
        """What the config says of ending: with which status a start without time left ends, and when that is.

        Raises:
            ValueError: it has none left by now, and so would every other start; to queue it again is of no use.
        """
        self._requeue_status = requeue_status
        if max_runtime_minutes is not None:
            age, left = age_s(), max_runtime_minutes * 60 - SPARE_S
            if left <= age:
                raise ValueError(
                    f"max_runtime_minutes = {max_runtime_minutes:g} leaves no time for a step: the start has taken "
                    f"{age:.0f} s up to here, and {SPARE_S:g} s are kept for the end; raise it"
                )
            self._ends_at = time.monotonic() + left - age

    def interrupt(self, folder: Path | None = None) -> None:
        """From here on a signal raises `TooEarly`; so does at once what was asked for already.

        Args:
            folder: where ranks tell each other; None where this one is alone.
        """
        self._folder, self._stage = folder, Stage.STARTING
        self._tell_others()
        self._raise_once()

    @contextmanager
    def training(self) -> Iterator["StopSignals"]:
        """Around the loop, which reads `poll` between steps."""
        with nullcontext() if self._woken else self:
            self._stage = Stage.TRAINING
            try:
                yield self
            finally:
                self.conclude()

    def conclude(self) -> None:
        """The last words are next; nothing raises any more."""
        if self._stage is Stage.STARTING:
            self._tell_others()  # the thread may not have come to it
        if self._stage is not Stage.OVER:
            self._stage, self._since = Stage.OVER, time.monotonic()

    def poll(self) -> Decision:
        """What this rank was asked for since it began; the end of its launcher asks too."""
        if self._launcher_has_gone():
            self.asked |= AT_ONCE | Decision.ORPHANED
        return self.asked

    def stop_of_others(self) -> TooEarly | None:
        """Why another rank has left on purpose, where one has: what a lost connection may come of."""
        if self._folder is None or not (told := self._told_by_others()):
            return None
        self._ask(told)
        return self._too_early()

    # --- in the main thread: handlers only set flags, or raise; logging from one can deadlock -------------------------

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._by_thread and number == signal.SIGUSR1:
            self._by_thread = False
        else:
            self._ask(SIGNALS[number])
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 and self._stage is Stage.TRAINING:
                self._say_that_it_ends()
                raise KeyboardInterrupt
        self._raise_once()

    def _ask(self, why: Decision) -> None:
        if not self._first:
            self._first, self._asked_at = why, time.monotonic()
        self.asked |= AT_ONCE | why

    def _raise_once(self) -> None:
        if self.asked and self._stage is Stage.STARTING and not self._raised:
            self._raised = True
            raise self._too_early()

    def _too_early(self) -> TooEarly:
        place, left = LEFT[self.mode]
        return TooEarly(f"stopping {place}: {reason(self._first)}; {left}", self._status())

    def _status(self) -> int:
        return early_status(self._first, self._requeue_status or 0)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _watch(self, reader: int) -> None:
        interrupts = 0
        while not self._over.is_set():
            news = b""
            if select.select([reader], [], [], LOOK_S)[0] and not (news := os.read(reader, 64)):
                break
            interrupts += news.count(signal.SIGINT)
            if interrupts > 1:
                self._end_now()
            _BY_STAGE[self._stage](self, news)
        os.close(reader)

    def _end_now(self) -> None:
        """A second Ctrl-C: at once where nothing can be spoilt, else as soon as the main thread may be stuck."""
        self._say_that_it_ends()
        if self._stage in (Stage.LOADING, Stage.STARTING) or not self._over.wait(STUCK_S):
            self._leave(INTERRUPTED_STATUS)

    def _say_that_it_ends(self) -> None:
        if not self._said:
            self._said = True
            lost = "; what was trained after the newest checkpoint is lost" if self._stage is Stage.TRAINING else ""
            _say(f"a second Ctrl-C: stopping at once{lost}")

    def _look_while_loading(self, news: bytes) -> None:
        """Nothing is there that an end could spoil, so it needs no main thread; but SIGUSR1 asks for a status that only
        the config knows."""
        self._look(news)
        kept = self._first == Decision.WARNED and (self._requeue_status is None or not self._is_overdue())
        if self._first and not kept:
            self._leave_early()

    def _look_while_starting(self, news: bytes) -> None:
        if not self._first:
            self._look(news)
            if self._ends_at is not None and time.monotonic() > self._ends_at:
                self._ask(Decision.TIME_UP)
            if told := self._told_by_others():
                self._ask(told)
            if self._first and not self._raised:
                self._by_thread = True
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)  # to wake it: `_note` raises
        if self._first:
            self._tell_others()
            if self._is_overdue():
                self._leave_early()

    def _look(self, news: bytes) -> None:
        for number, why in SIGNALS.items():
            if number in news and not (self._by_thread and number == signal.SIGUSR1):
                self._ask(why)
        if self._launcher_has_gone():
            self._ask(Decision.ORPHANED)

    def _look_at_the_end(self, news: bytes) -> None:
        """All that counts is done: whoever asks for an end now need not wait for words. What brought the end about, and
        what launchers send right after it, may be among the news still."""
        ends = any(number in news for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
        if ends and time.monotonic() - self._since > LOOK_S:
            self._leave(self._status() if self._first else early_status(Decision.TERMINATED, 0))

    def _is_overdue(self) -> bool:
        return time.monotonic() - self._asked_at > PATIENCE_S

    def _launcher_has_gone(self) -> bool:
        return any(has_gone(pid, born) for pid, born in self.launchers.items())

    def _leave_early(self) -> None:
        _say(str(self._too_early()))
        self._leave(self._status())

    def _leave(self, status: int) -> None:
        if self._folder is not None:
            self._tell_others()
            with suppress(OSError):  # so that nobody takes this rank for killed
                (self._folder / f"rank_{_rank()}.json").unlink(missing_ok=True)
        os._exit(status)

    # --- the other ranks ----------------------------------------------------------------------------------------------

    def _tell_others(self) -> None:
        if self._folder is not None and self._first and not (self._folder / STOP).exists():
            with suppress(OSError):
                self._folder.mkdir(exist_ok=True)
                staged = self._folder / f"tmp-{STOP}-{_rank()}"
                staged.write_text(str(int(self._first)))
                staged.replace(self._folder / STOP)

    def _told_by_others(self) -> Decision:
        with suppress(OSError, ValueError):
            if self._folder is not None:
                return Decision(int((self._folder / STOP).read_text()))
        return Decision.NONE


_BY_STAGE: dict[Stage, Callable[[StopSignals, bytes], None]] = {
    Stage.LOADING: StopSignals._look_while_loading,
    Stage.STARTING: StopSignals._look_while_starting,
    Stage.TRAINING: lambda _, __: None,
    Stage.OVER: StopSignals._look_at_the_end,
}


def _say(words: str) -> None:
    """On rank 0, without a logger: the main thread may hold its lock."""
    with suppress(OSError):  # the terminal may be what has gone, or take nothing
        if _rank() == "0" and select.select([], [2], [], LOOK_S)[1]:
            os.write(2, f"Reelpipe: {words}\n".encode())


def _rank() -> str:
    return os.environ.get("RANK", "0")
