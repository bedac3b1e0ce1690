"""The full training state on disk: staged, complete or absent, and readable by any number of stages.

    <run>/global_step40/
        state.json                  step, data position, course of the run, meters
        weights_00.safetensors      trained tensors of stage 0, by name
        optimizer_00.pt             optimizer state of stage 0, by parameter name (tensors and plain values only)
        weights_high_00.safetensors, optimizer_high_00.pt ... instead, where experts have names
        manifest.json               size and hash of each file above; written last
    <run>/latest                    "global_step40"

Everything is written in `<run>/tmp-global_step40` and renamed in one go, so a folder named global_step... is whole.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.weights import write_safetensors
from utils import dist
from utils.data.stat_index import hash_file
from utils.train.optimizers import (
    load_optimizer_state_by_name,
    merge_optimizer_states,
    optimizer_state_by_name,
)
from utils.train.state import TrainState

FORMAT = 1
NAME = re.compile(r"global_step(\d+)")
SAVED_NAME = re.compile(r"(epoch|step)\d+")
START_FROM_WEIGHTS = "to start anew from them, set [adapter] init_from_existing (a LoRA) or [model] transformer_path"
SPARE_BYTES = 64 << 20  # left free on the disk, so that logs can still be written

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; says what is there and what would help."""


class Part(NamedTuple):
    """What one model brings: this stage's share."""

    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None  # None: its state is left out of a load


class Loaded(NamedTuple):
    """What a checkpoint says beside tensors."""

    state: TrainState
    epochs_done: int
    course: dict[str, Any]
    meters: dict[str, Any]


def save(
    run_dir: Path,
    state: TrainState,
    *,
    epochs_done: int,
    course: Mapping[str, Any],
    meters: Mapping[str, Any],
    parts: Mapping[str, Part],
    stage: int,
    data_rank: int,
    keep_last: int | None,
    note: Callable[[str], None] = lambda what: None,
) -> Path | None:
    """Write a checkpoint; every rank calls this. Returns None, and leaves earlier checkpoints as they are, when it
    could not be written: training can go on.

    Args:
        parts: by expert; a model that is alone has no name.
        note: told of each file, before it is written and before it is read again: either may take an hour.
    """
    final = run_dir / f"global_step{state.step}"
    staging = run_dir / f"tmp-{final.name}"
    payload = _payload(stage, parts) if data_rank == 0 else {}
    told = {"state": state.to_dict(), "epochs_done": epochs_done, "course": course, "meters": meters}
    trouble = _prepare(run_dir, staging, final, payload)
    if trouble is None:
        trouble, files = _write_all(staging, payload, note)
        if trouble is None and dist.is_main():
            trouble = attempt(lambda: _finish(staging, final, told, files))
        trouble = first_trouble(trouble)
    if trouble is not None:
        if dist.is_main():
            shutil.rmtree(staging, ignore_errors=True)
            logger.error("checkpoint at step %d not written: %s; training goes on", state.step, trouble)
        return None
    if dist.is_main():
        prune(run_dir, keep_last, newest=state.step)
    dist.barrier()
    return final


