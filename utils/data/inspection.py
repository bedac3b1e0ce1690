"""Looks at a few small frames of each clip in worker processes: is it black, still, framed by bars, cut in the middle.

Free of torch: every worker imports this module.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.data.media import decode_clip
from utils.data.media_types import picture_box
from utils.data.records import Bucket, Clip, Framing
from utils.data.scan import reason_of
from utils.data.scenes import scene_changes
from utils.data.stat_index import StatIndex
from utils.data.workers import DECODE_TIMEOUT, Progress, Silent, WorkerPool

LOOKS_FILE = "looks.jsonl"  # beside the cache's entries
_VERSION = 2  # raise it when `measure` tells other numbers of the same frames
_SIDE_PX = 96  # the longer one, of what is looked at
_MOST_FRAMES = 49  # of a clip, evenly spread
_GRID = (12, 16)  # rows and columns of the blocks whose colours are compared: grain and codec noise average out

# Levels are of 0 to 255.
_BLACK_MEAN, _BLACK_BRIGHT = 12.0, 48.0  # a frame whose mean and whose 99th percentile lie below is black
_BAR_LEVEL = 20.0  # 98 of 100 pixels of a row of a bar lie below, in every frame
_BAR_LEAST = 0.03  # of the picture, on each of two opposite sides
_STILL_LEVEL, _STILL_BLOCKS = 1.5, 3  # fewer blocks than this have changed by more: grain may reach one
_FLAT_LEVEL = 4.0  # a frame whose blocks differ by less has nothing to be told apart by


class Look(NamedTuple):
    """What was seen of a clip, as the model will see it. Shares are of 0 to 1."""

    black: float  # share of the frames that are black
    still: float  # longest share of its length in which nothing moves; 0 for an image
    bars: tuple[float, float]  # share of the picture under black bars: above and below, left and right
    cuts: tuple[float, ...]  # s from the start of the clip
    print: str  # 48 hex digits of first, middle and last frame, alike for pictures that look alike; "" where flat


def look_at(
    clips: Iterable[Clip],
    *,
    workers: int,
    index: StatIndex,
    progress: Progress | None = None,
    timeout_s: float = 120.0,
) -> tuple[dict[str, Look], dict[str, str]]:
    """Looks by `view_of`, remembered in `index`; and for views that cannot be decoded the reason.

    Args:
        timeout_s: how long one clip may take.
    """
    progress = progress or Silent()
    wanted: dict[str, Clip] = {}
    for clip in clips:
        wanted.setdefault(view_of(clip), clip)
    looks: dict[str, Look] = {}
    reasons: dict[str, str] = {}
    unknown = []
    for view, clip in wanted.items():
        known = _remembered(index, clip).get(view)
        if known is None:
            unknown.append(clip)
        else:
            looks[view] = _from_json(known)
    if unknown:
        progress.start(len(unknown), "looking at clips")
        left = Counter(clip.media.path for clip in unknown)
        news: dict[Path, dict[str, Look]] = {path: {} for path in left}
        with WorkerPool(inspect, min(workers, len(unknown)), timeout_s, DECODE_TIMEOUT) as pool:
            for outcome in pool.run(unknown, ahead=4 * max(1, workers), name=lambda clip: str(clip.media.path)):
                clip, view, path = outcome.item, view_of(outcome.item), outcome.item.media.path
                if outcome.error is None:
                    looks[view] = news[path][view] = outcome.value
                else:
                    reasons[view] = reason_of(outcome.error)
                left[path] -= 1
                if not left[path] and news[path]:  # once a file: each time all of its looks are written again
                    index.put(path, {**_remembered(index, clip), **news.pop(path)})
                progress.advance(1, path.name)
        progress.done()
    return looks, reasons


def view_of(clip: Clip) -> str:
    """Name of what is looked at: content, moments and shape. Clips of one file at several areas share it."""
    clip = _bare(clip)
    size = "x".join(map(str, small_size(clip, _SIDE_PX)))
    parts = (clip.start, clip.fps, clip.source_fps, clip.bucket.frames, clip.fill and tuple(clip.fill), size)
    parts += (clip.framing.row(),) if clip.framing else ()
    return f"{_VERSION} {clip.media.content_hash} {' '.join(map(str, parts))}"


def _bare(clip: Clip) -> Clip:
    """`clip` as its file shows it: not mirrored, and without padding, which would be taken for bars of the file's."""
    if not clip.framing:
        return clip
    size, shape = (clip.media.width, clip.media.height), (clip.bucket.width, clip.bucket.height)
    left, top, right, bottom = picture_box(size, shape, clip.framing)
    framing = clip.framing._replace(flip=False, pad=False)
    bucket = Bucket(right - left, bottom - top, clip.bucket.frames)
    return replace(clip, bucket=bucket, framing=None if framing == Framing() else framing)


