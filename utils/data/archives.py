"""Tar archives, unpacked once into the cache: nothing of them is written outside of their own folder there."""

import contextlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from utils.data.listing import Skipped
from utils.data.room import unwritable
from utils.data.stat_index import StatIndex, hash_file
from utils.monitor.console import short_bytes

ARCHIVE_SUFFIX = ".tar"
_FREE_SHARE = 0.9  # of the free disk that an archive may fill
_HASHED = "archive"  # marks an archive's hash in the index
_VERSION = 1  # of the notes; raise it when other members are refused
_PIECE_BYTES = 2**20
_UNPACK_S = 3600.0  # that one may take: before that nobody takes away what has no note yet


class Unpacked(NamedTuple):
    """An archive's files, under their names in it."""

    folder: Path | None  # None where it cannot be read at all
    refused: list[Skipped]


class Archives:
    """Unpacks to `<root>/<content hash>`, so a moved or renamed archive is not unpacked again, nor by another run.

    A note beside the folder, `<content hash>.json`, says what was refused, and how many files there must be.
    """

    def __init__(self, root: Path, index: StatIndex) -> None:
        self._root, self._index = root, index

    def unpack(self, path: Path) -> Unpacked:
        """The folder with the members of `path`; members that could do harm are refused, each by its name.

        Raises:
            ValueError: the disk has no room for it.
        """
        if not path.is_file():  # a fifo, or a link to nothing
            return Unpacked(None, [Skipped(path, "is not a regular file", bad=True)])
        try:
            folder = self._root / self._hash(path)
            reasons = self._found(folder)
            if reasons is None:
                reasons = self._unpack(path, folder)
            with contextlib.suppress(OSError):  # a cache of somebody else, perhaps
                os.utime(_note(folder))  # so that one can tell which are in use
        except (tarfile.TarError, EOFError, PermissionError) as error:
            return Unpacked(None, [Skipped(path, f"cannot be read as a tar archive: {error}", bad=True)])
        return Unpacked(folder, [Skipped(path, reason, bad=True) for reason in reasons])

    def _hash(self, path: Path) -> str:
        remembered = self._index.get(path)
        if remembered is None or remembered[0] != _HASHED:
            remembered = [_HASHED, hash_file(path)]
            self._index.put(path, remembered)
        return remembered[1]

    def _found(self, folder: Path) -> list[str] | None:
        """What was refused when `folder` was unpacked; None where it must be done again."""
        try:
            note = json.loads(_note(folder).read_bytes())
            whole = note["version"] == _VERSION and note["files"] == _num_files(folder)
            return note["refused"] if whole else None
        except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is damaged
            return None

    def _unpack(self, path: Path, folder: Path) -> list[str]:
        """What was refused, and why. The folder appears whole or not at all."""
        with contextlib.suppress(OSError):
            self._root.mkdir(parents=True, exist_ok=True)
        if why := unwritable(self._root):
            raise ValueError(
                f"{path}: is to be unpacked in the cache, and {self._root} cannot be written to ({why}); set cache_dir "
                "to a folder of yours, or unpack the archive yourself and name its folder"
            )
        # "r:" reads no compressed archives, so what is written is no larger than what lies there.
        with tarfile.open(path, "r:") as archive:
            members, reasons = _sort_out(archive)
            _require_room(path, sum(member.size for member in members.values()), self._root)
            with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=self._root) as work:
                whole, note = Path(work) / "whole", Path(work) / "note"
                whole.mkdir()
                for name, member in members.items():
                    reasons += _write(archive, member, whole / name)
                told = {"version": _VERSION, "archive": path.name, "files": _num_files(whole), "refused": reasons}
                note.write_text(json.dumps(told))
                os.replace(note, _note(folder))
                if _num_files(folder) not in (-1, told["files"]):
                    shutil.rmtree(folder)
                _rename(whole, folder)
        return reasons


class Stored(NamedTuple):
    """An archive as it lies unpacked."""

    folder: Path
    name: str  # of the archive when it was unpacked; "?" where nothing tells
    size: int  # bytes
    used: float  # s since the epoch: when a start or a plan last read it


def stored(root: Path) -> Iterator[Stored]:
    """Everything that was unpacked to `root`, what killed processes have left included."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
        size = sum(
            os.lstat(os.path.join(inside, name)).st_size for inside, _, files in os.walk(folder) for name in files
        )
        try:
            name, used = json.loads(_note(folder).read_bytes())["archive"], _note(folder).stat().st_mtime
        except (OSError, ValueError, LookupError, TypeError):  # cut off while it was unpacked, or still at it
            name, used = "?", folder.stat().st_mtime + _UNPACK_S
        yield Stored(folder, name, size, used)


def remove(archive: Stored) -> None:
    """Take an unpacked archive away; a start that needs it unpacks it again."""
    _note(archive.folder).unlink(missing_ok=True)  # first: what is left after a crash then counts for nothing
    shutil.rmtree(archive.folder, ignore_errors=True)


def _rename(whole: Path, folder: Path) -> None:
    try:
        os.rename(whole, folder)
    except OSError:
        if not folder.is_dir():  # else another run was faster, with the same bytes
            raise


def _note(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _num_files(folder: Path) -> int:
    """Files anywhere in `folder`, -1 where it is not there: somebody may have deleted a part of the cache."""
    return sum(len(files) for _, _, files in os.walk(folder)) if folder.is_dir() else -1


def _sort_out(archive: tarfile.TarFile) -> tuple[dict[str, tarfile.TarInfo], list[str]]:
    """Name -> member to write, the last one of a name as tar itself does it; and what is wrong with the others."""
    members: dict[str, tarfile.TarInfo] = {}
    reasons = []
    for member in archive:
        name = PurePosixPath(member.name)
        if harm := _harm(member, name):
            reasons.append(f"its member {member.name!r} {harm}")
        elif member.isfile() and name.parts:
            members[str(name)] = member
    return members, reasons


def _harm(member: tarfile.TarInfo, name: PurePosixPath) -> str | None:
    if name.is_absolute() or "\0" in member.name:
        return "has an absolute path"
    if ".." in name.parts:
        return "leads out of the archive"
    if member.issym() or member.islnk():
        return f"is a link, to {member.linkname!r}; pack the file itself (tar --dereference --hard-dereference)"
    if member.issparse():
        return "is sparse, larger than what lies in the archive; pack it without --sparse"
    return None if member.isfile() or member.isdir() else "is neither a file nor a folder"


def _require_room(path: Path, size: int, root: Path) -> None:
    free = shutil.disk_usage(root).free
    if size > _FREE_SHARE * free:
        raise ValueError(
            f"{path}: unpacks to {short_bytes(size)} in the cache, and {root} has {short_bytes(free)} free; "
            "set cache_dir to a larger disk, or unpack the archive yourself and name its folder"
        )


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> list[str]:
    source: Any = archive.extractfile(member)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file, _PIECE_BYTES)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return [f"its member {member.name!r} is a file and a folder at once"]
    except OSError as error:
        if error.filename is None:  # reading, or a full disk
            raise
        return [f"its member {member.name!r} cannot be written ({error.strerror})"]  # a name that is too long
    return []