def load(folder: Path, parts: Mapping[str, Part]) -> Loaded:
    """Fill this stage's parameters and optimizers, by expert, from a checkpoint of any number of stages.

    Raises:
        CheckpointError: damaged, or made by a run that trained other models or tensors.
    """
    manifest = verify(folder)
    saved = {told.get("expert", "") for name, told in manifest["files"].items() if name.endswith(".safetensors")}
    if saved != set(parts):
        raise CheckpointError(
            f"{folder} holds {_experts(saved)}, and this run trains {_experts(set(parts))}; go on with the [model] "
            "table that it was made with"
        )
    _refuse_other_tensors(folder, manifest, parts)
    for expert, part in parts.items():
        _load_weights(folder, _holders(manifest, ".safetensors", expert), part.trained)
        if part.optimizer is not None:
            _load_optimizer(folder, _holders(manifest, ".pt", expert), part.trained, part.optimizer)
    content = json.loads((folder / "state.json").read_text())
    return Loaded(TrainState(**content["state"]), content["epochs_done"], content["course"], content["meters"])


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file's size and hash was compared with it."""
    manifest = _manifest(folder)
    if manifest is None:
        raise CheckpointError(explain(folder.parent, f"{folder.name} that is complete"))
    for name, told in manifest["files"].items():
        if hash_file(folder / name) != told["blake2b"]:
            others = [p for p in folder.parent.glob("global_step*") if p != folder and _manifest(p) is not None]
            older = ", ".join(f"{p.parent.name}/{p.name}" for p in sorted(others, key=_step_of)) or "none"
            raise CheckpointError(
                f"{folder / name} is damaged: its content is not what was written; name another one after "
                f"--resume_from_checkpoint: {older}"
            )
    return manifest


def find(run_dir: Path) -> Path:
    """The complete checkpoint that was written last: the one that `latest` names, else the one of most steps.

    They differ after going back to an earlier one: what lies beyond it belongs to the course that was left.

    Raises:
        CheckpointError: there is none; lists what there is.
    """
    folders = [p for p in run_dir.iterdir() if NAME.fullmatch(p.name)] if run_dir.is_dir() else []
    for folder in sorted(folders, key=lambda p: (p.name == _latest(run_dir), _step_of(p)), reverse=True):
        if _manifest(folder) is not None:
            return folder
        logger.warning("%s is not complete; looking for an older checkpoint", folder)
    raise CheckpointError(explain(run_dir))


def _latest(run_dir: Path) -> str:
    pointer = run_dir / "latest"
    return pointer.read_text().strip() if pointer.is_file() else ""


def explain(run_dir: Path, wanted: str = "complete checkpoint") -> str:
    """What there is in `run_dir` where `wanted` was looked for in vain."""
    if not run_dir.is_dir():
        return f"no run folder {run_dir}; check output_dir and the name given to --resume_from_checkpoint"
    if SAVED_NAME.fullmatch(run_dir.name):
        return f"{run_dir} holds weights only, no training state; {START_FROM_WEIGHTS}"
    names = sorted(path.name for path in run_dir.iterdir() if path.is_dir())
    saved = [name for name in names if SAVED_NAME.fullmatch(name)]
    found = [
        name if _manifest(run_dir / name) is not None else f"{name} (incomplete)"
        for name in names
        if NAME.fullmatch(name)
    ]
    weights = f"; {', '.join(saved)} hold weights only: {START_FROM_WEIGHTS}" if saved else ""
    return f"no {wanted} in {run_dir}; found: {', '.join(found) or 'none'}{weights}"


