"""Models that take the optimizer steps in turns; one of them is on the device, the others wait in host memory."""

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.base import ModelFamily
from utils.train.build import Built, EngineSettings, build_engine, check_settings
from utils.train.engine import ReelEngine
from utils.train.fuse import check_expert_names

SHOWN_TURNS = 6  # enough to tell two patterns apart
SHOWN_STEPS = 100


class Expert(NamedTuple):
    """One of the models: what is known of it, and this rank's part of it."""

    family: ModelFamily
    built: Built


class Experts:
    """All models of a run by name. Most runs have one, unnamed, which never waits.

    Args:
        family: decides whose turn it is.
        members: built; the last one is awake.
    """

    def __init__(self, family: ModelFamily, members: Mapping[str, Expert]) -> None:
        self._family, self._members = family, dict(members)
        self.awake = list(self._members)[-1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __getitem__(self, name: str) -> Expert:
        return self._members[name]

    def items(self) -> ItemsView[str, Expert]:
        return self._members.items()

    @property
    def engine(self) -> ReelEngine:
        """Any engine, for what is the same for all: stage, data rank, grid."""
        return self._members[self.awake].built.engine

    @property
    def awake_first(self) -> list[str]:
        """In an order that begins without a switch."""
        return sorted(self._members, key=lambda name: name != self.awake)

    def wake(self, name: str) -> Expert:
        """The expert, on the device; the one that was there waits in host memory. Only between steps."""
        if name != self.awake:
            self._members[self.awake].built.engine.module.parking.park()  # first: there may be room for one
            self._members[name].built.engine.module.parking.wake()
            self.awake = name
        return self._members[name]

    def at(self, step: int) -> Expert:
        """Whose turn optimizer step `step` (from 0) is, on the device."""
        return self.wake(self._family.expert_at(step))


def build_experts(family: ModelFamily, settings: EngineSettings, device: torch.device) -> Experts:
    """An engine, an optimizer and a trained set for each expert, never two on the device.

    Raises:
        ValueError: as `build_engine`.
    """
    members: dict[str, Expert] = {}
    for name, each in family.experts().items():
        for earlier in members.values():
            earlier.built.engine.module.parking.park()
        members[name] = Expert(each, build_engine(each, _settings_of(settings, name), device))
    return Experts(family, members)


def check_experts(family: ModelFamily, settings: EngineSettings) -> None:
    """Everything that `build_experts` would refuse, found without weights. Raises `ValueError`."""
    experts = family.experts()
    given = settings.adapter.init_from_existing if settings.adapter else None
    if isinstance(given, Mapping) and set(given) - set(experts):
        names = ", ".join(filter(None, experts))
        mend = f"its keys must be among {names}" if names else "this run trains one model: give it one path"
        raise ValueError(f"[adapter] init_from_existing names {', '.join(sorted(set(given) - set(experts)))}; {mend}")
    if isinstance(given, Path) and given.is_file() and len(experts) > 1:
        each = ", ".join(f"{name} = '...'" for name in experts)
        raise ValueError(
            f"[adapter] init_from_existing: '{given}' is one file, and this run trains two models; give each its own, "
            f"{{{each}}}, or the folder that both were saved in"
        )
    check_expert_names(settings.fuse, list(experts))
    for name, expert in experts.items():
        check_settings(expert, _settings_of(settings, name))


def _settings_of(settings: EngineSettings, name: str) -> EngineSettings:
    """With the path of this expert where there is one for each, and what is merged into it alone."""
    settings = replace(settings, fuse=tuple(fusion for fusion in settings.fuse if fusion.expert == name))
    if settings.adapter is None or not isinstance(settings.adapter.init_from_existing, Mapping):
        return settings
    path = settings.adapter.init_from_existing.get(name)
    return replace(settings, adapter=replace(settings.adapter, init_from_existing=path))


def turns(family: ModelFamily) -> dict[str, Any]:
    """How steps are dealt out, for the comparison at resume: `3 high, 6 low, 3 high, ...`. Empty for one model."""
    if len(family.expert_shares()) == 1:
        return {}
    runs = [(name, len(list(steps))) for name, steps in groupby(map(family.expert_at, range(SHOWN_STEPS)))]
    shown = ", ".join(f"{count} {name}" for name, count in runs[:SHOWN_TURNS])
    return {"turns of the experts": shown + (", ..." if len(runs) > SHOWN_TURNS else "")}
