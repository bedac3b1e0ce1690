"""The checkpoints of a run folder: which there are, which of them is whole and newest, which may go.

    <run>/global_step40/
        state.json                  step, data position, course of the run, meters
        weights_00.safetensors      trained tensors of stage 0, by name
        optimizer_00.pt             optimizer state of stage 0, by parameter name (tensors and plain values only)
        weights_high_00.safetensors, optimizer_high_00.pt ... instead, where experts have names
        manifest.json               size and hash of each file above, and which save of the run it was; written last
    <run>/latest                    "global_step40"

Everything is written in `<run>/tmp-global_step40` and renamed in one go, so a folder named global_step... is whole.
Each rank that writes files leaves in `<run>/tmp-parts-global_step40` what they are, once they are on the disk: a save
that was cut short after the last of them needs nothing more but a manifest, which whoever comes next writes.
`checkpoint_write` makes them and `checkpoint_read` loads them.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from utils.data.stat_index import hash_file
from utils.train.disk import Disk, HashedFile, attempt, replace

FORMAT = 1
NAME = re.compile(r"global_step(\d+)")
SAVED_NAME = re.compile(r"(epoch|step)\d+")
STAGED, DOOMED = "tmp-", "tmp-old-"  # before the name of a checkpoint that is being written, or deleted
PARTS = "tmp-parts-"  # before the name of the folder of what its ranks have written
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


def find(run_dir: Path, *, complete: bool = True) -> Path:
    """The complete checkpoint that was written last.

    That is not always the one of most steps: after going back to an earlier one, what lies beyond it belongs to the
    course that was left. Of those that an older version wrote, which did not count its saves, `latest` names it.

    Args:
        complete: first do what is left to do for one that lacks nothing but its place; for the one process that holds
            the folder.

    Raises:
        CheckpointError: there is none; lists what there is.
    """
    if complete:
        complete_staged(run_dir)
    folders = [p for p in run_dir.iterdir() if NAME.fullmatch(p.name)] if run_dir.is_dir() else []
    whole = {folder: manifest for folder in folders if (manifest := manifest_of(folder)) is not None}
    for folder in sorted(set(folders) - set(whole), key=step_of):
        logger.warning("%s is not complete, and passed over", folder)
    if not whole:
        raise CheckpointError(explain(run_dir))
    latest = _latest(run_dir)
    return max(whole, key=lambda folder: (save_of(whole[folder]), folder.name == latest, step_of(folder)))


def complete_staged(run_dir: Path, disk: Disk | None = None) -> None:
    """Do what is left to do, which is the manifest or the last rename, for a save that was cut short when all that it
    consists of was on the disk. One process at a time."""
    for staged in run_dir.glob(f"{STAGED}global_step*"):
        final = staged.with_name(staged.name.removeprefix(STAGED))
        files = parts_of(staged) if manifest_of(staged) is None else {}
        if not NAME.fullmatch(final.name) or files is None:
            continue
        disk = disk or Disk()
        trouble = attempt(partial(put_in_place, disk, staged, final, files))
        if trouble is None:
            attempt(partial(disk.sync, run_dir))  # before anything that it takes the place of is removed
            attempt(partial(disk.remove, parts_folder(staged)))
            logger.info("%s: its save was cut short after the last file; taken as it is", final)
        else:
            logger.warning("%s: its save was cut short after the last file, and it cannot be moved: %s", final, trouble)
    attempt(partial(put_back, run_dir, disk or Disk()))


def put_back(run_dir: Path, disk: Disk) -> None:
    """What was moved aside for another that never came, since the disk had failed by then. Raises `OSError`."""
    for aside in run_dir.glob(f"{DOOMED}global_step*"):
        final = aside.with_name(aside.name.removeprefix(DOOMED))
        if not final.exists() and manifest_of(aside) is not None:
            disk.rename(aside, final)


def put_in_place(
    disk: Disk, staged: Path, final: Path, files: Mapping[str, Any], moved: Callable[[], None] = lambda: None
) -> None:
    """The manifest, where there is none yet, and one rename.

    Args:
        files: for the manifest.
        moved: called after each piece that is written.

    Raises:
        OSError: nothing has changed then but what is in `staged`.
    """
    if manifest_of(staged) is None:
        before = [save_of(manifest_of(p) or {}) for p in final.parent.iterdir() if NAME.fullmatch(p.name)]
        manifest = {"format": FORMAT, "save": max(before, default=0) + 1, "files": files}
        write_json(disk, staged / MANIFEST, manifest, moved)
    disk.sync(staged)
    replace(disk, staged, final, final.with_name(DOOMED + final.name))  # the older one is of an earlier start


def parts_of(staged: Path) -> dict[str, Any] | None:
    """What the ranks say that they have written to a checkpoint on its way, for the manifest; None until all have, and
    where a file is not as it is told."""
    files: dict[str, Any] = {}
    parts = sorted(parts_folder(staged).glob("rank_*.json"))
    try:
        told = [json.loads(part.read_text()) for part in parts]
        for each in told:
            files |= each["files"]
        is_whole = {len(told)} == {each["parts"] for each in told}
        is_whole = is_whole and all((staged / name).stat().st_size == of["bytes"] for name, of in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if is_whole else None


def parts_folder(staged: Path) -> Path:
    return staged.with_name(PARTS + staged.name.removeprefix(STAGED))


def write_json(
    disk: Disk, path: Path, content: Mapping[str, Any], moved: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """A file that is on the disk when this returns; its size and hash."""
    with HashedFile(disk, path, moved) as file:
        file.write(json.dumps(content, indent=1).encode())
    return file.told()


def sweep(run_dir: Path, disk: Disk | None = None) -> list[str]:
    """Remove what saves and deletions that were cut short left behind; their names. Raises `OSError`."""
    put_back(run_dir, disk or Disk())
    left = sorted(run_dir.glob(f"{STAGED}*global_step*"))
    for folder in left:
        (disk or Disk()).remove(folder)
    return [folder.name for folder in left]


def _latest(run_dir: Path) -> str:
    pointer = run_dir / POINTER
    return pointer.read_text(errors="replace").strip() if pointer.is_file() else ""


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
    """What decided the order of the data in the run that wrote the checkpoint.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    manifest = manifest_of(folder)
    if manifest is None:
        raise CheckpointError(explain(folder.parent, f"{folder.name} that is complete"))
    for damage in damaged(folder, manifest, [STATE]):
        raise CheckpointError(name_another(folder, damage))
    return json.loads((folder / STATE).read_text())["course"]


def damaged(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> Iterator[str]:
    """A line for each of the files `names` whose content is not what was written."""
    for name in names:
        if name not in manifest["files"] or hash_file(folder / name) != manifest["files"][name]["blake2b"]:
            yield f"{folder / name} is damaged: its content is not what was written"


def name_another(folder: Path, trouble: str) -> str:
    """`trouble`, which this checkpoint has, and what others there are."""
    others = [p for p in folder.parent.glob("global_step*") if p != folder and manifest_of(p) is not None]
    names = ", ".join(f"{p.parent.name}/{p.name}" for p in sorted(others, key=step_of)) or "none"
    return f"{trouble}; name another one after --resume_from_checkpoint: {names}"


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
        save_of(manifest)
        whole = manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == told["bytes"] for name, told in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    return manifest if whole else None
