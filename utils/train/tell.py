"""What the console shows around the training: introduction, cache, stages, buckets, and where everything is."""

import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch
from rich.console import Console

from models.base import ModelFamily
from utils import dist
from utils.config.schema import RunConfig
from utils.monitor import console as show
from utils.train.loop import Run
from utils.train.prepare import Prepared, skipped


def waiting(console: Console) -> None:
    """While ranks meet. On a CPU DeepSpeed compiles a small library the first time, which takes a minute."""
    why = "" if dist.on_gpu() else "; the first time on a machine DeepSpeed compiles a small library"
    show.show(console, f"waiting for {show.counted(dist.world_size(), 'rank')} to meet{why}")


def introduce(
    console: Console,
    family: ModelFamily,
    config: RunConfig,
    run_dir: Path | None,
    resume: Path | None,
    notices: Sequence[str],
) -> None:
    """The first lines."""
    trains = f"LoRA of rank {config.adapter.rank}" if config.adapter else "all weights"
    ranks, stages = dist.world_size(), config.pipeline_stages
    where = torch.cuda.get_device_name() if dist.on_gpu() else "CPU"
    show.show(
        console,
        f"{family.title}: training {trains} on {show.counted(ranks, 'rank')} ({where}), "
        f"{show.counted(stages, 'pipeline stage')} x {show.counted(ranks // stages, 'data rank')}",
    )
    if run_dir:
        show.show(console, f"run folder: {run_dir}" + (f", going on from {resume.name}" if resume else ""))
    for notice in notices:
        show.show(console, f"note: {notice}")


def cache(console: Console, prepared: Prepared, run_dir: Path | None) -> None:
    """What was encoded, and what is left out."""
    manifests = list(prepared.manifests.values())
    entries = [entry for manifest in manifests for entry in manifest.entries]
    latents = {entry.latents_key for entry in entries}
    texts = {key for entry in entries for key in entry.text_keys} | {m.empty_text_key for m in manifests} - {""}
    for keys, noun, encoded in ((latents, "clip", prepared.report.latents), (texts, "caption", prepared.report.text)):
        show.show(console, show.cache_summary(encoded, len(keys), noun))
    left_out = [(item.path.name, item.reason) for _, item in skipped(prepared.manifests)]
    if left_out:
        show.show(console, show.skipped_table(left_out, full_list=str((run_dir or Path()) / "skipped.jsonl")))


def plan(console: Console, family: ModelFamily, run: Run, ranks: Sequence[Sequence[int]]) -> None:
    """Stages, buckets and the arithmetic of an epoch."""
    stages = [
        show.StageRow(
            row.stage, row.first_layer, row.last_layer, row.parameters, row.trainable, row.weight_bytes, ranks[i]
        )
        for i, row in enumerate(run.built.engine.module.rows)
    ]
    show.show(console, show.stage_table(stages))
    counts = run.plan.counts()
    buckets = [
        show.BucketRow(
            str(row.bucket),
            _plain(row.samples_per_epoch),
            row.batch.samples,
            row.steps_first_epoch,
            row.left_over,
            family.tokens(*row.bucket),
        )
        for row in counts
    ]
    show.show(console, show.bucket_table(buckets))
    rows = [
        show.EpochRow(
            row.clips,
            float(row.samples_per_epoch / row.clips),
            row.batch.micro_batch,
            row.steps_first_epoch,
            row.left_over,
        )
        for row in counts
    ]
    shape = counts[0].batch
    show.show(console, show.epoch_arithmetic_banner(rows, shape.micro_batches, shape.data_ranks, width=console.width))
    total, left = run.settings.total_steps, max(run.settings.total_steps - run.state.step, 0)
    to_go = f", {left} to go" if left else f", {run.state.step} done: raise epochs or max_steps to train on"
    show.show(console, f"{show.counted(total, 'step')} in all" + (to_go if left != total else ""))
    for bucket in run.plan.never_used(run.plan.epoch_of(max(total - run.state.data_start - 1, 0))):
        show.show(console, f"warning: bucket {bucket} does not fill one batch in this run, its clips are never used")


def _plain(number: Fraction) -> int | float:
    return number.numerator if number.denominator == 1 else float(number)


def start_command(ranks: int, words: Sequence[str]) -> str:
    """How this run was started, as far as the same run needs it again: its config and its overrides."""
    kept = [words[i : i + 2] for i, word in enumerate(words[:-1]) if word in ("--config", "--set")]
    kept += [[word] for word in words if word.startswith(("--config=", "--set="))]
    pairs = " ".join(shlex.join(pair) for pair in kept)
    return f"deepspeed --num_gpus={ranks} train.py --deepspeed {pairs}"


def goodbye(console: Console, run: Run, finished: bool) -> None:
    """Where everything is and what to run next."""
    if not dist.is_main():
        return
    paths: dict[str, object] = {"run folder": run.run_dir}
    if run.saved is not None:
        paths["trained " + ("LoRA" if run.settings.is_adapter else "model")] = run.saved
    if run.checkpointed is not None:
        paths["checkpoint"] = run.checkpointed
    paths["numbers"] = run.run_dir / "metrics.jsonl"
    start = start_command(dist.world_size(), sys.argv)
    commands = {
        "see the curves": f"tensorboard --logdir {shlex.quote(str(run.run_dir.parent))}",
        "go on (raise epochs first)" if finished else "go on": f"{start} --resume_from_checkpoint {run.run_dir.name}",
    }
    show.show(console, show.closing_panel(paths, commands, title="Done" if finished else "Stopped"))
