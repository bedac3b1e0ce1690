"""Tiny checkpoints as ComfyUI's fp8_scaled files have them, in each form that people own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# form -> (ending of a weight's scale, ending of an input's scale, marker)
FORMS = {
    "old": (".scale_weight", ".scale_input", "scaled_fp8"),
    "comfy_quant": (".weight_scale", ".input_scale", "comfy_quant"),
    "metadata": (".weight_scale", ".input_scale", "_quantization_metadata"),
}
PREFIX = "model.diffusion_model."


def is_linear(name: str, tensor: Tensor) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2


def is_block_linear(name: str, tensor: Tensor) -> bool:
    """What ComfyUI's own Wan files have in float8."""
    return name.startswith("blocks.") and is_linear(name, tensor)


def quantise(weight: Tensor, dtype: torch.dtype, by_row: bool = False) -> tuple[Tensor, Tensor]:
    """The weight in float8 and its float32 scale, [] or [out, 1]: the largest number becomes the dtype's largest."""
    largest = weight.float().abs().amax(dim=1, keepdim=True) if by_row else weight.float().abs().max()
    scale = largest / torch.finfo(dtype).max
    return (weight.float() / scale).to(dtype), scale


def scaled_tensors(
    tensors: Mapping[str, Tensor],
    form: str = "old",
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    prefix: str = "",
    by_row: bool = False,
    chosen: Callable[[str, Tensor], bool] = is_block_linear,
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """What a file holds, the metadata of its header, and the float32 tensors it stands for, by the names given.

    Args:
        chosen: which tensors are quantised.
    """
    scale_ending, input_ending, marker = FORMS[form]
    stored: dict[str, Tensor] = {}
    dequantised: dict[str, Tensor] = {}
    layers = {}
    name_of_format = str(dtype).removeprefix("torch.")
    for name, tensor in tensors.items():
        if not chosen(name, tensor):
            stored[name] = dequantised[name] = tensor
            continue
        module = name.removesuffix(".weight")
        stored[name], stored[module + scale_ending] = quantise(tensor, dtype, by_row)
        stored[module + input_ending] = torch.tensor(0.25)
        dequantised[name] = stored[name].float() * stored[module + scale_ending]
        layers[prefix + module] = {"format": name_of_format}
        if marker == "comfy_quant":
            content = json.dumps(layers[prefix + module]).encode()
            stored[f"{module}.comfy_quant"] = torch.tensor(list(content), dtype=torch.uint8)
    if marker == "scaled_fp8":
        stored[marker] = torch.zeros(2, dtype=dtype)
    metadata = {marker: json.dumps({"format_version": "1.0", "layers": layers})} if form == "metadata" else {}
    return {prefix + name: tensor.contiguous() for name, tensor in stored.items()}, metadata, dequantised


def write_scaled(file: Path, tensors: Mapping[str, Tensor], form: str = "old", **settings: object) -> dict[str, Tensor]:
    """Write `scaled_tensors` into `file`; returns the float32 tensors that it stands for."""
    stored, metadata, dequantised = scaled_tensors(tensors, form, **settings)
    save_file(stored, file, metadata)
    return dequantised
