"""Entries and draws to the tensors of one micro-batch."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import Draw, MicroBatch, ModelFamily
from utils.data.cache import CacheDamaged, CacheStore
from utils.data.plan import Item, counter_hash, counter_uniform
from utils.data.records import TEXT, Entry


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

    def made_by(self, family: ModelFamily) -> "CachedDataset":
        """The same samples and draws, made into micro-batches by another family."""
        other = copy.copy(self)
        other.family = family
        return other

    def training_batch(self, items: Sequence[Item]) -> MicroBatch:
        """The micro-batch of one forward pass, on the CPU, with what each sample counts in the loss."""
        samples, draws = [], []
        for item in items:
            entry = self.entries[item.entry]
            path = self._path(item)
            samples.append(self._read(entry, self._caption_of(entry, path), item.turn))
            quantile, noise = counter_uniform("quantile", *path), counter_hash("noise", *path)
            draws.append(Draw(quantile, noise, counter_uniform("choice", *path)))
        weights = torch.tensor([self.entries[item.entry].weight for item in items])
        return self.family.micro_batch(samples, draws)._replace(weights=weights)

    def eval_batch(self, items: Sequence[EvalItem]) -> MicroBatch:
        """Fixed quantiles, noise fixed by sample and quantile, no dropout, always the first caption and start.

        The choice is fixed by sample alone: at every quantile and in every evaluation it is a sample of the same task.
        Samples have no weights here: what is held out is measured alike, whatever teaches more.
        """
        samples, draws = [], []
        for item in items:
            entry = self.entries[item.entry]
            samples.append(self._read(entry, entry.text_keys[0] if entry.text_keys else ""))
            noise = counter_hash("eval", self.seed, entry.sample_id, item.quantile)
            draws.append(Draw(item.quantile, noise, counter_uniform("eval choice", self.seed, entry.sample_id)))
        return self.family.micro_batch(samples, draws)

    def not_finite(self, items: Sequence[Item]) -> list[Path]:
        """Files of the cache that these samples of training read, and that hold NaN or infinity.

        Raises:
            OSError, ValueError: one cannot be read.
        """
        read = [(self.entries[item.entry], item.turn, self._path(item)) for item in items]
        parts = {part for entry, turn, path in read for part in _parts(entry, self._caption_of(entry, path), turn)}
        found = {part: self.store.read(*part).values() for part in sorted(parts)}
        return [self.store.path(*part) for part, held in found.items() if not all(t.isfinite().all() for t in held)]

    def _path(self, item: Item) -> tuple[object, ...]:
        """Where the choices of one use of an entry lie."""
        entry = self.entries[item.entry]
        return self.seed, entry.sample_id, entry.group, item.turn

    def _caption_of(self, entry: Entry, path: tuple[object, ...]) -> str:
        """Key of the caption for this draw; "" where no encoder reads captions."""
        if not entry.text_keys:
            return ""
        if self.caption_dropout and counter_uniform("drop", *path) < self.caption_dropout:
            return self.empty_text_key
        return entry.text_keys[counter_hash("caption", *path) % len(entry.text_keys)]

    def _read(self, entry: Entry, text_key: str, turn: int = 0) -> dict[str, Tensor]:
        """What every encoder made of one sample, in one dict."""
        sample: dict[str, Tensor] = {}
        try:
            for kind, key in _parts(entry, text_key, turn):
                tensors = self.store.read(kind, key)
                assert sample.keys().isdisjoint(tensors), f"{kind} has a tensor of the name that another encoder gave"
                sample |= tensors
            return sample
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename}: the cache entry of {entry.name} is gone since the start; go on with "
                "--resume_from_checkpoint, which makes it anew"
            ) from error
        except CacheDamaged as error:
            # the encoders have left the device to the model, so it cannot be made anew here
            try:
                error.path.unlink(missing_ok=True)
            except OSError as kept:
                raise ValueError(
                    f"{error.path}: the cache entry of {entry.name} is damaged ({error.reason}) and cannot be deleted "
                    f"({kept.strerror}); delete it yourself, and go on with --resume_from_checkpoint and a cache_dir "
                    "that can be written to"
                ) from error
            raise ValueError(
                f"{error.path}: the cache entry of {entry.name} was damaged ({error.reason}) and is deleted; go on "
                "with --resume_from_checkpoint, which makes it anew. A disk that damages files is worth a check; "
                "`python -m utils.train.cache_tool verify` reads all entries"
            ) from error


def _parts(entry: Entry, text_key: str, turn: int) -> Iterator[tuple[str, str]]:
    """(kind, key) of all that use number `turn` of an entry reads."""
    yield from entry.media_of(turn)
    yield from entry.mask_of(turn)
    if text_key:
        yield TEXT, text_key
