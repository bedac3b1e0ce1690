"""The nouns of listing what a [[directory]] names, and what messages say of them: Item, Skipped, Listing."""

import os
import re
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
    black: bool = False  # what is bad of it: a loss mask that is black, which every further start would find as well

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


class Item(NamedTuple):
    """One file by its suffix, not yet looked at."""

    path: Path
    written: Sequence[Weighted] | None  # its captions; None: they are in a text file beside it
    source: str = ""  # name of the file that has `written`
    start: Fraction = Fraction(0)  # s; the part of a video that may be used
    end: Fraction | None = None  # s; None is the video's end
    weight: float = 1.0  # what it counts in the loss
    mask: Path | None = None  # says where it does


class Listing(NamedTuple):
    """Everything that a path names is in `items` or `skipped`."""

    items: list[Item]
    skipped: list[Skipped]
    notices: list[str]


def shown(folder: str | Path) -> list[os.DirEntry[str]]:
    """What lies in `folder` and is not hidden, by name. Raises `OSError`."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def plural(count: int, noun: str) -> str:
    """`1 file`, `3 files`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def by_reason(skipped: Iterable[Skipped]) -> list[tuple[str, str]]:
    """Names of files, and why they are left out: a row a reason, those of many files first.

    A reason that names a file beside its own, such as its caption, names `*.txt` where it is that of several.
    """
    groups: dict[str, list[Skipped]] = {}
    for item in skipped:
        groups.setdefault(re.sub(rf"\b{re.escape(item.path.stem)}(?=\.[a-z])", "*", item.reason), []).append(item)
    rows = []
    for reason, items in sorted(groups.items(), key=lambda group: -len(group[1])):
        several = f"{len(items)} files: {some(item.path.name for item in items)}"
        rows.append((items[0].path.name, items[0].reason) if len(items) == 1 else (several, reason))
    return rows


def some(names: Iterable[str]) -> str:
    """The first few of `names`, for a message."""
    rows = sorted(names)
    return ", ".join(rows[:_MAX_NAMES]) + (", ..." if len(rows) > _MAX_NAMES else "")
