"""Makes loss masks: cut in time and framed as their clips are, then averaged to the grid of the latents.

Free of torch: every worker imports this module.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ImageOps

from utils.data.image import fitted, laid_on, opened
from utils.data.media import decode_clip, errors_named
from utils.data.media_types import MediaError
from utils.data.records import Bucket, Clip, Fill, Framing, Mask

MASK_VERSION = 1  # part of every key: raise it when the grids that `mask_grid` returns change
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow makes grey of colours
_BLACK = 2.0  # of 255; codecs leave so much of what was painted black
_NOT_DIMMED = 0.25  # of the brightness, where a contact sheet shows that nothing is trained


class AllBlack(MediaError):
    """A mask under which nothing of its clip would be trained."""


class Strides(NamedTuple):
    """What one cell of the latents stands for."""

    frames: int  # after the first, which has cells of its own
    pixels: int  # px, both ways


class MaskJob(NamedTuple):
    """One mask to make and store under `key`."""

    key: str
    file: Mask | None  # None: padding alone
    start: Fraction  # s; this and the next five as in `Clip`
    fps: Fraction
    bucket: Bucket
    source_fps: Fraction
    fill: Fill | None
    framing: Framing | None
    box: tuple[int, int, int, int]  # left, top, right, bottom, px of the bucket: where the picture lies
    strides: Strides

    @classmethod
    def of(cls, key: str, clip: Clip, box: tuple[int, int, int, int], strides: Strides) -> "MaskJob":
        when = (clip.start, clip.fps, clip.bucket, clip.source_fps, clip.fill)
        return cls(key, clip.media.mask, *when, clip.framing, box, strides)

    @property
    def path(self) -> Path:
        return self.file.path if self.file else Path()

    @property
    def name(self) -> str:
        return str(self.path) if self.file else f"the padding of {self.bucket}"

    @property
    def cells(self) -> int:
        """Of its grid; one takes a byte."""
        (width, height, frames), (frame_stride, stride) = self.bucket, self.strides
        return ((frames - 1) // frame_stride + 1) * (height // stride) * (width // stride)

    def row(self) -> list[Any]:
        """JSON-able."""
        file = self.file and [str(self.file.path), *self.file[1:4], *map(str, self.file[4:6]), self.file.clock]
        when = (str(self.start), str(self.fps), self.bucket, str(self.source_fps), self.fill)
        return [self.key, file, *when, self.framing and self.framing.row(), self.box, self.strides]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> "MaskJob":
        """What `row` gave."""
        key, file, start, fps, bucket, source_fps, fill, framing, box, strides = row
        if file:
            path, *rest, rate, duration, clock = file
            file = Mask(Path(path), *rest, Fraction(rate), Fraction(duration), clock)
        when = (Fraction(start), Fraction(fps), Bucket(*bucket), Fraction(source_fps), fill and Fill(*fill))
        return cls(key, file, *when, framing and Framing.of_row(framing), tuple(box), Strides(*strides))


def too_short(clip: Clip) -> str | None:
    """Why the mask of `clip` cannot be cut as its video is, by the frames that the mask's header tells; None if it
    can."""
    mask = clip.media.mask
    if mask is None or not mask.is_video:
        return None
    last = min(clip.bucket.frames, clip.fill.frames if clip.fill else clip.bucket.frames) - 1
    for turn in clip.each_turn():
        at = turn.start + last / turn.fps
        # time stamps are rounded, so that one frame too few is let pass, as in decoding
        held = mask.frames / turn.source_fps if turn.source_fps else mask.duration + 1 / mask.fps
        if at >= held:
            return (
                f"its mask {mask.path} lasts {float(mask.duration):.2f} s, and the clip from {float(turn.start):.2f} s "
                f"needs it at {float(at):.2f} s; make it as long as the video, or use an image for all frames"
            )
    return None


def mask_grid(job: MaskJob) -> np.ndarray:
    """How much of each cell of the latents is trained, uint8 [T, H, W], 255 for all of it; runs in the worker
    processes.

    Grey is a share, colours count by their luminance, and transparent parts of an image are black. Cells average what
    they stand for: the first frame, then `strides.frames` at a time.

    Raises:
        MediaError: the file cannot be read, or ends before the clip.
        AllBlack: it leaves nothing to train.
    """
    frames, frame_stride = job.bucket.frames, job.strides.frames
    length = (frames - 1) // frame_stride + 1
    assert frames == (length - 1) * frame_stride + 1, f"{frames} frames are not {frame_stride}k + 1"
    inside = _inside(job)
    if job.file is None or not job.file.is_video:
        shown = _still(job) if job.file else np.full(inside.shape, 255, np.float32)
        grid = np.broadcast_to(_small(shown * inside, job.strides.pixels), (length, *_cells(job)))
    else:
        grid = np.zeros((length, *_cells(job)), np.float32)
        for number, frame in enumerate(_moving(job, range(frames))):
            of = (number + frame_stride - 1) // frame_stride
            grid[of] += _small(frame * inside, job.strides.pixels) / (frame_stride if of else 1)
    if grid.max() <= _BLACK:
        raise AllBlack(job.path, why_black(job))
    return np.rint(grid).astype(np.uint8)


def dimmed(frames: np.ndarray, numbers: Sequence[int], clip: Clip) -> np.ndarray:
    """Frames `numbers` of `clip`, uint8 [N, h, w, 3] at its bucket's size, darker where less is trained."""
    if clip.media.mask is None:
        return frames
    job = MaskJob.of("", clip, (0, 0, *clip.bucket[:2]), Strides(1, 1))  # padding is black as it is
    masks = _moving(job, numbers) if clip.media.mask.is_video else [_still(job)] * len(numbers)
    shares = np.stack(list(masks))[..., None] / 255
    return np.rint(frames * (_NOT_DIMMED + (1 - _NOT_DIMMED) * shares)).astype(np.uint8)


