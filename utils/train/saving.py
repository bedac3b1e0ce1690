"""What the loop saves of a run: checkpoints, written beside the next steps, and models."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from utils import dist
from utils.monitor.console import duration, short_bytes
from utils.train.activity import LONG
from utils.train.checkpoint import CheckpointError, Part, find, step_of
from utils.train.checkpoint_write import SPARE_BYTES, Ended
from utils.train.disk import Disk
from utils.train.errors import is_lost_peer
from utils.train.export import Model, export
from utils.train.nonfinite import bad_state, bad_weight
from utils.train.optimizers import eval_mode
from utils.train.parking import tensor_bytes
from utils.train.state import course_mark
from utils.train.triggers import Decision

if TYPE_CHECKING:
    # `utils.train.loop` imports this file
    from utils.train.loop import Run

COURSE_MARK = "reelpipe.course"  # in the header of saved models, see `mark_of`
EVALUATION = "evaluation"  # of what a stopped run owes; anything else is the name of a saved model
RESCUE_S = 15.0  # how long a rank that fails waits for a checkpoint: all are to have ended 30 s after
ROOM_S, LOOK_S = 600.0, 10.0  # how long the last model waits for room on a full disk, and between two looks

logger = logging.getLogger(__name__)


def bad_weight_of(run: "Run") -> str | None:
    """A trained weight of any stage that is not finite; all ranks call this."""
    trained = {name: expert.built.trained for name, expert in run.experts.items()}
    return bad_weight(trained, run.experts.engine.stage_id)


def bad_of(run: "Run") -> str | None:
    """In words what of a checkpoint would not be finite; all ranks call this."""
    if name := bad_weight_of(run):
        return f"the weight {name}"
    parts = {name: (each.built.trained, each.built.optimizer) for name, each in run.experts.items()}
    name = bad_state(parts, run.experts.engine.stage_id)
    return name and f"the optimizer's {name}"


def save_checkpoint(run: "Run", *, wait: bool = False, owed: Sequence[str] = ()) -> None:
    """Begin a checkpoint of this step. All ranks call this.

    Args:
        wait: until it is there, or has failed; else training goes on beside it, and `look_at_checkpoint` tells.
        owed: what was due at this step, and is left to the start that goes on from it.
    """
    settle_checkpoint(run)  # there may be one on its way still
    if bad := bad_of(run):
        logger.error("no checkpoint of step %d: %s is not finite; keeping earlier ones", run.state.step, bad)
        run.checkpoint_clock = time.monotonic()  # else it is due after every step, and looks at every tensor
        return
    run.activity.begin(f"writing the checkpoint of step {run.state.step}", patience=LONG)
    run.metrics.flush()  # numbers must not be behind the checkpoint
    told = {"epochs_done": run.state.epochs_done(run.plan), "course": run.course, "meters": run.meters.state_dict()}
    goes_on = run.checkpointer.begin(
        run.state,
        {**told, **({"owed": list(owed)} if owed else {})},
        {name: Part(each.built.trained, each.built.optimizer) for name, each in run.experts.items()},
        wait=wait,
    )
    run.last_checkpoint, run.checkpoint_clock = run.state.step, time.monotonic()
    if not goes_on:
        settle_checkpoint(run)


def look_at_checkpoint(run: "Run") -> None:
    """Take note of a checkpoint that has been finished, or has failed, beside training. Between any two steps."""
    _note(run, run.checkpointer.poll())


def settle_checkpoint(run: "Run") -> None:
    """Wait for the checkpoint that is being written, where there is one."""
    if run.checkpointer.is_writing:
        run.activity.begin(f"writing the checkpoint of step {run.last_checkpoint}", patience=LONG)
        _note(run, run.checkpointer.settle())


def retry_checkpoint(run: "Run") -> None:
    """At the end of a run whose last checkpoint failed: once more, since room may have been made for the model."""
    if run.last_checkpoint == run.state.step:
        return
    save_checkpoint(run, wait=True)
    if run.last_checkpoint != run.state.step and dist.is_main():
        logger.warning("the run ends at step %d without a checkpoint of it, see above; %s", run.state.step, way_on(run))


@contextmanager
def rescued(run: "Run") -> Iterator[None]:
    """Meanwhile, an exception does not take a checkpoint with it that is being written beside: the next start finds it
    if it is whole."""
    try:
        yield
    except Exception as error:
        if run.checkpointer.is_writing:
            alone = dist.world_size() == 1
            with run.activity.aside(f"writing the checkpoint of step {run.last_checkpoint} to its end"):
                run.checkpointer.rescue(math.inf if alone else RESCUE_S, others_live=not is_lost_peer(error))
        raise


def _note(run: "Run", ended: Ended | None) -> None:
    if ended is None:
        return
    run.limit.saved(ended.seconds)
    if ended.folder is None:
        run.last_checkpoint = -1
    else:
        run.checkpointed = ended.folder
        logger.info("checkpoint written: %s", ended.folder)


def save_model(run: "Run", name: str) -> None:
    if weight := bad_weight_of(run):
        logger.error("%s is not saved: the weight %s is not finite; what was saved before stays", name, weight)
        return
    engine = run.experts.engine
    run.activity.begin(f"saving {name}", patience=LONG)
    now = run.milestones()
    told = {"reelpipe.step": str(now.step), "reelpipe.epoch": str(now.epochs_done), COURSE_MARK: mark_of(run)}
    with ExitStack() as stack:
        for _, expert in run.experts.items():
            stack.enter_context(eval_mode(expert.built.optimizer))
        folder = export(
            [Model(expert.family, expert.built.trained, expert.built.base) for _, expert in run.experts.items()],
            run.run_dir / name,
            is_adapter=run.settings.is_adapter,
            dtype=run.settings.save_dtype,
            stage=engine.stage_id,
            data_rank=engine.data_rank,
            metadata={**run.metadata, **told},
            extras=run.write_configs,
            formats=run.settings.formats,
            goes_on=run.state.step < run.settings.total_steps and not run.asked & Decision.QUIT,
        )
    if folder is not None:
        run.last_saved, run.saved = run.state.step, folder
        logger.info("saved: %s", folder)


def mark_of(run: "Run") -> str:
    """Tells this step of this course from the same step of one that was left: by the losses so far, the data and the
    settings. Nothing random: a run that is started twice writes the same files. Where nothing was trained since the
    checkpoint that the run goes on from, the settings are those of before: its weights are the same."""
    step, mark = run.came_with
    return mark if step == run.state.step else course_mark(run.state, run.course, run.meters.state_dict())


def save_last_model(
    run: "Run",
    name: str,
    asked: Callable[[], Decision],
    *,
    room_s: float = ROOM_S,
    look_s: float = LOOK_S,
    disk: Disk | None = None,
) -> None:
    """As `save_model`, and where the disk is too full, again as soon as there is room. All ranks call this.

    Args:
        asked: what anybody wants of the run by now, the same on all ranks; to quit ends the waiting.
        room_s: how long room is waited for, and `look_s` between two looks.
    """
    save_model(run, name)
    if run.last_saved == run.state.step:
        return
    need, disk = model_bytes(run) + SPARE_BYTES, disk or Disk()
    if _has_room(disk, run.run_dir, need):
        return  # it failed for another reason, which no waiting mends
    logger.log(
        logging.WARNING if dist.is_main() else logging.DEBUG,
        "%s is full: the trained weights of this run need %s, and %s are free. Waiting up to %s for room: delete or "
        "move what else lies on that disk, such as earlier models or checkpoints of other runs",
        run.run_dir,
        short_bytes(need),
        short_bytes(disk.free(run.run_dir)),
        duration(room_s),
    )
    for _ in range(math.ceil(room_s / look_s)):
        run.activity.begin("waiting for room on the disk", patience=LONG)  # anew each time: the watchdog sees it move
        time.sleep(look_s)
        if asked() & Decision.QUIT:
            return
        if _has_room(disk, run.run_dir, need):
            save_model(run, name)
            if run.last_saved == run.state.step:
                return


def _has_room(disk: Disk, folder: Path, need: int) -> bool:
    """As rank 0 sees it, whose disk it is; the same on all ranks."""
    return bool(dist.from_main(int(dist.is_main() and disk.free(folder) >= need)))


def model_bytes(run: "Run") -> int:
    """What saving it takes on the disk, of all ranks, about: the stages' parts and each format."""
    settings, mine = run.settings, 0
    if run.experts.engine.data_rank == 0:
        trained = [p for _, expert in run.experts.items() for p in expert.built.trained.values()]
        size = settings.save_dtype.itemsize if settings.save_dtype else None
        mine = sum(p.numel() * size if size else tensor_bytes(p) for p in trained)
    files = 1 + max(1, len(settings.formats))
    return files * int(dist.sum_over_ranks(torch.tensor([mine], dtype=torch.int64)).item())


def way_on(run: "Run") -> str:
    """What is left to a run that ends without having saved what it should, for the message that says so."""
    try:
        newest = find(run.run_dir, complete=False)  # all ranks look
    except CheckpointError:
        return "there is no checkpoint, so what was trained is lost; mend that, then start again from the beginning"
    held = ", which holds them" if step_of(newest) == run.state.step else ""
    return f"the newest checkpoint is {newest}{held}; mend that, then start again with --resume_from_checkpoint"
