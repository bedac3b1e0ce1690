"""A checkpoint into the models and optimizers of a run, whatever the number of stages that wrote it."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from utils import dist
from utils.train.beside import Beside
from utils.train.checkpoint import (
    STATE,
    CheckpointError,
    Part,
    damaged,
    explain,
    manifest_of,
    name_another,
    save_of,
    sweep,
)
from utils.train.disk import attempt, first_trouble
from utils.train.export import clear_saved
from utils.train.optimizers import load_optimizer_state_by_name, merge_optimizer_states
from utils.train.state import TrainState, course_mark

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What a checkpoint says beside tensors."""

    state: TrainState
    epochs_done: int
    course: dict[str, Any]
    meters: dict[str, Any]
    owed: tuple[str, ...] = ()  # what was due at its step and not done any more, see `utils.train.saving`
    mark: str = ""  # of models that were saved at its step


def load(folder: Path, parts: Mapping[str, Part], *, is_ours: bool = True) -> Loaded:
    """Fill this stage's parameters and optimizers, by expert, from a checkpoint of any number of stages. Every rank
    calls this.

    Each rank reads and checks the files that it takes tensors from, and no other.

    Args:
        is_ours: what saves that were cut short left beside `folder` is removed; not where another start may be at work.

    Raises:
        CheckpointError: damaged or not the same for all, on all ranks alike; or made by a run that trained other models
            or tensors.
    """
    manifest = _seen_by_all(folder)
    saved = {told.get("expert", "") for name, told in manifest["files"].items() if name.endswith(".safetensors")}
    if saved != set(parts):
        raise CheckpointError(
            f"{folder} holds {_experts(saved)}, and this run trains {_experts(set(parts))}; go on with the [model] "
            "table that it was made with"
        )
    _refuse_other_tensors(folder, manifest, parts)
    mine, unread = _files(manifest, parts)
    trouble = first_trouble(next(damaged(folder, manifest, mine), None))
    if trouble is not None:
        raise CheckpointError(name_another(folder, trouble))
    if dist.is_main():
        if is_ours:
            _clear(folder.parent)
        if unread:
            Beside(lambda: _warn_of_damage(folder, manifest, unread), "look at unread files")
    for expert, part in parts.items():
        _load_weights(folder, _holders(manifest, ".safetensors", expert), part.trained)
        if part.optimizer is not None:
            _load_optimizer(folder, _holders(manifest, ".pt", expert), part.trained, part.optimizer)
    content = json.loads((folder / STATE).read_text())
    state, course, meters = TrainState(**content["state"]), content["course"], content["meters"]
    owed = tuple(content.get("owed", ()))
    return Loaded(state, content["epochs_done"], course, meters, owed, course_mark(state, course, meters))


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint; every file's size and hash is compared with the manifest. Nothing: sound."""
    manifest = manifest_of(folder)
    if manifest is None:
        return [explain(folder.parent, f"{folder.name} that is complete")]
    return list(damaged(folder, manifest, manifest["files"]))


def _seen_by_all(folder: Path) -> dict[str, Any]:
    """The manifest, which must be the same for every rank: stages that go on from two courses would train on noise,
    samples and targets of different steps, and nothing would tell.

    Raises:
        CheckpointError: on all ranks alike.
    """
    manifest = manifest_of(folder)
    mine = "nothing that is complete"
    if manifest is not None:
        digest = manifest["files"].get(STATE, {}).get("blake2b", "none")
        mine = f"{folder.name}, save {save_of(manifest)}, {STATE} {digest[:8]}"
    of_ranks = dist.gather_text(mine)
    if len(set(of_ranks)) > 1:
        told = "; ".join(f"rank {rank}: {seen}" for rank, seen in enumerate(of_ranks))
        raise CheckpointError(
            f"ranks do not see the same checkpoint in {folder}: {told}. All nodes must share output_dir; if they do, "
            "its disk is late: start again"
        )
    if manifest is None:
        raise CheckpointError(explain(folder.parent, f"{folder.name} that is complete"))
    return manifest


