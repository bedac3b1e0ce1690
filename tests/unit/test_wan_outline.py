"""Which Wan is planned for, with its weights and without."""

import pytest
import torch

from models.base import ClipEnds
from models.wan.config import WanModelConfig
from models.wan.family import WanFamily
from models.wan.outline import DEFAULT, guess
from tests.helpers.tiny import tiny_checkpoint

NOWHERE = "/nowhere"


def config(ckpt_path=NOWHERE, **keys):
    return WanModelConfig(type="wan", ckpt_path=str(ckpt_path), **keys)


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        ({"ckpt_path": "/m/Wan2.1-T2V-14B"}, "Wan2.1 T2V"),
        ({"ckpt_path": "/m/Wan2.1-I2V-14B-480P"}, "Wan2.1 I2V"),
        ({"ckpt_path": "/m/Wan2.1-FLF2V-14B-720P-Diffusers"}, "Wan2.1 FLF2V"),
        ({"ckpt_path": "/m/Wan2.1-Fun-14B-InP"}, "Wan2.1 I2V"),
        ({"ckpt_path": "/m/Wan2.2-TI2V-5B"}, "Wan2.2 TI2V-5B"),
        ({"ckpt_path": "/m/Wan2.2-T2V-A14B"}, "Wan2.2 T2V-A14B"),
        ({"ckpt_path": "/m/Wan2.2-I2V-A14B/"}, "Wan2.2 I2V-A14B"),
        ({"transformer_path": "/c/diffusion_models/wan2.1_i2v_480p_14B_fp8_scaled.safetensors"}, "Wan2.1 I2V"),
        ({"transformer_path": "/c/diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors"}, "Wan2.2 I2V-A14B"),
        ({"transformer_path": "/c/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors"}, "Wan2.2 TI2V-5B"),
        ({"transformer_path": "/m/mine.safetensors", "ckpt_path": "/m/Wan2.2-TI2V-5B"}, "Wan2.2 TI2V-5B"),
        ({"clip_path": "/c/clip_vision_h.safetensors"}, "Wan2.1 I2V"),
        ({"expert": "high"}, "Wan2.2 T2V-A14B"),
        ({}, DEFAULT),
    ],
)
def test_names_tell_where_weights_are_absent(keys, title):
    variant, how = guess(config(**keys))
    assert variant.title == title
    assert f"taken for {title}" in how
    outline = WanFamily.outline(config(**keys))
    assert (outline.title, outline.media, outline.notes[0]) == (title, variant.media, how)
    assert outline.count_caption_tokens is None


def test_released_sizes():
    t2v, i2v, ti2v = (
        WanFamily.outline(config(f"/m/{name}")) for name in ("Wan2.1-T2V-14B", "Wan2.1-I2V-14B-480P", "Wan2.2-TI2V-5B")
    )
    assert t2v.tokens(832, 480, 81) == 32760 and ti2v.tokens(1280, 704, 121) == 27280  # as in the README
    assert t2v.cache_bytes(832, 480, 81) == {"latents": 16 * 21 * 60 * 104 * 4}
    assert i2v.cache_bytes(832, 480, 81) == {
        "latents": 16 * 21 * 60 * 104 * 4,
        "condition": 16 * 21 * 60 * 104 * 4,
        "image": 257 * 1280 * 2,
    }
    assert ti2v.cache_bytes(1280, 704, 121) == {"latents": 48 * 31 * 44 * 80 * 4}
    assert t2v.caption_token_bytes == 8192


@pytest.mark.parametrize("variant", ["t2v", "i2v", "flf2v", "ti2v"])
def test_an_outline_with_weights_is_what_the_family_makes(tmp_path, variant):
    settings = config(tiny_checkpoint(tmp_path, variant=variant), dtype="float32")
    outline, family = WanFamily.outline(settings), WanFamily(settings)
    assert (outline.title, outline.media, list(outline.notes)) == (family.title, family.media_spec(), [])
    assert outline.tokens(64, 96, 9) == family.tokens(64, 96, 9)
    pixels = torch.zeros(9, 96, 64, 3, dtype=torch.uint8)
    caption = "a  dog &amp; a cat"
    items = {"pixels": pixels, "ends": ClipEnds(pixels[[0, -1]].numpy(), 9), "caption": caption}
    made = {}
    for encoder in family.encoders():
        encoder.load(torch.device("cpu"))
        (tensors,) = encoder.encode([items[encoder.reads]])
        made[encoder.kind] = sum(tensor.nbytes for tensor in tensors.values())
    assert outline.count_caption_tokens(caption) * outline.caption_token_bytes == made.pop("text")
    assert outline.cache_bytes(64, 96, 9) == made


def test_what_is_missing_is_told(tmp_path):
    tiny_checkpoint(tmp_path)
    (tmp_path / "official" / "Wan2.1_VAE.pth").unlink()
    outline = WanFamily.outline(config(tmp_path / "official"))
    (note,) = outline.notes
    assert note.startswith("the start will stop at this: ") and "VAE" in note
