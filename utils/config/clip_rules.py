"""Checks of the keys that say how videos are cut: which go together, and which have no effect."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from utils.config.dataset_schema import DirectoryConfig

if TYPE_CHECKING:  # at run time models would bring torch
    from models.base import MediaSpec

# key -> the modes that read it
MODE_KEYS = {"frame_stride": ("slide",), "frame_sample": ("uniform", "random_start"), "max_frames": ("full",)}
# mode -> a key of it that asks for next to nothing where it is 1, and what then happens
_IDLE_AT_ONE = {
    "slide": ("frame_stride", "starts a clip at every frame of a video, each encoded by itself"),
    "uniform": ("frame_sample", "gives one clip a video, from its beginning, as 'head' does"),
    "random_start": ("frame_sample", "gives a video the same start in every epoch; with more they take turns"),
}

_EVERY_FRAME = ("chunk", "multiple_overlapping")  # modes that start a clip of one frame at each frame

KeyFinding = tuple[str, str]  # the key, and what follows its name


def clip_errors(folder: DirectoryConfig, mode: str, spec: "MediaSpec") -> Iterator[KeyFinding]:
    """What cannot work in one folder.

    Args:
        mode: its video_clip_mode, the run's where it has none.
    """
    if mode != "full":
        return
    if folder.size_buckets:
        yield "size_buckets", " names lengths, and with video_clip_mode = 'full' videos have their own; use resolutions"
    if folder.max_frames <= spec.frame_stride:
        least = spec.frame_stride + 1
        yield "max_frames", f" = {folder.max_frames} is less than the shortest clip of this model; use {least} or more"


def clip_advice(folder: DirectoryConfig, mode: str, spec: "MediaSpec | None" = None) -> Iterator[KeyFinding]:
    """What works in one folder and is probably not meant; `mode` as for `clip_errors`, `spec` where it is known."""
    for key, modes in MODE_KEYS.items():
        value = getattr(folder, key)
        if mode not in modes and value != DirectoryConfig.model_fields[key].default:
            users = " and ".join(f"'{name}'" for name in modes)
            yield key, f" = {value} has no effect with video_clip_mode = '{mode}'; it is for {users}"
    if folder.crop != "random" and folder.crop_sample != 1:
        yield "crop_sample", f" = {folder.crop_sample} has no effect with crop = '{folder.crop}'; it is for 'random'"
    if folder.crop == "random" and folder.crop_sample == 1:
        yield "crop", " = 'random' with crop_sample = 1 gives a file one crop; more of them take turns"
    if mode in _IDLE_AT_ONE:
        key, effect = _IDLE_AT_ONE[mode]
        if getattr(folder, key) == 1:
            yield key, f" = 1 {effect}"
    if mode == "full" and folder.frame_buckets != (1,) and not folder.size_buckets:
        yield "frame_buckets", " has no effect on videos with video_clip_mode = 'full': clips are as long as they are"
    if folder.stills:
        yield from _still_advice(folder, mode, spec)


def _still_advice(folder: DirectoryConfig, mode: str, spec: "MediaSpec | None") -> Iterator[KeyFinding]:
    if spec is not None and not spec.images:
        yield "stills", " = true has no effect: this model trains on videos and takes no single frames"
    elif folder.media == "images":
        yield "stills", " = true has no effect with media = 'images': stills are frames of videos"
    elif mode in _EVERY_FRAME:
        yield "stills", f" = true makes a still of every frame of a video with video_clip_mode = '{mode}'"


def whole_lengths(frames: Sequence[int], stride: int) -> tuple[tuple[int, ...], str | None]:
    """Lengths rounded down to `stride` n + 1, ascending, each once, and what to tell of it where one changed.

    musubi-tuner rounds its target_frames so; frame_buckets are refused instead, with the two nearest lengths named.
    """
    rounded = {count: max(0, count - 1) // stride * stride + 1 for count in sorted(frames)}
    changed = ", ".join(f"{old} to {new}" for old, new in rounded.items() if old != new)
    note = f"lengths must be {stride}n+1 frames; rounded down: {changed}" if changed else None
    return tuple(sorted(set(rounded.values()))), note
