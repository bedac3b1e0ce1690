"""What follows a step whose numbers are not finite, and a loss that is out of the ordinary."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from utils import dist
from utils.data.plan import StepPlan
from utils.monitor.loss_watch import WINDOW
from utils.train.kept import examine, samples_of
from utils.train.nonfinite import DATA, FROZEN, Incident, NonFiniteError, shown
from utils.train.saving import save_checkpoint, settle_checkpoint

if TYPE_CHECKING:
    from utils.train.loop import Run

logger = logging.getLogger(__name__)


def leave_out(run: "Run", plan: StepPlan, loss: float, lr: float) -> None:
    """A step that the engine refused: nothing was changed by it. All ranks call this.

    Raises:
        NonFiniteError: training is to stop, or cannot go on. What was there before the step is in a checkpoint.
    """
    incident, kept = examine(run, plan, loss, lr)
    settings, watch = run.settings, run.meters.watch
    skipped = watch.lately_left_out(run.state.step) + 1
    if settings.on_nonfinite == "skip" and skipped <= settings.max_nonfinite and not incident.is_hopeless:
        watch.leave_out(run.state.step)  # not before: a checkpoint of what was before knows nothing of it
        if dist.is_main():
            logger.warning("%s\n  %s\n  the step is left out", incident.words(), kept)
        return
    if run.last_checkpoint != run.state.step and not incident.is_hopeless:
        save_checkpoint(run, wait=True)
    settle_checkpoint(run)
    run.activity.begin(f"step {incident.step}")  # the last words tell where it happened
    raise NonFiniteError(stop_words(incident, kept, run.checkpointed, skipped, settings.on_nonfinite))


def stop_words(incident: Incident, kept: str, checkpointed: Path | None, skipped: int, on_nonfinite: str) -> str:
    """The end of a run by a step that is not finite: what happened, what is saved, what to do."""
    lines = [incident.words(), kept]
    too_many = f"{skipped} of the last {WINDOW} steps were left out, more than max_nonfinite"
    if incident.first is not None and incident.first.cause == FROZEN:
        lines.append("it was read so: look at the files of the model, and at fuse_adapters")
    elif incident.is_hopeless:
        lines.append("no further step could be finite: go on from a checkpoint of before, with a lower lr")
    elif incident.first is not None and incident.first.cause == DATA:
        mend = "take the clip away, or start once with --regenerate_cache, which encodes it anew"
        if incident.files:
            what = "that file of the cache" if len(incident.files) == 1 else "those files of the cache"
            mend = f"delete {what}, and the next start makes it anew"
        left_out = too_many if on_nonfinite == "skip" else "on_nonfinite = 'skip' leaves such steps out"
        lines.append(f"it was read so, and no lr mends that: {mend}; {left_out}")
    elif on_nonfinite == "skip":
        lines.append(f"{too_many}: lower lr, look at them")
    else:
        lines.append("lower lr or mend the clip; on_nonfinite = 'skip' leaves such steps out")
    if checkpointed is not None:
        lines.append(f"the newest checkpoint is {checkpointed.name}; go on with --resume_from_checkpoint")
    return "\n  ".join(lines)


def tell_of_spike(run: "Run", plan: StepPlan, loss: float, usual: float) -> None:
    """Warn, with all samples of the step. All ranks call this: each knows its own."""
    samples = shown(samples_of(run, plan))
    if dist.is_main():
        step = run.state.step + 1
        logger.warning("the loss of step %d is %.4g, usually %.4g; samples: %s", step, loss, usual, samples)
