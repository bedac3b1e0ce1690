"""Adapters on a skeleton: peft's layers for each kind, put in on meta and given their first values."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from peft.tuners.lokr import LoKrModel
from peft.tuners.lokr.layer import Linear as PeftLoKrLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from models.adapters import ADAPTER, MAGNITUDE, SKELETON_PARTS, first_value, is_adapter, row_norms
from models.quantised import dequantise


@dataclass(frozen=True)
class AdapterShape:
    """How large an adapter is and how much it counts."""

    rank: int
    alpha: float  # the adapter counts alpha / rank times
    dropout: float = 0.0  # share of the inputs zeroed while training; not for LoKr
    factor: int = -1  # LoKr: largest size of the first matrix; -1 cuts as evenly as can be
    decompose_both: bool = False  # LoKr: the first matrix may be a product of two as well


def add_adapter(skeleton: nn.Module, targets: Sequence[str], kind: str, shape: AdapterShape) -> None:
    """Give each Linear in `targets` an adapter, float32 and on meta; all other parameters stop requiring gradients.

    The adapters take their input as it comes: run the model under autocast where it is not float32. peft would first
    make a float32 copy of every input, which autocast turns straight back.

    Raises:
        ValueError: no targets.
    """
    if not targets:
        raise ValueError("[adapter] exclude_modules leaves no module to train; remove entries from it")
    # a string is a regex, a list means suffixes
    INJECTORS[kind](skeleton, "|".join(re.escape(name) for name in targets), shape)
    adapted = {name: module for name, module in skeleton.named_modules() if isinstance(module, BaseTunerLayer)}
    assert set(adapted) == set(targets), f"peft adapted {len(adapted)} modules of {len(targets)}"
    for module in adapted.values():
        module.cast_input_dtype_enabled = False
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(is_adapter(name))


def initial_value(skeleton: nn.Module, name: str, shape: Sequence[int], seed: int) -> Tensor:
    """First value, float32, of the parameter `name` of an adapted skeleton, such that the model is as it was.

    DoRA's magnitude comes from the frozen weight as it is kept, which therefore has to be in place already; skeletons
    list it first. All other values come from the name and the seed.
    """
    part = SKELETON_PARTS[MAGNITUDE]
    if name.endswith(part):
        module = skeleton.get_submodule(name.removesuffix(part))
        assert isinstance(module, DoraLinear)
        return row_norms(full_weight(module.get_base_layer()))
    return first_value(name, shape, seed)


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapter`, whatever the adapters have learned or started from. Not for passes
    that make a graph: adapters' parameters require no gradients inside."""
    adapted = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in adapted:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


