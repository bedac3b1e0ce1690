"""Tensors by name out of safetensors and pth files, whatever the names in the file, read only when asked for."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models import quantised
from models.headers import ForeignFileError, Header, TensorInfo, load_pth, open_header
from models.headers import read_header as read_header
from models.json_files import MAX_INDEX_BYTES, read_table, shard_names

INDEX_SUFFIX = ".index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of ComfyUI's single files

# shapes under the names of a file, and its metadata -> what the file is and what to do about it; None where that does
# not help
Identify = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, str]], str | None]


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
    dtype: torch.dtype | None  # None: less than a byte a number


def weight_files(path: Path, stem: str) -> list[Path]:
    """The files of one model: `path` itself, or the shards in folder `path` whose names start with `stem`.

    Shards that an index or a file name (`-00002-of-00006`) promises are listed even where they are absent, so that the
    reader can name them. An empty list means that the folder holds nothing of the kind.
    """
    if path.is_file():
        return [path]
    for index in sorted(path.glob(f"{stem}*{INDEX_SUFFIX}")):
        return [path / name for name in sorted(_read_index(index))]
    found = sorted(path.glob(f"{stem}*.safetensors"))
    if found and (shard := SHARD_NAME.fullmatch(found[0].name)):
        total = int(shard["total"])
        return [path / f"{shard['stem']}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    return found


def _read_index(index: Path) -> set[str]:
    """The names of all shards."""
    try:
        return shard_names(read_table(index, MAX_INDEX_BYTES))
    except ValueError as error:
        raise ValueError(f"{index}: not a readable shard index ({error}); download it again") from error


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """`save_file` with the rights that a new file has here: the library makes files that only their owner can read,
    and ComfyUI often runs as somebody else. Equal content makes equal files. Raises `OSError` where it cannot be
    written."""
    file.touch()
    rights = file.stat().st_mode
    try:
        save_file(dict(tensors), file, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # the library's word for a full disk too
        raise OSError(f"{file}: {error}") from error
    _sort_metadata(file)
    file.chmod(rights)


def _sort_metadata(file: Path) -> None:
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        text = sorted_metadata(opened.read(length))
        opened.seek(8)
        opened.write(text)


def sorted_metadata(text: bytes) -> bytes:
    """The header of a safetensors file, as many bytes, with its metadata sorted: the library writes them in an order
    that differs from process to process."""
    header = json.loads(text)
    told = header.pop("__metadata__", None)
    if told is None:
        return text
    whole = {"__metadata__": dict(sorted(told.items())), **header}
    by_name = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    # spaces after it are what the library itself aligns with
    return by_name.ljust(len(text)) if len(by_name) <= len(text) else text


class WeightReader:
    """Tensors of one model under the skeleton's names; meets `models.base.WeightSource`.

    Only headers are read at first. Files that are absent or cut short are remembered in `broken` and come up in
    `check`, so one message tells which file and which tensors.

    Weights in float8 with a scale (`models.quantised`) are dequantised while they are read, to float32; or, where
    `keeps_scale` says so, read as stored, with the scale as a tensor of its own, `<module>.weight_scale`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        key_map: KeyMap | None = None,
        what: str = "weights",
        *,
        keeps_scale: Callable[[str], bool] = lambda weight: False,
        identify: Identify | None = None,
    ) -> None:
        """
        Args:
            files: all shards of one model, in their order.
            key_map: names that the files may use; a name it does not know is taken for the skeleton's own.
            what: how messages call it, for instance `transformer`.
            keeps_scale: whether a weight, by its skeleton name, is wanted as stored.
            identify: for the hint at the end of a message.

        Raises:
            ValueError: a file of another kind, or quantised weights that cannot be read.
        """
        assert files, "no files to read"
        self.what = what
        self.location = files[0] if len(files) == 1 else files[0].parent
        self.broken: list[str] = []
        self.metadata: dict[str, str] = {}  # of the headers
        self._key_map = key_map
        self._identify = identify
        self._stored: dict[str, StoredTensor] = {}
        self._safetensors: dict[Path, Any] = {}
        self._pth: dict[Path, dict[str, Tensor]] = {}
        for number, file in enumerate(files, start=1):
            place = f"shard {number} of {len(files)}" if len(files) > 1 else "file"
            self._scan(file, place)
        self._all = {tensor.name: tensor.shape for tensor in self._stored.values()}
        self._scales: dict[str, StoredTensor] = {}  # weight to be dequantised -> its scale
        self._sort_out(keeps_scale)

    def _scan(self, file: Path, place: str) -> None:
        try:
            header = self._open(file)
        except ForeignFileError as error:
            raise ForeignFileError(f"{self.what} {error}") from error
        except (FileNotFoundError, ValueError) as error:
            reason = "it does not exist" if isinstance(error, FileNotFoundError) else str(error).partition(": ")[2]
            self.broken.append(f"{place}, {file.name}: {reason}")
            return
        self.metadata |= header.metadata
        for name, (shape, dtype) in header.tensors.items():
            self._add(StoredTensor(file, name, shape, dtype))

    def _open(self, file: Path) -> Header:
        if file.suffix == ".safetensors":
            return open_header(file)
        self._pth[file] = load_pth(file)
        tensors = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self._pth[file].items()}
        return Header(tensors, {})

    def _add(self, tensor: StoredTensor) -> None:
        name = self._skeleton_name(tensor.name)
        if name == quantised.FILE_MARKER and name in self._stored:
            return  # each shard may have it
        if name in self._stored:
            other = self._stored[name]
            raise ValueError(
                f"{self.what}: one tensor is stored twice, as {other.name} in {other.file} and as {tensor.name} in "
                f"{tensor.file}; remove the file that does not belong there"
            )
        self._stored[name] = tensor

    def _skeleton_name(self, stored: str) -> str:
        plain = strip_prefix(stored)
        return (self._key_map and self._key_map.to_skeleton(plain)) or plain

    def _sort_out(self, keeps_scale: Callable[[str], bool]) -> None:
        """Take the tensors of quantised weights apart; see `models.quantised`."""
        plain = {strip_prefix(stored.name): name for name, stored in self._stored.items()}
        try:
            scales, aside = quantised.sort_out(
                {name: self._info(skeleton) for name, skeleton in plain.items()}, self._marked_formats(plain)
            )
            for scale in scales.values():
                if fault := quantised.scale_fault(self._load(self._stored[plain[scale]])):
                    raise ValueError(f"{scale} {fault}; download the file again")
        except ValueError as error:
            if self.broken:
                return  # what seems to be missing may lie in the shard that could not be read; `check` will say
            raise ValueError(f"{self.what} {self.location}: {error}") from error
        for name in aside:
            del self._stored[plain[name]]
        for name, scale in scales.items():
            weight, stored = plain[name], self._stored.pop(plain[scale])
            if keeps_scale(weight):
                self._stored[weight.removesuffix(quantised.WEIGHT) + quantised.SCALE] = stored
            else:
                self._scales[weight] = stored

    def _info(self, name: str) -> TensorInfo:
        stored = self._stored[name]
        return TensorInfo(stored.shape, stored.dtype)

    def _marked_formats(self, plain: Mapping[str, str]) -> dict[str, str]:
        """Module -> format, of the modules that the files mark as quantised."""
        markers = {
            name.removesuffix(quantised.MODULE_MARKER): bytes(self._load(self._stored[skeleton]).byte().flatten())
            for name, skeleton in plain.items()
            if name.endswith(quantised.MODULE_MARKER)
        }
        return quantised.marked_formats(markers, self.metadata.get(quantised.METADATA_KEY), strip_prefix)

    def names(self) -> set[str]:
        """Skeleton names of all tensors that can be read."""
        return set(self._stored)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by skeleton name, from the headers."""
        return {name: tensor.shape for name, tensor in self._stored.items()}

    def dtypes(self) -> dict[str, torch.dtype | None]:
        """What `read` gives, by skeleton name: as stored, or float32 where it dequantises."""
        stored = {name: tensor.dtype for name, tensor in self._stored.items()}
        return stored | dict.fromkeys(self._scales, torch.float32)

    def stored_names(self) -> set[str]:
        """The same as the files spell them."""
        return {tensor.name for tensor in self._stored.values()}

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, as stored or dequantised; only this one is read from disk. `KeyError` for a name not
        in `names()`."""
        tensor = self._load(self._stored[name])
        scale = self._scales.get(name)
        return tensor if scale is None else quantised.dequantise(tensor, self._load(scale))

    def _load(self, stored: StoredTensor) -> Tensor:
        if stored.file in self._pth:
            return self._pth[stored.file][stored.name]
        if stored.file not in self._safetensors:
            self._safetensors[stored.file] = safe_open(stored.file, framework="pt", device="cpu")
        return self._safetensors[stored.file].get_tensor(stored.name)

    def check(self, expected: Mapping[str, Sequence[int]]) -> None:
        """Compare with the shapes that the skeleton needs, by its names.

        Raises:
            ValueError: one message with the files that cannot be read, counts, first names as the files spell them, and
                a hint.
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
        raise ValueError(f"{self.what} {self.location}: {'; '.join(self.broken + faults)}. {hint}")

    def guess(self) -> str:
        """What the files seem to be, where that is something else than what is wanted; empty where nothing tells."""
        return (self._identify and self._identify(self._all, self.metadata)) or ""

    def _file_name(self, name: str) -> str:
        renamed = any(strip_prefix(stored.name) != skeleton for skeleton, stored in self._stored.items())
        return (renamed and self._key_map and self._key_map.from_skeleton(name)) or name

    def _hint(self, missing: Sequence[str], unexpected: Sequence[str]) -> str:
        if self.broken:
            return "Download the named files again."
        if hint := self.guess():
            return f"Hint: {hint}."
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
