"""Looking after a cache: what is in it, what of that is damaged, and what killed processes have left behind."""

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from utils.data.cache import CacheDamaged, CacheStore
from utils.data.crew import JOBS_FOLDER, Crew
from utils.data.handout import CLAIMS_FOLDER
from utils.data.scan_memory import SCANS_FOLDER
from utils.data.whole import WHOLE_FOLDER
from utils.data.workers import Progress

_SUFFIX = ".safetensors"
_SHARD = re.compile(r"[0-9a-f]{2}")
_OLD_S = 3600.0  # a temporary file that nobody has touched for so long is nobody's
_AT_ONCE = 256  # entries handed to the threads together

Result = TypeVar("Result")


class Found(NamedTuple):
    """One entry."""

    kind: str
    key: str
    path: Path
    size: int  # bytes
    written: float  # s since the epoch


def entries(root: Path) -> Iterator[Found]:
    """All entries of the cache at `root`, whatever made them."""
    for shard in _shards(root):
        with os.scandir(shard) as files:
            for file in files:
                if file.name.endswith(_SUFFIX) and not file.name.startswith("."):
                    told = file.stat()
                    key = file.name.removesuffix(_SUFFIX)
                    yield Found(shard.parent.name, key, Path(file.path), told.st_size, told.st_mtime)


def leftovers(root: Path) -> Iterator[Path]:
    """Temporary files of writers that were killed."""
    before = time.time() - _OLD_S
    for folder in (*_shards(root), *(root / name for name in ("uses", WHOLE_FOLDER, SCANS_FOLDER))):
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            if path.stat().st_mtime < before:
                yield path


def busy(root: Path) -> list[str]:
    """Jobs that fill this cache now."""
    with Crew.alone(root) as crew:
        beats = [beat for beat in (root / JOBS_FOLDER).glob("*/rank-*.json") if beat.parent != crew.folder]
        return sorted({beat.parent.name for beat in beats if crew.lives(beat)})


def drop_dead_claims(root: Path) -> None:
    """Take away claims of processes that are gone; any start would do the same with those that it meets."""
    with Crew.alone(root) as crew:
        for claim in (root / CLAIMS_FOLDER).glob("*"):
            if not crew.lives(root / claim.read_text()):
                claim.unlink(missing_ok=True)


def encoder_of(store: CacheStore, found: Found) -> str:
    """What made an entry, for people; "?" where it does not say."""
    return store.marks(found.path).get("encoder", "?")


def damage_of(store: CacheStore, found: Found) -> str:
    """What is wrong with an entry, all of which is read; "" where nothing is."""
    try:
        store.read(found.kind, found.key)
    except CacheDamaged as error:
        return error.reason
    except FileNotFoundError:  # somebody else cleans up
        pass
    return ""


def look_at_all(
    found: Sequence[Found], look: Callable[[Found], Result], threads: int, progress: Progress, label: str
) -> Iterator[tuple[Found, Result]]:
    """Each entry with what `look` gives of it."""
    progress.start(len(found), label)
    rest = iter(found)
    try:
        with ThreadPoolExecutor(threads) as pool:
            while part := list(islice(rest, _AT_ONCE)):
                for item, result in zip(part, pool.map(look, part), strict=True):
                    progress.advance(1, item.kind)
                    yield item, result
    finally:
        progress.done()


def _shards(root: Path) -> Iterator[Path]:
    """`<kind>/<two digits>`."""
    for kind in sorted(path for path in root.iterdir() if path.is_dir()):
        yield from sorted(path for path in kind.iterdir() if path.is_dir() and _SHARD.fullmatch(path.name))
