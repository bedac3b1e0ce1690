"""A toy family in which one caption poisons what passes through the third block: forward, backward, or its weight."""

import os
from typing import ClassVar

import torch
from torch import Tensor, nn

from tests.helpers.toy import ToyFamily, ToyWeights
from tests.helpers.toy_model import ToyBlock, ToyModel

HOW, LENGTH = "TOY_POISON", "TOY_POISON_LENGTH"  # "output", "gradient" or "weight"; of the caption, letters
EVALUATED = "TOY_POISON_EVALUATED"  # the same for one that is evaluated, of which the output is poisoned
BLOCK = 2  # on the second of two stages


class Poisoned(torch.autograd.Function):
    """The same numbers, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


def is_hit(context: Tensor, which: str) -> bool:
    return bool((context[:, 0, 0] * 100 - float(os.environ.get(which, "-1"))).abs().min() < 1e-3)


class PoisonBlock(ToyBlock):
    def forward(self, boundary):
        x, context, grid = super().forward(boundary)
        if not torch.is_grad_enabled() and is_hit(context, EVALUATED):
            return x * torch.nan, context, grid
        hit = is_hit(context, LENGTH)
        if hit and os.environ.get(HOW) == "gradient":
            x = Poisoned.apply(x)
        return x * torch.nan if hit and os.environ.get(HOW) == "output" else x, context, grid


class PoisonWeights(ToyWeights):
    def read(self, name: str) -> Tensor:
        value = super().read(name)
        if os.environ.get(HOW) == "weight" and name == f"blocks.{BLOCK}.up.weight":
            value[0, 0] = torch.nan
        return value


class PoisonToy(ToyFamily):
    Config: ClassVar[type] = type("PoisonConfig", (ToyFamily.Config,), {})

    def build_skeleton(self):
        with torch.device("meta"):
            model = ToyModel()
            blocks = list(model.blocks)
            model.blocks = nn.ModuleList([*blocks[:BLOCK], PoisonBlock(8), *blocks[BLOCK + 1 :]])
            return model

    def open_weights(self):
        return PoisonWeights()
