"""Stands among the encoders for what is made of loss masks: workers do all of it, and no device is needed."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from models.base import Encoder
from models.masks import KEY
from utils.data.records import MASK


class MaskEncoder(Encoder):
    """`{"mask": uint8 [T, H, W]}` of each array that `masks.mask_grid` made."""

    kind: ClassVar[str] = MASK
    reads: ClassVar[Literal["pixels", "ends", "caption", "mask"]] = "mask"

    def fingerprint(self) -> Mapping[str, Any]:
        """For people: the keys of masks come from `Keys.mask`."""
        return {"encoder": "loss masks"}

    def load(self, device: torch.device) -> None:
        """There is nothing to load."""

    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        return [{KEY: torch.as_tensor(item)} for item in items]

    def unload(self) -> None:
        """There is nothing to unload."""
