"""The training loop, whole."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.base import ModelFamily
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
    PEAK_MEMORY_GIB,
    SAMPLES_PER_S,
    STEP_S,
    MetricsWriter,
    Point,
    of_expert,
)
from utils.train import checkpoint
from utils.train.activity import LONG, Activity, Batch
from utils.train.checkpoint import Part
from utils.train.evaluate import EvalSet, evaluate_experts
from utils.train.experts import Experts
from utils.train.export import Model, export
from utils.train.optimizers import eval_mode
from utils.train.schedules import learning_rate_factor
from utils.train.state import Milestones, TrainState
from utils.train.triggers import Decision, Every, SignalFiles, StopSignals

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


@dataclass
class Run:
    """Everything the loop needs, and where it stands."""

    run_dir: Path
    family: ModelFamily
    experts: Experts  # the models that take the steps; most runs have one
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
    buckets_seen: set[Bucket] = field(default_factory=set)
    saved: Path | None = None  # newest model or adapter of this start
    checkpointed: Path | None = None  # newest checkpoint of this start
    last_eval: int = -1
    last_saved: int = -1
    last_checkpoint: int = -1
    checkpoint_clock: float = field(default_factory=time.monotonic)

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
    asked = Decision.NONE
    with StopSignals() as signals, run.display:
        if run.state.step == 0 and run.settings.eval_before_first_step:
            evaluate_all(run)
        while run.state.step < run.settings.total_steps and not asked & Decision.QUIT:
            before = run.milestones()
            one_step(run)
            asked = agree(run, files, signals)
            act(run, before, asked)
        finished = run.state.step >= run.settings.total_steps
        if finished:
            finish(run)
    run.metrics.close()
    if run.loader is not None:
        run.loader.close()
    return finished


def one_step(run: Run) -> None:
    """One optimizer step and its metrics."""
    run.meters.begin_step()
    plan = run.plan.step(run.state.plan_step)
    built = run.experts.at(run.state.step).built
    run.activity.begin(
        f"step {run.state.step + 1}",
        lambda micro_batch: batch_of(run, plan, micro_batch),
        patience=LONG if run.settings.compiles and plan.bucket not in run.buckets_seen else 1.0,
    )
    run.buckets_seen.add(plan.bucket)
    lr = set_learning_rate(run)
    built.engine.step_index = run.state.step
    batches = None if run.loader is None else run.meters.waiting(run.loader.next_step())
    loss = built.engine.train_step(batches)
    run.activity.note("the metrics")
    epochs_before = run.state.epochs_done(run.plan)
    run.state = run.state.advanced(plan.shape.samples)
    times = run.meters.end_step(loss, plan.shape.samples, plan.shape.samples * plan.bucket.frames)
    report(run, plan, loss, lr, times)
    if run.state.epochs_done(run.plan) > epochs_before:
        run.metrics.log(run.point(), {EPOCH_LOSS: run.meters.end_epoch()})


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
    """What rank 0 saw: minutes, files and signals. All ranks act in the same step."""
    seen = Decision.NONE
    if dist.is_main():
        seen = files.poll() | signals.poll()
        if run.settings.checkpoint_every.minutes_due(time.monotonic() - run.checkpoint_clock):
            seen |= Decision.CHECKPOINT
    run.activity.note("the word of rank 0 on what is due", None)
    return Decision(dist.from_main(int(seen)))


def act(run: Run, before: Milestones, asked: Decision) -> None:
    """Evaluate, save and checkpoint where this step made it due."""
    now, settings = run.milestones(), run.settings
    checkpoint_due = bool(asked & Decision.CHECKPOINT) or settings.checkpoint_every.due(before, now)
    if checkpoint_due and asked & Decision.QUIT:
        save_checkpoint(run)  # first: whoever sent SIGTERM may not wait for an evaluation
    if settings.eval_every.due(before, now):
        evaluate_all(run)
    if asked & Decision.SAVE or settings.save_every.due(before, now):
        # an epoch's end names the folder, as diffusion-pipe has it
        save_model(run, f"epoch{now.epochs_done}" if now.epochs_done > before.epochs_done else f"step{now.step}")
    if checkpoint_due and run.last_checkpoint != now.step:
        save_checkpoint(run)  # last: a start from it does not come back to what was due before


def finish(run: Run) -> None:
    """A last evaluation, checkpoint and model, unless just made: no run ends without a number or a file."""
    if run.eval_sets and run.last_eval != run.state.step:
        evaluate_all(run)
    if run.last_checkpoint != run.state.step:
        save_checkpoint(run)
    if run.last_saved != run.state.step:
        save_model(run, f"step{run.state.step}")
    if run.last_saved != run.state.step:
        raise OSError(
            f"the trained weights of step {run.state.step} could not be saved to {run.run_dir}, see above; make room, "
            "then start again with --resume_from_checkpoint"
        )


def evaluate_all(run: Run) -> None:
    """Losses of every eval dataset, of every expert."""
    run.last_eval = run.state.step
    progress = run.progress if dist.is_main() else None
    shares, patience = run.family.expert_shares(), LONG if run.settings.compiles else 1.0
    for name, found in evaluate_experts(run.experts, run.eval_sets, shares, progress, patience).items():
        run.metrics.log(run.point(), found.scalars(name))
        for expert, result in found.of.items():
            logger.info(
                "%s: loss %.4f over %d samples (%.4f at quantile 0.1, %.4f at 0.9)",
                of_expert(name, expert),
                result.loss,
                result.samples,
                result.by_quantile[0.1],
                result.by_quantile[0.9],
            )
        if len(found.of) > 1:
            logger.info("%s: loss %.4f over all timesteps", name, found.loss)


def save_checkpoint(run: Run) -> None:
    engine = run.experts.engine
    run.activity.begin(f"writing the checkpoint of step {run.state.step}", patience=LONG)
    folder = checkpoint.save(
        run.run_dir,
        run.state,
        epochs_done=run.state.epochs_done(run.plan),
        course=run.course,
        meters=run.meters.state_dict(),
        parts={name: Part(each.built.trained, each.built.optimizer) for name, each in run.experts.items()},
        stage=engine.stage_id,
        data_rank=engine.data_rank,
        keep_last=run.settings.keep_last,
        note=run.activity.note,
    )
    run.checkpoint_clock = time.monotonic()
    if folder is not None:
        run.last_checkpoint, run.checkpointed = run.state.step, folder
        run.metrics.flush()
        logger.info("checkpoint written: %s", folder)


def save_model(run: Run, name: str) -> None:
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
