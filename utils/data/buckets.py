"""The tensor shapes of a directory, and which of them a media file goes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from models.base import MediaSpec
from utils.data.media_types import resampled_frames
from utils.data.records import Bucket, MediaFile

Size = tuple[int, int]  # width, height, px
# diffusion-pipe rounds aspect ratios so before it compares them and derives sizes.
_RATIO_DIGITS = 3


class BucketSettings(Protocol):
    """What a `[[directory]]` says of shapes, its inheritance from the top level resolved."""

    @property
    def resolutions(self) -> Sequence[int | Sequence[int]] | None:
        """The side of a square, or [width, height]; each file is trained once in each. With aspect-ratio buckets only
        the area counts."""

    @property
    def enable_ar_bucket(self) -> bool: ...

    @property
    def min_ar(self) -> float | None:
        """Aspect ratios are width / height."""

    @property
    def max_ar(self) -> float | None: ...

    @property
    def num_ar_buckets(self) -> int | None: ...

    @property
    def ar_buckets(self) -> Sequence[float | Sequence[int]] | None:
        """Ratios, or [width, height] pairs."""

    @property
    def frame_buckets(self) -> Sequence[int] | None: ...

    @property
    def size_buckets(self) -> Sequence[Sequence[int]] | None:
        """[width, height, frames], in place of all the others."""


@dataclass(frozen=True)
class BucketTable:
    """Every shape that a directory trains in.

    A file goes to the aspect ratio nearest to its own by logarithm, and to the most frames that it fills at the model's
    rate. A video never goes to the one-frame bucket: it would be a single frame under a caption that tells of motion.
    """

    spec: MediaSpec
    areas: tuple[tuple[float, tuple[Size, ...]], ...]  # ratio -> one size per resolution; empty with size_buckets
    frames: tuple[int, ...]  # ascending; empty with size_buckets
    fixed: tuple[Bucket, ...]  # size_buckets

    def assign(self, media: MediaFile) -> list[Bucket] | str:
        """One bucket per resolution, or why there is none, without the file's name."""
        wanted = self.lengths_for(media)
        if isinstance(wanted, str):
            return wanted
        length = resampled_frames(media.frames, media.fps, self.spec.fps) if media.is_video else 1
        fitting = [frames for frames in wanted if frames <= length]
        return self.shapes(media, fitting) if fitting else too_short(media, media.fps, self.spec.fps, wanted[0])

    def lengths_for(self, media: MediaFile) -> list[int] | str:
        """The listed lengths that a file of its kind may have, ascending, or why there are none."""
        if not media.is_video and not self.spec.images:
            least = f"this model trains on clips of at least {self.spec.frame_stride + 1} frames"
            return f"is an image, and {least}; images are skipped, give it videos or choose a model that takes images"
        return [frames for frames in self.frame_lengths() if (frames > 1) == media.is_video] or _no_bucket(media)

    def shapes(self, media: MediaFile, lengths: Sequence[int], every: bool = False) -> list[Bucket]:
        """The buckets of a file, one per resolution.

        Args:
            lengths: frames that the file fills, ascending; size_buckets that have none of them take the length on.
            every: in each of `lengths`, not in the longest alone.
        """
        log_ratio = math.log(media.width / media.height)
        if not self.fixed:
            sizes = min(self.areas, key=lambda row: abs(math.log(row[0]) - log_ratio))[1]
            kept = lengths if every else lengths[-1:]
            return [Bucket(width, height, frames) for frames in kept for width, height in sizes]
        videos = [bucket for bucket in self.fixed if bucket.frames > 1]
        found = [bucket for bucket in self.fixed if bucket.frames in lengths] or [
            bucket._replace(frames=frames) for bucket in videos for frames in lengths
        ]
        away = [abs(math.log(bucket.width / bucket.height) - log_ratio) for bucket in found]
        nearest = {b.frames: b for b, far in reversed([*zip(found, away, strict=True)]) if far == min(away)}
        kept = sorted(nearest) if every else [max(nearest)]
        return [nearest[frames] for frames in kept]

    def frame_lengths(self) -> list[int]:
        """Every number of frames there is a bucket for, ascending."""
        return sorted({bucket.frames for bucket in self.fixed} or self.frames)