def full_weight(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a Linear as it counts, a float32 copy: its scale is in it where it has one."""
    assert isinstance(linear, nn.Linear) and not linear.weight.is_meta, "a weight that is not there yet"
    scale = getattr(linear, "weight_scale", None)
    if scale is None:
        return linear.weight.detach().to(torch.float32, copy=True)
    return dequantise(linear.weight.detach(), scale.detach())


class _Magnitude(nn.Module):
    """Holds the lengths of the rows, under the name that peft gives them."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class _DoraVariant(DoraLinearVariant):
    """peft's DoRA for weights of any storage, and without its float32 copies of the activations."""

    @staticmethod
    def init(module: lora.Linear, adapter_name: str, **kwargs: Any) -> None:
        # peft takes the norm of the weight here, which on meta, in float8 or scaled cannot be had
        module.lora_magnitude_vector[adapter_name] = _Magnitude(module.out_features)

    @staticmethod
    def forward(module: lora.Linear, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """m * (W + s B A) x / ||W + s B A|| + bias, from `result` = W x + bias.

        The norm counts as a constant in the backward pass (arXiv 2402.09353, section 4.3).
        """
        base = module.get_base_layer()
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scaling = module.scaling[active_adapter]
        plain = result
        if module.training and not isinstance(module.lora_dropout[active_adapter], nn.Identity):
            x = module.lora_dropout[active_adapter](x)
            plain = base(x)
        if base.bias is not None:
            plain = plain - base.bias.to(plain.dtype)
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        ratio = magnitude / _adapted_norms(base, a, b, scaling)
        # The ratio is near 1, so its distance from 1 bears the dtype of the activations. On the other side it goes into
        # B: [out, rank] numbers in place of one a token.
        low_rank = F.linear(F.linear(x, a), b * (ratio * scaling)[:, None])
        return result + (ratio - 1).to(plain.dtype) * plain + low_rank


def _adapted_norms(base: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Lengths of the rows of W + s B A, [out] float32; never zero, so that a row of zeros stays one."""
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        norms = row_norms(full_weight(base).addmm_(b.float(), a.float(), alpha=scaling))
        return norms.clamp_min(torch.finfo(norms.dtype).tiny)


class DoraLinear(lora.Linear):
    """peft's LoRA layer with our DoRA."""

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        return {("use_dora",): _DoraVariant}


class LoKrLinear(PeftLoKrLinear):
    """peft's LoKr layer without the full matrix, and without a random number drawn in each forward pass.

    peft multiplies the input with the Kronecker product itself, which doubles the cost of the layer and, without
    recomputation, keeps a second copy of the whole model for the backward pass.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not self.merged, "we never merge"
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        first, second = (self._factors(name) for name in ("lokr_w1", "lokr_w2"))
        whole = first[0] if len(first) == 1 else first[0] @ first[1]
        return result + kronecker_linear(x, whole * self.scaling[ADAPTER], second).to(result.dtype)

    def _factors(self, name: str) -> list[Tensor]:
        """The matrix, or the two whose product it is."""
        names = [name] if ADAPTER in getattr(self, name) else [f"{name}_a", f"{name}_b"]
        return [getattr(self, part)[ADAPTER] for part in names]


def kronecker_linear(x: Tensor, first: Tensor, second: Sequence[Tensor]) -> Tensor:
    """x @ kron(first, second)^T by one small product after another.

    Args:
        x: [..., c * d].
        first: [a, c].
        second: one matrix [b, d], or two of them [b, r] and [r, d].

    Returns:
        [..., a * b].
    """
    (a, c), b, d = first.shape, second[0].shape[0], second[-1].shape[1]
    before, after = second[1:], second[:1]  # of two, the inner width r is what passes through the first matrix
    if len(second) == 1 and c * b <= a * d:
        before, after = second, ()  # of one, the smaller of [..., c, b] and [..., a, d] passes between
    rows = x.unflatten(-1, (c, d))
    for matrix in before:
        rows = F.linear(rows, matrix)
    rows = F.linear(rows.transpose(-1, -2), first).transpose(-1, -2)
    for matrix in after:
        rows = F.linear(rows, matrix)
    return rows.flatten(-2)


class _LoKrModel(LoKrModel):
    """Puts our layer in where peft would put its own."""

    layers_mapping = {nn.Linear: LoKrLinear}  # noqa: RUF012 (peft's attribute)


def _inject_lora(skeleton: nn.Module, targets: str, shape: AdapterShape) -> None:
    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout, target_modules=targets)
    inject_adapter_in_model(config, skeleton, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def _inject_dora(skeleton: nn.Module, targets: str, shape: AdapterShape) -> None:
    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout, target_modules=targets, use_dora=True
    )
    config._register_custom_module({nn.Linear: DoraLinear})  # peft's way to bring layers of one's own
    inject_adapter_in_model(config, skeleton, adapter_name=ADAPTER, low_cpu_mem_usage=True)


def _inject_lokr(skeleton: nn.Module, targets: str, shape: AdapterShape) -> None:
    config = LoKrConfig(
        r=shape.rank,
        alpha=shape.alpha,
        decompose_factor=shape.factor,
        decompose_both=shape.decompose_both,
        target_modules=targets,
    )
    _LoKrModel(skeleton, config, ADAPTER, low_cpu_mem_usage=True)


INJECTORS: Mapping[str, Callable[[nn.Module, str, AdapterShape], None]] = {
    "lora": _inject_lora,
    "dora": _inject_dora,
    "lokr": _inject_lokr,
}
