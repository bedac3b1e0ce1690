"""`fuse_adapters`: adapters merged into the model's weights while these are read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models import adapters
from models.base import ModelFamily
from models.fused import FusedWeights, LoadedAdapter


@dataclass(frozen=True)
class Fusion:
    """One adapter to merge."""

    path: Path
    weight: float = 1.0  # what its change of weight is multiplied with
    expert: str = ""  # whose weights; empty where there is one model
    index: int | None = None  # in the config's list, for messages; its place among those given unless told


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


def load_fusions(family: ModelFamily, fusions: Sequence[Fusion]) -> list[LoadedAdapter]:
    """Read the adapters, in any format that the family knows. `ValueError` names the entry that cannot be read."""
    loaded: list[LoadedAdapter] = []
    for place, fusion in enumerate(fusions):
        key = f"fuse_adapters[{place if fusion.index is None else fusion.index}]"
        try:
            # its own alpha is folded in; a DoRA counts from what the adapters before it made of the weights
            merge = family.load_merge(fusion.path, FusedWeights(family.open_weights(), loaded))
            modules = adapters.by_module(merge.adapter)
        except (ValueError, OSError) as error:
            raise ValueError(f"{key}: {error}") from error
        loaded.append(LoadedAdapter(key, fusion.weight, modules, merge.differences))
    return loaded


def check_fusions(skeleton: nn.Module, loaded: Sequence[LoadedAdapter]) -> None:
    """Whether the adapters can be merged into this model.

    Args:
        skeleton: on meta; with an adapter of its own or without.

    Raises:
        ValueError: a module or parameter that is not there, has another shape, or is kept in scaled fp8.
    """
    shapes = {adapters.base_name(name): tuple(p.shape) for name, p in skeleton.named_parameters()}
    for each in loaded:
        for module, parts in each.modules.items():
            try:
                found = adapters.delta_shape(parts)
            except ValueError as error:
                raise ValueError(f"{each.key}: {module} {error}") from error
            wanted = shapes.get(f"{module}.weight")
            # a convolution's weight counts as a matrix with a row for each output
            matrix = (wanted[0], math.prod(wanted[1:])) if wanted and len(wanted) > 2 else wanted
            if found != matrix:
                there = f"has weights of {list(wanted)}" if wanted else "is no module of this model"
                raise _other_model(each.key, list(found), module, there)
        for name, difference in each.differences.items():
            wanted = shapes.get(name)
            if tuple(difference.shape) != wanted:
                there = f"is of {list(wanted)}" if wanted else "is no parameter of this model"
                raise _other_model(each.key, list(difference.shape), name, there)
        weights = {*(f"{module}.weight" for module in each.modules), *each.differences}
        if scaled := sorted(name for name in weights if f"{name}_scale" in shapes):
            raise ValueError(
                f"{each.key}: {scaled[0].removesuffix('.weight')} is kept in scaled fp8, which the sum cannot be "
                "rounded to; use the bfloat16 file of the model, or set transformer_dtype = 'bfloat16' in [model]"
            )


def _other_model(key: str, found: list[int], name: str, there: str) -> ValueError:
    return ValueError(f"{key}: the adapter's {found} are for {name}, which {there}; it is made for another model")
