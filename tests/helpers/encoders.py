"""Small real encoders that count their calls, for tests of the cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.base import ClipEnds, Encoder


class CountingEncoder(Encoder):
    """Counts what it encodes, and insists on being loaded."""

    def __init__(self, weights: Path) -> None:
        self.weights = weights
        self.items: list[Any] = []
        self.batches: list[int] = []
        self.loads = 0
        self.loaded = False

    def fingerprint(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "files": [str(self.weights)]}

    def load(self, device: torch.device) -> None:
        self.loaded = True
        self.loads += 1

    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        assert self.loaded
        self.batches.append(len(items))
        return [self._encode_one(item) for item in items]

    def _encode_one(self, item: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def unload(self) -> None:
        self.loaded = False


class ConvEncoder(CountingEncoder):
    """Pixels [F, h, w, 3] to latents [16, (F + 3) // 4, h // 8, w // 8] through one convolution."""

    kind, reads = "latents", "pixels"

    def __init__(self, weights: Path) -> None:
        super().__init__(weights)
        generator = torch.Generator().manual_seed(0)
        self.conv = nn.Conv3d(3, 16, (1, 8, 8), (4, 8, 8))
        self.conv.weight.data = torch.randn(self.conv.weight.shape, generator=generator) / 14
        nn.init.zeros_(self.conv.bias)

    def _encode_one(self, item: np.ndarray) -> dict[str, Tensor]:
        self.items.append(item.copy())  # the original is overwritten later
        pixels = torch.as_tensor(item).permute(3, 0, 1, 2).float() / 127.5 - 1
        return {"latents": self.conv(pixels)}


class EndsEncoder(CountingEncoder):
    """The ends of a clip to one number each: the mean grey of the frame."""

    reads = "ends"

    def _encode_one(self, item: ClipEnds) -> dict[str, Tensor]:
        assert isinstance(item, ClipEnds) and item.pixels.dtype == np.uint8 and item.pixels.shape[0] == 2
        self.items.append(item._replace(pixels=item.pixels.copy()))  # the original is overwritten later
        return {self.kind: torch.as_tensor(item.pixels).float().mean(dim=(1, 2, 3))}


class ConditionEncoder(EndsEncoder):
    kind = "condition"


class ImageEncoder(EndsEncoder):
    kind = "image"


class ByteEncoder(CountingEncoder):
    """Captions to states [bytes + 1, 8]."""

    kind, reads = "text", "caption"

    def _encode_one(self, item: str) -> dict[str, Tensor]:
        self.items.append(item)
        table = torch.randn(257, 8, generator=torch.Generator().manual_seed(1))
        return {"text": table[[*item.encode(), 256]]}
