"""The order of the data as a config gives it, and whether a checkpoint's run had the same."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils import dist
from utils.config.schema import RunConfig
from utils.data.manifest import Manifest
from utils.data.plan import BatchShape, EpochPlan
from utils.data.records import Bucket
from utils.monitor.console import counted, grouped
from utils.train import checkpoint
from utils.train.checkpoint import CheckpointError

Tokens = Callable[[int, int, int], int]  # of one sample inside the model, by its width px, height px and frames


def plan_of(config: RunConfig, train: Manifest, data_ranks: int, tokens: Tokens) -> EpochPlan:
    """Raises `ValueError` where there are no samples."""

    def batch_of(bucket: Bucket) -> BatchShape:
        micro_batch = config.micro_batch_size(*bucket, tokens(*bucket))
        return BatchShape(micro_batch, config.gradient_accumulation_steps, data_ranks)

    return EpochPlan(train.entries, [group.num_repeats for group in train.groups], batch_of, config.seed)


def make_plan(config: RunConfig, train: Manifest, data_ranks: int, tokens: Tokens) -> EpochPlan:
    """Raises `ValueError` where no bucket ever fills a batch."""
    plan = plan_of(config, train, data_ranks, tokens)
    if plan.first_step(config.epochs + 1) == 0:
        sizes = ", ".join(
            f"{row.bucket}: {counted(row.clips, 'clip')}, batch {row.batch.samples}" for row in plan.counts()
        )
        epochs = f"{counted(config.epochs, 'epoch')} {'does' if config.epochs == 1 else 'do'}"
        raise ValueError(f"{epochs} not fill a single batch ({sizes}); {smaller_batches(config)}")
    return plan


def batch_key(config: RunConfig) -> str:
    """The key that says how large micro-batches are."""
    return "micro_batch_size_per_gpu" if config.max_tokens_per_gpu is None else "max_tokens_per_gpu"


def smaller_batches(config: RunConfig) -> str:
    """What to do about a batch that is never filled."""
    return f"lower {batch_key(config)} or gradient_accumulation_steps, or raise epochs or num_repeats"


def never_used(config: RunConfig, plan: EpochPlan, epochs: int) -> list[str]:
    """A line for each bucket that fills no batch in `epochs` epochs."""
    sizes = {row.bucket: (row.clips, row.batch.samples) for row in plan.counts()}
    told = []
    for bucket in plan.never_used(epochs):
        clips, batch = sizes[bucket]
        told.append(
            f"bucket {bucket} does not fill one batch of {batch} in this run, its {counted(clips, 'clip')} "
            f"{'is' if clips == 1 else 'are'} never used; {smaller_batches(config)}"
        )
    return told


def over_budget(
    config: RunConfig, plan: EpochPlan | None, tokens: Tokens, held_out: Iterable[Bucket] = ()
) -> list[str]:
    """A line for each bucket of which a single sample has more tokens than `max_tokens_per_gpu`."""
    most = config.max_tokens_per_gpu
    if most is None:
        return []
    buckets = {row.bucket for row in plan.counts()} if plan else set()
    if config.eval_micro_batch_size_per_gpu is None:
        buckets |= set(held_out)
    return [
        f"bucket {bucket}: one sample has {grouped(count)} tokens, more than max_tokens_per_gpu = {most}; its samples "
        "go through the model one at a time"
        for bucket in sorted(buckets)
        if (count := tokens(*bucket)) > most
    ]


def data_ranks_of(config: RunConfig) -> int:
    return dist.world_size() // config.pipeline_stages


def course_of(config: RunConfig, plan: EpochPlan, train: Manifest) -> dict[str, Any]:
    """What decides which samples come when, for the comparison at resume."""
    return {
        "order": plan.digest(),
        "seed": config.seed,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "micro_batch_size_per_gpu": config.micro_batch_size_per_gpu,
        "image_micro_batch_size_per_gpu": config.image_micro_batch_size_per_gpu,
        "max_tokens_per_gpu": config.max_tokens_per_gpu,
        "data_ranks": data_ranks_of(config),
        "num_repeats": [group.num_repeats for group in train.groups],
        "number of clips": len(train.entries),
        "uncond_fraction": config.uncond_fraction,
    }


def refuse_other_order(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where samples would come in another order than the checkpoint's run had."""
    if saved["order"] == now["order"]:
        return
    changes = [change for change in checkpoint.course_changes(saved, now) if not change.startswith("order ")]
    raise CheckpointError(
        f"cannot go on from {folder}: {', '.join(changes) or 'the clips themselves'} changed, and with it the order of "
        "the data; change it back, or pass --reset_dataloader to start the data from its beginning"
    )


def refuse_other_model(folder: Path, title: str) -> None:
    """Raises `CheckpointError` where the checkpoint is another model's: two of one shape would not be told apart by
    their tensors. A checkpoint that does not tell passes."""
    saved = checkpoint.read_course(folder).get("model", title)
    if saved != title:
        raise CheckpointError(
            f"cannot go on from {folder}: it is of {saved}, and this run trains {title}; set [model] to what it was, "
            "or start a new run with [adapter] init_from_existing"
        )


def check_order(config: RunConfig, train: Manifest, tokens: Tokens, resume: Path | None) -> None:
    """What would be refused once the clips are encoded, found before. `resume` is the checkpoint to go on with."""
    course = course_of(config, make_plan(config, train, data_ranks_of(config), tokens), train)
    if resume is not None and not config.skip_bad_media:  # a clip that cannot be decoded changes the order yet
        refuse_other_order(resume, checkpoint.read_course(resume), course)