def small_size(clip: Clip, side_px: int) -> tuple[int, int]:
    """Width and height, px, of the shape of the clip's bucket with its longer side `side_px` at most."""
    longest = max(clip.bucket.width, clip.bucket.height)
    scale = min(1.0, side_px / longest)
    return max(8, round(clip.bucket.width * scale)), max(8, round(clip.bucket.height * scale))


def frames_of(clip: Clip, numbers: Sequence[int], width: int, height: int) -> np.ndarray:
    """Frames `numbers` of `clip`, uint8 [N, height, width, 3], framed as for its bucket. Raises `MediaError`."""
    media, frames = clip.media, clip.bucket.frames
    how = {"source_fps": clip.source_fps, "fill": clip.fill, "framing": clip.framing}
    return decode_clip(
        media.path, media.is_video, clip.start, clip.fps, frames, width, height, only=list(numbers), **how
    )


def spread(frames: int, most: int) -> list[int]:
    """At most `most` frame numbers over all of a clip, the first and the last among them."""
    count = min(frames, most)
    return [0] if count < 2 else [round(i * (frames - 1) / (count - 1)) for i in range(count)]


def inspect(clip: Clip) -> Look:
    """Runs in the worker processes. Raises `MediaError`."""
    clip = _bare(clip)
    numbers = spread(clip.bucket.frames, _MOST_FRAMES)
    pixels = frames_of(clip, numbers, *small_size(clip, _SIDE_PX))
    fps = float(clip.fps)
    return measure(pixels, [number / fps if fps else 0.0 for number in numbers])


def _remembered(index: StatIndex, clip: Clip) -> dict[str, Any]:
    return index.get(clip.media.path) or {}


def _from_json(value: Sequence[Any]) -> Look:
    black, still, bars, cuts, print_ = value
    return Look(black, still, (bars[0], bars[1]), tuple(cuts), print_)


# --- what is seen -----------------------------------------------------------------------------------------------------


def measure(pixels: np.ndarray, times_s: Sequence[float]) -> Look:
    """`pixels` uint8 [N, h, w, 3], shown at `times_s`."""
    luma = pixels @ np.array([0.299, 0.587, 0.114], np.float32)  # [N, h, w]
    blocks = _blocks(pixels)
    black = (luma.mean((1, 2)) < _BLACK_MEAN) & (np.percentile(luma, 99, (1, 2)) < _BLACK_BRIGHT)
    bars = (0.0, 0.0) if black.all() else (_bars(luma), _bars(luma.swapaxes(1, 2)))
    cuts = tuple(round(times_s[i], 2) for i in scene_changes(blocks, times_s))
    return Look(round(float(black.mean()), 3), _still(blocks), bars, cuts, _print(luma))


def _blocks(frames: np.ndarray, grid: tuple[int, int] = _GRID) -> np.ndarray:
    """Means of blocks: [N, h, w, ...] -> float32 [N, rows, columns, ...]."""
    sums = frames.astype(np.float32)
    for axis, count in zip((1, 2), grid, strict=True):
        edges = np.linspace(0, frames.shape[axis], min(count, frames.shape[axis]) + 1).astype(int)
        sizes = np.diff(edges).reshape([-1 if i == axis else 1 for i in range(frames.ndim)])
        sums = np.add.reduceat(sums, edges[:-1], axis=axis) / sizes
    return sums


def _bars(luma: np.ndarray) -> float:
    """Share of the height under black bars, above and below; 0 where they are not about equal, as bars are."""
    lit = np.percentile(luma, 98, axis=2).max(0) >= _BAR_LEVEL  # [h]: whether a row is more than a bar in any frame
    if not lit.any():
        return 0.0
    height = len(lit)
    above, below = int(lit.argmax()), int(lit[::-1].argmax())
    unequal = abs(above - below) > max(2, 0.02 * height)
    return 0.0 if unequal or min(above, below) < _BAR_LEAST * height else round((above + below) / height, 3)


def _still(blocks: np.ndarray) -> float:
    """Longest share of the frames that are as the first of them."""
    frames = len(blocks)
    grey = blocks.mean(-1)
    longest = start = 0
    for i in range(1, frames):
        if (np.abs(grey[i] - grey[start]) >= _STILL_LEVEL).sum() >= _STILL_BLOCKS:
            start = i
        longest = max(longest, i - start)
    return round(longest / (frames - 1), 3) if frames > 1 else 0.0


def _print(luma: np.ndarray) -> str:
    """Which of neighbouring blocks is brighter, in first, middle and last frame: 3 x 64 bits. Survives another size,
    bit rate and small changes of colour."""
    frames = luma[[0, len(luma) // 2, -1]]
    small = _blocks(frames, (8, 9))
    if small.shape[1:] != (8, 9) or min(small.std((1, 2))) < _FLAT_LEVEL:
        return ""
    return np.packbits(small[:, :, 1:] > small[:, :, :-1]).tobytes().hex()
