"""Files for fuse_adapters, which may change all of the model: LoRAs on any matrix, differences of any parameter."""

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from models.adapters import LORA_A, LORA_B
from models.base import Merge
from models.wan.adapter_files import BaseWeights
from models.wan.adapter_formats import skeleton_module
from models.wan.adapter_reader import NAMES_SHOWN, LinearShape, adapter_file, folded, read_adapter
from models.weights import read_header

# Ending of a difference -> the leaf of the parameter it is added to. Distilled models that were turned into LoRAs carry
# them for whatever is no matrix. ComfyUI adds the first two (comfy/lora.py), LightX2V, where such files come from, all
# three (its table of LoRA formats).
DIFFERENCES = {".diff": "weight", ".diff_b": "bias", ".diff_m": "modulation"}


def load_merge(
    path: Path, shapes: Mapping[str, tuple[int, ...]], suffix: str = "", base: BaseWeights | None = None
) -> Merge:
    """Read an adapter in any spelling that `load_adapter` knows, modules outside the blocks and differences included.

    Args:
        path, suffix, base: as for `load_adapter`.
        shapes: of all parameters of the skeleton, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `load_adapter`, and differences of what this model does not have.
    """
    file = adapter_file(path, suffix)
    keys = read_header(file)[0]  # a truncated file is told apart from a wrong one
    own = {key: parameter_of(key, shapes) for key in keys if key.endswith(tuple(DIFFERENCES))}
    if unknown := [key for key, name in own.items() if name is None]:
        shown = ", ".join(unknown[:NAMES_SHOWN]) + (" ..." if len(unknown) > NAMES_SHOWN else "")
        raise ValueError(
            f"{file}: {len(unknown)} differences are of nothing that this model has, first {shown}; it is made for "
            "another model"
        )
    differences: dict[str, Tensor] = {}
    with safe_open(file, framework="pt", device="cpu") as stored:
        for key, name in own.items():
            assert name is not None, "refused above"
            if name in differences:
                raise ValueError(f"{file}: {name} has its difference twice, the second as {key}")
            differences[name] = stored.get_tensor(key).float()
    if own and len(own) == len(keys):
        return Merge({}, differences)
    matrices = {
        name.removesuffix(".weight"): LinearShape(shape[0], math.prod(shape[1:]))
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }
    adapter = read_adapter(file, matrices, own)
    for parts in adapter.modules.values():
        # of a convolution: A [rank, in, t, h, w] and B [out, rank, 1, 1, 1]
        parts |= {part: parts[part].flatten(1) for part in (LORA_A, LORA_B) if part in parts and parts[part].ndim > 2}
    return Merge(folded(file, adapter, matrices, base), differences)


def parameter_of(key: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The skeleton's parameter that a difference is of; None where it has none: `diffusion_model.blocks.0.norm3.diff`
    is of `blocks.0.norm2.weight`, `diffusion_model.blocks.0.diff_m` of `blocks.0.scale_shift_table`."""
    ending = next(ending for ending in DIFFERENCES if key.endswith(ending))
    owner, leaf = key.removesuffix(ending), DIFFERENCES[ending]
    if leaf == "modulation":
        names = [skeleton_module(f"{owner}.{leaf}")]
    else:
        module = skeleton_module(owner)
        names = [f"{module}.{leaf}", module if ending == ".diff" else None]  # some are no weight of a module
    return next((name for name in names if name in shapes), None)
