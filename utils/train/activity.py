"""What a rank is doing: noted at every instruction, read by the watchdog and by the last words of a rank."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from utils.data.workers import Progress
from utils.monitor.console import counted

# Stall timeouts that a phase without small steps may take: compiling, writing or reading all weights.
LONG = 6.0
MAX_NAMES = 8  # samples in one message

# To whom a rank may be listening.
NOBODY: tuple[int, ...] = ()


class Doing(NamedTuple):
    """One thing that a rank does, or waits for."""

    what: str  # "forward"; of a wait, what is waited for: "activations"
    since: float  # s, time.monotonic
    micro_batch: int | None = None  # from 0, of this step or evaluation
    peers: tuple[int, ...] | None = NOBODY  # ranks that are waited for; None is all of them
    patience: float = 1.0  # stall timeouts that it may take


class Batch(NamedTuple):
    """What was being worked on, for people."""

    bucket: str
    samples: Sequence[str]


class Activity:
    """Where a rank is. The main thread writes, the watchdog reads; a note costs a microsecond.

    What runs inside the training loop is a phase ("step 12", "writing the checkpoint") of notes; a counter for each
    kind of note gives the micro-batch, since the k-th forward of a step is that of micro-batch k.
    """

    def __init__(self) -> None:
        self.stage: int | None = None  # known once the engine is built
        self.held_up_until = -math.inf  # s; the watchdog's: the process was stopped as a whole
        self.phase = "the start"
        self.doing = Doing("the start", time.monotonic(), patience=LONG)
        self._patience = LONG
        self._counts: dict[str, int] = {}
        self._batches: Callable[[int | None], Batch] | None = None

    def begin(self, phase: str, batches: Callable[[int | None], Batch] | None = None, *, patience: float = 1.0) -> None:
        """Enter a phase.

        Args:
            phase: goes with "in": "step 12", "the evaluation".
            batches: micro-batch (None: all of them) to what is in it; asked only for a message.
            patience: of everything in this phase, in stall timeouts.
        """
        self.phase, self._batches, self._patience = phase, batches, patience
        self._counts = {}
        self.note(phase)

    def note(self, what: str, peers: tuple[int, ...] | None = NOBODY) -> None:
        """Do something else from now on; any note counts as progress."""
        self.doing = Doing(what, time.monotonic(), None, peers, self._patience)

    def note_next(self, what: str, peers: tuple[int, ...] | None = NOBODY) -> None:
        """The same for the next micro-batch of this phase."""
        count = self._counts.get(what, 0)
        self._counts[what] = count + 1
        self.doing = Doing(what, time.monotonic(), count, peers, self._patience)

    @contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Something long in between, after which this rank is where it was."""
        before = self.phase, self._batches, self._patience, self._counts, self.doing
        self.begin(phase, patience=LONG)
        try:
            yield
        finally:
            self.phase, self._batches, self._patience, self._counts, doing = before
            self.doing = doing._replace(since=time.monotonic())

    def idle_s(self, now: float) -> float:
        """Seconds since this rank last moved."""
        return now - max(self.doing.since, self.held_up_until)

    def batch(self) -> Batch | None:
        """What is being worked on, where that is known. Never fails: it is asked after something else did."""
        if self._batches is None:
            return None
        try:
            return self._batches(self.doing.micro_batch)
        except Exception:
            return None

    def place(self) -> str:
        """`in step 2, forward of micro-batch 1 (bucket 64x64x5, samples a.mp4, b.mp4)`."""
        micro = "" if self.doing.micro_batch is None else f" of micro-batch {self.doing.micro_batch}"
        waiting = "waiting for " if self.doing.peers != NOBODY else ""
        what = "" if self.doing.what == self.phase else f", {waiting}{self.doing.what}{micro}"
        batch = self.batch()
        return f"in {self.phase}{what}" + (f" ({describe(batch)})" if batch else "")


def describe(batch: Batch) -> str:
    """`bucket 64x64x5, samples a.mp4, b.mp4 and 3 more`."""
    names = list(dict.fromkeys(batch.samples))
    shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
    return f"bucket {batch.bucket}, {counted(len(names), 'sample').partition(' ')[2]} {shown}"


class Watched:
    """A `Progress` whose every item counts as something done by this rank.

    The time before the first item is long: encoders read their weights in it. So is that between two lists of items:
    weights are hashed and entries looked up, each on a disk that may be slow.
    """

    def __init__(self, shown: Progress, activity: Activity) -> None:
        self._shown, self._activity = shown, activity

    def start(self, total: int, label: str) -> None:
        self._shown.start(total, label)
        self._activity.begin(label or "caching", patience=LONG)

    def advance(self, n: int = 1, name: str = "") -> None:
        self._shown.advance(n, name)
        self._activity.begin(self._activity.phase)
        if name:
            self._activity.note(f"the item after {name}")

    def done(self) -> None:
        self._shown.done()
        self._activity.begin("caching", patience=LONG)
