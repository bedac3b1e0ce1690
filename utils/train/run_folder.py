"""Where a run lives: a new folder named by the UTC time, or the one to go on with."""

import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from utils.train import checkpoint
from utils.train.checkpoint import CheckpointError
from utils.train.run_lock import InUse, RunLock

SEEN_S = 30.0  # network file systems may remember for so long that a file is not there
LOOK_S = 0.1  # between two looks
MAX_NAMES = 5  # in a line

logger = logging.getLogger(__name__)

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


def go_on(output_dir: Path, asked: str, tell: Callable[[str], None]) -> tuple[Path, RunLock]:
    """As `find_checkpoint`, with its run folder held from before it is looked into: an earlier start may be in its last
    save. For one rank alone.

    Args:
        tell: what is waited for.

    Raises:
        ValueError: nothing to go on with, or another start is at work there.
        OSError: the folder cannot be written to.
    """
    locks: list[RunLock] = []

    def let_go() -> None:
        while locks:
            locks.pop().release(is_main=True, clean=True)

    def hold(run_dir: Path) -> None:
        let_go()
        locks.append(RunLock(run_dir))
        locks[0].take(tell)

    try:
        return find_checkpoint(output_dir, asked, hold), locks[0]
    except BaseException:
        let_go()
        raise


def find_checkpoint(output_dir: Path, asked: str, hold: Callable[[Path], None] | None = None) -> Path:
    """The checkpoint that `--resume_from_checkpoint [asked]` means.

    Args:
        asked: "" for the newest run; or a run's folder name, a path to it, or one of its `global_stepN`.
        hold: is given each run folder before it is looked into, and keeps others out of it until the next; a save there
            that was cut short after its last file is then completed. None only looks.

    Raises:
        CheckpointError: nothing there to go on with; says what there is.
    """
    if not asked:
        return _newest(output_dir, hold)
    within, named = output_dir / asked, Path(asked)
    if checkpoint.NAME.fullmatch(named.name):
        places = (within, named)
        there = next((p for p in places if p.is_dir()), next((p for p in places if p.parent.is_dir()), None))
        if there is not None:
            _prepare(there.parent, hold)
            if there.is_dir():
                return there
            told = checkpoint.explain(there.parent, there.name)
            raise CheckpointError(f"--resume_from_checkpoint {asked}: {told}")
    named = within if within.is_dir() else named
    if not named.is_dir():
        raise CheckpointError(f"--resume_from_checkpoint {asked}: {_absent(output_dir, asked)}")
    if (inside := _runs(named)) and not _has_checkpoint(named):
        raise CheckpointError(f"--resume_from_checkpoint {asked}: {_too_high(output_dir, named, inside)}")
    if checkpoint.SAVED_NAME.fullmatch(named.name):
        raise CheckpointError(checkpoint.explain(named))
    _prepare(named, hold)
    return checkpoint.find(named, complete=False)


def _absent(output_dir: Path, asked: str) -> str:
    """What is told where there is no folder of that name."""
    file = next((path for path in (output_dir / asked, Path(asked)) if path.is_file()), None)
    if file is not None:
        names = [parent for parent in Path(asked).parents if RUN_NAME.fullmatch(parent.name)]
        names += [parent for parent in Path(asked).parents if checkpoint.NAME.fullmatch(parent.name)]
        mend = f"name its folder: --resume_from_checkpoint {names[-1]}" if names else "name the folder of a run"
        return f"{file} is a file; {mend}"
    return f"no such run in {output_dir}; newest runs: {', '.join(_runs(output_dir)[-MAX_NAMES:]) or 'none'}"


def _too_high(output_dir: Path, folder: Path, runs: Sequence[str]) -> str:
    """What is told where a folder of runs was named."""
    is_own = output_dir.is_dir() and output_dir.samefile(folder)
    names = [name if is_own else str(folder / name) for name in runs[-MAX_NAMES:]]
    mend = "name one of them, or none for the newest with a checkpoint" if is_own else "name one of them"
    return f"{folder} is a folder of runs; {mend}. The newest: {', '.join(names)}"


def _newest(output_dir: Path, hold: Callable[[Path], None] | None) -> Path:
    """Of the newest run that has a checkpoint: a start that failed early leaves a folder without one behind."""
    runs, without = _runs(output_dir), []
    for name in reversed(runs):
        run_dir = output_dir / name
        try:
            _prepare(run_dir, hold)
        except InUse as error:
            raise ValueError(_in_use(output_dir, runs[: runs.index(name)], error)) from error
        if _has_checkpoint(run_dir):
            found = checkpoint.find(run_dir, complete=False)
            if without:
                more = f" and {len(without) - MAX_NAMES} more" if len(without) > MAX_NAMES else ""
                logger.warning(
                    "%s: going on with the newest run that has a checkpoint, %s; newer ones without one are passed "
                    "over: %s%s",
                    output_dir,
                    name,
                    ", ".join(without[:MAX_NAMES]),
                    more,
                )
            return found
        without.append(name)
    if not runs:
        raise CheckpointError(f"--resume_from_checkpoint: no runs in {output_dir}; check output_dir")
    raise CheckpointError(checkpoint.explain(output_dir / runs[-1]))


def _in_use(output_dir: Path, older: Sequence[str], error: InUse) -> str:
    """What is told where nobody has named the run that is at work: it may be somebody else's."""
    for name in reversed(older):
        with suppress(CheckpointError):
            checkpoint.find(output_dir / name, complete=False)
            return (
                f"--resume_from_checkpoint without a name is for the newest run, and {error.told}; to go on with "
                f"another one name it (--resume_from_checkpoint {name} is the newest of those with a checkpoint), else "
                f"wait for the end of that one or, if it is yours, stop it ({error.way_out})"
            )
    return str(error)


def _has_checkpoint(run_dir: Path) -> bool:
    return any(checkpoint.NAME.fullmatch(path.name) for path in run_dir.iterdir())


def _prepare(run_dir: Path, hold: Callable[[Path], None] | None) -> None:
    if hold is not None:
        hold(run_dir)
        checkpoint.complete_staged(run_dir)


def is_seen(folder: Path, seconds: float) -> bool:
    """Whether this rank sees the whole of a checkpoint that another one does, waiting for it."""
    deadline = time.monotonic() + seconds
    while checkpoint.manifest_of(folder) is None:
        if time.monotonic() > deadline:
            return False
        if folder.parent.is_dir():
            os.listdir(folder.parent)  # asks the server anew where a look-up may be remembered
        time.sleep(LOOK_S)
    return True


def _runs(output_dir: Path) -> list[str]:
    if not output_dir.is_dir():
        return []
    return sorted(path.name for path in output_dir.iterdir() if path.is_dir() and RUN_NAME.fullmatch(path.name))
