"""Which entries of the cache were used, by whom and when: one file a set of entries, dated by its last use."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from utils.data.cache import write_whole
from utils.data.manifest import Manifest

USES_FOLDER = "uses"
_KEY_BYTES = 20  # as CacheStore.key gives them


class Use(NamedTuple):
    """One set of entries."""

    keys: set[str]
    name: str  # of who used it last
    when: float  # s since the epoch, by the disk's clock


def keys_of(manifests: Iterable[Manifest]) -> set[str]:
    """All that the datasets need, whether it is there or not."""
    return set().union(*(keys for manifest in manifests for keys in manifest.keys().values()))


def record_use(root: Path, keys: Iterable[str], name: str) -> None:
    """Remember that `name`, a run, uses these entries of the cache at `root` now."""
    content = b"".join(sorted(map(bytes.fromhex, keys)))
    path = root / USES_FOLDER / f"{hashlib.blake2b(content, digest_size=8).hexdigest()}.keys"
    write_whole(path.with_suffix(".json"), json.dumps({"name": name}).encode())
    if path.exists():
        os.utime(path)
    else:
        write_whole(path, content)


def recorded_uses(root: Path) -> list[Use]:
    """The newest first."""
    uses = []
    for path in (root / USES_FOLDER).glob("*.keys"):
        try:
            name = json.loads(path.with_suffix(".json").read_bytes())["name"]
        except (OSError, ValueError, LookupError):
            name = "?"
        uses.append(Use(_read_keys(path), name, path.stat().st_mtime))
    return sorted(uses, key=lambda use: use.when, reverse=True)


def forget_uses(root: Path, kept: set[str]) -> None:
    """Take away the records of sets of which no entry is in `kept`."""
    for path in (root / USES_FOLDER).glob("*.keys"):
        if kept.isdisjoint(_read_keys(path)):
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def _read_keys(path: Path) -> set[str]:
    content = path.read_bytes()
    return {content[at : at + _KEY_BYTES].hex() for at in range(0, len(content), _KEY_BYTES)}