def _files(manifest: Mapping[str, Any], parts: Mapping[str, Part]) -> tuple[list[str], list[str]]:
    """Those that this rank takes something from, and those that no rank does.

    All tensors are trained by some rank, so files are left over only where the optimizer starts afresh.
    """
    mine, read = {STATE}, {STATE}
    for expert, part in parts.items():
        for ending in (".safetensors", ".pt")[: 1 if part.optimizer is None else 2]:
            holders = _holders(manifest, ending, expert)
            mine |= {holders[name] for name in part.trained if name in holders}
            read |= set(holders.values())
    return sorted(mine), sorted(set(manifest["files"]) - read)


def _warn_of_damage(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    try:
        for told in damaged(folder, manifest, names):
            logger.warning("%s; this start does not need it", told)
    except OSError as error:
        logger.warning("%s: %s; this start does not need it", folder, error)


def _clear(run_dir: Path) -> None:
    left: list[str] = []
    troubles = [attempt(lambda clear=clear: left.extend(clear(run_dir))) for clear in (sweep, clear_saved)]
    if left:
        logger.info("removed what a save that was cut short had left: %s", ", ".join(left))
    for trouble in filter(None, troubles):
        logger.warning("what a save that was cut short had left cannot be removed: %s", trouble)


def _experts(names: set[str]) -> str:
    return f"the experts {', '.join(sorted(names))}" if names != {""} else "one model"


def _refuse_other_tensors(folder: Path, manifest: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
    """Raise where what all stages train and what was saved are not the same names: left out, a DoRA's magnitudes would
    be gone without a word. All ranks raise alike."""
    mine = json.dumps({expert: list(part.trained) for expert, part in parts.items()})
    of_ranks = [json.loads(told) for told in dist.gather_text(mine)]
    for expert in parts:
        saved = set(_holders(manifest, ".safetensors", expert))
        trained = {name for of_rank in of_ranks for name in of_rank[expert]}
        found = {"missing": sorted(trained - saved), "not trained now": sorted(saved - trained)}
        told = [f"{len(names)} {what}, first {names[0]}" for what, names in found.items() if names]
        if told:
            raise CheckpointError(
                f"{folder} holds other tensors than this run trains: {', '.join(told)}; rank, exclude_modules and the "
                "kind of adapter must be those of the run"
            )


def _load_weights(folder: Path, holder: Mapping[str, str], trained: Mapping[str, nn.Parameter]) -> None:
    for file in sorted({holder[name] for name in trained}):
        with safe_open(folder / file, framework="pt") as reader:
            for name in (n for n in trained if holder[n] == file):
                value, parameter = reader.get_tensor(name), trained[name]
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{folder / file}: {name} is {list(value.shape)}, this run's is {list(parameter.shape)}; "
                        "set [adapter] rank to what the checkpoint was made with"
                    )
                with torch.no_grad():
                    parameter.copy_(value)


def _load_optimizer(
    folder: Path, holder: Mapping[str, str], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    files = sorted({holder[name] for name in trained if name in holder})
    parts = (torch.load(folder / file, map_location="cpu", weights_only=True) for file in files)
    missing = load_optimizer_state_by_name(optimizer, list(trained.items()), merge_optimizer_states(parts))
    if missing:
        raise CheckpointError(
            f"{folder} has no optimizer state for {len(missing)} tensors, first {missing[0]}; was it made with another "
            "optimizer? --reset_optimizer starts it afresh"
        )


def _holders(manifest: Mapping[str, Any], ending: str, expert: str) -> dict[str, str]:
    """Which file holds which tensor of an expert."""
    files = {
        name: told
        for name, told in manifest["files"].items()
        if name.endswith(ending) and told.get("expert", "") == expert
    }
    return {tensor: name for name, told in files.items() for tensor in told["tensors"]}
