"""The order of the data as a config gives it, and whether a checkpoint's run had the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import dist
from utils.config.schema import RunConfig
from utils.data.manifest import Manifest
from utils.data.plan import BatchShape, EpochPlan
from utils.data.records import Bucket
from utils.train import checkpoint
from utils.train.checkpoint import CheckpointError


def plan_of(config: RunConfig, train: Manifest, data_ranks: int) -> EpochPlan:
    """Raises `ValueError` where there are no samples."""

    def batch_of(bucket: Bucket) -> BatchShape:
        return BatchShape(config.micro_batch_size(*bucket), config.gradient_accumulation_steps, data_ranks)

    return EpochPlan(train.entries, [group.num_repeats for group in train.groups], batch_of, config.seed)


def make_plan(config: RunConfig, train: Manifest, data_ranks: int) -> EpochPlan:
    """Raises `ValueError` where no bucket ever fills a batch."""
    plan = plan_of(config, train, data_ranks)
    if plan.first_step(config.epochs + 1) == 0:
        sizes = ", ".join(f"{row.bucket}: {row.clips} clips, batch {row.batch.samples}" for row in plan.counts())
        raise ValueError(
            f"{config.epochs} epochs do not fill a single batch ({sizes}); lower micro_batch_size_per_gpu or "
            "gradient_accumulation_steps, or raise epochs or num_repeats"
        )
    return plan


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


def check_order(config: RunConfig, train: Manifest, resume: Path | None) -> None:
    """What would be refused once the clips are encoded, found before. `resume` is the checkpoint to go on with."""
    course = course_of(config, make_plan(config, train, data_ranks_of(config)), train)
    if resume is not None and not config.skip_bad_media:  # a clip that cannot be decoded changes the order yet
        refuse_other_order(resume, checkpoint.read_course(resume), course)
