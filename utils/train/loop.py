"""The training loop, whole."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.base import MicroBatch, ModelFamily
from utils import dist
from utils.data.loader import StepLoader
from utils.data.plan import EpochPlan, StepPlan
from utils.data.records import Bucket
from utils.data.workers import Progress
from utils.monitor.console import LiveLine, StepReport
from utils.monitor.meters import Meters, StepTimes, peak_memory_gib
from utils.monitor.metrics import (
    DATA_WAIT_S,
    EPOCH_LOSS,
    FRAMES_PER_S,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    NONFINITE,
    PEAK_MEMORY_GIB,
    SAMPLES_PER_S,
    STEP_S,
    MetricsWriter,
    Point,
    of_expert,
)
from utils.train.activity import LONG, Activity, Batch
from utils.train.checkpoint_write import Checkpointer
from utils.train.due import catch_up, do_what_is_due
from utils.train.engine import ReelEngine
from utils.train.evaluate import EvalSet
from utils.train.experts import Experts
from utils.train.nonfinite import refuse_bad_weights
from utils.train.refused import leave_out, tell_of_spike
from utils.train.regularization import held_samples, toward_base
from utils.train.saving import (
    EVALUATION,
    bad_weight_of,
    look_at_checkpoint,
    rescued,
    retry_checkpoint,
    save_checkpoint,
    save_last_model,
    settle_checkpoint,
    way_on,
)
from utils.train.schedules import learning_rate_factor
from utils.train.signals import StopSignals
from utils.train.state import Milestones, TrainState
from utils.train.stopping import TimeLimit, is_hurried, reason
from utils.train.triggers import QUIT_FILE, Decision, Every, SignalFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """When to do what, and how the learning rate goes."""

    total_steps: int
    schedule: str
    warmup_steps: int
    eval_every: Every
    eval_before_first_step: bool
    save_every: Every
    checkpoint_every: Every
    keep_last: int | None
    logging_steps: int
    save_dtype: torch.dtype | None
    is_adapter: bool
    formats: tuple[str, ...] = ()  # of a saved adapter, a file each
    compiles: bool = False  # the first step of each bucket takes long
    on_nonfinite: str = "stop"  # or "skip"
    max_nonfinite: int = 10  # steps of the last 100 that may be skipped
    loss_spike_factor: float = 0.0  # of the running mean, from which on a loss is told of; 0 is never


@dataclass
class Run:
    """Everything the loop needs, and where it stands."""

    run_dir: Path
    family: ModelFamily
    experts: Experts  # the models that take the steps; most runs have one
    checkpointer: Checkpointer
    plan: EpochPlan
    loader: StepLoader | None  # None on middle stages
    eval_sets: Sequence[EvalSet]
    settings: LoopSettings
    state: TrainState
    course: Mapping[str, Any]  # settings that the order of samples hangs on, kept in checkpoints
    metrics: MetricsWriter
    meters: Meters
    display: LiveLine
    progress: Progress
    metadata: Mapping[str, str]  # for the header of saved files
    write_configs: Callable[[Path], None]
    base_lr: float
    activity: Activity = field(default_factory=Activity)  # what this rank is doing, for the watchdog
    name_of: Callable[[int], str] = str  # entry of the plan to the name of its file
    is_regularization: Callable[[int], bool] = lambda _: False  # whether an entry holds the adapter to the base
    buckets_seen: set[Bucket] = field(default_factory=set)
    saved: Path | None = None  # newest model or adapter of this start
    checkpointed: Path | None = None  # newest checkpoint of this start
    owed: Sequence[str] = ()  # what was due when the run was stopped, see `utils.train.saving`
    came_with: tuple[int, str] = (-1, "")  # step that the run goes on from, and `mark_of` as it was then
    last_eval: int = -1
    last_saved: int = -1
    last_checkpoint: int = -1
    checkpoint_clock: float = field(default_factory=time.monotonic)
    limit: TimeLimit = field(default_factory=lambda: TimeLimit(None))  # of the whole process
    signals: StopSignals = field(default_factory=StopSignals)  # of the whole process
    asked: Decision = Decision.NONE  # after the last step; why it was the last, where it was not the end

    def point(self) -> Point:
        """Where the last step stands, for the metrics."""
        return Point(self.state.step, self.epoch_of_last_step(), self.state.examples)

    def epoch_of_last_step(self) -> int:
        done = max(self.state.plan_step - 1, 0)
        return self.state.epoch_start + self.plan.epoch_of(done)

    def milestones(self) -> Milestones:
        return self.state.milestones(self.plan)


def train(run: Run) -> bool:
    """Train to the end or until asked to stop; True when the end was reached. Every rank calls this."""
    files = SignalFiles(run.run_dir)
    with run.signals.training() as signals, run.display, rescued(run):
        catch_up(run)
        while run.state.step < run.settings.total_steps and not run.asked & Decision.QUIT:
            before = run.milestones()
            one_step(run)
            run.asked = agree(run, files, signals)
            look_at_checkpoint(run)
            act(run, before, run.asked)
        finished = run.state.step >= run.settings.total_steps and not is_hurried(run.asked)
        if finished:
            finished = finish(run, lambda: agree(run, files, signals))
        settle_checkpoint(run)
    if run.asked & Decision.QUIT:
        refuse_to_lose(run)
    run.metrics.close()
    if run.loader is not None:
        run.loader.close()
    return finished


def one_step(run: Run) -> None:
    """One optimizer step and its metrics."""
    run.meters.begin_step()
    plan = run.plan.step(run.state.plan_step)
    built = run.experts.at(run.state.step).built
    lr = set_learning_rate(run)
    built.engine.step_index = run.state.step
    batches = None if run.loader is None else run.meters.waiting(run.loader.next_step())
    if any(run.is_regularization(item.entry) for item in plan.items):
        batches = with_base_targets(run, plan, built.engine, batches)
    run.activity.begin(
        f"step {run.state.step + 1}",
        lambda micro_batch: batch_of(run, plan, micro_batch),
        patience=LONG if run.settings.compiles and plan.bucket not in run.buckets_seen else 1.0,
    )
    run.buckets_seen.add(plan.bucket)
    loss = built.engine.train_step(batches)
    if built.engine.refused:
        leave_out(run, plan, loss, lr)
    elif usual := run.meters.watch.spike(loss, run.settings.loss_spike_factor, run.experts.awake):
        tell_of_spike(run, plan, loss, usual)
    run.activity.note("the metrics")
    epochs_before = run.state.epochs_done(run.plan)
    run.state = run.state.advanced(plan.shape.samples)
    times = run.meters.end_step(loss, plan.shape.samples, plan.shape.samples * plan.bucket.frames)
    report(run, plan, loss, lr, times)
    if run.state.epochs_done(run.plan) > epochs_before:
        run.metrics.log(run.point(), {EPOCH_LOSS: run.meters.end_epoch()})


def with_base_targets(
    run: Run, plan: StepPlan, engine: ReelEngine, batches: Iterator[MicroBatch] | None
) -> Iterator[MicroBatch] | None:
    """The micro-batches of a step that has samples of regularization sets."""
    held = held_samples(plan.micro_batches_of(engine.data_rank), run.is_regularization)
    numbers = list(held)
    run.activity.begin(
        f"step {run.state.step + 1}, the base model's predictions",
        lambda passed: batch_of(run, plan, None if passed is None else numbers[passed]),
        patience=LONG if run.settings.compiles else 1.0,  # without the adapter the layers are compiled anew
    )
    return toward_base(engine, batches, held)


def batch_of(run: Run, plan: StepPlan, micro_batch: int | None) -> Batch:
    """What is in a micro-batch of this data rank, or in the whole step."""
    mine = plan.micro_batches_of(run.experts.engine.data_rank)
    items = plan.items if micro_batch is None else mine[micro_batch]
    return Batch(str(plan.bucket), [run.name_of(item.entry) for item in items])


def set_learning_rate(run: Run) -> float:
    """From the step alone, so that a resumed run needs no scheduler state."""
    settings = run.settings
    factor = learning_rate_factor(settings.schedule, run.state.step, settings.warmup_steps, settings.total_steps)
    for _, expert in run.experts.items():  # the idle ones too: a checkpoint then depends on the step alone
        for group in expert.built.optimizer.param_groups:
            group["lr"] = run.base_lr * factor
    return run.base_lr * factor


def report(run: Run, plan: StepPlan, loss: float, lr: float, times: StepTimes) -> None:
    """Metrics and the live line of a step."""
    step, expert, norm = run.state.step, run.experts.awake, run.experts.engine.grad_norm
    if run.experts.engine.refused:
        run.metrics.log(run.point(), {NONFINITE: run.meters.watch.total_left_out})
    if step % run.settings.logging_steps == 0:
        values = {LOSS: loss, GRAD_NORM: norm, LEARNING_RATE: lr, STEP_S: times.step_s, DATA_WAIT_S: times.data_wait_s}
        values |= {of_expert(LOSS, expert): loss, of_expert(GRAD_NORM, expert): norm}
        speeds = {SAMPLES_PER_S: times.samples_per_s, FRAMES_PER_S: times.frames_per_s}
        run.metrics.log(run.point(), {**values, **speeds, PEAK_MEMORY_GIB: peak_memory_gib()})
    run.display.update(
        StepReport(
            step=step,
            total_steps=run.settings.total_steps,
            epoch=plan.epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            step_s=times.step_s,
            samples_per_s=times.samples_per_s,
            eta_s=run.meters.eta_s(run.settings.total_steps - step),
            expert=expert,
        )
    )


def agree(run: Run, files: SignalFiles, signals: StopSignals) -> Decision:
    """What any rank saw: minutes and files rank 0 alone, signals each its own. All ranks act in the same step."""
    seen = signals.poll()
    if dist.is_main():
        seen |= files.poll() | run.limit.poll()
        if run.settings.checkpoint_every.minutes_due(time.monotonic() - run.checkpoint_clock):
            seen |= Decision.CHECKPOINT
    run.activity.note("the word of all on what is due", None)
    asked = Decision(dist.join_flags(int(seen)))
    if asked & Decision.QUIT:
        why = reason(asked) or f"{run.run_dir / QUIT_FILE} was there"
        logger.info("stopping after step %d: %s", run.state.step, why)
    return asked


def act(run: Run, before: Milestones, asked: Decision) -> None:
    """Evaluate, save and checkpoint where this step made it due."""
    now, settings = run.milestones(), run.settings
    checkpoint_due = bool(asked & Decision.CHECKPOINT) or settings.checkpoint_every.due(before, now)
    # an epoch's end names the folder, as diffusion-pipe has it
    name = f"epoch{now.epochs_done}" if now.epochs_done > before.epochs_done else f"step{now.step}"
    due = [EVALUATION] if run.eval_sets and settings.eval_every.due(before, now) else []
    due += [name] if asked & Decision.SAVE or settings.save_every.due(before, now) else []
    checkpoint_due |= bool(due) and now.step >= settings.total_steps  # it would be written after these
    if is_hurried(asked):
        save_checkpoint(run, wait=True, owed=due)
        return
    if checkpoint_due and run.last_checkpoint != now.step:
        # first, since it is written beside: the others may take longer than a scheduler waits
        save_checkpoint(run, wait=bool(asked & Decision.QUIT) and not due, owed=due)
    do_what_is_due(run, due)


def refuse_to_lose(run: Run) -> None:
    """Raises `OSError` where a run that was asked to stop could not write its checkpoint."""
    if run.last_checkpoint != run.state.step:
        raise OSError(f"the run stops after step {run.state.step} without a checkpoint of it, see above; {way_on(run)}")


def finish(run: Run, asked: Callable[[], Decision]) -> bool:
    """A last checkpoint, evaluation and model, unless just made: no run ends without a number or a file. False where a
    stop was asked for meanwhile, and what is left is left to the next start.

    Args:
        asked: what anybody wants of the run by now, the same on all ranks.
    """
    refuse_bad_weights(bad_weight_of(run), f"the end of the run, step {run.state.step},")
    settle_checkpoint(run)
    due = [EVALUATION] if run.eval_sets and run.last_eval != run.state.step else []
    if run.last_checkpoint != run.state.step:
        save_checkpoint(run, wait=not due)
    do_what_is_due(run, due)
    settle_checkpoint(run)
    if is_hurried(run.asked):
        return False
    if run.last_saved != run.state.step:
        save_last_model(run, f"step{run.state.step}", asked)
    retry_checkpoint(run)
    if run.last_saved != run.state.step:
        raise OSError(
            f"the trained weights of step {run.state.step} could not be saved to {run.run_dir}, see above; "
            f"{way_on(run)}"
        )
    return True
