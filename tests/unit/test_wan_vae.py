"""The Wan VAE: parity with the official module, layouts, stored form, and what it says of wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.encoder_keymaps import VAE
from models.wan.vae import WanVAEEncoder

DATA = Path(__file__).parents[1] / "data" / "wan_t2v"
PTH = DATA / "Wan2.1_VAE.pth"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "encoders_golden.safetensors")


@pytest.fixture(scope="module")
def encoder():
    loaded = WanVAEEncoder(PTH, torch.float32)
    loaded.load(CPU)
    return loaded


@pytest.fixture(scope="module")
def official():
    return torch.load(PTH, weights_only=True)


def clip(seed, frames=5, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def diffusers_weights(official):
    return {VAE.to_skeleton(name): tensor for name, tensor in official.items()}


def write_diffusers_folder(folder, official, **config):
    folder.mkdir()
    save_file(diffusers_weights(official), folder / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKLWan", "base_dim": 8, **config}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_latents_equal_the_official_module(encoder, golden):
    latents = encoder.encode_pixels(golden["vae.video"])
    torch.testing.assert_close(latents, golden["vae.latents"], rtol=0, atol=1e-5)


def test_decoded_pixels_equal_the_official_module(encoder, golden):
    frames = encoder.decode(golden["vae.latents"][0])
    official = golden["vae.decoded"][0].clamp(-1, 1).permute(1, 2, 3, 0)
    assert frames.dtype == torch.uint8 and frames.shape == (9, 48, 64, 3)
    assert (frames.float() / 127.5 - 1 - official).abs().max() <= 0.5 / 127.5 + 1e-5  # half a level of rounding


def test_bytes_become_pixels_between_minus_one_and_one(encoder):
    frames = clip(0)
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    assert pixels.min() == -1 and pixels.max() == 1
    (entry,) = encoder.encode([frames])
    torch.testing.assert_close(entry["latents"], encoder.encode_pixels(pixels)[0], rtol=0, atol=1e-5)


def test_an_entry_is_its_own_contiguous_float32_tensor(encoder):
    clips = [clip(1), clip(2)]
    entries = encoder.encode(clips)
    assert len(entries) == 2
    for one, entry in zip(clips, entries, strict=True):
        latents = entry["latents"]
        assert latents.shape == (16, 2, 4, 6) and latents.dtype == torch.float32 and latents.is_contiguous()
        assert latents.untyped_storage().nbytes() == latents.nbytes, "a slice drags its batch into the cache"
        torch.testing.assert_close(latents, encoder.encode([one])[0]["latents"], rtol=0, atol=1e-5)


def test_an_image_is_a_clip_of_one_frame(encoder):
    frames = clip(3)
    (image,) = encoder.encode([frames[:1]])
    (video,) = encoder.encode([frames])
    assert image["latents"].shape == (16, 1, 4, 6)
    torch.testing.assert_close(image["latents"], video["latents"][:, :1], rtol=0, atol=1e-5)  # the VAE is causal


def test_bfloat16_runs_and_stays_near(encoder):
    half = WanVAEEncoder(PTH, torch.bfloat16)
    half.load(CPU)
    latents = half.encode([clip(4)])[0]["latents"]
    reference = encoder.encode([clip(4)])[0]["latents"]
    assert latents.dtype == torch.float32
    assert 0 < (latents - reference).abs().max() < 0.1
    assert half.fingerprint() != encoder.fingerprint()


def test_key_table_covers_the_vae_both_ways(official):
    for name in official:
        assert VAE.from_skeleton(VAE.to_skeleton(name)) == name
    assert len({VAE.to_skeleton(name) for name in official}) == len(official)


def test_every_layout_gives_the_same_latents(tmp_path, encoder, official):
    folder = write_diffusers_folder(tmp_path / "vae", official)
    save_file(official, tmp_path / "wan_2.1_vae.safetensors")
    save_file(diffusers_weights(official), tmp_path / "single_diffusers.safetensors")
    reference = encoder.encode([clip(5)])[0]["latents"]
    for path in (folder, tmp_path / "wan_2.1_vae.safetensors", tmp_path / "single_diffusers.safetensors"):
        other = WanVAEEncoder(path, torch.float32)
        other.check()
        other.load(CPU)
        assert torch.equal(other.encode([clip(5)])[0]["latents"], reference), path


def test_statistics_of_a_diffusers_config_count(tmp_path, encoder, official):
    folder = write_diffusers_folder(tmp_path / "vae", official, latents_mean=[0.0] * 16, latents_std=[2.0] * 16)
    other = WanVAEEncoder(folder, torch.float32)
    other.load(CPU)
    mean, std = encoder._statistics()
    raw = encoder.encode([clip(6)])[0]["latents"] * std + mean
    torch.testing.assert_close(other.encode([clip(6)])[0]["latents"], raw / 2, rtol=0, atol=1e-5)
    assert str(folder / "config.json") in other.fingerprint()["files"]


def test_fingerprint_is_json_and_names_the_files(encoder):
    fingerprint = encoder.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["files"] == [str(PTH)]


def test_unload_drops_the_weights():
    once = WanVAEEncoder(PTH, torch.float32)
    once.load(CPU)
    once.unload()
    with pytest.raises(AssertionError, match="before load"):
        once.encode([clip(7)])
    once.load(CPU)
    assert once.encode([clip(7)])


def test_missing_and_misshapen_tensors_come_in_one_message(tmp_path, official):
    broken = dict(official)
    del broken["encoder.conv1.bias"], broken["decoder.head.2.weight"]
    broken["conv2.bias"] = torch.zeros(7)
    path = tmp_path / "broken.pth"
    torch.save(broken, path)
    with pytest.raises(ValueError) as error:
        WanVAEEncoder(path, torch.float32).check()
    message = str(error.value)
    assert "2 tensors missing" in message and "encoder.conv1.bias" in message
    assert "1 tensor mis-shaped" in message and "conv2.bias" in message and str(path) in message


def test_another_file_is_named_as_such(tmp_path):
    path = tmp_path / "vae.safetensors"
    save_file({"encoder.conv1.weight": torch.zeros(160, 12, 3, 3, 3)}, path)
    with pytest.raises(ValueError, match=r"Wan2\.2's VAE"):
        WanVAEEncoder(path, torch.float32).check()
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=r"194 tensors missing.*1 tensor unexpected"):
        WanVAEEncoder(path, torch.float32).check()


def test_wrong_paths_and_damaged_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        WanVAEEncoder(tmp_path / "gone.pth", torch.float32).check()
    with pytest.raises(FileNotFoundError, match="holds no diffusion_pytorch_model"):
        WanVAEEncoder(tmp_path, torch.float32).check()
    (tmp_path / "cut.pth").write_bytes(PTH.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.pth"):
        WanVAEEncoder(tmp_path / "cut.pth", torch.float32).check()


def test_infinite_latents_are_refused(tmp_path, official):
    broken = official | {"conv1.bias": torch.full((32,), float("inf"))}
    torch.save(broken, tmp_path / "inf.pth")
    encoder = WanVAEEncoder(tmp_path / "inf.pth", torch.float32)
    encoder.load(CPU)
    with pytest.raises(ValueError, match="not finite"):
        encoder.encode([clip(8)])
