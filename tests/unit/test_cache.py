"""The cache store: keys, whole writes, damage, and fingerprints of weight files."""

import os

import pytest
import torch

from utils.data.cache import CacheDamaged, CacheStore, FingerprintIndex, write_lines


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path / "cache")


TENSORS = {"latents": torch.randn(16, 2, 3, 4), "states": torch.randn(5, 8).to(torch.bfloat16)}


def test_what_is_written_is_read(store):
    key = store.key("latents", {"media": "abc"})
    assert not store.has("latents", key)
    store.write("latents", key, TENSORS, {"name": "clip.mp4"})
    assert store.has("latents", key) and not store.has("text", key)
    read = store.read("latents", key)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) and read[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert store.path("latents", key).parent.name == key[:2]
    assert [path.suffix for path in store.root.rglob("*") if path.is_file()] == [".safetensors"]  # nothing temporary


def test_views_are_stored_as_what_they_show(store):
    store.write("latents", "ab", {"latents": TENSORS["latents"].transpose(0, 1)[:1]}, {})
    assert torch.equal(store.read("latents", "ab")["latents"], TENSORS["latents"].transpose(0, 1)[:1])


def test_the_key_depends_on_every_value_and_not_on_their_order(store):
    recipe = {"media": "abc", "bucket": [64, 64, 5], "encoder": {"dtype": "float32"}}
    key = store.key("latents", recipe)
    assert key == store.key("latents", dict(reversed(recipe.items())))
    others = [
        store.key("text", recipe),
        store.key("latents", recipe | {"media": "abd"}),
        store.key("latents", recipe | {"bucket": [64, 64, 9]}),
        store.key("latents", recipe | {"encoder": {"dtype": "bfloat16"}}),
    ]
    assert len({key, *others}) == 5
    assert key == "4e67d523735763f25630e3a3c8b0b009a3200efc"  # a change here empties every user's cache


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(store, value):
    with pytest.raises(ValueError, match=r"clip\.mp4: encoding gave NaN or infinity in 'latents'"):
        store.write("latents", "ab", {"latents": torch.tensor([1.0, value])}, {"name": "clip.mp4"})
    assert not store.has("latents", "ab")


def cut_short(content):
    return content[:-7]


def flip_a_bit(content):
    return content[:-7] + bytes([content[-7] ^ 1]) + content[-6:]


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, lambda content: b"", lambda content: b"x" * 100])
def test_damage_is_found_at_the_read_and_names_the_file(store, damage):
    store.write("latents", "ab", TENSORS, {})
    path = store.path("latents", "ab")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheDamaged, match="delete this file and start again") as caught:
        store.read("latents", "ab")
    assert str(path) in str(caught.value)
    assert store.has("latents", "ab") == (damage is flip_a_bit)  # planning looks at lengths only


@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_failed_write_leaves_what_was_there(store, monkeypatch, call):
    store.write("latents", "ab", TENSORS, {})

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, no_space)
    with pytest.raises(OSError, match="No space left"):
        store.write("latents", "ab", {"latents": torch.zeros(3)}, {})
    monkeypatch.undo()
    assert torch.equal(store.read("latents", "ab")["latents"], TENSORS["latents"])
    assert len([path for path in store.root.rglob("*") if path.is_file()]) == 1


def test_fingerprints_follow_content_and_not_names(tmp_path):
    weights, tokenizer = tmp_path / "vae.pth", tmp_path / "tokenizer"
    weights.write_bytes(b"weights")
    tokenizer.mkdir()
    (tokenizer / "a.json").write_text("{}")
    index = FingerprintIndex(tmp_path / "weights.jsonl")

    def resolve(*files):
        return index.resolve({"dtype": "float32", "files": [str(file) for file in files]})

    first = resolve(weights, tokenizer)
    assert first["dtype"] == "float32" and str(tmp_path) not in str(first)
    weights.rename(tmp_path / "renamed.pth")
    assert resolve(tmp_path / "renamed.pth", tokenizer) == first
    (tmp_path / "renamed.pth").write_bytes(b"others!")
    changed = resolve(tmp_path / "renamed.pth", tokenizer)
    assert changed != first
    (tokenizer / "a.json").write_text("{ }")
    assert resolve(tmp_path / "renamed.pth", tokenizer) != changed


def test_lines_hold_file_names_that_are_no_text(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [{"path": os.fsdecode(b"caf\xe9.mp4")}, {"path": "café.mp4"}])
    assert (tmp_path / "rows.jsonl").read_text("utf-8") == '{"path": "caf\\udce9.mp4"}\n{"path": "café.mp4"}\n'
