"""Names of cache entries and samples: what they were before, they stay, or every cache in the world is void."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from models.wan.text import WanTextEncoder
from models.wan.vae import WanVAEEncoder
from tests.helpers.encoders import ByteEncoder, ConditionEncoder, ConvEncoder, ImageEncoder
from tests.helpers.launch import ROOT
from tests.unit.test_buckets import SPEC
from utils.data.cache import FingerprintIndex
from utils.data.keys import Keys
from utils.data.records import Bucket, Clip, Mask, MediaFile

MEDIA = MediaFile(
    path=Path("/anywhere/clip.mp4"),
    content_hash="0123456789abcdef",
    width=64,
    height=48,
    frames=90,
    fps=Fraction(24000, 1001),
    duration=Fraction(4),
    is_video=True,
    captions=("a clip", "another"),
)
CLIP = Clip(MEDIA, Bucket(64, 48, 33), Fraction(5, 16), Fraction(16), group=2)
# as the first release wrote them
LATENTS = "94d28f0f5ac951967ac6e06c3fb557b731e08941"
CAPTION, EMPTY = "0ecf4f8c4436dac0a0d2d64a6f1d2ed162da6282", "5c99db903cb244d8400b01ab7252d614688d7cde"
SAMPLE = "c3ed54ecc7f55673f3a3ed01d920b1dc28de5694"
MASKED = "5c5cb5d6e921615db182846e2cd19672b9b0096e"  # by a video


@pytest.fixture
def keys_of(tmp_path):
    for kind in ("vae", "text"):
        (tmp_path / f"{kind}.pth").write_text(f"{kind} weights")

    def make(*classes):
        encoders = [cls(tmp_path / ("text.pth" if cls is ByteEncoder else "vae.pth")) for cls in classes]
        return Keys(encoders, FingerprintIndex(tmp_path / "weights.jsonl"))

    return make


def test_names_are_what_they_were(keys_of):
    keys = keys_of(ConvEncoder, ByteEncoder)
    assert (keys.kinds, keys.media_kinds) == (("latents", "text"), ("latents",))
    assert (keys.media(CLIP), keys.text("a clip"), keys.text("")) == ((LATENTS,), CAPTION, EMPTY)
    assert keys.sample(CLIP) == SAMPLE


def test_more_encoders_change_no_name(keys_of):
    keys = keys_of(ConvEncoder, ConditionEncoder, ImageEncoder, ByteEncoder)
    assert keys.media_kinds == ("latents", "condition", "image")
    assert keys.media(CLIP)[0] == LATENTS and len(set(keys.media(CLIP))) == 3
    assert (keys.text("a clip"), keys.sample(CLIP)) == (CAPTION, SAMPLE)


def test_a_mask_video_whose_clock_starts_late_has_a_name_of_its_own():
    def name(**kwargs):
        mask = Mask(Path("/masks/clip.avi"), "fedcba9876543210", True, 90, Fraction(24), Fraction(15, 4), **kwargs)
        return Keys.mask(replace(CLIP, media=replace(MEDIA, mask=mask)), SPEC).key

    assert name() == MASKED and name(clock=True) != MASKED
    late = replace(MEDIA, special="clock", mask=Mask(Path("a.png"), "aa", False, 1, Fraction(0), Fraction(0)))
    assert Keys.mask(replace(CLIP, media=late), SPEC).key == Keys.mask(
        replace(CLIP, media=replace(late, special="")), SPEC
    ).key, "that of its media does not matter"  # fmt: skip


def test_one_kind_one_encoder(keys_of):
    with pytest.raises(AssertionError, match="two encoders of kind 'image'"):
        keys_of(ImageEncoder, ImageEncoder)


def test_wan_fingerprints_are_what_they_were():
    data = ROOT / "tests" / "data" / "wan_t2v"
    vae, umt5 = data / "Wan2.1_VAE.pth", data / "models_t5_umt5-xxl-enc-bf16.pth"
    assert WanVAEEncoder(vae, torch.bfloat16).fingerprint() == {
        "encoder": "wan2.1-vae",
        "version": 1,
        "takes": "posterior mean",
        "dtype": "torch.bfloat16",
        "files": [str(vae)],
    }
    tokenizer = data / "google" / "umt5-xxl"
    assert WanTextEncoder(umt5, tokenizer, torch.bfloat16, 512).fingerprint() == {
        "encoder": "umt5",
        "version": 1,
        "dtype": "torch.bfloat16",
        "max_length": 512,
        "files": [str(umt5), str(tokenizer / "tokenizer.json")],
    }


def test_special_pixels_have_names_of_their_own(keys_of):
    keys = keys_of(ConvEncoder, ByteEncoder)
    special = [replace(CLIP, media=replace(MEDIA, special=special)) for special in ("pq", "hlg", "alpha")]
    assert len({LATENTS, *(name for clip in special for name in keys.media(clip))}) == 4
    assert len({SAMPLE, *map(keys.sample, special)}) == 4
