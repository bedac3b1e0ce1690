"""What the console shows around the training: introduction, cache, stages, buckets, and where everything is."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

from rich.console import Console

from models.adapters import TITLES
from models.base import ModelFamily
from utils import dist
from utils.config.schema import RunConfig
from utils.data.listing import by_reason
from utils.data.manifest import Group
from utils.data.plan import EpochPlan
from utils.monitor import console as show
from utils.train.experts import Experts
from utils.train.loop import Run
from utils.train.order import never_used, over_budget
from utils.train.prepare import Prepared, skipped

# kind of encoder -> what one of its cache entries is to people
NOUNS = {"mask": "mask", "latents": "clip", "condition": "condition", "image": "image state", "text": "caption"}


def waiting(console: Console, what: str) -> None:
    """While ranks meet."""
    show.show(console, what)


def introduce(
    console: Console,
    family: ModelFamily,
    config: RunConfig,
    run_dir: Path | None,
    resume: Path | None,
    notices: Sequence[str],
) -> None:
    """The first lines."""
    trains = f"{trained(config)} of rank {config.adapter.rank}" if config.adapter else "all weights"
    ranks, stages = dist.world_size(), config.pipeline_stages
    where = dist.device_name()
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
    for kind, made in prepared.report.made.items():
        if any(made):  # not where all masks are black
            show.show(console, show.cache_summary(made.encoded, sum(made), NOUNS.get(kind, f"{kind} item")))
    if prepared.report.damaged:
        show.show(console, f"{show.counted(prepared.report.damaged, 'cache file')} damaged, made anew")
    for notice in (notice for manifest in prepared.manifests.values() for notice in manifest.notices):
        show.show(console, f"note: {notice}")
    if left_out := skipped(prepared.manifests):
        rows, full_list = by_reason(item for _, item in left_out), str((run_dir or Path()) / "skipped.jsonl")
        show.show(console, show.skipped_table(rows, full_list=full_list, files=len(left_out)))


def sets(console: Console, groups: Iterable[Group]) -> None:
    """What directories of the training data are used for, and how much, where that is out of the ordinary."""
    for group in groups:
        told = []
        if group.is_regularization:
            told.append("a regularization set: on its clips the adapter is held to what the model predicts without it")
        if group.weight != 1:
            told.append(f"its clips count {group.weight:g} times in the loss")
        if told:
            show.show(console, f"note: {group.path}: {'; '.join(told)}")


def plan(console: Console, config: RunConfig, family: ModelFamily, run: Run, ranks: Sequence[Sequence[int]]) -> None:
    """Stages, buckets and the arithmetic of an epoch."""
    show.show(console, show.stage_table(stage_rows(run.experts, ranks)))
    if len(shares := family.expert_shares()) > 1:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        show.show(
            console, f"experts take turns: {parts} of the steps; one is on the device, the other waits in host memory"
        )
    epoch(console, run.plan, family.tokens)
    total, left = run.settings.total_steps, max(run.settings.total_steps - run.state.step, 0)
    to_go = f", {left} to go" if left else f", {run.state.step} done: raise epochs or max_steps to train on"
    is_told = left == total or run.state.step > total  # `assemble.tell_of_end` warns of that
    show.show(console, f"{show.counted(total, 'step')} in all" + ("" if is_told else to_go))
    epochs = run.plan.epoch_of(max(total - run.state.data_start - 1, 0))
    held_out = [entry.bucket for eval_set in run.eval_sets for entry in eval_set.dataset.entries]
    for note in over_budget(config, run.plan, family.tokens, held_out):
        show.show(console, f"note: {note}")
    for warning in never_used(config, run.plan, epochs):
        show.show(console, f"warning: {warning}")


def epoch(console: Console, plan: EpochPlan, tokens: Callable[[int, int, int], int]) -> None:
    """Buckets and the arithmetic of an epoch; `tokens` as for `epoch_rows`."""
    rows, arithmetic = epoch_rows(plan, tokens, console.width)
    show.show(console, show.bucket_table(rows))
    show.show(console, arithmetic)


def epoch_rows(
    plan: EpochPlan, tokens: Callable[[int, int, int], int], width: int | None = None
) -> tuple[list[show.BucketRow], str]:
    """A row a bucket, and how clips become steps.

    Args:
        tokens: a sample's length inside the model, of width and height in px and frames.
        width: of the terminal, columns.
    """
    counts = plan.counts()
    buckets = [
        show.BucketRow(
            str(row.bucket),
            _plain(row.samples_per_epoch),
            row.batch.samples,
            row.steps_first_epoch,
            row.left_over,
            tokens(*row.bucket),
            row.batch.micro_batch,
        )
        for row in counts
    ]
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
    return buckets, show.epoch_arithmetic_banner(rows, shape.micro_batches, shape.data_ranks, width=width)


def stage_rows(experts: Experts, ranks: Sequence[Sequence[int]]) -> list[show.StageRow]:
    """A row a stage and expert. Where several take turns, frozen weights have a copy in host memory for good."""
    rows = [
        show.StageRow(
            row.stage,
            row.first_layer,
            row.last_layer,
            row.parameters,
            row.trainable,
            row.weight_bytes,
            ranks[row.stage],
            name,
            row.frozen_bytes if name else 0,
        )
        for name, expert in experts.items()
        for row in expert.built.engine.module.rows
    ]
    return sorted(rows, key=lambda row: row.stage)


def _plain(number: Fraction) -> int | float:
    return number.numerator if number.denominator == 1 else float(number)


def start_command(ranks: int, words: Sequence[str], nodes: int = 1, by_torchrun: bool = False) -> str:
    """How this run was started, as far as the same run needs it again: its config and its overrides."""
    kept = [words[i : i + 2] for i, word in enumerate(words[:-1]) if word in ("--config", "--set")]
    kept += [[word] for word in words if word.startswith(("--config=", "--set="))]
    pairs = " ".join(quoted(word) for pair in kept for word in pair)
    if nodes > 1:  # each by its own launcher, or all by one that was given a list of hosts
        return f"(on {nodes} nodes, launched as before) train.py --deepspeed {pairs}"
    if by_torchrun:
        return f"torchrun --nproc_per_node={ranks} train.py {pairs}"
    return f"deepspeed --num_gpus={ranks} train.py --deepspeed {pairs}"


def quoted(word: str) -> str:
    """For a shell. TOML's strings have single quotes, which `shlex.quote` makes unreadable."""
    plain = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain else shlex.quote(word)


