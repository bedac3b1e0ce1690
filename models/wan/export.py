"""Wan weights to files and back: LoRA under ComfyUI's names, whole models under the official ones."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.lora import LORA_A, LORA_B, fold_scale
from models.wan.keymaps import TRANSFORMER
from models.wan.layouts import TRANSFORMER_STEM
from models.weights import INDEX_SUFFIX, read_header, strip_prefix, write_safetensors

LORA_FILE = "adapter_model.safetensors"
LORA_CONFIG = "adapter_config.json"
COMFYUI_PREFIX = "diffusion_model."
DIFFUSERS_PREFIX = "transformer."
ALPHA = ".alpha"
SHARD_BYTES = 5_000_000_000  # as the official checkpoints and Hugging Face's are cut

# endings that trainers give the matrices -> ours; peft puts its adapter's name in between
ENDINGS = {
    ".lora_A.weight": LORA_A,
    ".lora_B.weight": LORA_B,
    ".lora_A.default.weight": LORA_A,
    ".lora_B.default.weight": LORA_B,
    ".lora_down.weight": LORA_A,
    ".lora_up.weight": LORA_B,
    ALPHA: ALPHA,
}


class LinearShape(NamedTuple):
    """What an adapter has to fit."""

    out_features: int
    in_features: int


def save_lora(tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write `adapter_model.safetensors` and peft's `adapter_config.json` into `folder`.

    Names are ComfyUI's native ones. Where alpha is not the rank each module gets an `.alpha`, which ComfyUI and
    diffusers read; without it both take the scale as 1, so it is left out where they are equal.

    Args:
        tensors: `<module>.lora_A.weight` and `<module>.lora_B.weight` by skeleton names.
        metadata: for the header; `alpha` is taken from here (equal to the rank where it is absent).

    Returns:
        The safetensors file.
    """
    rank = _rank(tensors)
    alpha = float(metadata.get("alpha", rank))
    named = {COMFYUI_PREFIX + _official(name): tensor for name, tensor in tensors.items()}
    if alpha != rank:
        modules = [name.removesuffix(LORA_A) for name in named if name.endswith(LORA_A)]
        named |= {module + ALPHA: torch.tensor(alpha) for module in modules}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / LORA_CONFIG, _peft_config(named, rank, alpha, metadata))
    _write_tensors(folder / LORA_FILE, named, metadata)
    return folder / LORA_FILE


def _rank(tensors: Mapping[str, Tensor]) -> int:
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(LORA_A)}
    assert len(ranks) == 1, f"one rank for all modules, not {sorted(ranks)}"
    return ranks.pop()


def _official(name: str) -> str:
    found = TRANSFORMER.from_skeleton(name)
    assert found is not None, f"{name} is not in the key table"
    return found


def _peft_config(named: Mapping[str, Tensor], rank: int, alpha: float, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's description of the adapter, with modules under the names in the file."""
    modules = {name.removesuffix(LORA_A).split(".", 3)[-1] for name in named if name.endswith(LORA_A)}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": metadata.get("base_model", ""),
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted(modules),
    }


def load_lora(path: Path, linears: Mapping[str, LinearShape]) -> dict[str, Tensor]:
    """Read a LoRA under ComfyUI's, the official or diffusers' names; alpha is folded in, so delta W = B @ A.

    Args:
        path: the file, or the folder that `save_lora` wrote.
        linears: shapes of the modules that may carry an adapter, by skeleton name.

    Returns:
        float32 `<module>.lora_A.weight` and `.lora_B.weight` by skeleton names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys that belong to no module of this model, half a pair, or a matrix that does not fit.
    """
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no LoRA at '{file}'")
    read_header(file)  # a truncated file is told apart from a wrong one
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    for key, tensor in load_file(file).items():
        module, ending = _split_key(key)
        if module not in linears:
            unknown.append(key)
        elif ending == ALPHA:
            alphas[module] = float(tensor)
        else:
            tensors[module + ending] = tensor.float()
    if unknown:
        raise ValueError(
            f"{file}: {len(unknown)} keys belong to no module of this model, first {unknown[0]}. "
            "It may be made for another model, or in a format that is not read yet (kohya's lora_unet_ names are not)"
        )
    return _folded(file, tensors, alphas, linears)


def _split_key(key: str) -> tuple[str, str]:
    """Module by skeleton name, and which of `ENDINGS` it is; two empty strings for anything else."""
    plain = strip_prefix(key).removeprefix(DIFFUSERS_PREFIX)
    for ending, ours in ENDINGS.items():
        if plain.endswith(ending):
            module = plain.removesuffix(ending)
            return TRANSFORMER.to_skeleton(module) or module, ours
    return "", ""


def _folded(
    file: Path, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], linears: Mapping[str, LinearShape]
) -> dict[str, Tensor]:
    folded: dict[str, Tensor] = {}
    for module in sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in tensors}):
        pair = {module + ending: tensors[module + ending] for ending in (LORA_A, LORA_B) if module + ending in tensors}
        if len(pair) != 2:
            raise ValueError(f"{file}: {module} has only one of its two matrices; the file is not complete")
        a, b = pair.values()
        if (b.shape[0], a.shape[1]) != linears[module] or b.shape[1] != a.shape[0]:
            raise ValueError(
                f"{file}: the adapter of {module} is {list(b.shape)} x {list(a.shape)} and should give "
                f"{list(linears[module])}; it is made for another size of model"
            )
        folded |= fold_scale(pair, alphas.get(module, a.shape[0]) / a.shape[0])
    if not folded:
        raise ValueError(f"{file} holds no LoRA")
    return folded


def save_full(
    tensors: Mapping[str, Tensor],
    folder: Path,
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write the whole transformer under official names with its config.json, sharded where it is large.

    Each file appears complete or not at all; the index comes last.

    Returns:
        The single file, or the index of the shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    named = {_official(name): tensor for name, tensor in tensors.items()}
    shards = list(_shards(named, shard_bytes))
    if len(shards) == 1:
        _write_tensors(folder / f"{TRANSFORMER_STEM}.safetensors", named, metadata)
        return folder / f"{TRANSFORMER_STEM}.safetensors"
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{TRANSFORMER_STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / name, {key: named[key] for key in shard}, metadata)
        weight_map |= dict.fromkeys(shard, name)
    index = folder / f"{TRANSFORMER_STEM}.safetensors{INDEX_SUFFIX}"
    total = sum(tensor.nbytes for tensor in named.values())
    _write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return index


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names in runs of up to `shard_bytes`; a larger tensor stands alone."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = file.with_name(f"{file.name}.tmp")
    write_safetensors(temporary, whole, {"format": "pt", **metadata})
    _put_in_place(temporary, file)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _put_in_place(temporary, file)


def _put_in_place(temporary: Path, file: Path) -> None:
    """Rename once the bytes are on disk, so that a crash leaves the old file or the new one."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, file)
