"""A job and its cached data to a `Run`: engine, plan, loader, meters, resumed where that was asked for."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import dist
from utils.config.load import LoadedConfig
from utils.config.schema import RunConfig
from utils.data.dataset import CachedDataset
from utils.data.loader import StepLoader
from utils.data.manifest import Manifest
from utils.data.plan import EpochPlan
from utils.data.records import Bucket
from utils.monitor.console import LiveLine
from utils.monitor.logs import captured_output
from utils.monitor.meters import Meters
from utils.monitor.metrics import MetricsWriter
from utils.monitor.progress import LiveProgress
from utils.train import checkpoint, tell
from utils.train.activity import LONG
from utils.train.checkpoint import Part
from utils.train.engine import ReelEngine
from utils.train.evaluate import EvalSet
from utils.train.experts import Experts, build_experts, turns
from utils.train.loop import LoopSettings, Run
from utils.train.order import course_of, make_plan, refuse_other_order
from utils.train.prepare import TRAIN, Prepared
from utils.train.record import write_configs, write_record
from utils.train.setup import DTYPES, Job, engine_settings, wandb_settings
from utils.train.state import TrainState
from utils.train.triggers import Every
from utils.version import VERSION

logger = logging.getLogger(__name__)


def build_run(job: Job, data: Prepared) -> Run:
    """The engine, the plan and everything else that the loop needs; resumed where that was asked for."""
    config, settings = job.config, engine_settings(job.config)
    job.activity.begin("building the model", patience=LONG)
    with captured_output(job.log_file):
        experts = build_experts(job.family, settings, dist.device())
    engine = experts.engine
    job.activity.stage = engine.stage_id
    for _, expert in experts.items():
        expert.built.engine.activity = job.activity
    data_ranks = engine.grid.get_data_parallel_world_size()
    plan = make_plan(config, data.train, data_ranks)
    course = course_of(config, plan, data.train) | turns(job.family) | quiet_course(job.loaded)
    course["model"] = job.family.title
    state, meters = TrainState(), Meters()
    if job.resume:
        job.activity.begin("reading the checkpoint", patience=LONG)
        state = resume(job, experts, course, meters)
    total = total_steps(config, plan, state)
    reads_data = engine.is_first_stage() or engine.is_last_stage()
    display = LiveLine(job.console, enabled=dist.is_main(), steps_per_print=config.steps_per_print)
    dataset_at = training_sets(job, data, experts, state.data_start)
    run = Run(
        run_dir=job.run_dir,
        family=job.family,
        experts=experts,
        plan=plan,
        loader=StepLoader(dataset_at, plan, engine.data_rank, state.plan_step) if reads_data else None,
        eval_sets=eval_sets(job, data),
        settings=loop_settings(config, total),
        state=state,
        course=course,
        metrics=MetricsWriter(
            job.run_dir,
            enabled=dist.is_main(),
            x_axis_examples=config.x_axis_examples,
            resume_step=state.step if job.resume else None,
            wandb=wandb_settings(job.loaded) if config.monitoring.enable_wandb else None,
        ),
        meters=meters,
        display=display,
        progress=LiveProgress(display, job.console, enabled=dist.is_main()),
        metadata=file_metadata(job, data.train),
        write_configs=lambda folder: write_configs(job.loaded, folder),
        base_lr=config.force_constant_lr or config.optimizer.lr,
        activity=job.activity,
        name_of=lambda entry: data.train.entries[entry].name,
        checkpointed=job.resume,
        last_checkpoint=state.step if job.resume else -1,
    )
    if dist.is_main():
        write_configs(job.loaded, job.run_dir)
        facts = {"layers": engine.module.parts, "ranks": dist.world_size(), **turns(job.family)}
        write_record(job.loaded, job.run_dir, facts)
        tell.plan(job.console, job.family, run, ranks_of(engine, data_ranks))
    return run


def resume(job: Job, experts: Experts, course: dict[str, Any], meters: Meters) -> TrainState:
    """Fill weights, optimizers and meters from the checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the data would come in another order.
    """
    fresh = job.flags.reset_optimizer
    parts = {n: Part(e.built.trained, None if fresh else e.built.optimizer) for n, e in experts.items()}
    loaded = checkpoint.load(job.resume, parts)
    meters.load_state_dict(loaded.meters)
    quiet = quiet_course(job.loaded)
    if job.flags.reset_dataloader:
        course = quiet
    else:  # what does not touch the order is no reason for another one
        decisive = {key: value for key, value in course.items() if key not in quiet}
        refuse_other_order(job.resume, loaded.course, decisive)
    for change in checkpoint.course_changes(loaded.course, course):
        logger.warning("changed since the checkpoint: %s", change)
    return loaded.state.restarted(loaded.epochs_done) if job.flags.reset_dataloader else loaded.state


def quiet_course(loaded: LoadedConfig) -> dict[str, Any]:
    """What may change without touching the order of the data, and yet makes other training of it.

    What the trained tensors count by and are added to, or they mean another change of weight; the loss; and all of
    `[model]` but its paths, since a checkpoint may have moved.
    """
    config, model = loaded.run, loaded.model
    fused = [[str(entry.path), entry.weight, entry.expert] for entry in config.fused]
    paths = {key for key in type(model).model_fields if isinstance(getattr(model, key), Path)}
    settings = {f"model.{key}": value for key, value in model.model_dump(mode="json", exclude=paths).items()}
    alpha = config.adapter and config.adapter.alpha
    return {"alpha": alpha, "fuse_adapters": fused, "pseudo_huber_c": config.pseudo_huber_c, **settings}


def total_steps(config: RunConfig, plan: EpochPlan, state: TrainState) -> int:
    """Optimizer steps of the whole run; `epochs` and `max_steps` are totals, earlier starts included."""
    left = max(config.epochs - state.epoch_start, 0)
    steps = state.data_start + plan.first_step(left + 1)
    return min(steps, config.max_steps) if config.max_steps else steps


def dataset_of(job: Job, data: Prepared, manifest: Manifest, seed: int, caption_dropout: float) -> CachedDataset:
    return CachedDataset(
        job.family,
        data.store,
        manifest.entries,
        manifest.empty_text_key,
        seed=seed,
        caption_dropout=caption_dropout,
    )


def training_sets(job: Job, data: Prepared, experts: Experts, data_start: int) -> Callable[[int], CachedDataset]:
    """Who makes the micro-batches of a step of the plan: the expert whose turn that step is."""
    whole = dataset_of(job, data, data.train, job.config.seed, job.config.uncond_fraction)
    of = {name: whole.made_by(expert.family) for name, expert in experts.items()}
    return lambda plan_step: of[job.family.expert_at(data_start + plan_step)]


def eval_sets(job: Job, data: Prepared) -> list[EvalSet]:
    config = job.config

    def micro_batch_of(bucket: Bucket) -> int:
        return config.micro_batch_size(*bucket, evaluating=True)

    held_out = {name: manifest for name, manifest in data.manifests.items() if name != TRAIN}
    return [
        EvalSet(name, dataset_of(job, data, manifest, config.eval_seed, 0.0), micro_batch_of)
        for name, manifest in held_out.items()
    ]


def loop_settings(config: RunConfig, total: int) -> LoopSettings:
    constant = config.force_constant_lr is not None
    return LoopSettings(
        total_steps=total,
        schedule="constant" if constant else config.lr_scheduler,
        warmup_steps=0 if constant else config.warmup_steps,
        eval_every=Every(config.eval_every_n_steps, config.eval_every_n_epochs, config.eval_every_n_examples),
        eval_before_first_step=config.eval_before_first_step,
        save_every=Every(config.save_every_n_steps, config.save_every_n_epochs, config.save_every_n_examples),
        checkpoint_every=Every(n_epochs=config.checkpoint_every_n_epochs, minutes=config.checkpoint_every_n_minutes),
        keep_last=config.keep_last,
        logging_steps=config.logging_steps,
        save_dtype=DTYPES[config.save_dtype] if config.save_dtype else None,
        is_adapter=config.adapter is not None,
        formats=config.adapter.save_format if config.adapter else (),
        compiles=config.compile,
    )


def file_metadata(job: Job, manifest: Manifest) -> dict[str, str]:
    """For the header of saved files; the model, step and epoch are added when one is written."""
    adapter = job.config.adapter
    adapted = {"rank": str(adapter.rank), "alpha": f"{adapter.alpha:g}"} if adapter else {}
    data = {"reelpipe.dataset_digest": manifest.digest(), "reelpipe.samples": str(len(manifest.entries))}
    return {"format": "pt", **adapted, **data, "reelpipe.version": VERSION}


def ranks_of(engine: ReelEngine, data_ranks: int) -> list[list[int]]:
    """Global ranks of each stage."""
    grid = engine.grid
    return [
        [grid.topology().get_rank(pipe=stage, data=data) for data in range(data_ranks)]
        for stage in range(grid.get_pipe_parallel_world_size())
    ]
