"""CLIP: parity with the official module, layouts, frames, and what it says of wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from models.base import ClipEnds
from models.wan.encoder_keymaps import IMAGE
from models.wan.image import WanImageEncoder

DATA = Path(__file__).parents[1] / "data" / "wan_i2v"
PTH = DATA / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
CPU = torch.device("cpu")
WIDTH, BLOCKS = 160, 3


def load(path, dtype=torch.float32, both_ends=False):
    encoder = WanImageEncoder(path, dtype, both_ends)
    encoder.check()
    encoder.load(CPU)
    return encoder


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "clip_golden.safetensors")


@pytest.fixture(scope="module")
def encoder():
    return load(PTH)


@pytest.fixture(scope="module")
def official():
    return torch.load(PTH, weights_only=True)


@pytest.fixture(scope="module")
def library(encoder):
    """transformers' own model of all blocks with the same weights; its last block and projection are random."""
    config = CLIPVisionConfig(**encoder._tower.config.to_dict() | {"num_hidden_layers": BLOCKS, "projection_dim": 32})
    model = CLIPVisionModelWithProjection(config)
    loaded = model.vision_model.load_state_dict(encoder._tower.state_dict(), strict=False)
    assert all("layers.2." in name for name in loaded.missing_keys) and not loaded.unexpected_keys
    return model


def ends(seed, height=48, width=64, frames=9):
    pixels = np.random.default_rng(seed).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    return ClipEnds(pixels, frames)


def test_states_equal_the_official_module(encoder, golden):
    states = encoder.encode_frames(golden["clip.frame"])
    torch.testing.assert_close(states, golden["clip.out"], rtol=0, atol=1e-5)


def test_the_last_block_is_neither_loaded_nor_run(encoder, official, tmp_path, golden):
    assert len(encoder._tower.encoder.layers) == BLOCKS - 1
    changed = {name: torch.zeros_like(t) if ".transformer.2." in name else t for name, t in official.items()}
    torch.save(changed, tmp_path / "changed.pth")
    assert torch.equal(
        load(tmp_path / "changed.pth").encode_frames(golden["clip.frame"]), encoder.encode_frames(golden["clip.frame"])
    )


def test_an_entry_is_the_first_frame_in_memory_of_its_own(encoder):
    clips = [ends(0), ends(1)]
    entries = encoder.encode(clips)
    for clip, entry in zip(clips, entries, strict=True):
        pixels = torch.from_numpy(clip.pixels[:1]).permute(0, 3, 1, 2).float() / 255 * 2 - 1
        states = entry["image"]
        assert states.shape == (257, WIDTH) and states.is_contiguous()
        assert states.untyped_storage().nbytes() == states.nbytes, "a slice drags its batch into the cache"
        torch.testing.assert_close(states, encoder.encode_frames(pixels)[0], rtol=0, atol=1e-4)


def test_both_ends_are_the_first_frames_states_and_then_the_lasts(encoder):
    clips = [ends(2), ends(3)]
    swapped = [ClipEnds(clip.pixels[::-1].copy(), clip.frames) for clip in clips]
    both = load(PTH, both_ends=True).encode(clips)
    for entry, first, last in zip(both, encoder.encode(clips), encoder.encode(swapped), strict=True):
        wanted = torch.cat([first["image"], last["image"]])
        assert wanted.shape == (514, WIDTH)
        torch.testing.assert_close(entry["image"], wanted, rtol=0, atol=1e-4)
        assert not torch.allclose(first["image"], last["image"], atol=1e-2)


def test_bfloat16_runs_and_stays_near(encoder):
    half = load(PTH, torch.bfloat16).encode([ends(4)])[0]["image"]
    exact = encoder.encode([ends(4)])[0]["image"]
    assert half.dtype == torch.bfloat16
    assert 0 < (half - exact).abs().max() < 0.1


def test_every_layout_gives_the_same_states(tmp_path, encoder, library):
    library.save_pretrained(tmp_path / "image_encoder")
    library.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    plain = CLIPVisionModel(library.config)
    plain.load_state_dict(library.vision_model.state_dict())
    plain.save_pretrained(tmp_path / "tower_only")
    # ComfyUI's file; old versions of transformers saved the buffer too
    weights = {name: tensor.contiguous() for name, tensor in library.state_dict().items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(weights, tmp_path / "clip_vision_h.safetensors")
    reference = encoder.encode([ends(5)])[0]["image"]
    for name in ("image_encoder", "sharded", "tower_only", "clip_vision_h.safetensors"):
        assert torch.equal(load(tmp_path / name).encode([ends(5)])[0]["image"], reference), name


def test_the_image_side_alone_is_enough(tmp_path, encoder, official):
    visual = {name: tensor for name, tensor in official.items() if name.startswith("visual.")}
    save_file(visual, tmp_path / "visual.safetensors")
    assert torch.equal(
        load(tmp_path / "visual.safetensors").encode([ends(6)])[0]["image"], encoder.encode([ends(6)])[0]["image"]
    )


def test_key_table_covers_the_image_side_both_ways(official):
    names = {name for name in official if name.startswith("visual.")} - {"visual.head"}
    assert {IMAGE.from_skeleton(IMAGE.to_skeleton(name) or "") for name in names} == names


def test_fingerprints_tell_runs_apart_that_differ(encoder):
    fingerprint = encoder.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint and fingerprint["files"] == [str(PTH)]
    others = [WanImageEncoder(PTH, torch.float32, True), WanImageEncoder(PTH, torch.bfloat16, False)]
    assert all(other.fingerprint() != fingerprint for other in others)


def test_unload_drops_the_weights():
    once = load(PTH)
    once.unload()
    with pytest.raises(AssertionError, match="before load"):
        once.encode([ends(7)])


def test_missing_and_misshapen_tensors_come_in_one_message(tmp_path, official):
    broken = dict(official)
    del broken["visual.transformer.0.attn.to_qkv.bias"]
    broken["visual.transformer.1.attn.to_qkv.weight"] = torch.zeros(WIDTH, WIDTH)
    path = tmp_path / "broken.pth"
    torch.save(broken, path)
    with pytest.raises(ValueError) as error:
        WanImageEncoder(path, torch.float32, False).check()
    message = str(error.value)
    assert "missing" in message and str(path) in message
    assert "visual.transformer.1.attn.to_qkv.weight is [160, 160] and should be [480, 160]" in message


def test_another_clip_is_refused_with_the_file_to_use(tmp_path):
    path = tmp_path / "clip_l.safetensors"
    save_file({"vision_model.embeddings.class_embedding": torch.zeros(1024)}, path)
    with pytest.raises(ValueError, match=r"1024 wide.*ViT-H/14.*clip_vision_h\.safetensors"):
        WanImageEncoder(path, torch.float32, False).check()


def test_another_file_and_wrong_paths(tmp_path):
    save_file({"encoder.conv1.weight": torch.zeros(96, 3, 3, 3, 3)}, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"CLIP image encoder .*vae\.safetensors: \d+ tensors missing"):
        WanImageEncoder(tmp_path / "vae.safetensors", torch.float32, False).check()
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        WanImageEncoder(tmp_path / "gone.pth", torch.float32, False).check()


def test_infinite_states_are_refused(tmp_path, official):
    broken = official | {"visual.pre_norm.bias": torch.full((WIDTH,), float("inf"))}
    torch.save(broken, tmp_path / "inf.pth")
    with pytest.raises(ValueError, match="not finite"):
        load(tmp_path / "inf.pth").encode([ends(8)])
