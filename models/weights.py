"""Tensors by name out of safetensors and pth files, whatever the names in the file, read only when asked for."""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX_SUFFIX = ".index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of ComfyUI's single files
HEADER_LENGTH_BYTES = 8  # a safetensors file opens with the header's length as a little-endian u64
HEADER_LIMIT_BYTES = 100_000_000  # the limit of the safetensors library: beyond it, this is no safetensors file

_SCALED = "this looks like a ComfyUI fp8_scaled file, which cannot be read yet: use the bf16, fp16 or plain fp8 file"
# part of an unexpected tensor's name -> what the file probably is
FILE_GUESSES = {
    "lora_": "this looks like a LoRA, not a model",
    "scale_weight": _SCALED,
    "weight_scale": _SCALED,
    "comfy_quant": "this looks like a ComfyUI quantised file, which cannot be read yet: use the bf16 or fp16 file",
}


class KeyMap:
    """A two-way table between the names in a file and the names in the skeleton.

    A row is a pair of patterns in which `{}` stands for a number. A row renames a whole name or the part of it up to a
    dot, so one row for a Linear serves its weight, its bias and its LoRA matrices.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        assert len(set(table.values())) == len(table), "two rows lead to one skeleton name: the way back is ambiguous"
        self._to_skeleton = [(_pattern(stored), skeleton) for stored, skeleton in table.items()]
        self._from_skeleton = [(_pattern(skeleton), stored) for stored, skeleton in table.items()]

    def to_skeleton(self, name: str) -> str | None:
        """The skeleton's name of what a file calls `name`; None if the table does not know it."""
        return _rename(name, self._to_skeleton)

    def from_skeleton(self, name: str) -> str | None:
        """The inverse of `to_skeleton`."""
        return _rename(name, self._from_skeleton)


def _pattern(row: str) -> re.Pattern[str]:
    return re.compile(r"(\d+)".join(re.escape(part) for part in row.split("{}")) + r"(?P<rest>\..+)?")


