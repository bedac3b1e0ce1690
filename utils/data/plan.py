"""Which samples make up which step: pure arithmetic on entries, batch sizes, seed and epoch."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from utils.data.records import Bucket, Entry


class BatchShape(NamedTuple):
    """How the samples of one step are cut up."""

    micro_batch: int  # samples in one forward pass of one data rank
    micro_batches: int  # gradient accumulation steps
    data_ranks: int

    @property
    def samples(self) -> int:
        """The global batch."""
        return self.micro_batch * self.micro_batches * self.data_ranks


class Item(NamedTuple):
    """One use of one entry."""

    entry: int  # index into the plan's entries
    turn: int  # how many times the entry was drawn before


class StepPlan(NamedTuple):
    """One optimizer step: a single bucket, so that no stage waits on a longer clip."""

    step: int  # from 0, over the whole run
    epoch: int  # from 1
    bucket: Bucket
    items: list[Item]
    shape: BatchShape

    def micro_batches_of(self, data_rank: int) -> list[list[Item]]:
        """The items of one data rank, a list a micro-batch."""
        size, ranks = self.shape.micro_batch, self.shape.data_ranks
        starts = [(m * ranks + data_rank) * size for m in range(self.shape.micro_batches)]
        return [self.items[start : start + size] for start in starts]


class BucketCount(NamedTuple):
    """The arithmetic of one bucket, for people."""

    bucket: Bucket
    clips: int
    samples_per_epoch: Fraction  # clips times repeats
    batch: BatchShape
    steps_first_epoch: int
    left_over: int  # samples of the first epoch that the second one starts with


class EpochPlan:
    """The order of all samples over all epochs.

    Each bucket has an endless stream of samples: epoch after epoch, each a shuffle of what its directories give
    (clips times repeats; a fractional repeat takes the next part of the directory's own shuffled rounds). Step k of a
    bucket takes samples k * batch to (k + 1) * batch of the stream. So what does not fill a batch in one epoch opens
    the next, every sample is used equally, and the samples of a step depend on the global batch alone, not on its cut.

    Args:
        repeats: `num_repeats` by group index.
        batch_of: the cut of a bucket's batch.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        repeats: Sequence[float],
        batch_of: Callable[[Bucket], BatchShape],
        seed: int,
    ) -> None:
        if not entries:
            raise ValueError("the dataset has no samples; see skipped.jsonl for why each file was left out")
        self.seed = seed
        self._members: dict[Bucket, dict[int, list[int]]] = {}
        for index, entry in enumerate(entries):
            self._members.setdefault(entry.bucket, {}).setdefault(entry.group, []).append(index)
        self._members = {bucket: self._members[bucket] for bucket in sorted(self._members)}
        self._buckets = list(self._members)
        # str() first: 0.1 as a float is not a tenth, and the difference adds up over epochs
        self._repeats = [Fraction(str(value)) for value in repeats]
        self._batch = {bucket: batch_of(bucket) for bucket in self._members}
        self._starts = [0]  # first step of each epoch, grown when asked for
        self._epoch_steps = lru_cache(maxsize=2)(self._build_epoch)
        self._epoch_samples = lru_cache(maxsize=4 * len(self._members))(self._build_samples)

    def first_step(self, epoch: int) -> int:
        """Steps done before `epoch` (from 1) starts."""
        while len(self._starts) < epoch:
            done = len(self._starts)
            self._starts.append(sum(self._cumulative(b, done) // self._batch[b].samples for b in self._members))
        return self._starts[epoch - 1]

    def epoch_of(self, step: int) -> int:
        """The epoch (from 1) that step `step` (from 0) belongs to."""
        while self._starts[-1] <= step:  # ends, since every repeat count is above 0
            self.first_step(len(self._starts) + 1)
        return bisect_right(self._starts, step)

    def step(self, step: int) -> StepPlan:
        """Step `step` (from 0) of the run."""
        epoch = self.epoch_of(step)
        place, index = self._epoch_steps(epoch)[step - self.first_step(epoch)].tolist()
        bucket = self._buckets[place]
        return StepPlan(step, epoch, bucket, self._stream(bucket, index, epoch), self._batch[bucket])

    def samples_before(self, step: int) -> int:
        """Samples used in steps 0 to step - 1."""
        if step == 0:
            return 0
        epoch = self.epoch_of(step - 1)
        whole = sum(
            self._cumulative(b, epoch - 1) // self._batch[b].samples * self._batch[b].samples for b in self._members
        )
        part = self._epoch_steps(epoch)[: step - self.first_step(epoch), 0]
        steps = np.bincount(part, minlength=len(self._buckets)).tolist()
        return whole + sum(n * self._batch[bucket].samples for n, bucket in zip(steps, self._buckets, strict=True))

    def counts(self) -> list[BucketCount]:
        """The arithmetic of the first epoch, a row a bucket."""
        rows = []
        for bucket, groups in self._members.items():
            samples = sum((self._repeats[g] * len(indices) for g, indices in groups.items()), Fraction())
            shape, drawn = self._batch[bucket], self._cumulative(bucket, 1)
            clips = sum(len(indices) for indices in groups.values())
            rows.append(BucketCount(bucket, clips, samples, shape, drawn // shape.samples, drawn % shape.samples))
        return rows

    def never_used(self, epochs: int) -> list[Bucket]:
        """Buckets that do not fill a single batch in `epochs` epochs."""
        return [b for b in self._members if self._cumulative(b, epochs) < self._batch[b].samples]

    def digest(self) -> str:
        """Changes when the order of samples does."""
        parts = [
            (tuple(b), self._batch[b].samples, {g: (str(self._repeats[g]), i) for g, i in groups.items()})
            for b, groups in self._members.items()
        ]
        return hashlib.blake2b(repr((self.seed, parts)).encode(), digest_size=16).hexdigest()

    def _drawn(self, bucket: Bucket, group: int, epochs: int) -> int:
        return int(epochs * self._repeats[group] * len(self._members[bucket][group]))

    def _cumulative(self, bucket: Bucket, epochs: int) -> int:
        """Samples of a bucket drawn in the first `epochs` epochs."""
        return sum(self._drawn(bucket, group, epochs) for group in self._members[bucket])

    def _build_epoch(self, epoch: int) -> np.ndarray:
        """Place in `_buckets` and number of the bucket's step, of each step: [steps, 2]."""
        steps = []
        for place, bucket in enumerate(self._buckets):
            size = self._batch[bucket].samples
            numbers = np.arange(self._cumulative(bucket, epoch - 1) // size, self._cumulative(bucket, epoch) // size)
            steps.append(np.stack([np.full_like(numbers, place), numbers], axis=1))
        whole = np.concatenate(steps)
        return whole[_generator(self.seed, "steps", epoch).permutation(len(whole))]

    def _build_samples(self, bucket: Bucket, epoch: int) -> np.ndarray:
        """What an epoch adds to a bucket's stream: entry and turn of each sample, [samples, 2].

        Directories are mixed, yet each goes through its turns one after another: what is carried over to the next epoch
        is then the end of a turn, not the same sample twice.
        """
        placed: list[tuple[np.ndarray, ...]] = []  # of each turn: moments, entries, turns
        for group, members in self._members[bucket].items():
            first, last = (self._drawn(bucket, group, e) for e in (epoch - 1, epoch))
            if first == last:  # so few that a part of them is none in this epoch
                continue
            place = _generator(self.seed, "place", bucket, group, epoch)
            for turn in range(first // len(members), -(-last // len(members))):
                order = _generator(self.seed, "turn", bucket, group, turn).permutation(len(members))
                start, stop = max(first - turn * len(members), 0), min(last - turn * len(members), len(members))
                begin, end = (((turn * len(members) + i) - first) / (last - first) for i in (start, stop))
                moments = np.sort(place.uniform(begin, end, stop - start))
                placed.append((moments, np.array(members)[order[start:stop]], np.full(stop - start, turn)))
        moments, chosen, turns = map(np.concatenate, zip(*placed, strict=True)) if placed else np.empty((3, 0), int)
        # as arrays, since a million samples as objects take seconds in which nobody trains
        return np.stack([chosen, turns], axis=1)[np.lexsort((turns, chosen, moments))]

    def _stream(self, bucket: Bucket, index: int, epoch: int) -> list[Item]:
        """Samples of the bucket's step `index`, which ends in `epoch` and may begin in an earlier one."""
        size = self._batch[bucket].samples
        begin, end = index * size, (index + 1) * size
        first = epoch
        while self._cumulative(bucket, first - 1) > begin:
            first -= 1
        items: list[Item] = []
        for each in range(first, epoch + 1):
            offset = self._cumulative(bucket, each - 1)
            rows = self._epoch_samples(bucket, each)[max(begin - offset, 0) : max(end - offset, 0)]
            items += [Item(entry, turn) for entry, turn in rows.tolist()]
        assert len(items) == size, (bucket, index, epoch, len(items))
        return items


def _generator(seed: int, *path: object) -> np.random.Generator:
    return np.random.default_rng(counter_hash(seed, *path))


def counter_hash(*parts: object) -> int:
    """63 bits that depend on the parts alone: equal in every process and every run."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def counter_draws(most: int, places: int, *path: object) -> list[int]:
    """Different whole numbers below `places`, `most` at most, in an order that `path` alone decides."""
    drawn: dict[int, None] = {}
    draw = 0
    while len(drawn) < min(most, places):
        drawn[counter_hash(*path, draw) % places] = None
        draw += 1
    return list(drawn)


def counter_uniform(*parts: object) -> float:
    """A number in the open interval (0, 1) that depends on the parts alone."""
    return ((counter_hash(*parts) >> 10) + 0.5) / 2**53
