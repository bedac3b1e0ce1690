"""What a start remembers of entries that it found whole."""

import os

import pytest
import torch

from utils.data.cache import CacheStore
from utils.data.whole import forget, lacking

KEYS = [f"{number:040x}" for number in range(4)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    store = CacheStore(tmp_path)
    for key in KEYS[:3]:
        store.write("latents", key, {"latents": torch.ones(5)}, {})
    store.opened = []
    has = CacheStore.has
    monkeypatch.setattr(CacheStore, "has", lambda self, kind, key: self.opened.append(key) or has(self, kind, key))
    return store


def test_an_entry_is_opened_once(store):
    assert lacking(store, "latents", KEYS) == {KEYS[3]}
    assert sorted(store.opened) == KEYS[:3], "what is not there is not opened"
    assert lacking(store, "latents", dict.fromkeys(KEYS)) == {KEYS[3]} and len(store.opened) == 3
    assert lacking(store, "text", KEYS) == set(KEYS) and lacking(store, "latents", []) == set()
    store.write("latents", KEYS[3], {"latents": torch.ones(5)}, {})
    assert lacking(store, "latents", KEYS) == set() and store.opened[3:] == [KEYS[3]]
    assert lacking(CacheStore(store.root), "latents", KEYS[:1]) == set()


def test_one_that_has_changed_is_opened_again(store):
    lacking(store, "latents", KEYS)
    cut, touched = (store.path("latents", key) for key in KEYS[:2])
    cut.write_bytes(cut.read_bytes()[:-4])
    os.utime(touched, (1, 1))
    assert lacking(store, "latents", KEYS[:3]) == {KEYS[0]}
    assert sorted(store.opened[3:]) == KEYS[:2]
    assert lacking(store, "latents", KEYS[:3]) == {KEYS[0]} and store.opened[5:] == [KEYS[0]]


def test_a_damaged_memory_is_as_good_as_none(store):
    lacking(store, "latents", KEYS)
    memory = store.root / "whole" / "latents"
    memory.write_bytes(memory.read_bytes()[:-1])
    assert lacking(store, "latents", KEYS) == {KEYS[3]} and len(store.opened) == 6


def test_what_is_deleted_is_forgotten(store):
    lacking(store, "latents", KEYS)
    forget(store.root, KEYS[1:])
    assert lacking(store, "latents", KEYS[:3]) == set() and store.opened[3:] == [KEYS[0]]
