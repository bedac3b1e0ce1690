"""Losses on held-out data, at fixed quantiles and with noise fixed by sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from models.base import MicroBatch
from utils import dist
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.records import Bucket
from utils.data.workers import Progress, Silent
from utils.monitor.metrics import eval_tag
from utils.train.engine import ReelEngine

QUANTILES = tuple(i / 10 for i in range(1, 10))


class EvalSet(NamedTuple):
    """One held-out dataset under its name in `eval_datasets`."""

    name: str
    dataset: CachedDataset
    micro_batch_of: Callable[[Bucket], int]


class EvalResult(NamedTuple):
    """Mean losses over all samples, each counted once."""

    loss: float
    by_quantile: dict[float, float]
    samples: int

    def scalars(self, name: str) -> dict[str, float]:
        """Under the tags that TensorBoard shows."""
        return {eval_tag(name): self.loss, **{eval_tag(name, q): value for q, value in self.by_quantile.items()}}


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


def evaluate(engine: ReelEngine, eval_set: EvalSet, progress: Progress | None = None) -> EvalResult:
    """Every rank calls this and gets the same result. Weights, optimizer and random state stay as they are."""
    batches = micro_batches(eval_set)
    data_ranks = engine.grid.get_data_parallel_world_size()
    mine = batches[engine.data_rank :: data_ranks]
    feed: Iterator[MicroBatch] | None = None
    if engine.is_first_stage() or engine.is_last_stage():
        feed = _feed(eval_set, mine, progress or Silent())
    losses = engine.evaluate_batches(feed, len(mine))
    # one cell a sample and quantile, filled by exactly one rank: the sum over ranks is exact
    table = torch.zeros(len(QUANTILES), len(eval_set.dataset.entries), dtype=torch.float64)
    for items, values in zip(mine, losses, strict=False):
        for item, value in zip(items, values.tolist(), strict=True):
            table[QUANTILES.index(item.quantile), item.entry] = value
    means = dist.sum_over_ranks(table).mean(dim=1).tolist()
    return EvalResult(sum(means) / len(means), dict(zip(QUANTILES, means, strict=True)), table.shape[1])


def _feed(eval_set: EvalSet, batches: Sequence[Sequence[EvalItem]], progress: Progress) -> Iterator[MicroBatch]:
    progress.start(len(batches), f"evaluating {eval_set.name}")
    for items in batches:
        yield eval_set.dataset.eval_batch(items)
        progress.advance(1, "")
    progress.done()
