"""The nouns of listing what a [[directory]] names: Item, Skipped, Listing."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from utils.data.captions import Weighted

_MAX_NAMES = 5


class Skipped(NamedTuple):
    """A file that gives no sample."""

    path: Path
    reason: str  # without the file's name
    bad: bool  # it cannot be read, in contrast to being out of place or too short

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


class Item(NamedTuple):
    """One file by its suffix, not yet looked at."""

    path: Path
    written: Sequence[Weighted] | None  # its captions; None: they are in a text file beside it
    source: str = ""  # name of the file that has `written`
    start: Fraction = Fraction(0)  # s; the part of a video that may be used
    end: Fraction | None = None  # s; None is the video's end


class Listing(NamedTuple):
    """Everything that a path names is in `items` or `skipped`."""

    items: list[Item]
    skipped: list[Skipped]
    notices: list[str]


def some(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    rows = sorted(names)
    return ", ".join(rows[:_MAX_NAMES]) + (", ..." if len(rows) > _MAX_NAMES else "")
