"""Adapters to files in any of the formats that people use, with alpha and DoRA's norms made right for each."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.adapters import (
    LOKR_W2,
    LOKR_W2_B,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    by_module,
    fold_scale,
    kinds_in,
    rank_of,
    row_norms,
)
from models.base import WeightSource
from models.files import write_json, write_tensors
from models.quantised import dequantise
from models.wan.adapter_formats import ALPHA, DEFAULT_FORMAT, DORA_SCALE, FORMATS, check_formats, official_name
from models.wan.metadata import DORA_NORM, for_kohya

PEFT_CONFIG = "adapter_config"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings, in the header

BaseWeights = Callable[[str], Tensor]  # skeleton module -> its weight [out, in] in the model that is adapted


def base_weights(open_weights: Callable[[], WeightSource]) -> BaseWeights:
    """Weights of a checkpoint, opened when the first is asked for; scales of fp8 are applied."""
    opened = cache(open_weights)

    def read(module: str) -> Tensor:
        weight, scale = f"{module}.weight", f"{module}.weight_scale"
        stored = opened().read(weight)
        return dequantise(stored, opened().read(scale)) if scale in opened().names() else stored.float()

    return read


class Adapter(NamedTuple):
    """An adapter as it is stored: nothing folded and nothing cast."""

    modules: dict[str, dict[str, Tensor]]  # skeleton module -> tensors by our part, or DORA_SCALE for MAGNITUDE
    scales: dict[str, float]  # skeleton module -> alpha / rank, which its change of weight is multiplied with
    metadata: dict[str, str]

    @property
    def kind(self) -> str:
        """`ValueError` where parts do not belong together, or modules are of several kinds."""
        plain = {DORA_SCALE: MAGNITUDE}
        kinds = kinds_in(module + plain.get(part, part) for module, parts in self.modules.items() for part in parts)
        if len(kinds) != 1:
            raise ValueError(f"modules of {len(kinds)} kinds ({', '.join(sorted(kinds)) or 'none'}), not of one")
        return kinds.pop()

    @property
    def rank(self) -> int:
        """The rank that most modules have; 0 where they have none."""
        told = self.metadata.get("rank", "")
        ranks = Counter(rank for parts in self.modules.values() if (rank := rank_of(parts)))
        return ranks.most_common(1)[0][0] if ranks else int(told) if told.isdecimal() else 0

    @property
    def alpha(self) -> float:
        """The alpha that most modules have."""
        [(scale, _)] = Counter(self.scales.values()).most_common(1)
        return scale * (self.rank or 1)


def save_adapter(
    tensors: Mapping[str, Tensor],
    folder: Path,
    metadata: Mapping[str, str],
    formats: Sequence[str] = (),
    suffix: str = "",
    base: BaseWeights | None = None,
) -> list[Path]:
    """Write a file a format into `folder`, and peft's `adapter_config.json` beside ComfyUI's.

    Args:
        tensors: by plain names (`models.adapters`), as trained: alpha is not folded in.
        metadata: for the header; `rank` and `alpha` are taken from here, equal to each other where they are absent.
        formats: some of `FORMATS`; ComfyUI's unless given.
        suffix: of each file's stem, such as `_high_noise`.
        base: weights of the model; DoRA under ComfyUI's or kohya's names needs them.

    Raises:
        ValueError: a format that cannot hold this kind of adapter.
    """
    modules = by_module(tensors)
    rank = int(metadata.get("rank") or max(rank_of(parts) or 1 for parts in modules.values()))
    scale = float(metadata.get("alpha", rank)) / rank
    adapter = Adapter(modules, dict.fromkeys(modules, scale), dict(metadata))
    check_formats(adapter.kind, formats)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in formats or (DEFAULT_FORMAT,):
        written.append(folder / f"{FORMATS[name].stem}{suffix}.safetensors")
        write_adapter(adapter, written[-1], name, base)
        if name == DEFAULT_FORMAT:
            write_json(folder / f"{PEFT_CONFIG}{suffix}.json", _peft_config(adapter))
    return written


def write_adapter(adapter: Adapter, file: Path, format_name: str, base: BaseWeights | None = None) -> None:
    """Write one file.

    Raises:
        ValueError: the format cannot hold this kind of adapter, or `base` is needed and not given.
    """
    kind, form = adapter.kind, FORMATS[format_name]
    check_formats(kind, (format_name,))
    told = {key: value for key, value in adapter.metadata.items() if key not in (DIFFUSERS_METADATA, DORA_NORM)}
    tensors: dict[str, Tensor] = {}
    for module, stored in adapter.modules.items():
        spelt, scale = form.spell(module), adapter.scales[module]
        parts = stored
        if kind == "dora":
            parts = with_dora_part(module, parts, scale, DORA_SCALE if DORA_SCALE in form.parts else MAGNITUDE, base)
        width = alpha_divisor(parts)
        if form.alpha == "folded" or (width is None and scale != 1):
            parts, scale = fold_scale(parts, scale), 1.0
        if form.alpha == "always" or scale != 1:
            # where there is no width, ComfyUI ignores alpha and musubi-tuner divides it by the longer side
            tensors[spelt + ALPHA] = torch.tensor(scale * (width or max(parts[LOKR_W2].shape)))
        tensors |= {spelt + form.parts[part]: tensor for part, tensor in parts.items()}
    if kind == "dora" and DORA_SCALE in form.parts:
        told[DORA_NORM] = "base"
    if form.alpha == "folded":
        # what the header says must be what the matrices still need, or a tool that reads it would scale twice
        told |= {"alpha": str(adapter.rank), "reelpipe.alpha": f"{adapter.alpha:g}"}
        told[DIFFUSERS_METADATA] = json.dumps(_diffusers_metadata(adapter, kind), sort_keys=True)
    if format_name == "kohya":
        told = for_kohya(told, kind, adapter.rank, adapter.alpha)
    write_tensors(file, tensors, told)


def alpha_divisor(parts: Mapping[str, Tensor]) -> int | None:
    """What alpha is divided by: the rank, for LoKr that of the second matrix before the first, as ComfyUI has it; None
    for a LoKr of two whole matrices, which has no rank."""
    return parts[LOKR_W2_B].shape[0] if LOKR_W2_B in parts else rank_of(parts)


def with_dora_part(
    module: str, parts: Mapping[str, Tensor], scale: float, wanted: str, base: BaseWeights | None
) -> dict[str, Tensor]:
    """A DoRA's parts with its magnitude as `wanted`: MAGNITUDE m [out], or DORA_SCALE [out, 1].

    DoRA is W' = m * V / |V| with V = W + scale * B @ A and |V| [out] the norms of V's rows, and so peft and diffusers
    run it. ComfyUI divides by |W| instead (`weight_decompose` in comfy/weight_adapter/base.py, where dora_scale has as
    many rows as W), so that the same W' takes dora_scale = m * |W| / |V|. Always float32: in bfloat16 the norms of
    whole rows would be off by more than what was trained.

    Raises:
        ValueError: it takes another form and `base` is not given.
    """
    if wanted in parts:
        return dict(parts)
    if base is None:
        raise ValueError("a DoRA changes its form between these formats, which takes the model's weights; name them")
    weight = base(module).float()
    plain, adapted = row_norms(weight), row_norms(weight + scale * (parts[LORA_B].float() @ parts[LORA_A].float()))
    pair = {part: parts[part] for part in (LORA_A, LORA_B)}
    if wanted == DORA_SCALE:
        return {**pair, DORA_SCALE: (parts[MAGNITUDE].float() * _quotient(plain, adapted))[:, None]}
    return {**pair, MAGNITUDE: parts[DORA_SCALE].float()[:, 0] * _quotient(adapted, plain)}


def _quotient(above: Tensor, below: Tensor) -> Tensor:
    """`above` / `below`, and `above` where `below` is 0: a row of zeros stays one, and is no NaN in anybody's file."""
    return above / torch.where(below > 0, below, 1)


