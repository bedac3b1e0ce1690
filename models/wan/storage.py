"""What each weight of the transformer is kept in, by the settings and by what a float8 file holds."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from models.casting import CastLinear, CastRMSNorm
from models.quantised import FLOAT8, FORMATS, SCALE, WEIGHT
from models.wan.config import WanModelConfig
from models.wan.variants import Architecture
from models.weights import WeightReader

# parameter of the skeleton -> the field of `Storage` with its frozen dtype, or float32; the first match counts
ROWS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(.*\.)?scale_shift_table"), "float32"),
    (re.compile(r"condition_embedder\.time_(embedder|proj)\..*"), "float32"),
    (re.compile(r"condition_embedder\.image_embedder\.(norm\d\..*|pos_embed)"), "float32"),
    (re.compile(r"blocks\.\d+\.(.*\.)?norm\w*\.(weight|bias)"), "float32"),
    (re.compile(rf".*{re.escape(SCALE)}"), "float32"),
    (re.compile(r"blocks\.\d+\..*\.weight"), "linear"),
    (re.compile(r".*"), "compute"),
)
ANY_FLOAT8 = "float8"  # the value of transformer_dtype that takes the float8 of the file, where it has one


class Storage(NamedTuple):
    """The dtypes of one transformer."""

    compute: torch.dtype
    linear: torch.dtype  # of the blocks' Linear weights that are not in `float8`
    float8: Mapping[str, torch.dtype]  # weights that stay as their file has them
    scales: Mapping[str, tuple[int, ...]]  # `<module>.weight_scale` of those among them that have one -> its shape

    def dtype(self, name: str) -> torch.dtype:
        """Of the skeleton's parameter `name` while it is frozen."""
        if name in self.float8:
            return self.float8[name]
        field = _field(name)
        return torch.float32 if field == "float32" else getattr(self, field)


def _field(name: str) -> str:
    return next(field for pattern, field in ROWS if pattern.fullmatch(name))


def keeps_scale(config: WanModelConfig, weight: str) -> bool:
    """Whether a weight that its file has in float8 with a scale stays so. The few outside the blocks do not."""
    asked = config.transformer_dtype
    return _field(weight) == "linear" and (asked is None or asked.startswith(ANY_FLOAT8))


def choose_storage(config: WanModelConfig, reader: WeightReader) -> Storage:
    """Read off `reader`, which was opened with `keeps_scale`.

    Raises:
        ValueError: weights have scales, and transformer_dtype names another float8 than theirs.
    """
    asked = config.transformer_dtype
    scales = {name: shape for name, shape in reader.shapes().items() if name.endswith(SCALE)}
    float8 = {
        name: dtype
        for name, dtype in reader.dtypes().items()
        if dtype in FLOAT8
        and _field(name) == "linear"
        and (asked == ANY_FLOAT8 or name.removesuffix(WEIGHT) + SCALE in scales)
    }
    for name, dtype in float8.items():
        # their scales were made for the range of their own float8
        if asked in FORMATS and FORMATS[asked] != dtype:
            raise ValueError(
                f"[model] transformer_dtype = '{asked}': {reader.location} has {name} in {str(dtype)[6:]} with a "
                f"scale; remove the key to keep it so, or set it to '{config.dtype}'"
            )
    return Storage(config.compute_dtype, config.linear_dtype, float8, scales)


def resized(storage: Storage, sizes: Architecture) -> Storage:
    """The same for a transformer of other sizes: scales that stand for rows have as many as its Linears have."""

    def shape_of(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        rows = sizes.ffn_dim if ".ffn.net.0." in name else sizes.dim
        return tuple(rows if axis == 0 and length > 1 else length for axis, length in enumerate(shape))

    return storage._replace(scales={name: shape_of(name, shape) for name, shape in storage.scales.items()})


def swap_casting_modules(skeleton: WanTransformer3DModel, storage: Storage) -> None:
    """Put into the blocks modules that cast on use, where what is stored differs from what is computed in."""
    for name, module in list(skeleton.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.RMSNorm) and storage.compute != torch.float32:
            swapped: nn.Module = CastRMSNorm(module.normalized_shape, module.eps, device="meta")
        elif isinstance(module, nn.Linear) and storage.dtype(name + WEIGHT) != storage.compute:
            stored = storage.dtype(name + WEIGHT)
            swapped = CastLinear(module, stored, storage.compute, storage.scales.get(name + SCALE))
        else:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(skeleton.get_submodule(owner), leaf, swapped)
