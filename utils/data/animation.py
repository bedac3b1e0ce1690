"""Reads animated WebP, PNG and AVIF through Pillow, since FFmpeg reads them not at all, or in part."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from utils.data.image import fitted, opened, shown_size, special_of
from utils.data.media_types import MediaError, Probe
from utils.data.records import Framing

ANIMATION_SUFFIXES = frozenset([".webp", ".png", ".avif"])  # GIF goes to FFmpeg
_FORMATS = frozenset(["WEBP", "PNG", "AVIF"])
_UNTIMED_MS = 100  # what browsers show a frame for that has no duration


def is_animation(path: Path) -> bool:
    """Whether `path` is of several frames, and read by this file."""
    if path.suffix.lower() not in ANIMATION_SUFFIXES:
        return False
    with opened(path) as image:
        return image.format in _FORMATS and getattr(image, "is_animated", False)


def probe_animation(path: Path) -> Probe:
    """Size, frames and average rate; decodes all of it, for only then Pillow tells how long each frame is shown."""
    with opened(path) as image:
        width, height = shown_size(image)
        special = special_of(image)
        lengths = list(_frames(image))
    duration = sum(lengths, Fraction(0))
    return Probe(width, height, len(lengths), len(lengths) / duration, duration, True, special)


def decode_animation(
    path: Path,
    start: Fraction,
    fps: Fraction,
    numbers: Sequence[int],
    out: np.ndarray,
    source_fps: Fraction,
    framing: Framing | None = None,
) -> None:
    """What `video.decode_video` does, with the same arguments."""
    due = [start + number / fps for number in numbers]  # s, or frames of the file
    if source_fps:
        due = [Fraction(math.floor(moment * source_fps)) for moment in due]
    height, width = out.shape[1:3]
    done, end = 0, Fraction(0)
    with opened(path) as image:
        for length in _frames(image):
            end += 1 if source_fps else length
            first = done
            while done < len(due) and due[done] < end:
                out[done] = fitted(image, width, height, framing) if done == first else out[first]
                done += 1
            if done == len(due):
                return
    raise MediaError(path, f"ends too early: frame {numbers[done] + 1} of {numbers[-1] + 1} could not be decoded")


def _frames(image: Image.Image) -> Iterator[Fraction]:
    """How long each frame is shown, s; it is in `image` meanwhile."""
    first = 1 if image.info.get("default_image") else 0  # a PNG may have one for viewers that show no animations
    for number in range(first, image.n_frames):
        image.seek(number)
        image.load()
        # Rates such as 1/30 s come as floats.
        yield Fraction(image.info.get("duration") or _UNTIMED_MS).limit_denominator(1000) / 1000
