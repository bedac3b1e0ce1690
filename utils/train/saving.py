"""What the loop saves of a run: checkpoints, written beside the next steps, and models."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from utils.train.activity import LONG
from utils.train.checkpoint import Part
from utils.train.checkpoint_write import Ended
from utils.train.export import Model, export
from utils.train.nonfinite import bad_weight
from utils.train.optimizers import eval_mode

if TYPE_CHECKING:
    # `utils.train.loop` imports this file
    from utils.train.loop import Run

EVALUATION = "evaluation"  # of what a stopped run owes; anything else is the name of a saved model

logger = logging.getLogger(__name__)


def bad_weight_of(run: "Run") -> str | None:
    """A trained weight of any stage that is not finite; all ranks call this."""
    trained = {name: expert.built.trained for name, expert in run.experts.items()}
    return bad_weight(trained, run.experts.engine.stage_id)


def save_checkpoint(run: "Run", *, wait: bool = False, owed: Sequence[str] = ()) -> None:
    """Begin a checkpoint of this step. All ranks call this.

    Args:
        wait: until it is there, or has failed; else training goes on beside it, and `look_at_checkpoint` tells.
        owed: what was due at this step, and is left to the start that goes on from it.
    """
    settle_checkpoint(run)  # there may be one on its way still
    if name := bad_weight_of(run):
        logger.error(
            "no checkpoint of step %d: the weight %s is not finite; keeping earlier ones", run.state.step, name
        )
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
    metadata = {**run.metadata, "reelpipe.step": str(now.step), "reelpipe.epoch": str(now.epochs_done)}
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
            metadata=metadata,
            extras=run.write_configs,
            formats=run.settings.formats,
        )
    if folder is not None:
        run.last_saved, run.saved = run.state.step, folder
        logger.info("saved: %s", folder)
