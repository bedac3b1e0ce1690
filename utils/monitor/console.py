"""What a person sees: the arithmetic of an epoch, tables, the closing lines and one live line.

Everything but `LiveLine` is a pure function from plain values to text or a rich renderable. Show them with `show`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

# The C0 and C1 control characters but the newline: in a file's name they would reach the terminal as commands.
_CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def show(console: Console, renderable: RenderableType) -> None:
    """Print a string wrapped at words, a `Text` unbroken (paths and commands in it can be copied), a table as it is.

    Strings go in as they are: rich would take `[I2V] clip.mp4` for markup.
    """
    unbroken = isinstance(renderable, Text)
    console.print(plain(renderable) if isinstance(renderable, str) else renderable, soft_wrap=unbroken)


def plain(text: str) -> Text:
    """`text` as it is, neither markup nor commands to the terminal: control characters become `?`."""
    return Text(_CONTROLS.sub("?", text))


# Numbers and units


def counted(number: float, noun: str) -> str:
    """`1 step`, `14 steps`, `2 batches`, `12 000 steps`, `0.5 repeats`."""
    ending = "es" if noun.endswith(("s", "x", "tch", "sh")) else "s"
    return f"{grouped(number)} {noun}{'' if number == 1 else ending}"


def grouped(number: float) -> str:
    """Thousands apart: `75 600`; other than whole numbers as short as they are: `0.5`."""
    return f"{number:,}".replace(",", " ") if isinstance(number, int) else f"{number:g}"


def short_count(number: int) -> str:
    """Parameters: `1.42 B`, `87.0 M`, `12.3 k`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def short_bytes(number: int) -> str:
    """Binary units: `2.64 GiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            size = number / 1024**power
            return f"{size:.0f} {unit}" if size >= 999.5 else f"{size:.3g} {unit}"
    return f"{number} B"


def duration(seconds: float) -> str:
    """The two largest units: `2d4h`, `1h58m`, `3m20s`, `12s`."""
    span = timedelta(seconds=max(0, round(seconds)))
    minutes, rest_s = divmod(span.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(span.days, "d"), (hours, "h"), (minutes, "m"), (rest_s, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), len(parts) - 1)
    return "".join(f"{value}{unit}" for value, unit in parts[first : first + 2])


# Banner


class EpochRow(NamedTuple):
    """One bucket of one group in the arithmetic of an epoch."""

    clips: int  # before repeats
    repeats: float
    micro_batch: int  # samples per micro-batch and data rank
    steps: int  # in this epoch
    carried_over: int  # samples left for the next epoch


def epoch_arithmetic_banner(
    rows: Sequence[EpochRow], accumulation: int, data_ranks: int, width: int | None = None
) -> str:
    """How clips become steps: `1 epoch = 118 clips x 1 repeat / (1 micro x 4 GAS x 2 DP) = 14 steps + 6 carried over`.

    Rows of equal repeats and micro-batch share a line. A step takes all its samples from one bucket, so with several
    buckets there is a remainder in each: the line then says in how many.

    Args:
        accumulation: `gradient_accumulation_steps`, GAS.
        data_ranks: data-parallel ranks, DP.
        width: of the terminal, columns; a longer line is broken before its result.
    """

    def kind(row: EpochRow) -> tuple[float, int]:
        return row.repeats, row.micro_batch

    divisions, results = [], []
    for (repeats, micro), members in groupby(sorted(rows, key=kind), key=kind):
        same = list(members)
        buckets = f" in {len(same)} buckets" if len(same) > 1 else ""
        divisions.append(
            f"{counted(sum(r.clips for r in same), 'clip')}{buckets} x {counted(repeats, 'repeat')} / "
            f"({micro} micro x {accumulation} GAS x {data_ranks} DP)"
        )
        results.append(_steps_and_rest(same))
    if len(divisions) == 1:
        return _equation(f"1 epoch = {divisions[0]}", results[0], 8, width)
    lines = [_equation(f"  {d}", r, 4, width) for d, r in zip(divisions, results, strict=True)]
    return "\n".join([f"1 epoch = {_steps_and_rest(rows)}", *lines])


def _equation(left: str, right: str, indent: int, width: int | None) -> str:
    fits = width is None or len(left) + 3 + len(right) <= width
    return f"{left} = {right}" if fits else f"{left}\n{' ' * indent}= {right}"


def _steps_and_rest(rows: Iterable[EpochRow]) -> str:
    rows = list(rows)
    rest = sum(row.carried_over for row in rows)
    return counted(sum(row.steps for row in rows), "step") + (f" + {rest} carried over" if rest else "")


# Tables


class Column(NamedTuple):
    """A column of numbers stands right, one of text left and may fold."""

    title: str
    number: bool = True
    whole: bool = False  # text that is not folded


def _table(title: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], gap: int = 3) -> Table:
    """`gap`: spaces between columns, 2 or 3."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, gap - 2),
    )
    for column in columns:
        justify = "right" if column.number else "left"
        table.add_column(column.title, justify=justify, no_wrap=column.number or column.whole, overflow="fold")
    for row in rows:
        # Text, for the reason that `show` gives
        table.add_row(*(plain(cell if isinstance(cell, str) else grouped(cell)) for cell in row))
    return table