def prune(run_dir: Path, keep_last: int | None, newest: int) -> None:
    """Delete all but the last `keep_last` complete checkpoints up to step `newest`, which was just written.

    Those of later steps go first: training went back to before them, so they are of a course that was left.
    """
    if keep_last is None:
        return
    complete = [p for p in run_dir.iterdir() if NAME.fullmatch(p.name) and _manifest(p) is not None]
    for old in sorted(complete, key=lambda p: (_step_of(p) <= newest, _step_of(p)))[:-keep_last]:
        # under another name first: a delete that is cut short must not leave half a checkpoint
        doomed = old.with_name(f"tmp-old-{old.name}")
        os.replace(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read_course(folder: Path) -> dict[str, Any]:
    """What decided the order of the data in the run that wrote the checkpoint."""
    return json.loads((folder / "state.json").read_text())["course"]


def course_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not what they were, as `key old -> new`; one that the checkpoint's version did not write yet
    counts as unchanged."""
    told = json.loads(json.dumps(now))  # as `saved` was: tuples are lists there
    return [f"{key} {saved[key]} -> {told[key]}" for key in told if key in saved and saved[key] != told[key]]


def _step_of(folder: Path) -> int:
    found = NAME.fullmatch(folder.name)
    return int(found.group(1)) if found else -1


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest if all files are there at their size."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == told["bytes"] for name, told in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return None
    return manifest if whole else None


def _experts(names: set[str]) -> str:
    return f"the experts {', '.join(sorted(names))}" if names != {""} else "one model"


class _File(NamedTuple):
    """One file of the checkpoint before it is written."""

    expert: str
    content: dict[str, Any]


def _payload(stage: int, parts: Mapping[str, Part]) -> dict[str, _File]:
    files = {}
    for expert, (trained, optimizer) in parts.items():
        assert optimizer is not None, "a checkpoint without optimizer state cannot be gone on with"
        end = f"_{expert}_{stage:02d}" if expert else f"_{stage:02d}"
        weights = {name: p.detach().cpu().contiguous() for name, p in trained.items()}
        files[f"weights{end}.safetensors"] = _File(expert, weights)
        files[f"optimizer{end}.pt"] = _File(expert, optimizer_state_by_name(optimizer, list(trained.items())))
    return files


def payload_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(payload_bytes(v) for v in value.values())
    return sum(payload_bytes(v) for v in value) if isinstance(value, list | tuple) else 0


def _prepare(run_dir: Path, staging: Path, final: Path, payload: Mapping[str, _File]) -> str | None:
    """A clean staging folder and room for all; the same answer on every rank."""
    need = int(dist.sum_over_ranks(torch.tensor([payload_bytes(payload)], dtype=torch.int64)).item()) + SPARE_BYTES
    trouble = None
    if dist.is_main():

        def prepare() -> None:
            for old in run_dir.glob("tmp-*global_step*"):
                shutil.rmtree(old)
            free = shutil.disk_usage(run_dir).free
            if free < need:
                raise OSError(
                    f"need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free at {run_dir}; keeping earlier ones"
                )
            staging.mkdir()

        trouble = attempt(prepare)
    return first_trouble(trouble)


def _write_all(
    staging: Path, payload: Mapping[str, _File], note: Callable[[str], None]
) -> tuple[str | None, dict[str, Any]]:
    files: dict[str, Any] = {}

    def write() -> None:
        for name, (expert, content) in payload.items():
            path = staging / name
            note(f"writing {name}")
            if name.endswith(".safetensors"):
                write_safetensors(path, content)
            else:
                torch.save(content, path)
            _sync(path)
            note(f"hashing {name}")
            tensors = sorted(content if name.endswith(".safetensors") else content["shapes"])
            files[name] = {"bytes": path.stat().st_size, "blake2b": hash_file(path), "tensors": tensors}
            files[name] |= {"expert": expert} if expert else {}

    trouble = first_trouble(attempt(write))
    for part in dist.gather_text(json.dumps(files)):
        files |= json.loads(part)
    return trouble, files


def _finish(staging: Path, final: Path, told: Mapping[str, Any], files: dict[str, Any]) -> None:
    path = staging / "state.json"
    path.write_text(json.dumps(told, indent=1))
    _sync(path)
    files["state.json"] = {"bytes": path.stat().st_size, "blake2b": hash_file(path)}
    manifest = staging / "manifest.json"
    manifest.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    _sync(manifest)
    _sync(staging)
    replaced = final.with_name(f"tmp-old-{final.name}")
    if final.exists():  # written by an earlier start; kept until there is another
        os.replace(final, replaced)
    os.replace(staging, final)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = final.parent / "tmp-latest"
    pointer.write_text(final.name + "\n")
    _sync(pointer)
    os.replace(pointer, final.parent / "latest")
    _sync(final.parent)


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


def attempt(action: Callable[[], Any]) -> str | None:
    """Why `action`, which writes, failed; None when it did not. torch.save tells of a full disk by a RuntimeError."""
    try:
        action()
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def first_trouble(trouble: str | None) -> str | None:
    """The first rank's trouble, on every rank."""
    return next((text for text in dist.gather_text(trouble or "") if text), None)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
