"""Chooses which moments of a media file become clips."""

from collections.abc import Callable
from fractions import Fraction

from utils.data.buckets import BucketTable
from utils.data.records import Clip, MediaFile
from utils.data.scan import Skipped

# (frames that the video has at the model's rate, frames of the clip) -> first frame of each clip
Starts = Callable[[int, int], list[int]]


def _beginning(length: int, frames: int) -> list[int]:
    return [0]


def _middle(length: int, frames: int) -> list[int]:
    return [(length - frames) // 2]


# name in `video_clip_mode` -> rule
CLIP_MODES: dict[str, Starts] = {
    "single_beginning": _beginning,
    "single_middle": _middle,
}


def cut_clips(media: MediaFile, table: BucketTable, mode: str, group: int) -> list[Clip] | Skipped:
    """The clips of one file: one per resolution and start.

    Args:
        mode: a name in `CLIP_MODES`; `ValueError` for another.
        group: index of the [[directory]].
    """
    if mode not in CLIP_MODES:
        raise ValueError(f"video_clip_mode = {mode!r} is not known; use one of: {', '.join(CLIP_MODES)}")
    buckets = table.assign(media)
    if isinstance(buckets, str):
        return Skipped(media.path, buckets, bad=False)
    if not media.is_video:
        return [Clip(media, bucket, Fraction(0), Fraction(0), group) for bucket in buckets]
    fps, length = table.spec.fps, table.resampled(media)
    return [
        Clip(media, bucket, start / fps, fps, group)
        for bucket in buckets
        for start in CLIP_MODES[mode](length, bucket.frames)
    ]
