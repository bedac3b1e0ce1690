"""Remembers which loss masks are black: they are no entries of the cache, and yet are not made again at each start."""

import contextlib
from collections.abc import Iterable
from pathlib import Path

BLACK_FILE = "black_masks.txt"  # in the cache's root: a key a line
_KEY_LENGTH = 40


def known_black(root: Path) -> frozenset[str]:
    """Keys of the masks that were found black by any start on the cache at `root`."""
    try:
        lines = (root / BLACK_FILE).read_text(errors="replace").split()
    except OSError:  # there are none
        return frozenset()
    return frozenset(line for line in lines if len(line) == _KEY_LENGTH)  # one may be half written


def remember_black(root: Path, keys: Iterable[str]) -> None:
    """Add `keys`. What cannot be written is found out again."""
    new = sorted(set(keys) - known_black(root))
    if new:
        with contextlib.suppress(OSError), (root / BLACK_FILE).open("ab", buffering=0) as file:
            file.write("".join(f"\n{key}" for key in new).encode())  # at once, as other starts may add too
