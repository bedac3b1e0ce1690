"""A job and its cached data to a `Run`: engine, plan, loader, meters, resumed where that was asked for."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils import dist
from utils.config.load import LoadedConfig
from utils.config.schema import RunConfig
from utils.data.dataset import CachedDataset
from utils.data.loader import StepLoader
from utils.data.manifest import Manifest
from utils.data.plan import EpochPlan, counter_hash
from utils.data.records import Bucket
from utils.monitor.console import LiveLine
from utils.monitor.logs import captured_output
from utils.monitor.meters import Meters
from utils.monitor.metrics import METRICS_FILE, MetricsWriter, eval_tag, tags_at
from utils.monitor.progress import LiveProgress
from utils.train import checkpoint, checkpoint_read, tell
from utils.train.activity import LONG
from utils.train.checkpoint import Part
from utils.train.checkpoint_read import Loaded
from utils.train.checkpoint_write import Checkpointer
from utils.train.engine import ReelEngine
from utils.train.evaluate import EvalSet
from utils.train.experts import Experts, build_experts, turns
from utils.train.loop import LoopSettings, Run
from utils.train.order import course_of, make_plan, refuse_other_order
from utils.train.prepare import TRAIN, Prepared
from utils.train.record import write_configs, write_record
from utils.train.setup import DTYPES, Job, engine_settings, wandb_settings
from utils.train.state import TrainState
from utils.train.stopping import TimeLimit
from utils.train.triggers import Every
from utils.version import VERSION

logger = logging.getLogger(__name__)

SLOW_DISK_BYTES_PER_S = 100e6
STEP_KEYS = ("lr_scheduler", "warmup_steps", "force_constant_lr", "gradient_clipping")
ADAPTER_KEYS = ("type", "dropout", "factor", "decompose_both", "dtype")  # beside alpha; the rest shows in the tensors
LENGTH = "total steps"
CLIPS = "clips and captions"
HELD_OUT = "the clips of eval dataset "
DATA_COURSE = (CLIPS, "weight", "regularization sets", "loss masks")


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
    plan = make_plan(config, data.train, data_ranks, job.family.tokens)
    course = whole_course(job, data, plan)
    state, meters, owed, came_with = TrainState(), Meters(), (), (-1, "")
    if job.resume:
        job.activity.begin("reading the checkpoint", patience=LONG)
        loaded = resume(job, experts, course, meters, lambda state: length_course(config, plan, state))
        state, owed, came_with = loaded.state, loaded.owed, (loaded.state.step, loaded.mark)
    course |= length_course(config, plan, state)
    reads_data = engine.is_first_stage() or engine.is_last_stage()
    display = LiveLine(job.console, enabled=dist.is_main(), steps_per_print=config.steps_per_print)
    dataset_at = training_sets(job, data, experts, state.data_start)
    run = Run(
        run_dir=job.run_dir,
        family=job.family,
        experts=experts,
        checkpointer=checkpointer_of(job, engine),
        plan=plan,
        loader=StepLoader(dataset_at, plan, engine.data_rank, state.plan_step) if reads_data else None,
        eval_sets=eval_sets(job, data),
        settings=loop_settings(config, total_steps(config, plan, state)),
        state=state,
        course=course,
        metrics=metrics_writer(job, state.step if job.resume else None),
        meters=meters,
        display=display,
        progress=LiveProgress(display, job.console, enabled=dist.is_main()),
        metadata=file_metadata(job, data.train),
        write_configs=lambda folder: write_configs(job.loaded, folder),
        base_lr=config.force_constant_lr or config.optimizer.lr,
        activity=job.activity,
        name_of=lambda entry: data.train.entries[entry].name,
        is_regularization=lambda entry: data.train.groups[data.train.entries[entry].group].is_regularization,
        checkpointed=job.resume,
        last_checkpoint=state.step if job.resume else -1,
        owed=owed,
        came_with=came_with,
        limit=TimeLimit(config.max_runtime_minutes, first_save_s(experts)),
    )
    if job.resume:
        run.last_eval = state.step if is_evaluated(run) else -1
    if dist.is_main():
        introduce(job, data, run, ranks_of(engine, data_ranks))
    return run


def whole_course(job: Job, data: Prepared, plan: EpochPlan) -> dict[str, Any]:
    """All that makes a run what it is, but for its length."""
    course = course_of(job.config, plan, data.train) | turns(job.family) | quiet_course(job.loaded)
    return {**course, "model": job.family.title, **data_course(data.train), **held_out_course(data)}


def checkpointer_of(job: Job, engine: ReelEngine) -> Checkpointer:
    """What writes and prunes this rank's part of the run's checkpoints."""
    return Checkpointer(
        job.run_dir,
        stage=engine.stage_id,
        data_rank=engine.data_rank,
        keep_last=job.config.keep_last,
        activity=job.activity,
    )


def tell_of_end(run: Run) -> None:
    """Warn where the config has the run end before the step that it goes on from."""
    if run.state.step > run.settings.total_steps:
        logger.warning(
            "the checkpoint is of step %d, and epochs and max_steps end the run at step %d: there is nothing to train; "
            "raise them to train on",
            run.state.step,
            run.settings.total_steps,
        )


def metrics_writer(job: Job, resume_step: int | None) -> MetricsWriter:
    return MetricsWriter(
        job.run_dir,
        enabled=dist.is_main(),
        x_axis_examples=job.config.x_axis_examples,
        resume_step=resume_step,
        wandb=wandb_settings(job.loaded) if job.config.monitoring.enable_wandb else None,
    )


def introduce(job: Job, data: Prepared, run: Run, ranks: list[list[int]]) -> None:
    """What the run is, in its folder and on the console."""
    write_configs(job.loaded, job.run_dir)
    facts = {"layers": run.experts.engine.module.parts, "ranks": dist.world_size(), **turns(job.family)}
    facts["data_digest"] = {name: manifest.digest() for name, manifest in data.manifests.items()}
    write_record(job.loaded, job.run_dir, facts)
    tell_of_end(run)
    tell.sets(job.console, data.train.groups)
    tell.plan(job.console, job.config, job.family, run, ranks)


def resume(
    job: Job,
    experts: Experts,
    course: Mapping[str, Any],
    meters: Meters,
    course_from: Callable[[TrainState], Mapping[str, Any]] = lambda _: {},
) -> Loaded:
    """Fill weights, optimizers and meters from the checkpoint; what else it says, with the state to go on from.

    Args:
        course_from: what belongs to the course beside `course`, and hangs on that state.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the data would come in another order.
    """
    fresh = job.flags.reset_optimizer
    parts = {n: Part(e.built.trained, None if fresh else e.built.optimizer) for n, e in experts.items()}
    loaded = checkpoint_read.load(job.resume, parts)
    meters.load_state_dict(loaded.meters)
    harmless = {*quiet_course(job.loaded), *DATA_COURSE}
    quiet = {key: value for key, value in course.items() if key in harmless or key.startswith(HELD_OUT)}
    if job.flags.reset_dataloader:
        course, loaded = quiet, loaded._replace(state=loaded.state.restarted(loaded.epochs_done))
    else:  # what does not touch the order is no reason for another one
        decisive = {key: value for key, value in course.items() if key not in quiet}
        refuse_other_order(job.resume, loaded.course, decisive)
    for change in checkpoint.course_changes(loaded.course, {**course, **course_from(loaded.state)}):
        logger.warning("changed since the checkpoint: %s", _in_words(change))
    return loaded


def _in_words(change: str) -> str:
    """Two numbers tell nobody what it is that differs, nor does a key without its table."""
    if change.startswith("alpha "):
        return f"adapter.{change}"
    if change.startswith((HELD_OUT, "eval_seed ")):
        return f"{change}: evaluations of before and of now cannot be compared"
    if change.startswith(f"{LENGTH} "):
        return f"{change}: the learning rate, which goes down until then, is another one from here on"
    if not change.startswith(f"{CLIPS} "):
        return change
    return (
        f"the clips or their captions are others ({change.removeprefix(f'{CLIPS} ')}): a file, a caption, or what is "
        "made of them by a key of the dataset file, such as flip, crop or captions; training goes on with what is "
        "there now"
    )


def is_evaluated(run: Run) -> bool:
    """Whether the numbers of the step that a run goes on from are there already; rank 0 looks."""
    found = set()
    if dist.is_main() and (path := run.run_dir / METRICS_FILE).exists():
        found = tags_at(path, run.state.step)
    return bool(dist.from_main(int(all(eval_tag(each.name) in found for each in run.eval_sets))))


def quiet_course(loaded: LoadedConfig) -> dict[str, Any]:
    """What may change without touching the order of the data, and yet makes other training of it.

    What the trained tensors count by and are added to, or they mean another change of weight; the loss; how large steps
    are; and all of `[model]` but its paths, since a checkpoint may have moved.
    """
    config, model = loaded.run, loaded.model
    fused = [[str(entry.path), entry.weight, entry.expert] for entry in config.fused]
    paths = {key for key in type(model).model_fields if isinstance(getattr(model, key), Path)}
    settings = {f"model.{key}": value for key, value in model.model_dump(mode="json", exclude=paths).items()}
    settings |= {f"optimizer.{key}": value for key, value in config.optimizer.model_dump(mode="json").items()}
    settings |= {key: getattr(config, key) for key in STEP_KEYS}
    adapter = config.adapter
    settings |= {f"adapter.{key}": getattr(adapter, key) for key in ADAPTER_KEYS if adapter}
    alpha = adapter and adapter.alpha
    told = {"alpha": alpha, "fuse_adapters": fused, "pseudo_huber_c": config.pseudo_huber_c, **settings}
    return {**told, "eval_seed": config.eval_seed}


def held_out_course(data: Prepared) -> dict[str, str]:
    """What each eval dataset holds."""
    held_out = {name: manifest for name, manifest in data.manifests.items() if name != TRAIN}
    return {f"{HELD_OUT}{name}": _number([e.sample_id for e in held.entries]) for name, held in held_out.items()}


def length_course(config: RunConfig, plan: EpochPlan, state: TrainState) -> dict[str, int]:
    """How long the run is, where each learning rate hangs on that."""
    decays = config.force_constant_lr is None and config.lr_scheduler != "constant"
    return {LENGTH: total_steps(config, plan, state)} if decays else {}


def data_course(train: Manifest) -> dict[str, Any]:
    """What of the data may change without touching its order: the samples themselves, which a flip, a crop or another
    caption makes others; what they count, and what they are trained toward."""
    weights: dict[int, dict[str, float]] = {index: {} for index in range(len(train.groups))}
    for entry in train.entries:
        weights[entry.group][entry.sample_id] = entry.weight
    told = [_weights_told(of) or f"{train.groups[index].weight:g}" for index, of in weights.items()]
    held = [f"directory[{index}]" for index, group in enumerate(train.groups) if group.is_regularization]
    clips = _number([entry.sample_id for entry in train.entries])
    return dict(zip(DATA_COURSE, (clips, told, held, _masks_told(train)), strict=True))


def _masks_told(train: Manifest) -> str:
    """`none`, or `12 of 40 clips (9f3a62)`: the number tells other masks apart, as in `_weights_told`."""
    masked = sorted((entry.sample_id, entry.mask_keys) for entry in train.entries if entry.mask_keys)
    return f"{len(masked)} of {len(train.entries)} clips ({_number(masked)})" if masked else "none"


def _weights_told(of: Mapping[str, float]) -> str:
    """`0.5`, or `0.25 to 2 (9f3a62)` where clips differ: by the number two such lists are told apart."""
    values = set(of.values())
    if len(values) < 2:
        return "".join(f"{value:g}" for value in values)
    return f"{min(values):g} to {max(values):g} ({_number(sorted(of.items()))})"


def _number(value: object) -> str:
    """Six digits by which a person tells two values apart."""
    return f"{counter_hash(value) % 16**6:06x}"


def first_save_s(experts: Experts) -> float:
    """Seconds that a checkpoint may take as long as none was written: weights, and two moments of each."""
    trained = (p for _, expert in experts.items() for p in expert.built.trained.values())
    return sum(3 * p.numel() * p.element_size() for p in trained) / SLOW_DISK_BYTES_PER_S


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
        return config.micro_batch_size(*bucket, job.family.tokens(*bucket), evaluating=True)

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
        on_nonfinite=config.on_nonfinite,
        max_nonfinite=config.max_nonfinite,
        loss_spike_factor=config.loss_spike_factor,
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
