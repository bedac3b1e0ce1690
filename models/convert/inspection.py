"""What a weight file is: model, layout, dtypes, size, rank, alpha and what its header tells."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models.adapters import MAGNITUDE, TITLES, delta_shape
from models.convert.common import tell
from models.headers import TensorInfo, load_pth, open_header
from models.wan.adapter_formats import DORA_SCALE, format_of, split_key
from models.wan.adapter_reader import read_adapter
from models.wan.identify import identify
from models.wan.layouts import WEIGHT_SUFFIXES
from models.wan.variants import SIZES
from models.weights import SHARD_NAME

LONG = 200  # characters of a header's field that are shown
# size, and whether keys and values for image states are adapted -> the models that an adapter fits
FITS = {
    ("1.3B", False): "Wan2.1 T2V 1.3B",
    ("1.3B", True): "Wan2.1 Fun InP 1.3B",
    ("5B", False): "Wan2.2 TI2V-5B",
    ("14B", False): "14B of Wan2.1, and Wan2.2 T2V-A14B and I2V-A14B; nothing in it tells which of them it is for",
    ("14B", True): "Wan2.1 I2V 14B, FLF2V 14B and Fun InP 14B",
}


def inspect(path: Path, console: Console) -> None:
    """Tell what `path` is, or each weight file in it and in its folders.

    Raises:
        FileNotFoundError: it does not exist, or holds no weight file.
        ValueError: the one file cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist")
    if path.is_file():
        return tell(console, describe([path]))
    groups = grouped(sorted(file for file in path.rglob("*") if file.suffix in WEIGHT_SUFFIXES and file.is_file()))
    if not groups:
        raise FileNotFoundError(f"'{path}' holds no {' or '.join(WEIGHT_SUFFIXES)} file")
    for number, files in enumerate(groups):
        try:
            lines = describe(files)
        except (ValueError, OSError) as error:
            lines = [f"{files[0]}", f"  error      {error}"]
        tell(console, ([""] if number else []) + lines)
    return None


def grouped(files: Iterable[Path]) -> list[list[Path]]:
    """Shards of one model together."""
    groups: dict[Path, list[Path]] = {}
    for file in files:
        shard = SHARD_NAME.fullmatch(file.name)
        groups.setdefault(file.with_name(shard["stem"]) if shard else file, []).append(file)
    return list(groups.values())


def describe(files: Sequence[Path]) -> list[str]:
    """Lines about one model, given as all of its shards."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, told = _header(file)
        tensors |= found
        metadata |= told
    shapes = {name: info.shape for name, info in tensors.items()}
    what = identify(tensors, shapes, metadata) or "nothing that is known here"
    rows = [("what", what), ("size", _size(files, tensors)), ("dtypes", _dtypes(tensors.values()))]
    if any(map(split_key, tensors)):
        rows += _adapter_rows(files[0])
    rows += [("header", f"{key} = {_shortened(value)}") for key, value in sorted(metadata.items()) if key != "format"]
    place = f"{files[0]}" if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
    return [place, *(f"  {label:<10} {value}" for label, value in rows)]


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if file.suffix == ".safetensors":
        header = open_header(file)
        return header.tensors, header.metadata
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in load_pth(file).items()}, {}


def _size(files: Sequence[Path], tensors: dict[str, TensorInfo]) -> str:
    numbers = sum(torch.Size(info.shape).numel() for info in tensors.values())
    gib = sum(file.stat().st_size for file in files) / 2**30
    return f"{len(tensors)} tensors, {numbers / 1e6:,.2f} million numbers, {gib:.3f} GiB"


def _dtypes(tensors: Iterable[TensorInfo]) -> str:
    counts = Counter(str(info.dtype).removeprefix("torch.") for info in tensors)
    return ", ".join(f"{dtype} ({count})" for dtype, count in counts.most_common())


def _adapter_rows(file: Path) -> list[tuple[str, str]]:
    """Rank, alpha and format of an adapter; why it cannot be read, where it cannot."""
    try:
        adapter = read_adapter(file)
        kind = adapter.kind
    except ValueError as error:
        return [("error", str(error).removeprefix(f"{file}: "))]
    names = [key for key in open_header(file).tensors if split_key(key)]
    scales = Counter(f"{scale:.4g}" for scale in adapter.scales.values())
    blocks = {module.split(".")[1] for module in adapter.modules if module.startswith("blocks.")}
    ends = sorted({module.split(".", 2)[-1] for module in adapter.modules})
    return [
        ("adapter", f"{TITLES[kind]}, {format_of(names)} format"),
        ("rank", f"{adapter.rank}, alpha {adapter.alpha:g}, scale {', '.join(scales)}"),
        ("modules", f"{len(adapter.modules)} in {len(blocks)} blocks: {', '.join(ends)}"),
        ("fits", _fits(adapter.modules)),
    ]


def _fits(modules: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Which models an adapter can be put into, by its width and by whether it adapts what only some have."""
    for_images = any(".add_" in module for module in modules)
    for module, parts in modules.items():
        if ".attn1." in module:  # all of its weights are as wide as the model
            width, _ = delta_shape(
                {part: tensor for part, tensor in parts.items() if part not in (MAGNITUDE, DORA_SCALE)}
            )
            return FITS.get((SIZES.get(width, ""), for_images), f"a Wan {width} wide, which is none of the released")
    return "not to be told: it adapts no self attention"


def _shortened(value: str) -> str:
    plain = " ".join(value.split())
    return plain if len(plain) <= LONG else f"{plain[:LONG]} ... ({len(plain)} characters)"
