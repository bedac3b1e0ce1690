"""When to act: every n steps, epochs, examples or minutes, and on signal files, SIGTERM and Ctrl-C.

Nothing here talks to other ranks. Counts are the same on every rank, so each may decide by itself. Minutes, files and
signals are seen by one rank only: rank 0 makes a `Decision` once a step, the loop broadcasts it as an int, and all
ranks act in the same step.
"""

import enum
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Decision(enum.IntFlag):
    """What all ranks do after this step. An int, so that it can be broadcast: `Decision(int(decision))`."""

    NONE = 0
    SAVE = 1  # write the model or adapter for use elsewhere
    CHECKPOINT = 2  # write the training state
    QUIT = 4  # leave the loop after the above


class Counts(Protocol):
    """How far training has come. All three count what is complete."""

    @property
    def step(self) -> int: ...

    @property
    def epochs_done(self) -> int: ...

    @property
    def examples(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Every:
    """A cadence: due whenever one of its counts passes a multiple. None or 0 leaves that count out.

    Examples jump by a global batch, so a multiple is passed rather than met; passing several at once is one time due.
    """

    n_steps: int | None = None
    n_epochs: int | None = None
    n_examples: int | None = None
    minutes: float | None = None

    def due(self, before: Counts, after: Counts) -> bool:
        """Whether going from `before` to `after` passed a multiple of steps, epochs or examples."""
        return (
            _passed(self.n_steps, before.step, after.step)
            or _passed(self.n_epochs, before.epochs_done, after.epochs_done)
            or _passed(self.n_examples, before.examples, after.examples)
        )

    def minutes_due(self, elapsed_s: float) -> bool:
        """Whether `elapsed_s` since the last time is long enough. Asked on rank 0 only: clocks differ."""
        return bool(self.minutes) and elapsed_s >= self.minutes * 60

    def __bool__(self) -> bool:
        """Whether any cadence is set."""
        return bool(self.n_steps or self.n_epochs or self.n_examples or self.minutes)


def _passed(every: int | None, before: int, after: int) -> bool:
    return bool(every) and after // every > before // every


# File in the run folder -> what it asks for. On quitting the model is saved too, so that no run ends without a file.
SIGNAL_FILES: dict[str, Decision] = {
    "save_quit": Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT,
    "save": Decision.CHECKPOINT,
}


@dataclass(frozen=True, slots=True)
class SignalFiles:
    """The files `save` and `save_quit` that a user makes in the run folder (`touch <run>/save_quit`)."""

    run_dir: Path

    def poll(self) -> Decision:
        """What is asked for. Looks once, on rank 0, and takes the files away so that each acts once."""
        decision = Decision.NONE
        for name, meaning in SIGNAL_FILES.items():
            path = self.run_dir / name
            if not path.is_file():
                continue
            decision |= meaning
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # it would be found again at every step; saying so is all that can be done
                logger.warning("cannot delete the signal file %s (%s); please delete it", path, error)
        return decision


# The scheduler's or the launcher's grace period may be short (DeepSpeed's launcher kills after 30 s), so a signal asks
# for the checkpoint only: it holds all that an export needs.
ON_SIGNAL = Decision.CHECKPOINT | Decision.QUIT


@dataclass(slots=True)
class StopSignals:
    """SIGTERM and Ctrl-C as a flag, read between steps. A second Ctrl-C raises KeyboardInterrupt at once.

    Use as a context manager around the loop, in the main thread. Rank 0's flag is the one that counts: DeepSpeed's
    launcher signals rank 0 first and the others only after it has gone.
    """

    received: str | None = None  # name of the first signal
    _interrupts: int = 0
    _previous: dict[int, Any] = field(default_factory=dict)

    def poll(self) -> Decision:
        """`ON_SIGNAL` once a signal has come."""
        return ON_SIGNAL if self.received else Decision.NONE

    def __enter__(self) -> "StopSignals":
        handlers: dict[int, Callable[[int, FrameType | None], None]] = {
            signal.SIGTERM: self._on_terminate,
            signal.SIGINT: self._on_interrupt,
        }
        for number, handler in handlers.items():
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, previous = self._previous.popitem()
            signal.signal(number, previous)

    # Handlers only set a flag: logging from one can deadlock on a lock that the interrupted code holds.
    def _on_terminate(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _on_interrupt(self, number: int, _frame: FrameType | None) -> None:
        self._interrupts += 1
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name
