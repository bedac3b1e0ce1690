"""The tensor shapes of a directory, and which of them a media file goes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

from models.base import MediaSpec
from utils.data.listing import plural
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

    @property
    def bucket_no_upscale(self) -> bool: ...

    @property
    def crop(self) -> str:
        """With "pad" files lie inside their shape; else they cover it."""


@dataclass(frozen=True)
class BucketTable:
    """Every shape that a directory trains in.

    A file goes to the aspect ratio nearest to its own by logarithm, and to the most frames that it fills at the model's
    rate. A video goes to the one-frame bucket with `stills` alone: it would be a single frame under a caption that
    tells of motion.
    """

    spec: MediaSpec
    areas: tuple[tuple[float, tuple[Size, ...]], ...]  # ratio -> one size per resolution; empty with size_buckets
    frames: tuple[int, ...]  # ascending; empty with size_buckets
    fixed: tuple[Bucket, ...]  # size_buckets
    no_upscale: bool = False  # what a shape would enlarge goes to a smaller one
    pad: bool = False  # files lie inside their shape; else they cover it

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

    def shapes(self, media: MediaFile, lengths: Sequence[int], every: bool = False) -> list[Bucket] | str:
        """The buckets of a file, one per resolution, or why there is none, without the file's name.

        Args:
            lengths: frames that the file fills, ascending; size_buckets that have none of them take the length on.
            every: in each of `lengths`, not in the longest alone.
        """
        nearest = self._nearest(media, lengths, every)
        if not self.no_upscale:
            return nearest
        size = media.width, media.height
        if self.fixed:
            kept = [bucket for bucket in nearest if not self._enlarges(size, bucket)]
            return kept or self._largest(size, lengths, every) or _below(size, nearest[0], self.spec)
        smaller = [(bucket, self._within(size, bucket)) for bucket in nearest]
        found = dict.fromkeys(Bucket(*shape, bucket.frames) for bucket, shape in smaller if shape)
        return [*found] or _narrow(size, self.spec)

    def is_small(self, media: MediaFile, lengths: Sequence[int], every: bool = False) -> bool:
        """Whether `shapes` are others than those of files that are large enough."""
        if not self.no_upscale:
            return False
        return any(self._enlarges((media.width, media.height), b) for b in self._nearest(media, lengths, every))

    def _enlarges(self, size: Size, bucket: Bucket) -> bool:
        return _enlarges(size, (bucket.width, bucket.height), self.pad)

    def _within(self, size: Size, bucket: Bucket) -> Size | None:
        """The shape itself, or the largest one like it for which a picture of `size` is not enlarged."""
        shape = bucket.width, bucket.height
        # musubi-tuner gives each such file a shape of its own, its sides rounded down; those of one shape share batches
        return _largest_within(size, shape, self.spec, self.pad) if self._enlarges(size, bucket) else shape

    def _largest(self, size: Size, lengths: Sequence[int], every: bool) -> list[Bucket]:
        """The largest of size_buckets for which a picture of `size` is not enlarged, in one length or in every one."""
        covered = [bucket for bucket in self._listed(lengths) if not self._enlarges(size, bucket)]
        if not covered:
            return []
        ratio = math.log(size[0] / size[1])
        away = {b: abs(math.log(b.width / b.height) - ratio) for b in covered}
        best = max(covered, key=lambda b: (b.width * b.height, -away[b], b.frames))
        return sorted({b for b in covered if b[:2] == best[:2]}, key=lambda b: b.frames) if every else [best]

    def _listed(self, lengths: Sequence[int]) -> list[Bucket]:
        """Of size_buckets those of `lengths`, or all for videos at these lengths."""
        videos = [bucket for bucket in self.fixed if bucket.frames > 1]
        return [bucket for bucket in self.fixed if bucket.frames in lengths] or [
            bucket._replace(frames=frames) for bucket in videos for frames in lengths
        ]

    def _nearest(self, media: MediaFile, lengths: Sequence[int], every: bool) -> list[Bucket]:
        """`shapes` of a file that is large enough."""
        log_ratio = math.log(media.width / media.height)
        if not self.fixed:
            sizes = min(self.areas, key=lambda row: abs(math.log(row[0]) - log_ratio))[1]
            kept = lengths if every else lengths[-1:]
            return [Bucket(width, height, frames) for frames in kept for width, height in sizes]
        found = self._listed(lengths)
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
    framing = settings.bucket_no_upscale, settings.crop == "pad"
    if settings.size_buckets:
        if any_length:
            raise ValueError("size_buckets names lengths, and video_clip_mode = 'full' takes none; use resolutions")
        fixed = tuple(Bucket(*bucket) for bucket in settings.size_buckets)
        for bucket in fixed:
            _require_fit("size_buckets", bucket, spec)
        _require_trainable("size_buckets", [bucket.frames for bucket in fixed], spec)
        return BucketTable(spec, (), (), fixed, *framing)
    # diffusion-pipe always has a one-frame bucket, so that images need no setting.
    frames = tuple(sorted({*(settings.frame_buckets or ()), 1}))
    for count in frames:
        _require_frames("frame_buckets", count, spec)
    if not any_length:
        _require_trainable("frame_buckets", frames, spec)
    return BucketTable(spec, _areas(settings, spec), frames, (), *framing)


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


def _enlarges(size: Size, shape: Size, pad: bool) -> bool:
    """Whether a picture of `size` is enlarged where it covers `shape`, or lies in it with padding."""
    larger = shape[0] > size[0], shape[1] > size[1]
    return all(larger) if pad else any(larger)


@lru_cache(maxsize=4096)  # a folder has few sizes, and many files of each
def _largest_within(size: Size, shape: Size, spec: MediaSpec, pad: bool) -> Size | None:
    """Of the sizes that the model takes, with about the aspect ratio of `shape`, the largest that does not enlarge a
    picture of `size`; None where a side of the picture is too short for any."""
    width, height = shape
    sizes = [
        (side, spec.nearest_side(side * height / width))
        for side in range(spec.pixel_multiple, width + 1, spec.pixel_multiple)
    ]
    sizes += [
        (spec.nearest_side(side * width / height), side)
        for side in range(spec.pixel_multiple, height + 1, spec.pixel_multiple)
    ]
    found = [found for found in sizes if not _enlarges(size, found, pad)]
    return max(found, key=lambda s: (s[0] * s[1], -abs(math.log(s[0] * height / (s[1] * width)))), default=None)


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


def _below(size: Size, bucket: Bucket, spec: MediaSpec) -> str:
    """Why a file of `size` has no place in size_buckets that may not enlarge it."""
    step = spec.pixel_multiple
    fitting = [size[0] // step * step, size[1] // step * step, bucket.frames]
    if not all(fitting):
        return _narrow(size, spec)
    told = "smaller than each of size_buckets, and with bucket_no_upscale = true nothing is enlarged"
    return f"is {size[0]}x{size[1]} px, {told}; add a bucket such as {fitting}"


def _narrow(size: Size, spec: MediaSpec) -> str:
    told = f"too small for the model's {spec.pixel_multiple} px a side, and with bucket_no_upscale = true not enlarged"
    return f"is {size[0]}x{size[1]} px, {told}"


def too_short(media: MediaFile, source_fps: Fraction, fps: Fraction, smallest: int) -> str:
    """Why a video taken at `source_fps` has no place where clips of `fps` have `smallest` frames or more."""
    there = f"{plural(media.frames, 'frame')} at {_rate(source_fps)} fps"
    length = resampled_frames(media.frames, source_fps, fps)
    at_model = "" if source_fps == fps else f" = {plural(length, 'frame')} at {_rate(fps)} fps"
    return f"{there}{at_model}; the smallest video bucket is {smallest}"


def _rate(fps: Fraction) -> str:
    return f"{float(fps):.3f}".rstrip("0").rstrip(".")
