"""Disks that fail: full, broken or read-only from a call on, or the process is killed at it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from utils.train.disk import Disk

CHANGING = ("make", "open", "write", "sync", "rename", "remove")


class CountedDisk(Disk):
    """Notes every call that changes the disk, and lets `before` do something first: raise, kill, wait.

    Nothing is really synced: that takes up to a second on a busy disk, and no test pulls the plug.
    """

    def __init__(self, before: Callable[[int, str], None] = lambda number, call: None) -> None:
        self.calls: list[str] = []
        self._before = before

    def _note(self, call: str) -> None:
        self.calls.append(call)
        self._before(len(self.calls) - 1, call)

    def make(self, folder: Path) -> None:
        self._note("make")
        super().make(folder)

    def open(self, path: Path) -> BinaryIO:
        self._note("open")
        return super().open(path)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        self._note("write")
        return super().write(file, data)

    def sync(self, path: Path) -> None:
        self._note("sync")
        assert path.exists()

    def rename(self, old: Path, new: Path) -> None:
        self._note("rename")
        super().rename(old, new)

    def remove(self, folder: Path) -> None:
        self._note("remove")
        super().remove(folder)


def failing(number: int, code: int, lasting: bool) -> CountedDisk:
    """The call `number` (from 0) fails with errno `code`, and where it is `lasting` all later ones of its kind do."""
    kind: list[str] = []

    def fail(now: int, call: str) -> None:
        if now == number:
            kind.append(call)
        if now == number or (lasting and call in kind):
            raise OSError(code, os.strerror(code))

    return CountedDisk(fail)


def killing(number: int) -> CountedDisk:
    """The process is gone when the call `number` would begin."""

    def kill(now: int, call: str) -> None:
        if now == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return CountedDisk(kill)


def short(most: int) -> Disk:
    """Takes `most` bytes at a time, as a disk does that is nearly full."""

    class Short(CountedDisk):
        def write(self, file: Any, data: memoryview) -> int:
            return super().write(file, data[:most])

    return Short()
