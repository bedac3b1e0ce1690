"""Adapters with random values, and what other programs make of a file: their rules, written down from their sources."""

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import by_module, delta_weight, fold_scale, is_adapter, plain_name
from models.wan.family import WanFamily

# name -> kind and shape; the widths of the tiny Wan make LoKr's matrices whole or factored as these ranks ask
KINDS = {
    "lora": ("lora", AdapterShape(4, 2.5)),
    "lora, alpha is rank": ("lora", AdapterShape(4, 4.0)),
    "dora": ("dora", AdapterShape(4, 2.5)),
    "lokr": ("lokr", AdapterShape(2, 3.0)),
    "lokr, both factored": ("lokr", AdapterShape(2, 3.0, decompose_both=True)),
    "lokr, both whole": ("lokr", AdapterShape(16, 3.0)),
}


def random_adapter(family: WanFamily, kind: str, shape: AdapterShape, seed: int = 0) -> dict[str, Tensor]:
    """Plain names to tensors, as a trainer gives them: alpha is not folded in."""
    skeleton = family.build_skeleton()
    add_adapter(skeleton, family.lora_targets(skeleton), kind, shape)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        plain_name(name): torch.randn(parameter.shape, generator=generator) * 0.2
        for name, parameter in skeleton.named_parameters()
        if is_adapter(name)
    }
    return {name: tensor.abs() + 0.5 if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}


def metadata_of(shape: AdapterShape) -> dict[str, str]:
    return {"rank": str(shape.rank), "alpha": f"{shape.alpha:g}"}


def adapted_weights(family: WanFamily, tensors: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    """Module -> its weight with the adapter in it, by our own arithmetic."""
    weights = family.open_weights()
    adapted = {}
    for module, parts in by_module(fold_scale(tensors, scale)).items():
        base = weights.read(f"{module}.weight").float()
        adapted[module] = base + delta_weight(parts, base)
    return adapted


def comfyui_weight(file: dict[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """The weight [out, in] that ComfyUI runs with, by the rules of comfy/weight_adapter/lora.py, lokr.py and base.py.

    `key` is the module as comfy/lora.py `model_lora_keys_unet` spells it.
    """
    found = {name.removeprefix(f"{key}."): tensor for name, tensor in file.items() if name.startswith(f"{key}.")}
    alpha, divisor = found.get("alpha"), None
    if "lokr_w1" in found or "lokr_w1_a" in found:
        first, second = found.get("lokr_w1"), found.get("lokr_w2")
        if first is None:
            first, divisor = found["lokr_w1_a"] @ found["lokr_w1_b"], found["lokr_w1_b"].shape[0]
        if second is None:
            second, divisor = found["lokr_w2_a"] @ found["lokr_w2_b"], found["lokr_w2_b"].shape[0]
        difference = torch.kron(first, second)
    else:
        up = found["lora_up.weight"] if "lora_up.weight" in found else found["lora_B.weight"]
        down = found["lora_down.weight"] if "lora_down.weight" in found else found["lora_A.weight"]
        difference, divisor = up @ down, down.shape[0]
    if alpha is not None and divisor is not None:
        difference = difference * (alpha.item() / divisor)
    if "dora_scale" not in found:
        return weight + difference
    scale = found["dora_scale"]
    assert scale.shape == (weight.shape[0], 1), "ComfyUI takes the rows' norm only where dora_scale has as many rows"
    norm = weight.norm(dim=1, keepdim=True) + torch.finfo(torch.float32).eps
    return (weight + difference) * (scale / norm)


def musubi_weight(file: dict[str, Tensor], key: str, weight: Tensor) -> Tensor:
    """The weight that musubi-tuner runs with: networks/lora.py `merge_to`, where alpha has to be there."""
    up, down, alpha = (file[f"{key}.{part}"] for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    return weight + up @ down * (alpha.item() / down.shape[0])


def plain_pipeline(family: WanFamily) -> DiffusionPipeline:
    """diffusers' own model and pipeline on the same base weights."""
    transformer = WanTransformer3DModel(**family._sizes.diffusers_arguments())
    weights = family.open_weights()
    transformer.load_state_dict({name: weights.read(name) for name in weights.names()})
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    if family._sizes.image_dim:
        return WanImageToVideoPipeline(transformer=transformer, image_encoder=None, image_processor=None, **parts)
    return WanPipeline(transformer=transformer, **parts)
