"""The calls that change a disk, so that each can be made to fail, and what went wrong with them on any rank."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from utils import dist

PIECE_BYTES = 32 << 20  # written and hashed at a time


class Disk:
    """The real one; tests put one in its place that is full, read-only or broken from some call on."""

    def free(self, folder: Path) -> int:
        """Bytes that can still be written."""
        return shutil.disk_usage(folder).free

    def make(self, folder: Path) -> None:
        folder.mkdir()

    def open(self, path: Path) -> BinaryIO:
        """A file to write to, anew."""
        return path.open("wb", buffering=0)

    def write(self, file: BinaryIO, data: memoryview) -> int:
        """As `write(2)`, which may take less than it is given: before it says that a disk is full, for one."""
        return file.write(data)

    def sync(self, path: Path) -> None:
        """Back only when what `path` is, a file or a folder, would survive a power cut."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.replace(old, new)

    def remove(self, folder: Path) -> None:
        """With all that is in it."""
        shutil.rmtree(folder)


class HashedFile:
    """A new file that is hashed while it is written, and on the disk when the `with` block ends.

    It keeps an error to itself until then, and writes nothing more: torch.save, in C++, would make another error of it.
    """

    def __init__(self, disk: Disk, path: Path, moved: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            moved: called after each piece.
        """
        self.bytes = 0
        self._disk, self._path, self._moved = disk, path, moved
        self._digest = hashlib.blake2b(digest_size=16)  # as `utils.data.stat_index.hash_file`
        self._error: OSError | None = None
        self._file = disk.open(path)

    def write(self, data: Any) -> int:
        """All of `data`, anything that has bytes; says that it did."""
        rest = whole = memoryview(data).cast("B")
        try:
            while rest and self._error is None:
                count = self._disk.write(self._file, rest[:PIECE_BYTES])
                self._digest.update(rest[:count])
                rest = rest[count:]
                self._moved()
        except OSError as error:
            self._error = error
        self.bytes += len(whole)
        return len(whole)

    def flush(self) -> None:
        """Nothing is held back; torch.save asks for it."""

    def told(self) -> dict[str, Any]:
        """Size and hash, for the manifest."""
        return {"bytes": self.bytes, "blake2b": self._digest.hexdigest()}

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error
        if error is None:
            self._disk.sync(self._path)


def replace(disk: Disk, staged: Path, final: Path, aside: Path) -> None:
    """Give the folder `staged` the name `final`. What has that name is kept as `aside` until there is another, and then
    removed by whoever clears up; where the renaming fails it is put back.

    Raises:
        OSError: `final` is what it was.
    """
    if final.exists():
        if aside.exists():
            disk.remove(aside)
        disk.rename(final, aside)
    try:
        disk.rename(staged, final)
    except OSError:
        if aside.exists():
            disk.rename(aside, final)
        raise


def attempt(action: Callable[[], Any]) -> str | None:
    """Why `action`, which writes, failed; None when it did not. torch.save tells of a full disk by a RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError, MemoryError) as error:
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def first_trouble(trouble: str | None) -> str | None:
    """The first rank's trouble, on every rank."""
    return next((text for text in dist.gather_text(trouble or "") if text), None)
