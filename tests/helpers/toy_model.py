"""The toy family's network, as diffusers has Wan's: embed, blocks, head, with several dtypes between them."""

import torch
from torch import nn


class ToyBlock(nn.Module):
    checkpointable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, boundary):
        x, context, grid = boundary
        return x + self.down(torch.tanh(self.up(x) + context.float().mean((1, 2))[:, None, None])), context, grid


class ToyEmbed(nn.Linear):
    def forward(self, inputs):
        x, t, text = inputs  # integers and a second float dtype cross the boundary too
        return super().forward(x.flatten(2).mT) + t[:, None, None], text.double(), torch.tensor(x.shape[2:])


class ToyHead(nn.Linear):
    def forward(self, boundary):
        return super().forward(boundary[0]).mT.unflatten(2, tuple(boundary[2].tolist()))


class ToyModel(nn.Module):
    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.embed, self.head = ToyEmbed(16, width), ToyHead(width, 16)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(blocks))
