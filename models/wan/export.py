"""Whole transformers to folders under official or diffusers' names, sharded, with the config.json that each reads."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from models.files import write_json, write_tensors
from models.wan.adapter_formats import official_name
from models.wan.adapter_reader import EXPERT_SUFFIXES
from models.wan.layouts import EXPERT_FOLDERS, TRANSFORMER_STEM
from models.wan.variants import Architecture, Variant
from models.weights import INDEX_SUFFIX

Layout = Literal["official", "diffusers"]

SHARD_BYTES = 5_000_000_000  # as the official checkpoints and Hugging Face's are cut
# as `WanTransformer3DModel.save_pretrained` writes it, less what is None anyway
DIFFUSERS_CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "_diffusers_version": "0.35.0",
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
# layout -> suffix of an expert's files -> its folder
FOLDERS: dict[Layout, dict[str, str]] = {
    layout: dict(zip(EXPERT_SUFFIXES, folders, strict=True))
    for layout, folders in zip(("official", "diffusers"), EXPERT_FOLDERS, strict=True)
}


def model_folder(folder: Path, layout: Layout, suffix: str) -> Path:
    """Where in `folder` a transformer lies; `suffix` is its expert's (`_high_noise`), or nothing."""
    return folder / FOLDERS[layout][suffix] if suffix else folder


def config_of(sizes: Architecture, variant: Variant, layout: Layout) -> dict[str, Any]:
    """The config.json of a layout."""
    if layout == "official":
        return sizes.official_config(variant.model_type)
    return {**DIFFUSERS_CONFIG, **sizes.diffusers_arguments()}


def save_full(
    tensors: Mapping[str, Tensor],
    folder: Path,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "official",
) -> Path:
    """Write the whole transformer, given by skeleton names, as `stream_full` does."""
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return stream_full(sizes, tensors.__getitem__, folder, config, metadata, shard_bytes, layout)


def stream_full(
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    folder: Path,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
    layout: Layout = "official",
) -> Path:
    """Write a transformer with its config.json, sharded where it is large, holding one shard at a time.

    Each file appears complete or not at all; the index comes last.

    Args:
        sizes: bytes of each tensor as `read` will give it, by skeleton name.
        read: the tensor of a skeleton name.

    Returns:
        The single file, or the index of the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    spell = official_name if layout == "official" else str
    shards = list(_shards(sizes, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = folder / f"{TRANSFORMER_STEM}{part}.safetensors"
        write_tensors(file, {spell(name): read(name) for name in shard}, metadata)
        weight_map |= {spell(name): file.name for name in shard}
    if len(shards) == 1:
        return folder / f"{TRANSFORMER_STEM}.safetensors"
    index = folder / f"{TRANSFORMER_STEM}.safetensors{INDEX_SUFFIX}"
    write_json(index, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    return index


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names in runs of up to `shard_bytes`; a larger tensor stands alone."""
    names: list[str] = []
    size = 0
    for name, nbytes in sizes.items():
        if names and size + nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names
