"""Reads images through Pillow."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils.data.icc import in_srgb, needs_conversion
from utils.data.media_types import MediaError, Probe, cover_box, picture_box
from utils.data.records import Framing

_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
# Their animations are told by the suffix, so that no other file need be opened to know what it is.
_ANIMATED = frozenset(["WEBP", "PNG", "AVIF"])


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The image, not yet decoded; raises `MediaError` for what is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF, a page for a file; of half the pixels that are an error
        try:
            image = Image.open(path)
        except Image.UnidentifiedImageError as error:
            raise MediaError(path, "is not an image that Pillow knows, whatever its name says") from error
        except Image.DecompressionBombError as error:
            raise MediaError(path, "has over 178 million pixels, or its header is damaged: scale it down") from error
        with image:
            yield image


def is_animated_gif(path: Path) -> bool:
    """Whether `path` is a GIF of several frames, which is read as a video."""
    if path.suffix.lower() != ".gif":
        return False
    with opened(path) as image:
        return image.format == "GIF" and image.is_animated


def probe_image(path: Path) -> Probe:
    """Size of an image, after decoding it once to know that it is whole."""
    with opened(path) as image:
        if image.format in _ANIMATED and getattr(image, "is_animated", False):
            raise MediaError(path, f"is an animated {image.format}; rename it to {path.stem}.{image.format.lower()}")
        width, height = shown_size(image)
        special = special_of(image)
        image.draft("RGB", (64, 64))  # a JPEG is then read to its end, but computed at 1/8 of its size
        image.load()
        if image.format == "TIFF":  # Pillow turns these upright by itself, and its newer versions tell so before
            width, height = image.size
        if image.mode == "F" and image.getextrema()[1] <= 1:
            raise MediaError(path, "holds fractions of 1, which would be black here: save it with 8 bits a colour")
    return Probe(width, height, 1, Fraction(0), Fraction(0), False, special)


def special_of(image: Image.Image) -> str:
    """As `MediaFile.special`."""
    return "icc" if needs_conversion(image) else ""


def shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in px, after the EXIF orientation."""
    sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
    return image.size[::-1] if sideways else image.size


def decode_image(path: Path, width: int, height: int, framing: Framing | None = None) -> np.ndarray:
    """`fitted` of the image in `path`."""
    with opened(path) as image:
        return fitted(image, width, height, framing)


def fitted(image: Image.Image, width: int, height: int, framing: Framing | None = None) -> np.ndarray:
    """uint8 RGB [height, width, 3]: upright, on white, scaled to cover and cropped to the middle, or as `framing` says
    but for its flip."""
    # Without an orientation, a copy as large as the image would be made for nothing.
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    upright = _flattened(ImageOps.exif_transpose(image) if turned else image)
    if framing and framing.pad:
        left, top, right, bottom = picture_box(upright.size, (width, height), framing)
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right] = upright.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        return pixels
    box = cover_box(upright.size, (width, height), framing)
    return np.asarray(upright.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _flattened(image: Image.Image) -> Image.Image:
    """sRGB, with transparency laid on white."""
    if image.mode.startswith("I"):  # Pillow clips 16-bit grey at 255 where it should scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image = in_srgb(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    return laid_on("white", image)


def laid_on(ground: str, image: Image.Image) -> Image.Image:
    """RGB, what is clear of the image showing a colour."""
    layer = image.convert("RGBA")
    below = Image.new("RGBA", layer.size, ground)
    below.alpha_composite(layer)
    return below.convert("RGB")