class StageRow(NamedTuple):
    """One pipeline stage."""

    stage: int
    first_layer: int
    last_layer: int  # inclusive
    parameters: int
    trainable: int
    bytes: int  # of all its parameters, as stored
    ranks: Sequence[int] = ()
    expert: str = ""  # which of several models
    host_bytes: int = 0  # kept in host memory, for the time that another model is on the device


def stage_table(rows: Sequence[StageRow]) -> Table:
    """Where the layers went: one row a stage and model."""
    columns = [Column("stage"), Column("layers"), Column("parameters"), Column("trainable"), Column("memory")]
    with_experts, with_ranks = any(row.expert for row in rows), any(row.ranks for row in rows)
    if with_experts:
        columns = [columns[0], Column("expert", number=False, whole=True), *columns[1:], Column("host memory")]
    if with_ranks:
        columns.append(Column("ranks", number=False))
    cells = (
        [
            row.stage,
            *([row.expert] if with_experts else []),
            f"{row.first_layer}-{row.last_layer}",
            short_count(row.parameters),
            short_count(row.trainable),
            short_bytes(row.bytes),
            *([short_bytes(row.host_bytes)] if with_experts else []),
            *([", ".join(map(str, row.ranks))] if with_ranks else []),
        ]
        for row in rows
    )
    return _table("Pipeline stages", columns, cells, gap=2 if with_experts else 3)


class BucketRow(NamedTuple):
    """One bucket of the training set."""

    bucket: str  # `832x480x81`
    clips: float  # repeats counted
    batch: int  # global batch
    steps: int  # in the first epoch
    carried_over: int
    tokens: int  # a sample's length inside the transformer
    micro_batch: int = 1  # samples that go through it at once

    @property
    def load(self) -> int | str:
        """Tokens that go through the transformer at once: `4 x 1 560 = 6 240`."""
        count = self.micro_batch
        return self.tokens if count == 1 else f"{count} x {grouped(self.tokens)} = {grouped(count * self.tokens)}"

    def cells(self) -> tuple[float | str, ...]:
        """What a table shows under `BUCKET_TITLES`."""
        return self.bucket, self.clips, self.batch, self.steps, self.carried_over, self.load


BUCKET_TITLES = ("bucket", "clips", "batch", "steps in epoch 1", "carried over", "tokens")


def bucket_table(rows: Sequence[BucketRow], title: str = "Buckets") -> Table:
    """What one step is made of: one row a bucket."""
    first, *numbers = BUCKET_TITLES
    gap = 2 if any(row.micro_batch > 1 for row in rows) else 3  # or the products do not fit 80 columns
    return _table(title, [Column(first, number=False), *map(Column, numbers)], (row.cells() for row in rows), gap=gap)


def skipped_table(
    rows: Sequence[tuple[str, str]], max_rows: int = 15, full_list: str = "skipped.jsonl", files: int | None = None
) -> Table:
    """What is not trained on: rows of (file or files, reason); beyond `max_rows` the last row says where the rest is
    listed. `files`: how many they are, where a row may be several."""
    title = f"Skipped: {counted(len(rows) if files is None else files, 'file')}"
    columns = [Column("file", number=False), Column("reason", number=False)]
    return _table(title, columns, _some(rows, max_rows, full_list))


def warning_table(rows: Sequence[tuple[str, str, str]], max_rows: int = 15, full_list: str = "warnings.jsonl") -> Table:
    """What to look at: rows of (file, kind, sentence); `max_rows` as for `skipped_table`."""
    columns = [Column(title, number=False) for title in ("file", "what", "why")]
    kinds = Counter(kind for _, kind, _ in rows)
    told = ", ".join(f"{kind} {grouped(count)}" for kind, count in kinds.most_common())
    rare_first = sorted(rows, key=lambda row: kinds[row[1]])  # or what all clips have would hide the rest
    return _table(f"Warnings: {told}", columns, _some(rare_first, max_rows, full_list))


