"""Losses on held-out data, at fixed quantiles and with noise fixed by sample."""

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import MicroBatch, ModelFamily
from utils import dist
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.records import Bucket
from utils.data.workers import Progress, Silent
from utils.monitor.metrics import eval_others_tag, eval_tag, of_expert
from utils.train.activity import Batch
from utils.train.engine import ReelEngine
from utils.train.experts import Experts
from utils.train.forward_pass import Question
from utils.train.nonfinite import MAX_SAMPLES
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
    """Mean losses over all samples, each counted once.

    Attributes:
        bad: index of a sample to the quantiles at which its loss is NaN or infinite, as a mean with it then is too.
        others_loss: the mean over the samples that are finite everywhere; NaN where there are none.
    """

    loss: float
    by_quantile: dict[float, float]
    samples: int
    bad: Mapping[int, Sequence[float]]
    others_loss: float

    @classmethod
    def of(cls, table: Tensor) -> "EvalResult":
        """From losses [quantiles, samples]."""
        means, good = table.mean(dim=1).tolist(), table.isfinite()
        bad: dict[int, list[float]] = {}
        for index, place in (~good).T.nonzero().tolist():
            bad.setdefault(index, []).append(QUANTILES[place])
        others = float(table[:, good.all(dim=0)].mean())
        by_quantile = dict(zip(QUANTILES, means, strict=True))
        return cls(sum(means) / len(means), by_quantile, table.shape[1], bad, others)

    def scalars(self, name: str) -> dict[str, float]:
        """Under the tags that TensorBoard shows."""
        tags = {eval_tag(name): self.loss, **{eval_tag(name, q): value for q, value in self.by_quantile.items()}}
        return {**tags, eval_others_tag(name): self.others_loss} if self.bad else tags

    def bad_words(self, name_of: Callable[[int], str]) -> str:
        """Which samples are in `bad`, and where: `a.mp4 (quantile 0.1), b.mp4 (all quantiles) and 3 more`."""
        told = []
        for index, quantiles in list(self.bad.items())[:MAX_SAMPLES]:
            where = f"quantile {', '.join(map(str, quantiles))}" if len(quantiles) < len(QUANTILES) else "all quantiles"
            told.append(f"{name_of(index)} ({where})")
        more = len(self.bad) - len(told)
        return ", ".join(told) + (f" and {more} more" if more else "")


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
        if any(result.bad for result in self.of.values()):
            others = (self.shares[expert] * result.others_loss for expert, result in self.of.items())
            tags[eval_others_tag(name)] = sum(others)
        for expert, result in self.of.items():
            tags |= result.scalars(of_expert(name, expert))
        return tags


def evaluate_experts(
    experts: Experts,
    eval_sets: Sequence[EvalSet],
    shares: Mapping[str, float],
    progress: Progress | None,
    patience: float = 1.0,
    question: Question | None = None,
) -> dict[str, Evaluation] | None:
    """Every dataset with every expert, by the dataset's name. Every rank calls this and gets the same result, which is
    None where the answers to `question` had them leave."""
    found = {eval_set.name: Evaluation({}, shares) for eval_set in eval_sets}
    for name in experts.awake_first if eval_sets else ():
        family, built = experts.wake(name)
        with eval_mode(built.optimizer):
            for eval_set in eval_sets:
                result = evaluate(built.engine, eval_set.of(name, family), progress, patience, question)
                if result is None:
                    return None
                found[eval_set.name].of[name] = result
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
    engine: ReelEngine,
    eval_set: EvalSet,
    progress: Progress | None = None,
    patience: float = 1.0,
    question: Question | None = None,
) -> EvalResult | None:
    """Every rank calls this and gets the same result. Weights, optimizer and random state stay as they are.

    Args:
        patience: of a single micro-batch, in stall timeouts.
        question: asked at each micro-batch; None is returned where its answer was to leave.
    """
    batches = micro_batches(eval_set)
    data_ranks = engine.grid.get_data_parallel_world_size()
    mine = batches[engine.data_rank :: data_ranks]
    feed: Generator[MicroBatch, None, None] | None = None
    if engine.is_first_stage() or engine.is_last_stage():
        feed = _feed(eval_set, mine, progress or Silent())
    engine.activity.begin(f"the evaluation of {eval_set.name}", partial(_named, eval_set, mine), patience=patience)
    losses = engine.evaluate_batches(feed, len(mine), question, len(batches) // data_ranks)
    if feed is not None:
        feed.close()
    if losses is None:
        return None
    engine.activity.note("the sum of the losses", None)
    # one cell a sample and quantile, filled by exactly one rank: the sum over ranks is exact
    table = torch.zeros(len(QUANTILES), len(eval_set.dataset.entries), dtype=torch.float64)
    for items, values in zip(mine, losses, strict=False):
        for item, value in zip(items, values.tolist(), strict=True):
            table[QUANTILES.index(item.quantile), item.entry] = value
    return EvalResult.of(dist.sum_over_ranks(table))


def _named(eval_set: EvalSet, batches: Sequence[Sequence[EvalItem]], micro_batch: int | None) -> Batch:
    entries = [eval_set.dataset.entries[item.entry] for item in batches[micro_batch or 0]]
    return Batch(str(entries[0].bucket), [entry.name for entry in entries])


def _feed(
    eval_set: EvalSet, batches: Sequence[Sequence[EvalItem]], progress: Progress
) -> Generator[MicroBatch, None, None]:
    progress.start(len(batches), f"evaluating {eval_set.name}")
    try:
        for items in batches:
            yield eval_set.dataset.eval_batch(items)
            progress.advance(1, "")
    finally:  # left, perhaps
        progress.done()
