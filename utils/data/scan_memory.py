"""Remembers what a dataset came to: a start whose files are as they were asks the disk for no more than that."""

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import av
import PIL

from utils.data.archives import ARCHIVE_SUFFIX
from utils.data.cache import CacheStore, encoded
from utils.data.listing import shown
from utils.data.manifest import Manifest
from utils.data.scan import ScanSettings
from utils.data.whole import lacking

SCANS_FOLDER = "scans"  # in the cache's root
_MOST_BYTES = 2**30  # of all of them; one of 100,000 clips has 30 MB
_TICK_NS = 2 * 10**9  # the coarsest clock of a file system: what changes twice within a tick has one time for both
_CODE = (Path(__file__).parent, Path(__file__).parents[2] / "models" / "base.py")

logger = logging.getLogger(__name__)


class ScanMemory:
    """Of one dataset; what it remembers counts for as long as nothing that decides on it has changed.

    That is all settings, the code that scans, and the name, size, times and inode of every file in the folders. What
    cannot be told so is scanned: datasets with an index or an archive, and files that were written a moment ago.

    Args:
        directories: the dataset. The folders are looked at now, so that what changes after that is scanned next time.
        decided_by: JSON-able; everything else that a scan depends on.
        now_ns: the time, ns since the epoch.
    """

    def __init__(self, store: CacheStore, directories: Sequence[ScanSettings], decided_by: Any, *, now_ns: int) -> None:
        self._store = store
        self._path: Path | None = None
        if (seen := _seen(directories, now_ns)) is not None:
            about = encoded([_code(), [str(Path(of.path).absolute()) for of in directories], decided_by, seen])
            name = hashlib.blake2b(about.encode(), digest_size=20).hexdigest()
            self._path = store.root / SCANS_FOLDER / f"{name}.json"

    def manifest(self) -> Manifest | None:
        """What the dataset came to, of which the cache has everything; None where it must be scanned."""
        if self._path is None or not self._path.exists():
            return None
        try:
            manifest = Manifest.load(self._path)
            with contextlib.suppress(OSError):  # a cache of somebody else, perhaps
                os.utime(self._path)  # so that one can tell which are in use
        except (OSError, ValueError, LookupError, TypeError) as error:
            logger.debug("%s cannot be read, so the dataset is scanned: %s", self._path, error)
            return None
        complete = not any(lacking(self._store, kind, keys) for kind, keys in manifest.keys().items())
        return manifest if complete else None

    def keep(self, manifest: Manifest) -> None:
        """Remember a scan that was begun after this object was made; not where a file could not be read, since the next
        start may find that it can."""
        if self._path is None or any(item.bad and not item.black for item in manifest.skipped):
            return
        counts = {kind: count._replace(present=count.total) for kind, count in manifest.counts.items()}
        try:
            replace(manifest, jobs={kind: [] for kind in manifest.jobs}, counts=counts).save(self._path)
        except OSError as error:
            logger.debug("what the dataset came to cannot be remembered: %s", error)
            return
        found = sorted(_found(self._store.root), reverse=True)  # the newest first
        sizes = accumulate(size for _, size, _ in found)
        _remove([path for (_, _, path), size in zip(found, sizes, strict=True) if size > _MOST_BYTES])


def forget_scans(root: Path, since: float) -> None:
    """Take what no start has used after `since`, s since the epoch, out of the cache at `root`."""
    _remove([path for used, _, path in _found(root) if used < since])


# --- what the files look like -----------------------------------------------------------------------------------------


class _NotSeen(Exception):
    """What the folders show does not tell what a scan would find."""


def _seen(directories: Sequence[ScanSettings], now_ns: int) -> str | None:
    """A digest of all files that a scan would look at, None where their folders do not tell."""
    rows: list[str] = []
    try:
        for settings in directories:
            _walk(os.fspath(settings.path), settings.recursive, now_ns, rows, set())  # an index or archive is no folder
            if settings.mask_path:
                _walk(os.fspath(settings.mask_path), True, now_ns, rows, set())
            if settings.default_mask_file:
                rows.append(_row("", os.stat(settings.default_mask_file), now_ns))
    except (OSError, _NotSeen):
        return None
    return hashlib.blake2b("\n".join(rows).encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _walk(folder: str, deeper: bool, now_ns: int, rows: list[str], above: set[tuple[int, int]]) -> None:
    """A row for each file that is not hidden; of sub-folders that are not scanned only the names are told."""
    info = os.stat(folder)
    if (info.st_dev, info.st_ino) in above:  # by a link, perhaps in a circle: where it leads, a scan may tell
        rows.append(f"{folder} {info.st_dev} {info.st_ino}")
        return
    above.add((info.st_dev, info.st_ino))
    entries = shown(folder)
    rows.append(f"{folder} {len(entries)}")
    for entry in entries:
        if entry.name.lower().endswith(ARCHIVE_SUFFIX):
            raise _NotSeen  # it must be looked at, or it would be taken for one that nobody uses
        try:
            info = entry.stat()
        except OSError:  # a link to nothing
            rows.append(f"{entry.name!r} ?")
            continue
        if not stat.S_ISDIR(info.st_mode):
            rows.append(_row(entry.name, info, now_ns))
        elif deeper:
            _walk(entry.path, deeper, now_ns, rows, above)
        else:
            rows += [entry.name, *sorted(os.listdir(entry.path))]


def _row(name: str, info: os.stat_result, now_ns: int) -> str:
    if info.st_ctime_ns > now_ns - _TICK_NS:  # unlike the other time nobody can set it
        raise _NotSeen
    return f"{name!r} {info.st_size} {info.st_mtime_ns} {info.st_ctime_ns} {info.st_ino}"


@cache
def _code() -> list[str]:
    """What finds, cuts and names clips: with another version of it, or of the readers, a dataset may come to other
    samples."""
    digest = hashlib.blake2b(digest_size=20)
    for path in (*sorted(_CODE[0].glob("*.py")), _CODE[1]):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), av.__version__, PIL.__version__]


def _found(root: Path) -> list[tuple[float, int, Path]]:
    """When it was used, s since the epoch by the disk's clock, and the bytes of each that is remembered."""
    found = []
    for path in (root / SCANS_FOLDER).glob("*.json"):
        with contextlib.suppress(OSError):  # another start has just taken it away
            told = path.stat()
            found.append((told.st_mtime, told.st_size, path))
    return found


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()
