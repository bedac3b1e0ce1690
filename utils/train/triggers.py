"""When to act: every n steps, epochs, examples or minutes, and on signal files.

Nothing here talks to other ranks. Counts are the same on every rank, so each may decide by itself. Minutes, files and
signals are seen by one rank only: each makes a `Decision` once a step, the loop joins them all as ints, and all ranks
act in the same step.
"""

import enum
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

logger = logging.getLogger(__name__)


class Decision(enum.IntFlag):
    """What all ranks do after this step, and why. An int, so that ranks can join theirs: `Decision(int(decision))`."""

    NONE = 0
    SAVE = 1  # write the model or adapter for use elsewhere
    CHECKPOINT = 2  # write the training state
    QUIT = 4  # leave the loop after the above

    TERMINATED = 8  # by SIGTERM
    INTERRUPTED = 16  # by Ctrl-C
    WARNED = 32  # by SIGUSR1, as schedulers do before they kill
    ORPHANED = 64  # the launcher has ended
    TIME_UP = 128  # max_runtime_minutes
    HUNG_UP = 256  # by SIGHUP, as where the connection to the terminal is lost


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


QUIT_FILE = "save_quit"
# File in the run folder -> what it asks for. On quitting the model is saved too, so that no run ends without a file.
SIGNAL_FILES: dict[str, Decision] = {
    QUIT_FILE: Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT,
    "save": Decision.CHECKPOINT,
}


@dataclass(frozen=True, slots=True)
class SignalFiles:
    """The files `save` and `save_quit` that a user makes in the run folder (`touch <run>/save_quit`)."""

    run_dir: Path

    def poll(self) -> Decision:
        """What is asked for. Looks once, on rank 0, and takes the files away so that each acts once."""
        decision = Decision.NONE
        for name in self._taken():
            decision |= SIGNAL_FILES[name]
        return decision

    def drop(self) -> None:
        """Take away what was meant for an earlier start, which ended before it looked: this one would end after one
        step. Rank 0 calls this as soon as the folder is its own."""
        for name in self._taken():
            logger.warning(
                "%s was there before this start, and is taken away: it was for an earlier one", self.run_dir / name
            )

    def _taken(self) -> list[str]:
        found = [name for name in SIGNAL_FILES if (self.run_dir / name).is_file()]
        for path in (self.run_dir / name for name in found):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                # it would be found again at every step; saying so is all that can be done
                logger.warning("cannot delete the signal file %s (%s); please delete it", path, error)
        return found
