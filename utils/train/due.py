"""Evaluations and saves that are due after a step, and how a stop that is asked for meanwhile leaves them undone."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from utils import dist
from utils.monitor.metrics import of_expert
from utils.train.activity import LONG
from utils.train.evaluate import evaluate_experts
from utils.train.forward_pass import Question, delay
from utils.train.saving import (
    COURSE_MARK,
    EVALUATION,
    look_at_checkpoint,
    mark_of,
    save_checkpoint,
    save_model,
    settle_checkpoint,
)
from utils.train.stopping import HURRIED, is_hurried, reason
from utils.train.triggers import Decision

if TYPE_CHECKING:
    # `utils.train.loop` imports this file
    from utils.train.loop import Run

BUSY = 1 << 30  # beside the bits of a `Decision`: this rank's part of a checkpoint is being written still
logger = logging.getLogger(__name__)


def do_what_is_due(run: "Run", due: Sequence[str]) -> None:
    """Evaluate and save. All ranks call this.

    Where a stop is asked for before all is done (whoever sent SIGTERM will not wait for it), there is a checkpoint
    afterwards that owes it.

    Args:
        due: `EVALUATION`, or the name of a model to save.
    """
    for name in due:
        if is_asked_to_stop(run):
            break
        if name != EVALUATION:
            save_model(run, name)
        elif run.last_eval != run.state.step:
            evaluate_all(run)
    if due and is_asked_to_stop(run):
        settle_checkpoint(run)
        if run.last_checkpoint != run.state.step:
            save_checkpoint(run, wait=True, owed=due)


def catch_up(run: "Run") -> None:
    """What comes before the first step, or was due when the run was stopped and could not be waited for."""
    settings = run.settings
    first = run.state.step == 0 and bool(run.eval_sets) and settings.eval_before_first_step
    due = [EVALUATION, *run.owed] if first and EVALUATION not in run.owed else run.owed
    for name in (f"step{run.state.step}", f"epoch{run.milestones().epochs_done}"):
        if run.last_checkpoint == run.state.step and is_saved(run, name):
            run.last_saved, run.saved = run.state.step, run.run_dir / name  # an end here needs no other
    do_what_is_due(run, [name for name in due if name == EVALUATION or not is_saved(run, name)])


def is_saved(run: "Run", name: str) -> bool:
    """Whether the model of that name is of this very step and course; after going back to an earlier checkpoint it may
    be of the course that was left. Rank 0 looks: a shared disk may show others what was there before."""
    mark, files = mark_of(run), (run.run_dir / name).glob("*.safetensors")
    found = dist.is_main() and any(_mark_in(file) == mark for file in files)
    return bool(dist.from_main(int(found)))


def _mark_in(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt") as reader:
            return (reader.metadata() or {}).get(COURSE_MARK)
    except (OSError, SafetensorError):
        return None  # so it is written again


# --- a stop that is asked for meanwhile -------------------------------------------------------------------------------


def is_asked_to_stop(run: "Run") -> bool:
    """Whether any rank has been asked by now to stop at once; noted in `run.asked`. All ranks call this."""
    return _hear(run, dist.join_flags(_seen(run, 0)))


def question_of(run: "Run") -> Question:
    """The same between micro-batches. A checkpoint that is being written beside goes on to its end meanwhile."""
    to_leave = delay(run.experts.engine.num_stages)
    return Question(lambda: _seen(run, to_leave), lambda joined: _hear(run, joined))


def _seen(run: "Run", to_leave: int) -> int:
    """Signals each rank sees itself, the clock is rank 0's. Signal files can wait for the next step."""
    seen = run.signals.poll()
    if dist.is_main():
        seen |= run.limit.look(to_leave)
    return int(seen) | (BUSY if run.checkpointer.is_busy else 0)


def _hear(run: "Run", joined: int) -> bool:
    if not joined & BUSY:
        look_at_checkpoint(run)
    if not is_hurried(run.asked):
        run.asked |= Decision(joined & ~BUSY)
        if is_hurried(run.asked):
            logger.info("stopping after step %d: %s", run.state.step, reason(run.asked & HURRIED))
    return is_hurried(run.asked)


# --- evaluations ------------------------------------------------------------------------------------------------------


def evaluate_all(run: "Run") -> None:
    """Losses of every eval dataset, of every expert; left without a result where a stop is asked for."""
    progress = run.progress if dist.is_main() else None
    shares, patience = run.family.expert_shares(), LONG if run.settings.compiles else 1.0
    results = evaluate_experts(run.experts, run.eval_sets, shares, progress, patience, question_of(run))
    if results is None:
        logger.info("the evaluation of step %d is left to the start that goes on from here", run.state.step)
        return
    run.last_eval = run.state.step
    for name, found in results.items():
        run.metrics.log(run.point(), found.scalars(name))
    run.metrics.flush()  # they are not made again
    entries = {eval_set.name: eval_set.dataset.entries for eval_set in run.eval_sets}
    for name, found in results.items():
        for expert, result in found.of.items():
            logger.info(
                "%s: loss %.4f over %d samples (%.4f at quantile 0.1, %.4f at 0.9)",
                of_expert(name, expert),
                result.loss,
                result.samples,
                result.by_quantile[0.1],
                result.by_quantile[0.9],
            )
            if result.bad and dist.is_main():
                logger.warning(
                    "%s at step %d: the losses of %d of %d samples are not finite: %s; without them it is %.4f",
                    of_expert(name, expert),
                    run.state.step,
                    len(result.bad),
                    result.samples,
                    result.bad_words(lambda index, of=entries[name]: of[index].name),
                    result.others_loss,
                )
        if len(found.of) > 1:
            logger.info("%s: loss %.4f over all timesteps", name, found.loss)
