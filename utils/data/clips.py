"""Chooses which moments of a media file become clips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, Protocol

from models.base import MediaSpec
from utils.data.buckets import BucketTable, too_short
from utils.data.framing import framed
from utils.data.listing import Skipped
from utils.data.media_types import resampled_frames
from utils.data.plan import counter_draws
from utils.data.records import Bucket, Clip, Fill, MediaFile

_UNTOLD = Fraction(0)


class ClipSettings(Protocol):
    """What a `[[directory]]` says of clips, its inheritance from the top level resolved."""

    @property
    def video_clip_mode(self) -> str | None:
        """A name in `CLIP_MODES`; the run's where None."""

    @property
    def frame_stride(self) -> int: ...

    @property
    def frame_sample(self) -> int: ...

    @property
    def max_frames(self) -> int: ...

    @property
    def fps(self) -> str | float: ...

    @property
    def short_clips(self) -> str: ...

    @property
    def stills(self) -> bool: ...

    @property
    def crop(self) -> str:
        """A name in `framing.CROPS`."""

    @property
    def crop_sample(self) -> int: ...

    @property
    def flip(self) -> bool: ...


@dataclass(frozen=True)
class ClipRules:
    """How the videos of one directory are cut; `ValueError` for a mode that there is not."""

    mode: str = "single_beginning"
    frame_stride: int = 1  # frames from one start of "slide" to the next
    frame_sample: int = 1  # clips of "uniform", starts of "random_start"
    max_frames: int = 129  # of "full"
    fps: str | float = "model"  # "model", "native", or the frames a second that the files really have
    short_clips: str = "skip"  # or "loop", "pad", "smaller_bucket"
    stills: bool = False  # clips of one frame as well
    crop: str = "center"
    crop_sample: int = 1  # crops of "random", in turn
    flip: bool = False  # the mirror image as well, in turn

    def __post_init__(self) -> None:
        if self.mode not in CLIP_MODES:
            raise ValueError(f"video_clip_mode = {self.mode!r} is not known; use one of: {', '.join(CLIP_MODES)}")

    @classmethod
    def of(cls, settings: ClipSettings, default_mode: str) -> "ClipRules":
        """The rules of a directory in a run with `default_mode`."""
        return cls(
            settings.video_clip_mode or default_mode,
            settings.frame_stride,
            settings.frame_sample,
            settings.max_frames,
            settings.fps,
            settings.short_clips,
            settings.stills,
            settings.crop,
            settings.crop_sample,
            settings.flip,
        )

    @property
    def any_length(self) -> bool:
        """Whether clips are as long as their videos, so that no length need be listed."""
        return CLIP_MODES[self.mode].own_length

    def source_fps(self, spec: MediaSpec) -> Fraction:
        """The rate that the files' frames are taken to have; 0 where their time stamps tell.

        "native" is the model's own rate: each frame of the file is one of the clip.
        """
        if isinstance(self.fps, str):
            return spec.fps if self.fps == "native" else _UNTOLD
        return Fraction(str(self.fps))  # as it was written: 23.976 as a float is a little more


# --- the modes --------------------------------------------------------------------------------------------------------

# (the file, frames that it has at the clip's rate, frames of the clip, the rules) -> first frame of each clip
Starts = Callable[[MediaFile, int, int, ClipRules], Sequence[int]]


class Mode(NamedTuple):
    """Where clips start, and what else sets a mode apart."""

    starts: Starts
    every_length: bool = False  # clips of each listed length that fits, as in musubi-tuner; else of the longest alone
    own_length: bool = False  # as long as the video, whatever is listed
    in_turn: bool = False  # the starts are one sample, which takes them in turn
    stretched: bool = False  # the frames are spread from the video's first to its last


