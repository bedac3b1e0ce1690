"""Brings images that have a colour profile of their own to sRGB."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SAME = 3  # levels of 255: profiles that differ from sRGB by no more are taken for it, as there are dozens of sRGB
_MODES = frozenset(["RGB", "L", "CMYK"])


def needs_conversion(image: Image.Image) -> bool:
    """Whether its profile says anything else than sRGB. Profiles that are damaged, or of another kind than the image,
    are passed over, as browsers do."""
    profile = image.info.get("icc_profile")
    return bool(profile) and _transform(profile, _colours(image)) is not None


def in_srgb(image: Image.Image) -> Image.Image:
    """`image` in sRGB: as it is where it `needs_conversion` not, else RGB, or RGBA where it has transparency."""
    if not needs_conversion(image):
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    mode = _colours(image)
    transform = _transform(image.info["icc_profile"], mode)
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    if alpha:
        converted.putalpha(alpha)
    return converted


def _colours(image: Image.Image) -> str:
    """The mode that holds the image's colours without their transparency."""
    base = {"RGBA": "RGB", "RGBX": "RGB", "P": "RGB", "PA": "RGB", "LA": "L", "1": "L"}.get(image.mode, image.mode)
    return base if base in _MODES else ""


@lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """To sRGB, or None where there is nothing to do, or nothing can be done."""
    if not mode:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Perceptual, the default of browsers; for profiles of a matrix and curves all intents are the same.
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        sample = _sample(mode)
        found = ImageCms.applyTransform(sample, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    apart = np.abs(np.asarray(found, np.int16) - np.asarray(sample.convert("RGB"), np.int16))
    return transform if apart.max() > _SAME else None


def _sample(mode: str) -> Image.Image:
    """Colours from all over the space, one a pixel."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    levels = np.meshgrid(*[np.linspace(0, 255, 5).astype(np.uint8)] * bands)
    pixels = np.stack([level.ravel() for level in levels], -1)[None]  # [1, 5 ** bands, bands]
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels, mode)
