"""The training loop, whole."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from models.base import ModelFamily
from utils import dist
from utils.data.loader import StepLoader
from utils.data.plan import EpochPlan, StepPlan
from utils.monitor.logs import get_logger
from utils.monitor.meters import Meters
from utils.monitor.metrics import MetricsWriter
from utils.train import checkpoint
from utils.train.build import Built
from utils.train.evaluate import EvalSet, Progress, evaluate
from utils.train.export import export
from utils.train.optimizers import eval_mode
from utils.train.schedules import learning_rate_factor
from utils.train.state import Milestones, TrainState
from utils.train.triggers import Decision, Every, SignalFiles, StopSignals

logger = get_logger(__name__)


class StepDisplay(Protocol):
    """The live line."""

    def update(self, **values: Any) -> None: ...
    def message(self, text: str) -> None: ...


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
    save_dtype: torch.dtype | None
    is_adapter: bool


@dataclass
class Run:
    """Everything the loop needs, and where it stands."""

    run_dir: Path
    family: ModelFamily
    built: Built
    plan: EpochPlan
    loader: StepLoader | None  # None on middle stages
    eval_sets: Sequence[EvalSet]
    settings: LoopSettings
    state: TrainState
    course: Mapping[str, Any]  # settings that the order of samples hangs on, kept in checkpoints
    metrics: MetricsWriter
    meters: Meters
    display: StepDisplay
    progress: Progress
    metadata: Mapping[str, str]  # for the header of saved files
    write_configs: Callable[[Path], None]
    base_lrs: list[float] = field(default_factory=list)
    last_saved: int = -1
    last_checkpoint: int = -1
    checkpoint_clock: float = field(default_factory=time.monotonic)

    def milestones(self) -> Milestones:
        return self.state.milestones(self.plan)


def train(run: Run) -> bool:
    """Train to the end or until asked to stop; True when the end was reached. Every rank calls this."""
    if run.state.step == 0 and run.settings.eval_before_first_step:
        evaluate_all(run)
    files = SignalFiles(run.run_dir)
    asked = Decision.NONE
    with StopSignals() as signals:
        while run.state.step < run.settings.total_steps and not asked & Decision.QUIT:
            before = run.milestones()
            one_step(run)
            asked = agree(run, files, signals)
            act(run, before, asked)
    finished = run.state.step >= run.settings.total_steps
    if finished:
        finish(run)
    return finished


def one_step(run: Run) -> None:
    """One optimizer step and its metrics."""
    started = time.perf_counter()
    plan = run.plan.step(run.state.plan_step)
    lr = set_learning_rate(run)
    run.built.engine.step_index = run.state.step
    batches = None
    if run.loader is not None:
        _, batches = run.loader.next_step()
        batches = run.meters.timed(batches)
    loss = run.built.engine.train_step(batches)
    epochs_before = run.state.epochs_done(run.plan)
    run.state = run.state.advanced(plan.shape.samples)
    run.meters.step(time.perf_counter() - started, plan.shape.samples, plan.shape.samples * plan.bucket.frames, loss)
    report(run, plan, loss, lr)
    if run.state.epochs_done(run.plan) > epochs_before:
        run.metrics.write(run.state.step, run.state.examples, {"train/epoch_loss": run.meters.end_epoch()})


def set_learning_rate(run: Run) -> float:
    """From the step alone, so that a resumed run needs no scheduler state."""
    settings, optimizer = run.settings, run.built.optimizer
    factor = learning_rate_factor(settings.schedule, run.state.step, settings.warmup_steps, settings.total_steps)
    for group, base in zip(optimizer.param_groups, run.base_lrs, strict=True):
        group["lr"] = base * factor
    return max(base * factor for base in run.base_lrs)


def report(run: Run, plan: StepPlan, loss: float, lr: float) -> None:
    """Metrics and the live line of a step."""
    speeds, norm = run.meters.scalars(), run.built.engine.grad_norm
    values = {"train/loss": loss, "train/grad_norm": norm, "train/lr": lr, **speeds}
    run.metrics.write(run.state.step, run.state.examples, values)
    run.display.update(
        step=run.state.step,
        total_steps=run.settings.total_steps,
        epoch=plan.epoch,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        step_s=speeds["perf/step_s"],
        samples_per_s=speeds["perf/samples_per_s"],
        eta_s=run.meters.eta_s(run.settings.total_steps - run.state.step),
    )


def agree(run: Run, files: SignalFiles, signals: StopSignals) -> Decision:
    """What rank 0 saw: minutes, files and signals. All ranks act in the same step."""
    seen = Decision.NONE
    if dist.is_main():
        seen = files.poll() | signals.poll()
        if run.settings.checkpoint_every.minutes_due(time.monotonic() - run.checkpoint_clock):
            seen |= Decision.CHECKPOINT
    return Decision(dist.from_main(int(seen)))


def act(run: Run, before: Milestones, asked: Decision) -> None:
    """Evaluate, save and checkpoint where this step made it due."""
    now, settings = run.milestones(), run.settings
    if settings.eval_every.due(before, now):
        evaluate_all(run)
    if asked & Decision.CHECKPOINT or settings.checkpoint_every.due(before, now):
        save_checkpoint(run)
    if asked & Decision.SAVE or settings.save_every.due(before, now):
        # an epoch's end names the folder, as diffusion-pipe has it
        save_model(run, f"epoch{now.epochs_done}" if now.epochs_done > before.epochs_done else f"step{now.step}")


def finish(run: Run) -> None:
    """A last evaluation, checkpoint and model, unless just made: no run ends without a file."""
    if run.last_checkpoint != run.state.step:
        save_checkpoint(run)
    if run.last_saved != run.state.step:
        save_model(run, f"step{run.state.step}")


def evaluate_all(run: Run) -> None:
    """Losses of every eval dataset."""
    with eval_mode(run.built.optimizer):
        for eval_set in run.eval_sets:
            result = evaluate(run.built.engine, eval_set, run.progress if dist.is_main() else None)
            run.metrics.write(run.state.step, run.state.examples, result.scalars(eval_set.name))
            run.display.message(
                f"{eval_set.name}: loss {result.loss:.4f} over {result.samples} samples "
                f"(quantile 0.1: {result.by_quantile[0.1]:.4f}, 0.9: {result.by_quantile[0.9]:.4f})"
            )


def save_checkpoint(run: Run) -> None:
    engine = run.built.engine
    folder = checkpoint.save(
        run.run_dir,
        run.state,
        course=run.course,
        meters=run.meters.state_dict(),
        trained=run.built.trained,
        optimizer=run.built.optimizer,
        stage=engine.stage_id,
        data_rank=engine.data_rank,
        keep_last=run.settings.keep_last,
    )
    run.checkpoint_clock = time.monotonic()
    if folder is not None:
        run.last_checkpoint = run.state.step
        run.metrics.flush()
        run.display.message(f"checkpoint: {folder}")


def save_model(run: Run, name: str) -> None:
    engine = run.built.engine
    now = run.milestones()
    metadata = {**run.metadata, "reelpipe.step": str(now.step), "reelpipe.epoch": str(now.epochs_done)}
    with eval_mode(run.built.optimizer):
        folder = export(
            run.family,
            run.run_dir / name,
            run.built.trained,
            is_adapter=run.settings.is_adapter,
            dtype=run.settings.save_dtype,
            stage=engine.stage_id,
            data_rank=engine.data_rank,
            metadata=metadata,
            extras=run.write_configs,
        )
    run.last_saved = run.state.step
    run.display.message(f"saved: {folder}")
