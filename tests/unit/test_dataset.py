"""Entries and draws to what a family is given: merged tensors, and randomness that is a function of the sample."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from models.base import Draw
from utils.data.cache import CacheStore
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.plan import Item, counter_hash, counter_uniform
from utils.data.records import Bucket, Entry

KINDS = ("latents", "condition", "image")


class Given(NamedTuple):
    samples: list
    draws: list
    weights: torch.Tensor | None = None


class Recorder:
    """Stands where a family does and gives back what it was given."""

    def micro_batch(self, samples, draws):
        return Given(list(samples), list(draws))


@pytest.fixture
def dataset(tmp_path):
    store = CacheStore(tmp_path)
    keys = tuple(CacheStore.key(kind, {}) for kind in KINDS)
    texts = tuple(CacheStore.key("text", {"caption": i}) for i in range(3))  # the last one is of the empty caption
    for number, (kind, key) in enumerate(zip(KINDS, keys, strict=True)):
        store.write(kind, key, {kind: torch.tensor([float(number)])}, {})
    for number, key in enumerate(texts):
        store.write("text", key, {"text": torch.tensor([float(number)])}, {})
    entries = [Entry(f"sample{i}", "a.mp4", Bucket(64, 64, 9), 0, KINDS, keys, texts[:2]) for i in range(200)]
    return CachedDataset(Recorder(), store, entries, texts[2], seed=7, caption_dropout=0.25)


def test_a_sample_has_what_every_encoder_made(dataset):
    [sample], _, _ = dataset.training_batch([Item(0, 0)])
    assert {name: tensor.item() for name, tensor in sample.items() if name != "text"} == {
        "latents": 0,
        "condition": 1,
        "image": 2,
    }
    items = [Item(entry, 0) for entry in range(200)]
    captions = [sample["text"].item() for sample in dataset.training_batch(items)[0]]
    assert 30 < captions.count(2) < 70 and captions.count(0) > 50 and captions.count(1) > 50
    assert all(sample["text"].item() == 0 for sample in dataset.eval_batch([EvalItem(i, 0.5) for i in range(20)])[0])


def test_what_is_not_finite_in_the_cache_is_found(dataset, monkeypatch):
    """Of what a draw reads alone: another caption of the clip is no matter."""
    items = [Item(entry, 0) for entry in range(20)]
    assert dataset.not_finite(items) == []
    captions = [sample["text"].item() for sample in dataset.training_batch(items)[0]]
    dropped, kept = items[captions.index(2)], items[captions.index(0)]
    monkeypatch.setattr("utils.data.cache.refuse_not_finite", lambda *_: None)  # as a write by other hands
    dataset.store.write("text", dataset.empty_text_key, {"text": torch.tensor([1.0, torch.inf])}, {})
    text = dataset.store.path("text", dataset.empty_text_key)
    assert (dataset.not_finite([kept]), dataset.not_finite([dropped])) == ([], [text])
    bad = ("condition", dataset.entries[0].media_keys[1])
    dataset.store.write(*bad, {"condition": torch.tensor([torch.nan]).bfloat16()}, {})
    assert dataset.not_finite([kept, dropped]) == [dataset.store.path(*bad), text]


def test_draws_depend_on_the_sample_and_its_turn_alone(dataset):
    _, draws, _ = dataset.training_batch([Item(3, 0), Item(3, 1), Item(4, 0)])
    assert dataset.training_batch([Item(4, 0)])[1] == draws[2:]
    assert all(len({draw[field] for draw in draws}) == 3 for field in range(3))
    path = (7, "sample3", 0, 1)
    assert draws[1] == Draw(
        counter_uniform("quantile", *path), counter_hash("noise", *path), counter_uniform("choice", *path)
    )
    choices = [draw.choice for draw in dataset.training_batch([Item(i, 0) for i in range(200)])[1]]
    assert 0.4 < sum(choices) / 200 < 0.6 and 0 < min(choices) < 0.1 and 0.9 < max(choices) < 1


def test_what_a_sample_counts_is_for_training_alone(dataset):
    dataset.entries = [replace(entry, weight=0.5 + i) for i, entry in enumerate(dataset.entries)]
    counted = dataset.training_batch([Item(2, 0), Item(0, 3)]).weights
    assert counted.dtype == torch.float32 and counted.tolist() == [2.5, 0.5]
    assert dataset.eval_batch([EvalItem(2, 0.5)]).weights is None, "as the family made it"


def test_a_damaged_entry_goes_so_that_the_next_start_makes_it_anew(dataset):
    path = dataset.store.path("latents", dataset.entries[0].media_keys[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"entry of a\.mp4 was damaged \(its checksum does not fit\) and is deleted"):
        dataset.training_batch([Item(0, 0)])
    assert not path.exists()
    with pytest.raises(ValueError, match=r"is gone since the start; go on with --resume_from_checkpoint"):
        dataset.training_batch([Item(0, 0)])


def test_a_damaged_entry_of_a_cache_that_can_only_be_read(dataset, monkeypatch):
    path = dataset.store.path("latents", dataset.entries[0].media_keys[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ValueError, match=r"is damaged \(its checksum does not fit\) and cannot be deleted \(Read-"):
        dataset.training_batch([Item(0, 0)])
    monkeypatch.undo()
    assert path.exists()


def test_noise_and_quantile_are_what_they_were_in_the_first_release():
    path = (7, "abc", 0, 3)
    assert (counter_uniform("quantile", *path), counter_hash("noise", *path)) == (
        0.04278869664538426,
        8339336269163958613,
    )
    assert counter_hash("eval", 7, "abc", 0.3) == 1201195679064503712


def test_a_held_out_sample_is_the_same_task_at_every_quantile(dataset):
    quantiles = [i / 10 for i in range(1, 10)]
    _, draws, _ = dataset.eval_batch([EvalItem(5, quantile) for quantile in quantiles])
    assert [draw.quantile for draw in draws] == quantiles
    assert len({draw.choice for draw in draws}) == 1 and len({draw.seed for draw in draws}) == 9
    assert dataset.eval_batch([EvalItem(5, 0.3)])[1] == [draws[2]]
    choices = [draw.choice for draw in dataset.eval_batch([EvalItem(i, 0.5) for i in range(200)])[1]]
    assert 0.4 < sum(choices) / 200 < 0.6


def test_two_encoders_must_not_give_one_name(dataset):
    entry = dataset.entries[0]
    dataset.store.write("image", entry.media_keys[2], {"latents": torch.zeros(1)}, {})
    with pytest.raises(AssertionError, match="image has a tensor of the name"):
        dataset.training_batch([Item(0, 0)])


def test_a_family_without_captions_and_an_entry_that_is_gone(dataset):
    silent = Entry("s", "a.mp4", Bucket(64, 64, 9), 0, KINDS, dataset.entries[0].media_keys, ())
    quiet = CachedDataset(Recorder(), dataset.store, [silent], "", seed=7)
    assert (
        set(quiet.training_batch([Item(0, 0)])[0][0]) == set(KINDS) == set(quiet.eval_batch([EvalItem(0, 0.5)])[0][0])
    )
    dataset.store.path("condition", silent.media_keys[1]).unlink()
    with pytest.raises(ValueError, match=r"condition.*the cache entry of a\.mp4 is gone since the start"):
        quiet.training_batch([Item(0, 0)])
