"""Where a run lives: a new folder named by the UTC time, or the one to go on with."""

import re
from datetime import datetime, timezone
from pathlib import Path

from utils.train import checkpoint
from utils.train.checkpoint import CheckpointError

TIME_FORMAT = "%Y%m%d_%H-%M-%S"  # diffusion-pipe's
RUN_NAME = re.compile(r"\d{8}_\d\d-\d\d-\d\d(_\d+)?")


def new_run_folder(output_dir: Path) -> Path:
    """Make `<output_dir>/<UTC time>`; two starts in one second get folders of their own."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"output_dir = '{output_dir}' cannot be made ({reason}); name another folder") from error
    name = datetime.now(timezone.utc).strftime(TIME_FORMAT)
    for attempt in range(1000):
        folder = output_dir / (name if attempt == 0 else f"{name}_{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"cannot make a run folder in {output_dir}")


def find_checkpoint(output_dir: Path, asked: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint [asked]` means.

    Args:
        asked: "" for the newest run; or a run's folder name, a path to it, or one of its `global_stepN`.

    Raises:
        CheckpointError: nothing there to go on with; says what there is.
    """
    if not asked:
        return _newest(output_dir)
    named = output_dir / asked if (output_dir / asked).is_dir() else Path(asked)
    run_dir = (output_dir / asked).parent if (output_dir / asked).parent.is_dir() else named.parent
    if not named.is_dir() and checkpoint.NAME.fullmatch(named.name) and run_dir.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {asked}: {checkpoint.explain(run_dir, named.name)}")
    if not named.is_dir():
        runs = ", ".join(_runs(output_dir)[-5:]) or "none"
        raise CheckpointError(f"--resume_from_checkpoint {asked}: no such run in {output_dir}; newest runs: {runs}")
    if checkpoint.NAME.fullmatch(named.name):
        return named
    return checkpoint.find(named)


def _newest(output_dir: Path) -> Path:
    """Of the newest run that has a complete checkpoint: a start that failed early leaves an empty folder behind."""
    runs = _runs(output_dir)
    for name in reversed(runs):
        if any(checkpoint.NAME.fullmatch(path.name) for path in (output_dir / name).iterdir()):
            return checkpoint.find(output_dir / name)
    if not runs:
        raise CheckpointError(f"--resume_from_checkpoint: no runs in {output_dir}; check output_dir")
    raise CheckpointError(checkpoint.explain(output_dir / runs[-1]))


def _runs(output_dir: Path) -> list[str]:
    if not output_dir.is_dir():
        return []
    return sorted(path.name for path in output_dir.iterdir() if path.is_dir() and RUN_NAME.fullmatch(path.name))