def _some(rows: Sequence[tuple[str, ...]], max_rows: int, full_list: str) -> list[tuple[str, ...]]:
    shown = list(rows[:max_rows])
    if len(rows) > max_rows:
        rest = f"... and {grouped(len(rows) - max_rows)} more"
        shown.append((rest, *[""] * (len(rows[0]) - 2), f"all are listed in {full_list}"))
    return shown


# Lines


def cache_summary(encoded: int, total: int, noun: str = "clip", elapsed_s: float | None = None) -> str:
    """`0 of 18 clips to encode: everything was in the cache`, `3 of 18 clips encoded in 12s, 15 were in the cache`."""
    of = f"{grouped(encoded)} of {counted(total, noun)}"
    if encoded == 0:
        return f"{of} to encode: everything was in the cache"
    took = "" if elapsed_s is None else f" in {duration(elapsed_s)}"
    held = total - encoded
    return f"{of} encoded{took}" + (f", {grouped(held)} {'was' if held == 1 else 'were'} in the cache" if held else "")


def closing_panel(paths: Mapping[str, object], commands: Mapping[str, str], title: str = "Done") -> Text:
    """Where everything is and what to run next. A path or command is never broken: show it with `show`.

    Args:
        paths: what it is -> where it is.
        commands: what it does -> the command, each on its own line.
    """
    text = Text()
    text.append(f"{title}\n", style="bold")
    width = max(map(len, paths), default=0)
    for name, path in paths.items():
        text.append(f"  {name:<{width}}  ", style="dim").append(f"{path}\n")
    if commands:
        text.append("Next\n", style="bold")
    for name, command in commands.items():
        text.append(f"  {name}:\n", style="dim").append(f"    {command}\n")
    text.rstrip()
    return text


# The live line


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step as it is shown."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    lr: float
    step_s: float
    samples_per_s: float
    grad_norm: float | None = None
    eta_s: float | None = None
    expert: str = ""  # whose turn it was, where several models are trained


# Dropped from the end while the line is wider than the terminal; shown in the order of `_fields`.
KEPT_FIRST = ("step", "loss", "eta", "speed", "expert", "epoch", "grad", "lr", "samples")


def _fields(report: StepReport) -> dict[str, str]:
    fields = {
        "step": f"step {report.step}/{report.total_steps}",
        "epoch": f"epoch {report.epoch}",
        "expert": report.expert or None,
        "loss": f"loss {report.loss:.4f}",
        "lr": f"lr {report.lr:.3g}",
        "grad": None if report.grad_norm is None else f"grad {report.grad_norm:.2g}",
        "speed": f"{report.step_s:.2f} s/step",
        "samples": f"{report.samples_per_s:.3g} samples/s",
        "eta": None if report.eta_s is None else f"ETA {duration(report.eta_s)}",
    }
    return {key: value for key, value in fields.items() if value is not None}


def live_text(report: StepReport, width: int | None = None) -> str:
    """The line for `report`, with the less needed fields left out where it would not fit `width` columns."""
    fields = _fields(report)
    kept = [key for key in KEPT_FIRST if key in fields]
    while True:
        line = "  ".join(value for key, value in fields.items() if key in kept)
        if width is None or len(line) <= width or len(kept) == 1:
            return line
        kept.pop()


class LiveLine:
    """One line that follows the training: in place on a terminal, else a plain line every `steps_per_print` steps.

    Use as a context manager. On a terminal, log lines and tables on the same console appear above it.
    """

    def __init__(self, console: Console, *, enabled: bool = True, steps_per_print: int = 1) -> None:
        """
        Args:
            enabled: False on every rank but 0: nothing is shown.
        """
        self._console = console
        self._enabled = enabled
        self._steps_per_print = max(1, steps_per_print)
        self._live: Live | None = None
        self._line = Text()

    def __enter__(self) -> "LiveLine":
        if self._enabled and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def update(self, report: StepReport) -> None:
        """Show `report`. The last step of a run is always shown."""
        if not self._enabled:
            return
        if self._live is not None:
            self._line = Text(live_text(report, self._console.width), no_wrap=True, overflow="ellipsis")
            self.restore()
        elif report.step % self._steps_per_print == 0 or report.step == report.total_steps:
            show(self._console, Text(live_text(report)))

    def note(self, text: str) -> None:
        """Show what goes on between steps (`evaluating holdout: 12 of 36`) in place of the line, on a terminal only."""
        if self._live is not None:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"))

    def restore(self) -> None:
        """Take a note away again."""
        if self._live is not None:
            self._live.update(self._line)

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
