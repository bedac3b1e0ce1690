"""Images with colour profiles: wide gamuts come to sRGB, and what already is sRGB stays byte for byte."""

import struct
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image, ImageCms

from utils.data.media import decode_clip, probe

P3_TO_SRGB = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]])
COLOUR = (200, 100, 50)


def profile(name):
    """That of sRGB by littleCMS, or the same with the primaries of Display P3, adapted to D50 as in its own profile."""
    raw = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for i in range(struct.unpack_from(">I", raw, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", raw, 132 + 12 * i)
        if name == "P3" and tag in primaries:
            struct.pack_into(">3i", raw, offset + 8, *[round(65536 * value) for value in primaries[tag]])
    return bytes(raw)


def in_srgb(colour):
    coded = np.array(colour) / 255
    light = P3_TO_SRGB @ np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def pixel(path):
    return decode_clip(path, False, Fraction(0), Fraction(0), 1, 32, 32)[0, 9, 9].astype(int)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_a_wide_gamut_is_brought_to_srgb(tmp_path, mode, suffix):
    path, image = tmp_path / f"a.{suffix}", Image.new("RGB", (64, 48), COLOUR)
    if mode == "RGBA":
        image.putalpha(128)
    if mode == "P":
        image = image.quantize()
    image.save(path, icc_profile=profile("P3"), **({"lossless": True} if suffix == "webp" else {}))
    assert probe(path).special == "icc"
    expected = in_srgb(COLOUR)
    if mode == "RGBA":
        expected = (expected * 128 + 255 * 127) / 255
    assert np.abs(pixel(path) - expected).max() <= 1


@pytest.mark.parametrize("content", [None, "sRGB", "damaged", "for another kind of image"])
def test_other_images_stay_as_they_were(tmp_path, content):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    held = {None: None, "sRGB": profile("sRGB"), "damaged": profile("P3")[:200], "for another kind of image": lab}
    Image.new("RGB", (64, 48), COLOUR).save(tmp_path / "a.png", icc_profile=held[content])
    assert probe(tmp_path / "a.png").special == ""
    assert tuple(pixel(tmp_path / "a.png")) == COLOUR


def test_grey_and_cmyk(tmp_path):
    Image.new("L", (64, 48), 99).save(tmp_path / "a.png", icc_profile=profile("P3"))  # of colours, and there are none
    assert probe(tmp_path / "a.png").special == "" and set(pixel(tmp_path / "a.png")) == {99}
    Image.new("CMYK", (64, 48), (200, 100, 10, 30)).save(tmp_path / "b.jpg", quality=100)
    assert probe(tmp_path / "b.jpg").special == ""
    assert np.abs(pixel(tmp_path / "b.jpg") - [49, 137, 216]).max() <= 2  # (255 - ink) (255 - black) / 255


def test_animations_have_profiles_too(tmp_path):
    frames = [Image.new("RGB", (64, 48), (200, 100 + i, 50)) for i in range(3)]
    path = tmp_path / "a.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True, icc_profile=profile("P3"))
    assert probe(path).special == "icc"
    shown = decode_clip(path, True, Fraction(0), Fraction(10), 3, 32, 32)[:, 9, 9].astype(int)
    assert np.abs(shown - [in_srgb((200, 100 + i, 50)) for i in range(3)]).max() <= 1
