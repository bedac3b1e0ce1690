"""Entries and draws to the tensors of one micro-batch."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.base import Draw, MicroBatch, ModelFamily
from utils.data.cache import CacheStore
from utils.data.plan import Item, counter_hash, counter_uniform
from utils.data.records import Entry


class EvalItem(NamedTuple):
    """One held-out sample at one quantile."""

    entry: int
    quantile: float


class CachedDataset:
    """Reads cached tensors and lets the family make micro-batches of them.

    Every random choice is a hash of (seed, sample, turn), so both ends of the pipeline make the same one without a
    message, and a resumed run repeats it.

    Args:
        empty_text_key: cache key of the empty caption's states, used at the rate `caption_dropout`.
    """

    def __init__(
        self,
        family: ModelFamily,
        store: CacheStore,
        entries: Sequence[Entry],
        empty_text_key: str,
        *,
        seed: int,
        caption_dropout: float = 0.0,
    ) -> None:
        self.family, self.store, self.entries = family, store, entries
        self.empty_text_key, self.seed, self.caption_dropout = empty_text_key, seed, caption_dropout

    def training_batch(self, items: Sequence[Item]) -> MicroBatch:
        """The micro-batch of one forward pass, on the CPU."""
        samples, draws = [], []
        for item in items:
            entry = self.entries[item.entry]
            path = (self.seed, entry.sample_id, entry.group, item.turn)
            samples.append(self._read(entry, self._caption_of(entry, path)))
            draws.append(Draw(counter_uniform("quantile", *path), counter_hash("noise", *path)))
        return self.family.micro_batch(samples, draws)

    def eval_batch(self, items: Sequence[EvalItem]) -> MicroBatch:
        """Fixed quantiles, noise fixed by sample and quantile, no dropout, always the first caption."""
        samples, draws = [], []
        for item in items:
            entry = self.entries[item.entry]
            samples.append(self._read(entry, entry.text_keys[0]))
            draws.append(Draw(item.quantile, counter_hash("eval", self.seed, entry.sample_id, item.quantile)))
        return self.family.micro_batch(samples, draws)

    def _caption_of(self, entry: Entry, path: tuple[object, ...]) -> str:
        if self.caption_dropout and counter_uniform("drop", *path) < self.caption_dropout:
            return self.empty_text_key
        return entry.text_keys[counter_hash("caption", *path) % len(entry.text_keys)]

    def _read(self, entry: Entry, text_key: str) -> dict[str, Tensor]:
        try:
            return self.store.read("latents", entry.latents_key) | self.store.read("text", text_key)
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename}: the cache entry of {entry.name} is gone since the start; go on with "
                "--resume_from_checkpoint, which makes it anew"
            ) from error
