"""Loss masks of a micro-batch, as every family reads them from its samples."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

KEY = "mask"  # in a sample: uint8 [T, H, W] on the grid of its latents, 255 where all of the error counts
WHITE = 255


def loss_mask(samples: Sequence[Mapping[str, Tensor]], frames: int, height: int, width: int) -> tuple[Tensor, ...]:
    """What is left of the error in each place, ones for samples without a mask; nothing where no sample has one.

    Args:
        frames, height, width: of the latents.

    Returns:
        (mask [B, 1, T, H, W],), float32 in [0, 1]; or ().
    """
    if not any(KEY in sample for sample in samples):
        return ()
    grid = (frames, height, width)
    whole = torch.full(grid, WHITE, dtype=torch.uint8)
    masks = [sample.get(KEY, whole) for sample in samples]
    assert all(mask.shape == grid for mask in masks), f"{[tuple(mask.shape) for mask in masks]} for latents {grid}"
    return ((torch.stack(masks).float() / WHITE)[:, None],)
