"""What a weight file holds, read without its tensors and trusting nothing: safetensors headers and pth archives."""

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADER_LENGTH_BYTES = 8  # a safetensors file opens with the header's length as a little-endian u64
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library: beyond it, this is no safetensors file
MOST_HEADER_BYTES = 10_000_000  # 14B: 130 kB; parsed, JSON takes up to 40 times its size of memory
MAX_DIMS = 64  # of a torch tensor
MAX_NAME = 1000  # characters; names of modules nest a dozen deep

# safetensors' name -> torch's; the formats of less than a byte are no torch dtypes
DTYPES: dict[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F4": None,
    "F6_E2M3": None,
    "F6_E3M2": None,
}
BITS_OF_SMALL = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# how files that are neither safetensors nor pth begin -> what they are, and what to do
MAGIC: dict[bytes, str] = {
    b"GGUF": "this is a GGUF file, whatever its name: its blocks cannot be trained on; use the safetensors file",
    b"version https://git-lfs": "this is git-lfs's note of a file and not the file; fetch it with `git lfs pull`",
    b"<!DOCTYPE": "this is a web page and not weights; download the file again, logged in if it asks for that",
    b"<!doctype": "this is a web page and not weights; download the file again, logged in if it asks for that",
    b"<html": "this is a web page and not weights; download the file again, logged in if it asks for that",
}
ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80\x02"


class ForeignFileError(ValueError):
    """The file is whole, and of another kind than its name says; to download it again would not help."""


class TensorInfo(NamedTuple):
    """A tensor as a header has it."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: a format of less than a byte, which torch does not know


class Header(NamedTuple):
    """A safetensors file's header."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name and the metadata of a safetensors file; raises as `open_header` does."""
    header = open_header(file)
    return {name: tensor.shape for name, tensor in header.tensors.items()}, header.metadata


def open_header(file: Path) -> Header:
    """The header of a safetensors file, every field of it checked against the file's size.

    The layout is that of https://github.com/huggingface/safetensors (README, "Format"): tensors lie without gaps and
    without overlap, and each one's bytes are its shape times its dtype.

    Raises:
        ForeignFileError: the file is something else, GGUF for instance.
        ValueError: it is cut short or damaged. Found from the header and the file's size alone.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        refuse_foreign(file, stream.read(max(map(len, MAGIC))), is_safetensors=True)
        stream.seek(0)
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        if not 0 < length <= min(size - HEADER_LENGTH_BYTES, HEADER_LIMIT_BYTES):
            raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes)")
        if length > MOST_HEADER_BYTES:
            raise ValueError(f"{file}: its header of {length:,} bytes is too large for weights; download it again")
        try:
            # a name that stands twice would let one tensor hide another
            header: Any = json.loads(stream.read(length), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: damaged safetensors header ({error})") from error
    try:
        return _checked(header, size - HEADER_LENGTH_BYTES - length, size)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def refuse_foreign(file: Path, start: bytes, is_safetensors: bool) -> None:
    """Raise `ForeignFileError` where the first bytes of a file are those of another format."""
    for magic, what in MAGIC.items():
        if start.startswith(magic):
            raise ForeignFileError(f"{file}: {what}")
    # a header's length may have the bytes of a pickle's beginning: 640 bytes is b"\x80\x02"
    is_torch = start.startswith((ZIP_MAGIC, PICKLE_MAGIC)) and start[HEADER_LENGTH_BYTES:][:1] != b"{"
    if is_safetensors and is_torch:
        raise ForeignFileError(f"{file}: this is a file of torch.save, not safetensors; rename it to end in .pth")
    if not is_safetensors and start[HEADER_LENGTH_BYTES:].startswith(b'{"'):
        raise ForeignFileError(f"{file}: this is a safetensors file; rename it to end in .safetensors")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _checked(header: Any, data_bytes: int, size: int) -> Header:
    """`header` as types that can be relied on. `ValueError` says what is wrong, without the file's name."""
    if not isinstance(header, dict):
        raise ValueError("damaged safetensors header (no table of tensors)")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("damaged safetensors header (__metadata__ is not a table of strings)")
    tensors: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(f"damaged safetensors header (a tensor is named {name[:80]!r})")
        tensors[name], start, end = _tensor(name, entry)
        ranges.append((start, end, name))
    reached = 0
    for start, end, name in sorted(ranges):
        if start != reached:
            fault = "overlaps the tensor before it" if start < reached else "leaves a gap before it"
            raise ValueError(f"damaged safetensors header ({name} {fault}, bytes {start} to {end})")
        reached = end
    if data_bytes < reached:
        raise ValueError(f"truncated, {size} of {size - data_bytes + reached} bytes")
    if data_bytes > reached:
        raise ValueError(f"damaged, {data_bytes - reached} bytes after its last tensor; download it again")
    return Header(tensors, metadata)


def _tensor(name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One tensor of the header, and the first byte and the end of its range."""
    fault = f"damaged safetensors header ({name}: "
    if not isinstance(entry, dict):
        raise ValueError(f"{fault}no description)")
    kind, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{fault}dtype {str(kind)[:40]} is unknown)")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise ValueError(f"{fault}shape {str(shape)[:80]} is none)")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{fault}data_offsets {str(offsets)[:80]} are no range)")
    dtype = DTYPES[kind]
    bits = math.prod(shape) * (dtype.itemsize * 8 if dtype else BITS_OF_SMALL[kind])
    start, end = offsets
    if bits != (end - start) * 8:
        raise ValueError(f"{fault}shape {shape} of {kind} is not {end - start} bytes)")
    return TensorInfo(tuple(shape), dtype), start, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def load_pth(file: Path) -> dict[str, Tensor]:
    """A flat state dict from a `.pth` or `.pt` file, memory-mapped where its format allows, never running its code.

    Raises:
        ForeignFileError: the file is something else, GGUF for instance.
        ValueError: the file is damaged, or holds something else than tensors by name.
    """
    with file.open("rb") as stream:
        refuse_foreign(file, stream.read(max(map(len, MAGIC))), is_safetensors=False)
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than torch 1.6 are no zip archives and cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # torch goes on with how that may have come about
        raise ValueError(f"{file}: truncated, or not a file of plain tensors ({reason})") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{file}: expected tensors by name, found a {type(loaded).__name__} of other things")
    return dict(loaded)
