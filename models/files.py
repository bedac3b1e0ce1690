"""Files that appear whole or not at all: a crash leaves the old one or the new one, never half of one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.headers import HEADER_LENGTH_BYTES
from models.weights import write_safetensors


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file; `OSError` where it cannot be written."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        write_safetensors(temporary, whole, {"format": "pt", **metadata})
        _sort_metadata(temporary)
        _put_in_place(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _sort_metadata(file: Path) -> None:
    """Equal tensors and metadata make equal bytes: the safetensors library writes metadata in an order of chance."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(encoded) <= length:  # the library spells JSON as tersely, and fills up with spaces itself
            stream.seek(HEADER_LENGTH_BYTES)
            stream.write(encoded.ljust(length))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """An indented JSON file."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _put_in_place(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _put_in_place(temporary: Path, file: Path) -> None:
    """Rename once the bytes are on disk."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)
