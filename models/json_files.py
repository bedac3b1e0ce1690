"""JSON files that come with weights, read within limits: they are written by others and may be anything."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_BYTES = 2_000_000  # config.json, model_index.json, adapter_config.json: a few kB
MAX_INDEX_BYTES = 20_000_000  # a shard index: 120 kB for the 1095 tensors of a 14B


def read_json(file: Path, most_bytes: int = MAX_BYTES) -> Any:
    """What the file holds; `ValueError`, without the file's name, where it is too large or not JSON."""
    if (size := file.stat().st_size) > most_bytes:
        raise ValueError(f"{size:,} bytes are too many for such a file")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("lists or tables are nested too deeply") from None


def read_table(file: Path, most_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The same of a file that holds keys and values."""
    return as_table(read_json(file, most_bytes))


def as_table(found: Any) -> dict[str, Any]:
    """`found`, where it is one; else a `ValueError`."""
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and should hold keys and values")
    return found


def shard_names(index: Mapping[str, Any]) -> set[str]:
    """The files that a shard index promises.

    Raises:
        ValueError: there is no table of them, or one lies in another folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError("its weight_map is no table of file names")
    names = set(weight_map.values())
    strays = sorted(name for name in names if not name.isprintable() or Path(name).name != name or name in ("", ".."))
    if strays:
        raise ValueError(f"it names a file in another folder, {strays[0][:80]!r}")
    return names
