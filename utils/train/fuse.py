"""`fuse_adapters`: adapters merged into the model's weights while these are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from models import adapters
from models.base import ModelFamily, WeightSource


@dataclass(frozen=True)
class Fusion:
    """One adapter to merge."""

    path: Path
    weight: float = 1.0  # what its change of weight is multiplied with
    expert: str = ""  # whose weights; empty where there is one model


class Loaded(NamedTuple):
    """One adapter, read."""

    key: str  # where it stands in the config, for messages
    weight: float
    modules: Mapping[str, Mapping[str, Tensor]]  # parts by module, on the CPU


class FusedWeights:
    """A checkpoint whose tensors come with the adapters' changes added in float32, in their order.

    One tensor at a time: no more than one weight and its change are held. What it is stored in is decided later, so
    nothing is rounded in between.
    """

    def __init__(self, weights: WeightSource, loaded: Sequence[Loaded]) -> None:
        self._weights, self._loaded = weights, loaded

    def names(self) -> set[str]:
        return self._weights.names()

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        module, _, leaf = name.rpartition(".")
        for adapter in self._loaded if leaf == "weight" else ():
            if module in adapter.modules:
                base = tensor.float()
                tensor = base + adapter.weight * adapters.delta_weight(adapter.modules[module], base)
        return tensor


def check_expert_names(fusions: Sequence[Fusion], experts: Sequence[str]) -> None:
    """`ValueError` for an entry whose expert is not among those trained; one model has an empty name."""
    for index, fusion in enumerate(fusions):
        if fusion.expert in experts:
            continue
        if experts == [""]:
            mend = f"names expert = '{fusion.expert}', and this run trains one model; remove expert"
        else:
            names = " or ".join(f"'{name}'" for name in experts)
            mend = f"has expert = '{fusion.expert}', and this run trains two; set expert = {names}, an entry for each"
        raise ValueError(f"fuse_adapters[{index}] {mend}")


def load_fusions(family: ModelFamily, fusions: Sequence[Fusion]) -> list[Loaded]:
    """Read the adapters, in any format that the family knows. `ValueError` names the entry that cannot be read."""
    loaded: list[Loaded] = []
    for index, fusion in enumerate(fusions):
        key = f"fuse_adapters[{index}]"
        try:
            # its own alpha is folded in; a DoRA counts from what the adapters before it made of the weights
            tensors = family.load_adapter(fusion.path, FusedWeights(family.open_weights(), loaded))
            modules = adapters.by_module(tensors)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from error
        loaded.append(Loaded(key, fusion.weight, modules))
    return loaded


def check_fusions(skeleton: nn.Module, loaded: Sequence[Loaded]) -> None:
    """Whether the adapters can be merged into this model.

    Args:
        skeleton: on meta; with an adapter of its own or without.

    Raises:
        ValueError: a module that is not there, has another shape, or is kept in scaled fp8.
    """
    shapes = {adapters.base_name(name): tuple(p.shape) for name, p in skeleton.named_parameters()}
    for key, _, modules in loaded:
        for module, parts in modules.items():
            try:
                found = adapters.delta_shape(parts)
            except ValueError as error:
                raise ValueError(f"{key}: {module} {error}") from error
            wanted = shapes.get(f"{module}.weight")
            if found != wanted:
                there = f"has weights of {list(wanted)}" if wanted else "is no module of this model"
                raise ValueError(
                    f"{key}: the adapter's {list(found)} are for {module}, which {there}; it is made for another model"
                )
            if f"{module}.weight_scale" in shapes:
                raise ValueError(
                    f"{key}: {module} is kept in scaled fp8, which the sum cannot be rounded to; use the bfloat16 file "
                    "of the model, or set transformer_dtype = 'bfloat16' in [model]"
                )
