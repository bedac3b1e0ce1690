"""What the readers of images and videos share: the probe, the error, and the geometry of covering a bucket."""

import math
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from utils.data.records import Framing

# Part of every cache key: raise it when the pixels that `media.decode_clip` returns change.
DECODE_VERSION = 1


class MediaError(ValueError):
    """One file cannot be used; says which and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it pickles
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Probe(NamedTuple):
    """What a file holds. An image has frames 1, fps 0 and duration 0."""

    width: int  # px, as shown: after the rotation flag, with square pixels
    height: int  # px
    frames: int
    fps: Fraction  # exact; the average for a variable rate
    duration: Fraction  # s; frames / fps
    is_video: bool
    special: str = ""  # as `MediaFile.special`


def resampled_frames(frames: int, fps: Fraction, target: Fraction) -> int:
    """How many frames at `target` fps fit into `frames` frames at `fps`; exact, no float is involved."""
    # by hand: fractions would cancel common factors at each step, which takes ten times as long
    return frames * target.numerator * fps.denominator // (target.denominator * fps.numerator)


def cover_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest size with the shape of `source` of which both sides cover `target`; (width, height) px."""
    scale = max(Fraction(target[0], source[0]), Fraction(target[1], source[1]))
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def cover_box(
    source: tuple[int, int], target: tuple[int, int], framing: Framing | None = None
) -> tuple[float, float, float, float]:
    """The part of `source` that has the shape of `target`: left, top, right, bottom in source px."""
    scale = min(Fraction(source[0], target[0]), Fraction(source[1], target[1]))
    keep_w, keep_h = target[0] * scale, target[1] * scale
    across, down = (framing or Framing())[:2]
    left, top = (source[0] - keep_w) * across, (source[1] - keep_h) * down
    return float(left), float(top), float(left + keep_w), float(top + keep_h)


def fit_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Largest size with the shape of `source` that fits into `target`; (width, height) px, each 1 at least."""
    scale = min(Fraction(target[0], source[0]), Fraction(target[1], source[1]))
    return max(1, round(source[0] * scale)), max(1, round(source[1] * scale))


def picture_box(source: tuple[int, int], target: tuple[int, int], framing: Framing | None) -> tuple[int, int, int, int]:
    """Where in a bucket the picture lies: left, top, right, bottom in px of the bucket; around it is padding.

    Args:
        source, target: width and height, px, of the file as shown and of the bucket.
    """
    if framing is None or not framing.pad:
        return 0, 0, *target
    width, height = fit_size(source, target)
    left, top = math.floor((target[0] - width) * framing.across), math.floor((target[1] - height) * framing.down)
    if framing.flip:
        left = target[0] - width - left
    return left, top, left + width, top + height