def _rename(name: str, rows: Sequence[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rows:
        if match := pattern.fullmatch(name):
            numbers = match.groups()[: pattern.groups - 1]
            return template.format(*numbers) + (match["rest"] or "")
    return None


class StoredTensor(NamedTuple):
    """Where a tensor lies on disk."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]


def weight_files(path: Path, stem: str) -> list[Path]:
    """The files of one model: `path` itself, or the shards in folder `path` whose names start with `stem`.

    Shards that an index or a file name (`-00002-of-00006`) promises are listed even where they are absent, so that the
    reader can name them. An empty list means that the folder holds nothing of the kind.
    """
    if path.is_file():
        return [path]
    for index in sorted(path.glob(f"{stem}*{INDEX_SUFFIX}")):
        return [path / name for name in sorted(set(_read_index(index).values()))]
    found = sorted(path.glob(f"{stem}*.safetensors"))
    if found and (shard := SHARD_NAME.fullmatch(found[0].name)):
        total = int(shard["total"])
        return [path / f"{shard['stem']}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as a shard index has it."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not a readable shard index ({error}); download it again") from error
    return dict(weight_map)


def read_header(file: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes by name and the metadata of a safetensors file.

    Raises:
        ValueError: the file is cut short or is something else. Found from the header and the file's size alone.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        if not 0 < length <= min(size - HEADER_LENGTH_BYTES, HEADER_LIMIT_BYTES):
            raise ValueError(f"{file}: truncated, or no safetensors file ({size} bytes)")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file}: damaged safetensors header ({error})") from error
    metadata = header.pop("__metadata__", {})
    promised = HEADER_LENGTH_BYTES + length + max((t["data_offsets"][1] for t in header.values()), default=0)
    if size < promised:
        raise ValueError(f"{file}: truncated, {size} of {promised} bytes")
    return {name: tuple(tensor["shape"]) for name, tensor in header.items()}, metadata


def load_pth(file: Path) -> dict[str, Tensor]:
    """A flat state dict from a `.pth` or `.pt` file, memory-mapped where its format allows, never running its code.

    Raises:
        ValueError: the file is damaged, or holds something else than tensors by name.
    """
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


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`save_file` with the rights that a new file has here: the library makes files that only their owner can read,
    and ComfyUI often runs as somebody else. Raises `OSError` where it cannot be written."""
    file.touch()
    rights = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # the library's word for a full disk too
        raise OSError(f"{file}: {error}") from error
    file.chmod(rights)


class WeightReader:
    """Tensors of one model under the skeleton's names; meets `models.base.WeightSource`.

    Only headers are read at first. Files that are absent or cut short are remembered in `broken` and come up in
    `check`, so one message tells which file and which tensors.
    """

    def __init__(self, files: Sequence[Path], key_map: KeyMap | None = None, what: str = "weights") -> None:
        """
        Args:
            files: all shards of one model, in their order.
            key_map: names that the files may use; a name it does not know is taken for the skeleton's own.
            what: how messages call it, for instance `transformer`.
        """
        assert files, "no files to read"
        self.what = what
        self.location = files[0] if len(files) == 1 else files[0].parent
        self.broken: list[str] = []
        self._key_map = key_map
        self._stored: dict[str, StoredTensor] = {}
        self._safetensors: dict[Path, Any] = {}
        self._pth: dict[Path, dict[str, Tensor]] = {}
        for number, file in enumerate(files, start=1):
            place = f"shard {number} of {len(files)}" if len(files) > 1 else "file"
            self._scan(file, place)

    def _scan(self, file: Path, place: str) -> None:
        try:
            shapes = self._shapes_in(file)
        except (FileNotFoundError, ValueError) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error).partition(": ")[2]
            self.broken.append(f"{place} absent or truncated ({file.name}: {reason})")
            return
        for name, shape in shapes.items():
            self._add(StoredTensor(file, name, shape))

    def _shapes_in(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix == ".safetensors":
            return read_header(file)[0]
        self._pth[file] = load_pth(file)
        return {name: tuple(tensor.shape) for name, tensor in self._pth[file].items()}

    def _add(self, tensor: StoredTensor) -> None:
        plain = strip_prefix(tensor.name)
        name = (self._key_map and self._key_map.to_skeleton(plain)) or plain
        if name in self._stored:
            other = self._stored[name]
            raise ValueError(
                f"{self.what}: one tensor is stored twice, as {other.name} in {other.file} and as {tensor.name} in "
                f"{tensor.file}; remove the file that does not belong there"
            )
        self._stored[name] = tensor

    def names(self) -> set[str]:
        """Skeleton names of all tensors that can be read."""
        return set(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by skeleton name, from the headers."""
        return {name: tensor.shape for name, tensor in self._stored.items()}

    def stored_names(self) -> set[str]:
        """The same as the files spell them."""
        return {tensor.name for tensor in self._stored.values()}

    def read(self, name: str) -> Tensor:
        """The tensor as stored, on the CPU; only this one is read from disk. `KeyError` for a name not in `names()`."""
        stored = self._stored[name]
        if stored.file in self._pth:
            return self._pth[stored.file][stored.name]
        if stored.file not in self._safetensors:
            self._safetensors[stored.file] = safe_open(stored.file, framework="pt", device="cpu")
        return self._safetensors[stored.file].get_tensor(stored.name)

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Compare with the shapes that the skeleton needs, by its names.

        Raises:
            ValueError: one message with counts, first names as the files spell them, the file, and a hint.
        """
        missing = [self._file_name(name) for name in expected if name not in self._stored]
        unexpected = [stored.name for name, stored in self._stored.items() if name not in expected]
        misshapen = [
            f"{stored.name} is {list(stored.shape)} and should be {list(expected[name])}"
            for name, stored in self._stored.items()
            if name in expected and stored.shape != tuple(expected[name])
        ]
        counted = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshapen}
        faults = [_count(names, kind) for kind, names in counted.items() if names]
        if not faults and not self.broken:
            return
        hint = self._hint(missing, unexpected)
        raise ValueError(f"{self.what} {self.location}: {'; '.join(faults + self.broken)}. {hint}")

    def _file_name(self, name: str) -> str:
        renamed = any(strip_prefix(stored.name) != skeleton for skeleton, stored in self._stored.items())
        return (renamed and self._key_map and self._key_map.from_skeleton(name)) or name

    def _hint(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        if self.broken:
            return "Download the named files again."
        for part, guess in FILE_GUESSES.items():
            if any(part in name for name in unexpected):
                return f"Hint: {guess}."
        if missing and not unexpected:
            return "Hint: the files hold a part of the model only; download all of its shards."
        return "Hint: the config.json beside the files and the files themselves may belong to different models."


def strip_prefix(name: str) -> str:
    """`name` without the prefix that ComfyUI's single files carry."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _count(names: Sequence[str], kind: str) -> str:
    plural = "tensor" if len(names) == 1 else "tensors"
    return f"{len(names)} {plural} {kind}, first {names[0]}"
