"""Wan2.1's and Wan2.2's VAE: parity with the official modules, layouts, memory, stored form, and wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from models.wan.encoder_keymaps import VAE, VAE22
from models.wan.vae import WanVAEEncoder, vae_config

DATA = Path(__file__).parents[1] / "data" / "wan_t2v"
PTH = DATA / "Wan2.1_VAE.pth"
DATA_22 = Path(__file__).parents[1] / "data" / "wan22_ti2v"
PTH_22 = DATA_22 / "Wan2.2_VAE.pth"
FILES = {"2.1": PTH, "2.2": PTH_22}
TABLES = {"2.1": VAE, "2.2": VAE22}
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
def golden_22():
    return load_file(DATA_22 / "vae_golden.safetensors")


@pytest.fixture(scope="module")
def encoder_22():
    loaded = WanVAEEncoder(PTH_22, torch.float32, "2.2")
    loaded.load(CPU)
    return loaded


class NoTensors:
    """A reader of nothing: sizes are then those of the released VAE."""

    location = Path("nothing")

    def shapes(self):
        return {}


def released(version):
    """The VAE at its released size, on meta."""
    with torch.device("meta"):
        return AutoencoderKLWan.from_config(vae_config(NoTensors(), version))


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


@pytest.mark.parametrize("version", FILES)
def test_key_table_covers_the_vae_both_ways(version):
    """The narrow file has the official names; the released VAE has as many, and only those."""
    table, stored = TABLES[version], set(torch.load(FILES[version], weights_only=True))
    assert {table.from_skeleton(table.to_skeleton(name) or "") for name in stored} == stored
    skeleton = {name for name, _ in released(version).named_parameters()}
    assert {table.from_skeleton(name) for name in skeleton} == stored
    assert {table.to_skeleton(name) for name in stored} == skeleton


# of the released files, in float32: 507.6 MB and 2.82 GB
@pytest.mark.parametrize(("version", "count"), [("2.1", 126_892_531), ("2.2", 704_688_668)])
def test_sizes_where_no_tensor_tells_are_the_released_ones(version, count):
    assert sum(parameter.numel() for parameter in released(version).parameters()) == count


def test_latents_of_2_2_equal_the_official_module(encoder_22, golden_22):
    latents = encoder_22.encode_pixels(golden_22["vae.video"])
    torch.testing.assert_close(latents, golden_22["vae.latents"], rtol=0, atol=1e-5)


def test_decoded_pixels_of_2_2_equal_the_official_module(encoder_22, golden_22):
    frames = encoder_22.decode(golden_22["vae.latents"][0])
    official = golden_22["vae.decoded"][0].clamp(-1, 1).permute(1, 2, 3, 0)
    assert frames.shape == (9, 32, 48, 3)
    assert (frames.float() / 127.5 - 1 - official).abs().max() <= 0.5 / 127.5 + 1e-5


def test_entries_of_2_2_and_their_causality(encoder_22):
    frames = clip(9, frames=9, height=64, width=32)
    (video,) = encoder_22.encode([frames])
    (image,) = encoder_22.encode([frames[:1]])
    (longer,) = encoder_22.encode([np.concatenate([frames, clip(10, 4, 64, 32)])])
    assert video["latents"].shape == (48, 3, 4, 2) and video["latents"].dtype == torch.float32
    assert image["latents"].shape == (48, 1, 4, 2) and longer["latents"].shape == (48, 4, 4, 2)
    torch.testing.assert_close(image["latents"], video["latents"][:, :1], rtol=0, atol=1e-5)
    torch.testing.assert_close(longer["latents"][:, :3], video["latents"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("frames, height", [(8, 32), (9, 40)])
def test_lengths_and_sides_that_do_not_fit_are_refused(encoder_22, frames, height):
    with pytest.raises(AssertionError, match=r"not 4k|not a multiple of 16"):
        encoder_22.encode([clip(11, frames, height, 32)])


@pytest.mark.parametrize("version", FILES)
def test_activations_do_not_grow_with_the_clip(version):
    encoder = WanVAEEncoder(FILES[version], torch.float32, version)
    encoder.load(CPU)
    sizes = []
    for module in encoder._vae.encoder.modules():
        module.register_forward_hook(lambda _, inputs, output: sizes.append(output.numel()))
    largest = []
    for num_frames in (9, 33):
        sizes.clear()
        encoder.encode([clip(12, num_frames, 32, 32)])
        largest.append(max(sizes))
    assert largest[0] == largest[1] > 0


def test_every_layout_of_2_2_gives_the_same_latents(tmp_path, encoder_22):
    official = torch.load(PTH_22, weights_only=True)
    save_file(official, tmp_path / "wan2.2_vae.safetensors")
    encoder_22._vae.save_pretrained(tmp_path / "vae")  # diffusers' own files
    reference = encoder_22.encode([clip(13)])[0]["latents"]
    for path in (tmp_path / "vae", tmp_path / "wan2.2_vae.safetensors"):
        other = WanVAEEncoder(path, torch.float32, "2.2")
        other.check()
        other.load(CPU)
        assert torch.equal(other.encode([clip(13)])[0]["latents"], reference), path


@pytest.mark.parametrize(("wanted", "found"), [("2.1", "2.2"), ("2.2", "2.1")])
def test_the_other_vae_is_named_with_the_one_to_use(wanted, found, tmp_path, encoder, encoder_22):
    message = rf"Wan VAE .*: this is Wan{found}'s VAE, made for .*; use Wan{wanted}_VAE\.pth"
    with pytest.raises(ValueError, match=message):
        WanVAEEncoder(FILES[found], torch.float32, wanted).check()
    {"2.1": encoder, "2.2": encoder_22}[found]._vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=message):
        WanVAEEncoder(tmp_path / "vae", torch.float32, wanted).check()


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
    assert WanVAEEncoder(PTH, torch.float32, "2.2").fingerprint() != fingerprint


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
