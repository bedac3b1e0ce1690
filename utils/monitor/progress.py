"""Progress of caching: a bar with rate and ETA on a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from utils.monitor.console import LiveLine, counted, duration, show

SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal; an item that takes longer is told when it is done


def progress_line(label: str, done: int, total: int, elapsed_s: float, name: str = "") -> str:
    """`latents: 12 of 118  8.33 s each  ETA 14m43s  clip.mp4`: items done, rate, time left and the current item.

    The rate is the mean since the start: items of one bucket come together, so the last few say little of the rest.
    """
    parts = [f"{label}: {done} of {total}"]
    if done > 0 and elapsed_s > 0:
        parts.append(_rate(done / elapsed_s))
        if done < total:
            parts.append(f"ETA {duration(elapsed_s / done * (total - done))}")
    if name:
        parts.append(name)
    return "  ".join(parts)


def _rate(per_second: float) -> str:
    """`3.2/s`, or `14 s each` where one takes longer than a second."""
    return f"{per_second:.3g}/s" if per_second >= 1 else f"{1 / per_second:.3g} s each"


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        return Text(_rate(task.completed / elapsed) if task.completed and elapsed > 0 else "")


class _EtaColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed, total = task.elapsed or 0.0, task.total or 0
        if not task.completed or task.completed >= total:
            return Text("")
        return Text(f"ETA {duration(elapsed / task.completed * (total - task.completed))}")


def _bar(console: Console) -> Progress:
    """One line: the item's name gets what width the rest leaves, and is cut rather than wrapped."""
    fixed, rest = Column(no_wrap=True), Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=fixed),
        BarColumn(bar_width=20, table_column=fixed),
        MofNCompleteColumn(table_column=fixed),
        _RateColumn(table_column=fixed),
        _EtaColumn(table_column=fixed),
        TextColumn("{task.fields[item]}", style="dim", markup=False, table_column=rest),
        console=console,
        transient=True,
        expand=True,
    )


class CacheProgress:
    """What caching tells while it runs: `start`, then `advance` for each item, then `done`. May be started again.

    As a context manager it gives the terminal back whatever happens.
    """

    def __init__(self, console: Console, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            enabled: False on every rank but 0: nothing is shown.
            clock: seconds.
        """
        self._console = console
        self._enabled = enabled
        self._clock = clock
        self._bar: Progress | None = None
        self._label = ""
        self._total = self._done = 0
        self._started = self._last_line = 0.0

    def start(self, total: int, label: str) -> None:
        """Begin `total` items of `label` ("latents", "text")."""
        self.done()
        self._label, self._total, self._done = label, total, 0
        self._started = self._last_line = self._clock()
        if not self._enabled or total == 0:
            return
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._bar.add_task(label, total=total, item="")
            self._bar.start()
        else:
            show(self._console, f"{label}: {counted(total, 'item')}")

    def advance(self, n: int = 1, name: str = "") -> None:
        """`n` more items are done; `name` is the last of them."""
        self._done += n
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=n, item=name)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            elapsed = self._last_line - self._started
            show(self._console, Text(progress_line(self._label, self._done, self._total, elapsed, name)))

    def done(self) -> None:
        """Take the bar away. Safe to call when nothing was started."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "CacheProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.done()


class LiveProgress:
    """Progress of an evaluation in the place of the live line, which a bar of its own would tear.

    Where the output is no terminal it tells how far it is only when it takes long.
    """

    def __init__(
        self, live: LiveLine, console: Console, *, enabled: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._live, self._console, self._enabled, self._clock = live, console, enabled, clock
        self._label = ""
        self._total = self._done = 0
        self._started = self._last_line = 0.0

    def start(self, total: int, label: str) -> None:
        self._label, self._total, self._done = label, total, 0
        self._started = self._last_line = self._clock()

    def advance(self, n: int = 1, name: str = "") -> None:
        self._done += n
        if not self._enabled:
            return
        line = progress_line(self._label, self._done, self._total, self._clock() - self._started, name)
        if self._console.is_terminal:
            self._live.note(line)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            show(self._console, Text(line))

    def done(self) -> None:
        self._live.restore()
