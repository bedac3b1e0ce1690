"""Modules whose weights are stored in another dtype than they are used in."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.quantised import row_scale


class CastLinear(nn.Linear):
    """A frozen Linear whose weight is stored in one dtype, float8 for instance, and used in another.

    Args:
        scale_shape: of a float32 `weight_scale` with one element or one a row, as the file has it; W = weight * scale.
    """

    def __init__(
        self,
        linear: nn.Linear,
        storage_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        scale_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=compute_dtype
        )
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=storage_dtype), requires_grad=False)
        scale = None if scale_shape is None else torch.empty(tuple(scale_shape), device="meta", dtype=torch.float32)
        self.weight_scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self._compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self._compute_dtype)
        return _CastMatmul.apply(x.to(self._compute_dtype), self.weight, self.weight_scale, bias)


def _expanded(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W in `dtype`, rounded once: float8 is exact in every dtype that is computed in, and a product with a scale of one
    dimension or more is taken in the scale's float32, on CUDA without a float32 copy of the weight."""
    cast = weight.to(dtype)
    return cast if scale is None else cast.mul_(row_scale(scale, cast.ndim))


class _CastMatmul(torch.autograd.Function):
    """x @ W^T + b with W cast on use. Plain autograd would keep the cast copy of every weight until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        assert not weight.requires_grad, "a weight stored in another dtype than it is used in cannot be trained"
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _expanded(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ _expanded(weight, scale, grad.dtype), None, None, None


class CastRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight may be stored in more bits than its input has.

    torch has a fused kernel, with sums in float32, only where both dtypes are equal; the fallback is slower and keeps
    float32 copies of the activations.
    """

    def forward(self, x: Tensor) -> Tensor:
        # autocast would bring such copies back: on CUDA, unlike on the CPU, it runs rms_norm in float32
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
