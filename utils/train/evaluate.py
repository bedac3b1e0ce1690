"""Losses on held-out data, at fixed quantiles and with noise fixed by sample."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from models.base import MicroBatch, ModelFamily
from utils import dist
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.records import Bucket
from utils.data.workers import Progress, Silent
from utils.monitor.metrics import eval_tag, of_expert
from utils.train.activity import Batch
from utils.train.engine import ReelEngine
from utils.train.experts import Experts
from utils.train.optimizers import eval_mode

QUANTILES = tuple(i / 10 for i in range(1, 10))


class EvalSet(NamedTuple):
    """One held-out dataset under its name in `eval_datasets`."""

    name: str
    dataset: CachedDataset
    micro_batch_of: Callable[[Bucket], int]

    def of(self, expert: str, family: ModelFamily) -> "EvalSet":
        """The same samples for one of several models, under a name of its own."""
        return self._replace(name=of_expert(self.name, expert), dataset=self.dataset.made_by(family))


class EvalResult(NamedTuple):
    """Mean losses over all samples, each counted once."""

    loss: float
    by_quantile: dict[float, float]
    samples: int

    def scalars(self, name: str) -> dict[str, float]:
        """Under the tags that TensorBoard shows."""
        return {eval_tag(name): self.loss, **{eval_tag(name, q): value for q, value in self.by_quantile.items()}}


class Evaluation(NamedTuple):
    """One held-out dataset, by expert; each is measured over its own timesteps."""

    of: dict[str, EvalResult]
    shares: Mapping[str, float]  # of the steps

    @property
    def loss(self) -> float:
        """The mean over the timesteps that are trained on, as often as they are."""
        return sum(self.shares[expert] * result.loss for expert, result in self.of.items())

    def scalars(self, name: str) -> dict[str, float]:
        """Under the tags that TensorBoard shows; a model without a name has no tags of its own."""
        tags = {eval_tag(name): self.loss}
        for expert, result in self.of.items():
            tags |= result.scalars(of_expert(name, expert))
        return tags


def evaluate_experts(
    experts: Experts,
    eval_sets: Sequence[EvalSet],
    shares: Mapping[str, float],
    progress: Progress | None,
    patience: float = 1.0,
) -> dict[str, Evaluation]:
    """Every dataset with every expert, by the dataset's name. Every rank calls this and gets the same result."""
    found = {eval_set.name: Evaluation({}, shares) for eval_set in eval_sets}
    for name in experts.awake_first if eval_sets else ():
        family, built = experts.wake(name)
        with eval_mode(built.optimizer):
            for eval_set in eval_sets:
                found[eval_set.name].of[name] = evaluate(built.engine, eval_set.of(name, family), progress, patience)
    return found


def micro_batches(eval_set: EvalSet) -> list[list[EvalItem]]:
    """All samples at all quantiles in batches of one bucket and one quantile; the last of a bucket may be short."""
    by_bucket: dict[Bucket, list[int]] = {}
    for index, entry in enumerate(eval_set.dataset.entries):
        by_bucket.setdefault(entry.bucket, []).append(index)
    batches = []
    for bucket in sorted(by_bucket):
        members, size = by_bucket[bucket], eval_set.micro_batch_of(bucket)
        for start in range(0, len(members), size):
            batches += [[EvalItem(i, q) for i in members[start : start + size]] for q in QUANTILES]
    return batches


def evaluate(
    engine: ReelEngine, eval_set: EvalSet, progress: Progress | None = None, patience: float = 1.0
) -> EvalResult:
    """Every rank calls this and gets the same result. Weights, optimizer and random state stay as they are.

    Args:
        patience: of a single micro-batch, in stall timeouts.
    """
    batches = micro_batches(eval_set)
    data_ranks = engine.grid.get_data_parallel_world_size()
    mine = batches[engine.data_rank :: data_ranks]
    feed: Iterator[MicroBatch] | None = None
    if engine.is_first_stage() or engine.is_last_stage():
        feed = _feed(eval_set, mine, progress or Silent())
    engine.activity.begin(f"the evaluation of {eval_set.name}", partial(_named, eval_set, mine), patience=patience)
    losses = engine.evaluate_batches(feed, len(mine))
    engine.activity.note("the sum of the losses", None)
    # one cell a sample and quantile, filled by exactly one rank: the sum over ranks is exact
    table = torch.zeros(len(QUANTILES), len(eval_set.dataset.entries), dtype=torch.float64)
    for items, values in zip(mine, losses, strict=False):
        for item, value in zip(items, values.tolist(), strict=True):
            table[QUANTILES.index(item.quantile), item.entry] = value
    means = dist.sum_over_ranks(table).mean(dim=1).tolist()
    return EvalResult(sum(means) / len(means), dict(zip(QUANTILES, means, strict=True)), table.shape[1])


def _named(eval_set: EvalSet, batches: Sequence[Sequence[EvalItem]], micro_batch: int | None) -> Batch:
    entries = [eval_set.dataset.entries[item.entry] for item in batches[micro_batch or 0]]
    return Batch(str(entries[0].bucket), [entry.name for entry in entries])


def _feed(eval_set: EvalSet, batches: Sequence[Sequence[EvalItem]], progress: Progress) -> Iterator[MicroBatch]:
    progress.start(len(batches), f"evaluating {eval_set.name}")
    for items in batches:
        yield eval_set.dataset.eval_batch(items)
        progress.advance(1, "")
    progress.done()
