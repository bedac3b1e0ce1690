"""The content-addressed cache: what an entry is called, and writing and reading it whole or not at all."""

import hashlib
import io
import json
import os
import secrets
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models.base import NotFiniteError
from models.weights import sorted_metadata
from utils.data.stat_index import StatIndex, hash_file

# Part of every key: raise it when the meaning of a recipe or of a stored tensor changes.
_SCHEMA = 1
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)  # json.dumps makes one a call
_MAX_HEADER_BYTES = 2**20  # an entry has a handful of tensors; a longer header is damage


class CacheDamaged(ValueError):
    """An entry is there and cannot be read; the message names the file and the mend."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: damaged cache entry ({reason}); delete this file and start again to make it anew")


class CacheStore:
    """Tensors under `<root>/<kind>/<two digits>/<key>.safetensors`.

    A key is the hash of all that made the entry, so nothing goes stale and nobody needs a lock: whoever writes an entry
    writes the same, into a temporary file that is then renamed. Any number of ranks, nodes and runs may share a root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._root = os.fspath(root)

    @staticmethod
    def key(kind: str, recipe: Mapping[str, Any]) -> str:
        """Name of the entry that `recipe`, JSON-able and complete, leads to; 40 hex digits."""
        return CacheStore.key_of(kind, {name: encoded(value) for name, value in recipe.items()})

    @staticmethod
    def key_of(kind: str, parts: Mapping[str, str]) -> str:
        """`key` of a recipe whose values are `encoded` already: what many keys share need be so only once."""
        inside = ",".join([f'"{name}":{parts[name]}' for name in sorted(parts)])
        text = f'[{_SCHEMA},"{kind}",{{{inside}}}]'
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def path(self, kind: str, key: str) -> Path:
        return Path(self.name(kind, key))

    def name(self, kind: str, key: str) -> str:
        """`path` as text: a start looks at every entry, and pathlib takes longer for that than the disk."""
        return f"{self._root}/{kind}/{key[:2]}/{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry is there and as long as its header says. Reads no more than the header."""
        try:
            with open(self.name(kind, key), "rb", buffering=0) as file:
                start, header = _read_header(file)
                ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
                return start + max(ends, default=0) == os.fstat(file.fileno()).st_size
        except (OSError, ValueError, LookupError, TypeError, AttributeError):  # absent, or a header full of nonsense
            return False

    def read(self, kind: str, key: str) -> dict[str, Tensor]:
        """The tensors, on the CPU. Raises `FileNotFoundError`, or `CacheDamaged`."""
        path = self.path(kind, key)
        content = path.read_bytes()
        try:
            start, header = _read_header(io.BytesIO(content))
            tensors = safetensors.torch.load(content)
            told = header["__metadata__"]["crc32"]
        except (ValueError, LookupError, safetensors.SafetensorError) as error:
            raise CacheDamaged(path, str(error)) from error
        if told != _checksum(content, start):
            raise CacheDamaged(path, "its checksum does not fit")
        return tensors

    @staticmethod
    def marks(path: Path) -> dict[str, str]:
        """What is noted in an entry's header beside its tensors; empty where that cannot be read."""
        try:
            with path.open("rb") as file:
                return dict(_read_header(file)[1]["__metadata__"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return {}

    def write(self, kind: str, key: str, tensors: Mapping[str, Tensor], note: Mapping[str, str]) -> None:
        """Store `tensors` so that a reader sees all or nothing.

        Args:
            note: goes into the file's header for people; `name` says what was encoded and is used in errors.

        Raises:
            NotFiniteError: a tensor holds NaN or infinity.
        """
        refuse_not_finite(tensors, note.get("name", key))
        plain = {field: tensor.contiguous() for field, tensor in tensors.items()}
        unmarked = safetensors.torch.save(plain)
        start, _ = _read_header(io.BytesIO(unmarked))
        marks = {**note, "crc32": _checksum(unmarked, start)}  # of the tensors alone, so that the header can hold it
        content = safetensors.torch.save(plain, marks)
        start, _ = _read_header(io.BytesIO(content))
        write_whole(self.path(kind, key), b"".join([content[:8], sorted_metadata(content[8:start]), content[start:]]))


def refuse_not_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raises `NotFiniteError` where a tensor holds NaN or infinity; `name` says what it was made of."""
    for field, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NotFiniteError(f"{name}: encoding gave NaN or infinity in {field!r}; nothing stored")


def encoded(value: Any) -> str:
    """As JSON that is the same for equal values."""
    return _ENCODER.encode(value)


def _read_header(file: BinaryIO) -> tuple[int, dict[str, Any]]:
    """Where the tensors start, and the JSON header. A safetensors file opens with the header's length, 8 bytes."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise ValueError("its header is damaged")
    try:
        return 8 + length, json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise ValueError("its header is damaged") from None


def _checksum(content: bytes, start: int) -> str:
    return f"{zlib.crc32(memoryview(content)[start:]):08x}"


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path` at once: a reader, or a run after a crash, finds all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk is told without a name
    finally:
        temporary.unlink(missing_ok=True)  # there only after a failure


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object a line, whole. File names that are no text are written with escapes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode("utf-8", "backslashreplace"))


class FingerprintIndex:
    """Turns an encoder's fingerprint into one that depends on the content of its weight files, not on where they lie.

    Hashes are remembered, since reading an 11 GB text encoder takes a quarter of a minute.
    """

    def __init__(self, path: Path) -> None:
        self._index = StatIndex(path)

    def resolve(self, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """`fingerprint` with `files`, paths of files and folders, replaced by hashes. Raises `FileNotFoundError`."""
        resolved = dict(fingerprint)
        if "files" in resolved:
            resolved["files"] = [self._hashes(Path(name)) for name in resolved["files"]]
        return resolved

    def _hashes(self, path: Path) -> str | Sequence[Sequence[str]]:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            return [[file.relative_to(path).as_posix(), self._hash(file)] for file in inside]
        return self._hash(path)

    def _hash(self, path: Path) -> str:
        known = self._index.get(path)
        if known is None:
            known = hash_file(path)
            self._index.put(path, known)
        return known