def trained(config: RunConfig) -> str:
    """What comes out, in a word."""
    return TITLES[config.adapter.type] if config.adapter else "model"


def resume_name(output_dir: Path, run_dir: Path) -> str:
    """How `--resume_from_checkpoint` finds it, for a shell: by its name, or where it was named by a path, by that."""
    there = output_dir / run_dir.name
    is_inside = there == run_dir or (there.is_dir() and there.samefile(run_dir))
    return shlex.quote(run_dir.name if is_inside else str(run_dir))


def goodbye(console: Console, config: RunConfig, run: Run, finished: bool) -> None:
    """Where everything is and what to run next."""
    if not dist.is_main():
        return
    paths: dict[str, object] = {"run folder": run.run_dir}
    if run.saved is not None:
        names = " and ".join(filter(None, run.experts))
        paths[f"trained {trained(config)}" + (names and f"s of {names}")] = run.saved
    if run.checkpointed is not None:
        paths["checkpoint"] = run.checkpointed
    paths["numbers"] = run.run_dir / "metrics.jsonl"
    nodes, by_torchrun = dist.world_size() // dist.ranks_here(), "TORCHELASTIC_RUN_ID" in os.environ
    start = start_command(dist.world_size(), sys.argv, nodes, by_torchrun)
    totals = "epochs and max_steps" if config.max_steps else "epochs"
    onward = f"go on (raise {totals} first)" if finished else "go on"
    commands = {
        "see the curves": f"tensorboard --logdir {shlex.quote(str(run.run_dir.parent))}",
        onward: f"{start} --resume_from_checkpoint {resume_name(config.output_dir, run.run_dir)}",
    }
    lacking = ", but there is no checkpoint of the last step" if run.last_checkpoint != run.state.step else ""
    show.show(console, show.closing_panel(paths, commands, title=f"Done{lacking}" if finished else "Stopped"))
