"""Remembers what was found out about a file for as long as the file has not changed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

_PIECE_BYTES = 16 * 2**20


def hash_file(path: Path) -> str:
    """BLAKE2b of the file's bytes, 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        piece = bytearray(min(_PIECE_BYTES, max(1, os.fstat(file.fileno()).st_size)))
        view = memoryview(piece)
        while count := file.readinto(piece):
            digest.update(view[:count])
    return digest.hexdigest()


class StatIndex:
    """File -> JSON value, valid while size, times and inode stay the same.

    Of the times, that of the last change of anything tells of a file that was written over by an archive's, whose time
    of modification nobody can trust. A file that changes while it is looked at is looked at again: what is put counts
    for the file as it was when `get` was asked for it.

    Kept as lines of JSON to which new findings are appended, so a scan that is killed keeps what it had. A line that
    cannot be read is as good as absent: its file is looked at again. So is one that cannot be written, since a cache
    from which everything is read may be somebody else's.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[list[int], Any]] = {}
        self._asked: dict[str, list[int]] = {}  # what the files that were not known looked like
        lines = self._load()
        if lines > 2 * len(self._known) + 100:
            self._rewrite()

    def get(self, path: Path) -> Any | None:
        """What was remembered of `path`, or None. Raises `FileNotFoundError` where that is no longer there."""
        # most paths are absolute already, and to make sure of that takes longer than to ask the disk
        stamp, value = self._known.get(os.fspath(path)) or self._known.get(os.path.abspath(path), (None, None))
        try:
            now = _stamp(path)
        except OSError:
            if stamp is None:
                return None  # whoever looks at it finds out
            raise
        if stamp == now:
            return value
        self._asked[os.path.abspath(path)] = now
        return None

    def put(self, path: Path, value: Any) -> None:
        """Remember `value`, which must not be None."""
        key = os.path.abspath(path)
        stamp = self._asked.pop(key, None) or _stamp(path)
        self._known[key] = (stamp, value)
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # One write of one line in append mode, so that runs which share the file do not tear each other's lines.
            with self._path.open("ab", buffering=0) as file:
                file.write(_line(key, stamp, value))

    def _load(self) -> int:
        if not self._path.exists():
            return 0
        lines = [line for line in self._path.read_bytes().splitlines() if line]
        try:
            self._known = {key: (stamp, value) for key, stamp, value in json.loads(b"[%b]" % b",".join(lines))}
        except (ValueError, TypeError):  # a line is half written, or damaged
            for line in lines:
                with contextlib.suppress(ValueError, TypeError):
                    key, stamp, value = json.loads(line)
                    self._known[key] = (stamp, value)
        return len(lines)

    def _rewrite(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_bytes(b"".join(_line(key, *found) for key, found in self._known.items()))
            os.replace(temporary, self._path)


def _stamp(path: Path) -> list[int]:
    info = os.stat(path)
    return [info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino]


def _line(key: str, stamp: list[int], value: Any) -> bytes:
    return b"\n" + json.dumps([key, stamp, value], separators=(",", ":")).encode()