def _beginning(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    return (0,)


def _middle(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    return ((length - frames) // 2,)


def _chunk(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    return range(0, length - frames + 1, frames)


def _slide(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    return range(0, length - frames + 1, rules.frame_stride)


def _uniform(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    return _evenly(length - frames, rules.frame_sample)


def _overlapping(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    # As many as are needed to cover the video; diffusion-pipe has the rule, switched off, in models/base.py.
    return _evenly(length - frames, (length - 1) // frames + 1)


def _evenly(last: int, count: int) -> Sequence[int]:
    """`count` whole numbers from 0 to `last`: linspace, cut to integers, without the rounding of floats."""
    return [i * last // (count - 1) for i in range(count)] if count > 1 else (0,)


def _random(media: MediaFile, length: int, frames: int, rules: ClipRules) -> Sequence[int]:
    # Of the file's content alone: another seed or name finds the same clips in the cache, and more of them add to it.
    return counter_draws(rules.frame_sample, length - frames + 1, "start", media.content_hash, frames)


# name in `video_clip_mode` -> rule; chunk, slide, uniform, full and head are musubi-tuner's, by its code
CLIP_MODES: dict[str, Mode] = {
    "single_beginning": Mode(_beginning),
    "single_middle": Mode(_middle),
    "head": Mode(_beginning, every_length=True),
    "middle": Mode(_middle, every_length=True),
    "chunk": Mode(_chunk, every_length=True),
    "slide": Mode(_slide, every_length=True),
    "uniform": Mode(_uniform, every_length=True),
    "multiple_overlapping": Mode(_overlapping),
    "full": Mode(_beginning, own_length=True),
    "random_start": Mode(_random, in_turn=True),
    "spread": Mode(_beginning, stretched=True),
}

# --- cutting ----------------------------------------------------------------------------------------------------------


def cut_clips(media: MediaFile, table: BucketTable, rules: ClipRules, group: int) -> list[Clip] | Skipped:
    """The clips of one file.

    Args:
        table: made for `rules.any_length`.
        group: index of the [[directory]].
    """
    clips = _cut(media, table, rules, group)
    if isinstance(clips, Skipped):
        return clips
    return [framed(clip, rules.crop, rules.crop_sample, rules.flip) for clip in clips]


def _cut(media: MediaFile, table: BucketTable, rules: ClipRules, group: int) -> list[Clip] | Skipped:
    """The same in one framing."""
    if not media.is_video:
        buckets = table.assign(media)
        if isinstance(buckets, str):
            return Skipped(media.path, buckets, bad=False)
        return [Clip(media, bucket, Fraction(0), Fraction(0), group) for bucket in buckets]
    moving, stills = _moving(media, table, rules, group), _stills(media, table, rules, group)
    if isinstance(moving, Skipped):
        return stills or moving
    return [*moving, *stills]


def _moving(media: MediaFile, table: BucketTable, rules: ClipRules, group: int) -> list[Clip] | Skipped:
    """The clips of a video that have more than one frame."""
    spec, mode = table.spec, CLIP_MODES[rules.mode]
    wanted = _wanted(media, table, rules)
    if isinstance(wanted, str):
        return Skipped(media.path, wanted, bad=False)
    length, fill = clip_frames(media, rules, spec), None
    fitting = [frames for frames in wanted if frames <= length]
    if not fitting:
        fitting, fill = _made_to_fit(length, wanted[0], rules, spec)
    if not fitting:
        source_fps = rules.source_fps(spec) or media.fps
        return Skipped(media.path, too_short(media, source_fps, spec.fps, wanted[0]), bad=False)
    if mode.own_length and not fill:
        fitting = [whole_length(min(length, rules.max_frames), spec)]
    buckets = table.shapes(media, fitting, mode.every_length)
    if isinstance(buckets, str):
        return Skipped(media.path, buckets, bad=False)
    clips: list[Clip] = []
    for bucket in buckets:
        clips += _at(bucket, media, length, fill, rules, spec, group)
    return clips


def _stills(media: MediaFile, table: BucketTable, rules: ClipRules, group: int) -> list[Clip]:
    """Single frames of a video, where the mode would start clips of one frame: musubi-tuner's target_frames = [1]."""
    length = clip_frames(media, rules, table.spec)
    if not rules.stills or not table.spec.images or length < 1:
        return []
    shapes = table.shapes(media, [1])
    if isinstance(shapes, str):
        return []
    return [clip for shape in shapes for clip in _at(shape, media, length, None, rules, table.spec, group)]


def clip_frames(media: MediaFile, rules: ClipRules, spec: MediaSpec) -> int:
    """Frames that a video has at the rate of its clips."""
    return resampled_frames(media.frames, rules.source_fps(spec) or media.fps, spec.fps)


def is_short(clip: Clip, table: BucketTable, rules: ClipRules) -> bool:
    """Whether the clip is of a video that fills no listed length, and was kept."""
    if rules.short_clips == "skip" or not clip.media.is_video or clip.bucket.frames == 1:
        return False
    wanted = _wanted(clip.media, table, rules)
    return clip.fill is not None or clip.bucket.frames < min(wanted)


def is_small(clip: Clip, table: BucketTable, rules: ClipRules) -> bool:
    """Whether the clip is of a file that its bucket would enlarge, and went to a smaller one."""
    if not table.no_upscale:
        return False
    lengths = [1]  # of images and stills, whatever else is listed
    if clip.bucket.frames > 1:
        wanted, length = _wanted(clip.media, table, rules), clip_frames(clip.media, rules, table.spec)
        lengths = [frames for frames in wanted if frames <= length] or wanted[:1]
    return table.is_small(clip.media, lengths, CLIP_MODES[rules.mode].every_length)


def _wanted(media: MediaFile, table: BucketTable, rules: ClipRules) -> list[int] | str:
    """Lengths to look for, ascending, or why there are none."""
    return [table.spec.frame_stride + 1] if rules.any_length else table.lengths_for(media)


def _made_to_fit(length: int, smallest: int, rules: ClipRules, spec: MediaSpec) -> tuple[list[int], Fill | None]:
    """What a video that is shorter than every length is used at, if at all, and what fills it up."""
    if rules.short_clips in ("loop", "pad"):
        return [smallest], Fill(rules.short_clips, max(1, length))  # even a moment has one frame
    shorter = whole_length(length, spec)
    # Not at one frame: that would be a still under a caption that tells of motion.
    return ([shorter] if rules.short_clips == "smaller_bucket" and shorter > 1 else []), None


def whole_length(frames: int, spec: MediaSpec) -> int:
    """`frames` rounded down to a length that the model takes."""
    return (frames - 1) // spec.frame_stride * spec.frame_stride + 1


def _at(
    bucket: Bucket, media: MediaFile, length: int, fill: Fill | None, rules: ClipRules, spec: MediaSpec, group: int
) -> list[Clip]:
    """The clips of one shape."""
    mode, source_fps = CLIP_MODES[rules.mode], rules.source_fps(spec)
    begin = media.offset * media.fps / source_fps if source_fps else media.offset
    if fill:
        return [Clip(media, bucket, begin, spec.fps, group, source_fps, fill)]
    starts = [begin + start / spec.fps for start in dict.fromkeys(mode.starts(media, length, bucket.frames, rules))]
    # Frame i of T stands for frame i (N - 1) / (T - 1) of N: the same as a slower rate from the first on.
    stretched = mode.stretched and bucket.frames > 1
    fps = spec.fps * (bucket.frames - 1) / (length - 1) if stretched else spec.fps
    if mode.in_turn:
        return [Clip(media, bucket, starts[0], fps, group, source_fps, turns=tuple(starts[1:]))]
    return [Clip(media, bucket, start, fps, group, source_fps) for start in starts]
