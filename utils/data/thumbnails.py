"""First, middle and last frame of each clip as the model will see them, as one small JPEG, made by worker processes.

Free of torch: every worker imports this module.
"""

import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.data.inspection import frames_of
from utils.data.masks import dimmed
from utils.data.records import Clip
from utils.data.workers import Progress, Silent, WorkerPool

_TIMEOUT_S = 120.0
_QUALITY = 72  # of the JPEG
_GAP_PX, _GAP_LEVEL = 3, 128  # between frames; black would look like a bar


class Strip(NamedTuple):
    """What is made of one clip, and how."""

    clip: Clip
    side_px: int  # the longer one of each frame


class Picture(NamedTuple):
    """Frames side by side."""

    jpeg: bytes
    width: int  # px
    height: int  # px


def pictures(
    clips: Sequence[Clip], *, side_px: int, workers: int, progress: Progress | None = None
) -> Iterator[Picture | None]:
    """One for each of `clips`, in their order; None for a clip that cannot be decoded."""
    if not clips:
        return
    progress = progress or Silent()
    progress.start(len(clips), "making the contact sheet")
    with WorkerPool(draw, min(workers, len(clips)), _TIMEOUT_S) as pool:
        strips = (Strip(clip, side_px) for clip in clips)
        for outcome in pool.run(strips, ahead=4 * max(1, workers), name=lambda strip: str(strip.clip.media.path)):
            progress.advance(1, outcome.item.clip.media.path.name)
            yield outcome.value if outcome.error is None else None
    progress.done()


def draw(strip: Strip) -> Picture:
    """Runs in the worker processes. Raises `MediaError`.

    Frames are decoded at the size of the bucket, so they are cut exactly as for the encoder, and made small after that.
    What a loss mask leaves out is shown darker.
    """
    clip = strip.clip
    width, height, frames = clip.bucket
    numbers = sorted({0, frames // 2, frames - 1})
    scale = min(1.0, strip.side_px / max(width, height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = dimmed(frames_of(clip, numbers, width, height), numbers, clip)
    small = [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in shown]
    gap = np.full((size[1], _GAP_PX, 3), _GAP_LEVEL, np.uint8)
    parts = [part for frame in small for part in (gap, frame)][1:]
    picture = Image.fromarray(np.concatenate(parts, axis=1))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=_QUALITY, optimize=True, progressive=False)
    return Picture(content.getvalue(), *picture.size)
