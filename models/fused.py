"""A checkpoint's weights with the changes of adapters added while they are read."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from models.adapters import delta_weight
from models.base import WeightSource


class LoadedAdapter(NamedTuple):
    """One adapter that is to be added."""

    key: str  # where it was named, for messages
    weight: float  # what its change of weight is multiplied with
    modules: Mapping[str, Mapping[str, Tensor]]  # parts by module, alpha folded in, on the CPU
    differences: Mapping[str, Tensor] = MappingProxyType({})  # by parameter: added whole


class FusedWeights:
    """Tensors of a checkpoint with the adapters' changes added in float32, in their order; meets `WeightSource`.

    One tensor at a time: no more than one weight and its change are held. What it is stored in is decided later, so
    nothing is rounded in between.

    Args:
        device: where sums and products are taken; what is read comes back to the CPU.
    """

    def __init__(
        self, weights: WeightSource, loaded: Sequence[LoadedAdapter], device: torch.device | str = "cpu"
    ) -> None:
        self._weights, self._loaded, self._device = weights, loaded, device

    def names(self) -> set[str]:
        return self._weights.names()

    def read(self, name: str) -> Tensor:
        """As stored where no adapter changes it, else float32."""
        tensor = self._weights.read(name)
        module, _, leaf = name.rpartition(".")
        adapted = module if leaf == "weight" else ""
        changes = [each for each in self._loaded if adapted in each.modules or name in each.differences]
        if not changes:
            return tensor
        weight = tensor.to(self._device, torch.float32)
        for each in changes:
            if adapted in each.modules:
                parts = {part: factor.to(self._device) for part, factor in each.modules[adapted].items()}
                # a convolution's weight is a matrix with a row for each output, as adapters have it
                weight = weight + each.weight * delta_weight(parts, weight.flatten(1)).view_as(weight)
            if name in each.differences:
                weight = weight + each.weight * each.differences[name].to(self._device, torch.float32)
        return weight.cpu()
