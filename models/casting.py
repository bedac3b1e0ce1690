"""Modules whose weights are stored in another dtype than they are used in."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A frozen Linear whose weight is stored in one dtype, float8 for instance, and used in another."""

    def __init__(self, linear: nn.Linear, storage_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=compute_dtype
        )
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=storage_dtype), requires_grad=False)
        self._compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self._compute_dtype)
        return _CastMatmul.apply(x.to(self._compute_dtype), self.weight, bias)


class _CastMatmul(torch.autograd.Function):
    """x @ W^T + b with W cast on use. Plain autograd would keep the cast copy of every weight until backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not weight.requires_grad, "a weight stored in another dtype than it is used in cannot be trained"
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


class CastRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight may be stored in more bits than its input has.

    torch has a fused kernel, with sums in float32, only where both dtypes are equal; the fallback is slower and keeps
    float32 copies of the activations.
    """

    def forward(self, x: Tensor) -> Tensor:
        # autocast would bring such copies back: on CUDA, unlike on the CPU, it runs rms_norm in float32
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