def bucket_table(settings: BucketSettings, spec: MediaSpec, any_length: bool = False) -> BucketTable:
    """The shapes that `settings` ask for; `ValueError` names the key of a shape that the model cannot take.

    Args:
        any_length: videos have lengths of their own, so that none need be listed.
    """
    if settings.size_buckets:
        if any_length:
            raise ValueError("size_buckets names lengths, and video_clip_mode = 'full' takes none; use resolutions")
        fixed = tuple(Bucket(*bucket) for bucket in settings.size_buckets)
        for bucket in fixed:
            _require_fit("size_buckets", bucket, spec)
        _require_trainable("size_buckets", [bucket.frames for bucket in fixed], spec)
        return BucketTable(spec, (), (), fixed)
    # diffusion-pipe always has a one-frame bucket, so that images need no setting.
    frames = tuple(sorted({*(settings.frame_buckets or ()), 1}))
    for count in frames:
        _require_frames("frame_buckets", count, spec)
    if not any_length:
        _require_trainable("frame_buckets", frames, spec)
    return BucketTable(spec, _areas(settings, spec), frames, ())


def _areas(settings: BucketSettings, spec: MediaSpec) -> tuple[tuple[float, tuple[Size, ...]], ...]:
    if not settings.resolutions:
        raise ValueError("resolutions is not set; give areas such as [512], or size_buckets")
    if not settings.enable_ar_bucket:
        # diffusion-pipe makes a square of a pair's area here (its issue 451); who names a shape gets it
        pairs = [(side, side) if isinstance(side, int) else side for side in settings.resolutions]
        sizes = [(spec.nearest_side(width), spec.nearest_side(height)) for width, height in pairs]
        return ((1.0, _unique(sorted(sizes, key=math.prod))),)
    # As in diffusion-pipe, a pair stands for its area alone; the shape comes from the aspect ratios.
    sides = [side if isinstance(side, int) else math.sqrt(side[0] * side[1]) for side in settings.resolutions]
    ratios = _ratios(settings)
    return tuple((ratio, _unique([_size(side, ratio, spec) for side in sorted(sides)])) for ratio in ratios)


def _ratios(settings: BucketSettings) -> list[float]:
    if settings.ar_buckets:
        ratios = [ar[0] / ar[1] if isinstance(ar, Sequence) else ar for ar in settings.ar_buckets]
    else:
        low, high, count = settings.min_ar, settings.max_ar, settings.num_ar_buckets
        if not low or not high or not count:
            raise ValueError("enable_ar_bucket = true needs ar_buckets, or min_ar, max_ar and num_ar_buckets")
        step = math.log(high / low) / max(1, count - 1)
        ratios = [low * math.exp(step * i) for i in range(count)]
    return sorted({round(ratio, _RATIO_DIGITS) for ratio in ratios})


def _size(side: float, ratio: float, spec: MediaSpec) -> Size:
    width = side * math.sqrt(ratio)
    return spec.nearest_side(width), spec.nearest_side(side * side / width)


def _unique(sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Two areas may round to one size; a file is then trained in it once."""
    return tuple(dict.fromkeys(sizes))


def _require_fit(key: str, bucket: Bucket, spec: MediaSpec) -> None:
    multiple = spec.pixel_multiple
    if min(bucket) < 1 or bucket.width % multiple or bucket.height % multiple:
        nearest = [spec.nearest_side(bucket.width), spec.nearest_side(bucket.height), bucket.frames]
        raise ValueError(f"{key}: {list(bucket)} has a side that is no multiple of {multiple}; nearest: {nearest}")
    _require_frames(key, bucket.frames, spec)


def _require_frames(key: str, frames: int, spec: MediaSpec) -> None:
    stride = spec.frame_stride
    if frames < 1 or (frames - 1) % stride:
        below = max(0, frames - 1) // stride * stride + 1
        raise ValueError(f"{key}: {frames} frames are not {stride}n+1; use {below} or {below + stride}")


def _require_trainable(key: str, lengths: Sequence[int], spec: MediaSpec) -> None:
    if not spec.images and max(lengths) == 1:
        least, mend = spec.frame_stride + 1, f"add a length such as {8 * spec.frame_stride + 1}"
        raise ValueError(f"{key}: all are of 1 frame, and this model trains on clips of at least {least}; {mend}")


def _no_bucket(media: MediaFile) -> str:
    if media.is_video:
        return "is a video, and every bucket is for images; add a length such as 33 to frame_buckets"
    return "is an image, and every bucket is for videos; add a bucket of 1 frame to size_buckets"


def too_short(media: MediaFile, source_fps: Fraction, fps: Fraction, smallest: int) -> str:
    """Why a video taken at `source_fps` has no place where clips of `fps` have `smallest` frames or more."""
    there = f"{media.frames} frames at {_rate(source_fps)} fps"
    length = resampled_frames(media.frames, source_fps, fps)
    at_model = "" if source_fps == fps else f" = {length} frames at {_rate(fps)} fps"
    return f"{there}{at_model}; the smallest video bucket is {smallest}"


def _rate(fps: Fraction) -> str:
    return f"{float(fps):.3f}".rstrip("0").rstrip(".")