def _diffusers_metadata(adapter: Adapter, kind: str) -> dict[str, Any]:
    """peft's settings as `WanPipeline.save_lora_weights` stores them. The matrices have alpha folded in, for older
    diffusers and for other programs that read its names: so lora_alpha is the rank."""
    ranks = {module: parts[LORA_A].shape[0] for module, parts in adapter.modules.items()}
    others = {module: rank for module, rank in ranks.items() if rank != adapter.rank}
    settings = {
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": kind == "dora",
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return {f"transformer.{key}": value for key, value in settings.items()}


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """peft's description of the adapter, with modules under the names in ComfyUI's file, less what differs a block."""
    alpha = adapter.alpha
    config = {
        "peft_type": "LOKR" if adapter.kind == "lokr" else "LORA",
        "base_model_name_or_path": adapter.metadata.get("base_model", ""),
        "r": adapter.rank,
        "inference_mode": True,
        "target_modules": sorted({official_name(module).split(".", 2)[-1] for module in adapter.modules}),
    }
    number = int(alpha) if alpha.is_integer() else alpha
    if adapter.kind == "lokr":
        return {**config, "alpha": number}
    config |= {"lora_alpha": number, "lora_dropout": 0.0, "bias": "none"}
    return {**config, "use_dora": True} if adapter.kind == "dora" else config
