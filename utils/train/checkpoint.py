"""The checkpoints of a run folder: which there are, which of them is whole and newest, which may go.

    <run>/global_step40/
        state.json                  step, data position, course of the run, meters
        weights_00.safetensors      trained tensors of stage 0, by name
        optimizer_00.pt             optimizer state of stage 0, by parameter name (tensors and plain values only)
        weights_high_00.safetensors, optimizer_high_00.pt ... instead, where experts have names
        manifest.json               size and hash of each file above, and which save of the run it was; written last
    <run>/latest                    "global_step40"

Everything is written in `<run>/tmp-global_step40` and renamed in one go, so a folder named global_step... is whole.
`checkpoint_write` makes them and `checkpoint_read` loads them.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.train.disk import Disk

FORMAT = 1
NAME = re.compile(r"global_step(\d+)")
SAVED_NAME = re.compile(r"(epoch|step)\d+")
STAGED, DOOMED = "tmp-", "tmp-old-"  # before the name of a checkpoint that is being written, or deleted
MANIFEST, STATE, POINTER = "manifest.json", "state.json", "latest"
START_FROM_WEIGHTS = "to start anew from them, set [adapter] init_from_existing (a LoRA) or [model] transformer_path"
NONE_YET = "found: none; start without --resume_from_checkpoint, and what is encoded is found in the cache"

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; says what is there and what would help."""


class Part(NamedTuple):
    """What one model brings: this stage's share."""

    trained: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer | None  # None: its state is left out of a load


def find(run_dir: Path) -> Path:
    """The complete checkpoint that was written last.

    That is not always the one of most steps: after going back to an earlier one, what lies beyond it belongs to the
    course that was left. Of those that an older version wrote, which did not count its saves, `latest` names it.

    Raises:
        CheckpointError: there is none; lists what there is.
    """
    complete_staged(run_dir)
    folders = [p for p in run_dir.iterdir() if NAME.fullmatch(p.name)] if run_dir.is_dir() else []
    whole = {folder: manifest for folder in folders if (manifest := manifest_of(folder)) is not None}
    for folder in sorted(set(folders) - set(whole), key=step_of):
        logger.warning("%s is not complete, and passed over", folder)
    if not whole:
        raise CheckpointError(explain(run_dir))
    latest = _latest(run_dir)
    return max(whole, key=lambda folder: (save_of(whole[folder]), folder.name == latest, step_of(folder)))


def complete_staged(run_dir: Path) -> None:
    """Do the last rename for a save that was cut short between its manifest and that. Any rank may be first."""
    for staged in run_dir.glob(f"{STAGED}global_step*"):
        final = staged.with_name(staged.name.removeprefix(STAGED))
        if NAME.fullmatch(final.name) and not final.exists() and manifest_of(staged) is not None:
            with suppress(OSError):
                os.replace(staged, final)
                logger.info("%s: its save was cut short after the last file; taken as it is", final)


def sweep(run_dir: Path, disk: Disk | None = None) -> list[str]:
    """Remove what saves and deletions that were cut short left behind; their names. Raises `OSError`."""
    left = sorted(run_dir.glob(f"{STAGED}*global_step*"))
    for folder in left:
        (disk or Disk()).remove(folder)
    return [folder.name for folder in left]


def _latest(run_dir: Path) -> str:
    pointer = run_dir / POINTER
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
        name if manifest_of(run_dir / name) is not None else f"{name} (incomplete)"
        for name in names
        if NAME.fullmatch(name)
    ]
    weights = f"; {', '.join(saved)} hold weights only: {START_FROM_WEIGHTS}" if saved else ""
    told = f"found: {', '.join(found)}" if found else NONE_YET
    return f"no {wanted} in {run_dir}; {told}{weights}"


def prune(run_dir: Path, keep_last: int | None, newest: int, disk: Disk | None = None) -> None:
    """Delete all but the last `keep_last` complete checkpoints up to step `newest`, which was just written.

    Those of later steps go first: training went back to before them, so they are of a course that was left.

    Raises:
        OSError: one cannot be deleted.
    """
    if keep_last is None:
        return
    disk = disk or Disk()
    complete = [p for p in run_dir.iterdir() if NAME.fullmatch(p.name) and manifest_of(p) is not None]
    for old in sorted(complete, key=lambda p: (step_of(p) <= newest, step_of(p)))[:-keep_last]:
        # under another name first: a delete that is cut short must not leave half a checkpoint
        doomed = old.with_name(DOOMED + old.name)
        disk.rename(old, doomed)
        disk.remove(doomed)


def read_course(folder: Path) -> dict[str, Any]:
    """What decided the order of the data in the run that wrote the checkpoint."""
    return json.loads((folder / STATE).read_text())["course"]


def course_changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that are not what they were, as `key old -> new`; one that the checkpoint's version did not write yet
    counts as unchanged."""
    told = json.loads(json.dumps(now))  # as `saved` was: tuples are lists there
    changed = [key for key in told if key in saved and saved[key] != told[key]]
    return [f"{key} {_shown(saved[key])} -> {_shown(told[key])}" for key in changed]


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def step_of(folder: Path) -> int:
    found = NAME.fullmatch(folder.name)
    return int(found.group(1)) if found else -1


def save_of(manifest: Mapping[str, Any]) -> int:
    """Which save of its run folder a checkpoint was, from 1; 0 where its version did not count them."""
    return int(manifest.get("save", 0))


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest if all files are there at their size."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        whole = manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == told["bytes"] for name, told in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None
