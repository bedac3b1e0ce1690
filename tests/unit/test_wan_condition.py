"""The condition latents: given frames among grey ones, through the VAE that makes the latents."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import ClipEnds
from models.wan.condition import WanConditionEncoder
from models.wan.vae import WanVAEEncoder

PTH = Path(__file__).parents[1] / "data" / "wan_t2v" / "Wan2.1_VAE.pth"
VAE_22 = Path(__file__).parents[1] / "data" / "wan22_ti2v" / "Wan2.2_VAE.pth"
CPU = torch.device("cpu")


def load(both_ends, dtype=torch.float32):
    encoder = WanConditionEncoder(PTH, dtype, both_ends)
    encoder.check()
    encoder.load(CPU)
    return encoder


@pytest.fixture(scope="module")
def vae():
    loaded = WanVAEEncoder(PTH, torch.float32)
    loaded.load(CPU)
    return loaded


def clip(seed, frames=9, height=32, width=48):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def ends(frames):
    return ClipEnds(frames[[0, -1]], len(frames))


def grey_between(frames, given):
    """[1, 3, F, h, w]: frames `given` in [-1, 1], 0 elsewhere."""
    video = torch.zeros(len(frames), *frames.shape[1:])
    for number in given:
        video[number] = torch.from_numpy(frames[number]).float() / 255 * 2 - 1
    return video.permute(3, 0, 1, 2)[None]


@pytest.mark.parametrize(("both_ends", "given"), [(False, [0]), (True, [0, -1])])
def test_condition_is_the_vae_of_given_frames_and_grey(vae, both_ends, given):
    clips = [clip(0), clip(1)]
    entries = load(both_ends).encode([ends(frames) for frames in clips])
    for frames, entry in zip(clips, entries, strict=True):
        condition = entry["condition"]
        assert condition.shape == (16, 3, 4, 6) and condition.dtype == torch.float32
        assert condition.untyped_storage().nbytes() == condition.nbytes, "a slice drags its batch into the cache"
        wanted = vae.encode_pixels(grey_between(frames, given))[0]
        torch.testing.assert_close(condition, wanted, rtol=0, atol=1e-5)


def test_it_begins_as_the_latents_of_the_clip_do(vae):
    frames = clip(2)
    condition = load(False).encode([ends(frames)])[0]["condition"]
    latents = vae.encode([frames])[0]["latents"]
    torch.testing.assert_close(condition[:, :1], latents[:, :1], rtol=0, atol=1e-5)
    assert (condition[:, 1:] - latents[:, 1:]).abs().max() > 1e-3


def test_the_last_frame_counts_only_where_it_is_given():
    frames = clip(3)
    other = frames.copy()
    other[-1] = 255 - other[-1]
    first, both = load(False), load(True)
    assert torch.equal(*(first.encode([ends(shown)])[0]["condition"] for shown in (frames, other)))
    a, b = (both.encode([ends(shown)])[0]["condition"] for shown in (frames, other))
    assert torch.equal(a[:, :2], b[:, :2]) and (a[:, 2] - b[:, 2]).abs().max() > 1e-3


def test_fingerprints_differ_by_what_is_given(vae):
    first, both = WanConditionEncoder(PTH, torch.float32, False), WanConditionEncoder(PTH, torch.float32, True)
    half = WanConditionEncoder(PTH, torch.bfloat16, False)
    prints = [json.dumps(encoder.fingerprint()) for encoder in (first, both, half, vae)]
    assert len(set(prints)) == len(prints)
    assert first.fingerprint()["files"] == [str(PTH)]


def test_an_image_and_the_other_vae_are_refused():
    with pytest.raises(AssertionError, match="or an image"):
        load(False).encode([ClipEnds(clip(4)[[0, 0]], 1)])
    with pytest.raises(ValueError, match=r"this is Wan2\.2's VAE"):
        WanConditionEncoder(VAE_22, torch.float32, False).check()


def test_unload_drops_the_weights():
    once = load(False)
    once.unload()
    with pytest.raises(AssertionError, match="before load"):
        once.encode([ends(clip(5))])