def why_black(job: MaskJob) -> str:
    """What is told of a mask under which nothing of its clip would be trained, without its name."""
    assert job.file is not None, "padding leaves a picture"
    where = f"all through the clip from {float(job.start):.2f} s" if job.file.is_video else "where the clip is cut out"
    return f"the mask is black {where}: nothing would be trained; mend it or leave it out"


def _cells(job: MaskJob) -> tuple[int, int]:
    return job.bucket.height // job.strides.pixels, job.bucket.width // job.strides.pixels


def _small(plane: np.ndarray, stride: int) -> np.ndarray:
    """Means of blocks: float32 [h, w] -> [H, W]."""
    height, width = plane.shape
    assert height % stride == 0 and width % stride == 0, f"{width}x{height} is no multiple of {stride}"
    return plane.reshape(height // stride, stride, width // stride, stride).mean((1, 3))


def _inside(job: MaskJob) -> np.ndarray:
    """1 where the picture lies and 0 on its padding, float32 [h, w]."""
    left, top, right, bottom = job.box
    inside = np.zeros((job.bucket.height, job.bucket.width), np.float32)
    inside[top:bottom, left:right] = 1
    return inside


def _still(job: MaskJob) -> np.ndarray:
    """An image's luminance, framed as the clip is: float32 [h, w], 0 to 255."""
    assert job.file is not None
    framing = job.framing
    with errors_named(job.file.path), opened(job.file.path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.has_transparency_data:
            upright = laid_on("black", upright)
        plain = framing and framing._replace(flip=False)
        pixels = fitted(upright, job.bucket.width, job.bucket.height, plain)
    return (pixels[:, ::-1] if framing and framing.flip else pixels) @ _LUMA


def _moving(job: MaskJob, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """Luminance of a video's frames, cut and framed as the clip is: float32 [h, w] each, 0 to 255."""
    assert job.file is not None
    width, height, frames = job.bucket
    how = {"source_fps": job.source_fps, "fill": job.fill, "framing": job.framing}
    pixels = decode_clip(job.file.path, True, job.start, job.fps, frames, width, height, only=list(numbers), **how)
    return (frame @ _LUMA for frame in pixels)
