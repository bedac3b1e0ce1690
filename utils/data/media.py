"""Reads media files: what a file holds (`probe`), and the pixels of a clip at a given rate and size (`decode_clip`).

Free of torch, so that a decode worker starts in a fraction of a second.
"""

import math
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter
from av.video.stream import VideoStream
from PIL import Image, ImageOps

VIDEO_SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .ogv .3gp .mxf".split())
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .jfif .webp .bmp .tif .tiff .gif .avif .ppm .tga".split())

# Part of every cache key: raise it when the pixels that `decode_clip` returns change.
DECODE_VERSION = 1

# FFmpeg opens these whatever the suffix says; they are pictures, terminal art or play lists that name other files.
_NOT_VIDEO = frozenset(["image2", "tty", "concat", "hls", "dash"])
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)
# Pillow opens animations in these, but FFmpeg cannot be relied on to decode them.
_ANIMATION_REFUSED = frozenset(["WEBP", "PNG", "AVIF"])


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


def resampled_frames(frames: int, fps: Fraction, target: Fraction) -> int:
    """How many frames at `target` fps fit into `frames` frames at `fps`; exact, no float is involved."""
    return math.floor(frames * target / fps)


def probe(path: Path) -> Probe:
    """What `path` holds; raises `MediaError`.

    One video frame, or the whole image, is decoded, so a file with a sound header and no sound picture is found here.
    """
    with _errors_named(path):
        _require_regular_file(path)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return _probe_video(path)
        return _probe_image(path)


def decode_clip(
    path: Path,
    is_video: bool,
    start: Fraction,
    fps: Fraction,
    frames: int,
    width: int,
    height: int,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Pixels of one clip; raises `MediaError`.

    Output frame i is the source frame on show at `start + i / fps` seconds after the first one. Each is scaled to cover
    width x height (bicubic for video, Lanczos for images) and the middle is kept. Rotation flags, pixel shape and EXIF
    orientation are honoured; transparency in images is laid on white, as diffusion-pipe does.

    Args:
        start, fps: s and frames/s, ignored for an image.
        width, height: px.
        out: uint8 [frames, height, width, 3] to write to, made when absent.

    Returns:
        uint8 RGB [frames, height, width, 3]; `out` where it was given.
    """
    if out is None:
        out = np.empty((frames, height, width, 3), np.uint8)
    with _errors_named(path):
        _require_regular_file(path)
        if is_video:
            _decode_video(path, start, fps, out)
        else:
            out[:] = _decode_image(path, width, height)
    return out


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Whatever a decoder raises over a damaged file becomes a `MediaError` that names the file."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(path, "the file is not there") from error
    except av.FFmpegError as error:
        raise MediaError(path, f"FFmpeg cannot read it: {error.strerror}") from error
    except Exception as error:  # Pillow raises more than ten different types over damaged bytes
        raise MediaError(path, f"cannot be read ({type(error).__name__}: {error})") from error


def _require_regular_file(path: Path) -> None:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a fifo would wait for ever
        raise MediaError(path, "is not a regular file")
    if info.st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


# --- geometry ---------------------------------------------------------------------------------------------------------


def cover_size(source: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Smallest size with the shape of `source` of which both sides cover `target`; (width, height) px."""
    scale = max(Fraction(target[0], source[0]), Fraction(target[1], source[1]))
    return max(target[0], round(source[0] * scale)), max(target[1], round(source[1] * scale))


def _cover_box(source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The middle of `source` that has the shape of `target`: left, top, right, bottom in source px."""
    scale = min(Fraction(source[0], target[0]), Fraction(source[1], target[1]))
    keep_w, keep_h = target[0] * scale, target[1] * scale
    left, top = (source[0] - keep_w) / 2, (source[1] - keep_h) / 2
    return float(left), float(top), float(left + keep_w), float(top + keep_h)


# --- images -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened_image(path: Path) -> Iterator[Image.Image]:
    try:
        image = Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise MediaError(path, "is not an image that Pillow knows, whatever its name says") from error
    with image:
        yield image


def _probe_image(path: Path) -> Probe:
    with _opened_image(path) as image:
        if getattr(image, "is_animated", False):
            if image.format == "GIF":
                return _probe_video(path)
            if image.format in _ANIMATION_REFUSED:
                raise MediaError(path, f"animated {image.format} is not supported; convert it to mp4")
        sideways = image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        width, height = image.size[::-1] if sideways else image.size
        image.draft("RGB", (64, 64))  # a JPEG is then read to its end, but computed at 1/8 of its size
        image.load()
    return Probe(width, height, 1, Fraction(0), Fraction(0), False)


def _decode_image(path: Path, width: int, height: int) -> np.ndarray:
    with _opened_image(path) as image:
        upright = _flattened(ImageOps.exif_transpose(image))
        box = _cover_box(upright.size, (width, height))
        return np.asarray(upright.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _flattened(image: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white."""
    if image.mode.startswith("I;16") or image.mode == "I":  # Pillow clips 16-bit grey at 255 instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGBA", layer.size, "white")
    white.alpha_composite(layer)
    return white.convert("RGB")


# --- videos -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    # Only files: a play list that calls itself clip.mp4 must not reach out to the network.
    options = {"protocol_whitelist": "file"}
    with av.open(str(path), options=options, metadata_errors="replace") as container:
        name = container.format.name
        if name in _NOT_VIDEO or name.endswith("_pipe"):
            raise MediaError(path, f"is not a video, whatever its name says (FFmpeg takes it for {name!r})")
        covers = Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise MediaError(path, "has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise MediaError(path, "is coded in a way that this FFmpeg cannot decode")
        # FFmpeg's frame threads have dead-locked beside other thread pools; workers are processes, one thread each.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _probe_video(path: Path) -> Probe:
    with _opened_video(path) as (container, stream):
        frames, span = _count_frames(path, container, stream)
        rate = stream.average_rate or stream.guessed_rate
    with _opened_video(path) as (container, stream):  # counting may have run to the file's end
        frame = next(container.decode(stream), None)
        if frame is None:
            raise MediaError(path, "no frame of it can be decoded")
        width, height = _shown_size(frame, stream)
    if rate and (not span or abs(frames / rate - span) <= Fraction(3, 2) / rate):
        return Probe(width, height, frames, rate, frames / rate, True)
    if not span:
        raise MediaError(path, "tells neither its frame rate nor its duration")
    # The header's rate does not explain the time stamps: a variable rate, or a header that lies. Time stamps decide.
    return Probe(width, height, frames, frames / span, span, True)


def _count_frames(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction | None]:
    """Number of frames on show, and their time span in s where the container tells it."""
    entries = stream.index_entries
    if "mp4" in container.format.name and 0 < stream.frames <= len(entries):
        # mp4 and mov keep an exact table of every frame; reading it costs nothing.
        last = entries[len(entries) - 1]
        size = path.stat().st_size
        if last.pos + last.size > size:
            raise MediaError(path, f"is cut off: {size} bytes are there, its table reaches to {last.pos + last.size}")
        span = stream.duration * stream.time_base if stream.duration else None
        return sum(not entry.is_discard for entry in entries), span
    return _count_packets(path, container, stream)


def _count_packets(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction | None]:
    stamps, end = [], 0
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            stamps.append(packet.pts)
            end = max(end, (packet.pts or 0) + (packet.duration or 0))
    if not stamps:
        raise MediaError(path, "holds no frames")
    if any(stamp is None for stamp in stamps):
        return len(stamps), None
    return len(stamps), (end - min(stamps)) * stream.time_base


def _turns(frame: VideoFrame) -> int:
    """Quarter turns counter-clockwise that bring the stored picture upright."""
    return round(frame.rotation / 90) % 4


def _pixel_shape(stream: VideoStream) -> Fraction:
    """Width of a stored pixel over its height; 1 where the file is silent or absurd."""
    shape = stream.sample_aspect_ratio or Fraction(1)
    return shape if Fraction(1, 4) <= shape <= 4 else Fraction(1)


def _shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    width, height = round(frame.width * _pixel_shape(stream)), frame.height
    return (height, width) if _turns(frame) % 2 else (width, height)


class _Scaler:
    """Writes decoded frames, scaled, cropped and turned upright, into [height, width, 3] arrays.

    libswscale goes to planar RGB at the final size and packs it then. Straight to rgb24 it takes twice as long and
    halves the colour resolution: its packed writers skip full chroma interpolation and have no SIMD version.
    """

    def __init__(self, stream: VideoStream) -> None:
        self._pixel_shape = _pixel_shape(stream)
        self._resize, self._pack = VideoReformatter(), VideoReformatter()

    def write(self, frame: VideoFrame, out: np.ndarray) -> None:
        turns = _turns(frame)
        upright = np.rot90(out, -turns)  # a view of `out` that lies as the stored picture does
        target_h, target_w = upright.shape[:2]
        stored = (round(frame.width * self._pixel_shape), frame.height)
        width, height = cover_size(stored, (target_w, target_h))
        planar = self._resize.reformat(
            frame,
            width,
            height,
            "gbrp",
            interpolation=Interpolation.BICUBIC,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        )
        packed = self._pack.reformat(planar, width, height, "rgb24", dst_color_range=ColorRange.JPEG, threads=1)
        plane = packed.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)[:, : 3 * width]
        top, left = (height - target_h) // 2, (width - target_w) // 2
        upright[:] = rows.reshape(height, width, 3)[top : top + target_h, left : left + target_w]


def _decode_video(path: Path, start: Fraction, fps: Fraction, out: np.ndarray) -> None:
    for seek in (True, False) if start > 0 else (False,):
        with _opened_video(path) as (container, stream):
            if seek:
                origin = stream.start_time or 0
                container.seek(origin + math.floor(start / stream.time_base), stream=stream, backward=True)
            if _fill(path, container.decode(stream), stream, start, fps, out, sought=seek):
                return


def _fill(
    path: Path,
    decoded: Iterator[VideoFrame],
    stream: VideoStream,
    start: Fraction,
    fps: Fraction,
    out: np.ndarray,
    sought: bool,
) -> bool:
    """Pick and write every frame of the clip. False when a seek landed behind the start, so that it must be redone."""
    scaler = _Scaler(stream)
    clock = _clock(stream)
    due = _due_ticks(stream, start, fps, len(out))
    done = 0
    shown: VideoFrame | None = None  # the frame on show at due[done], as far as is known
    tick = 0
    for frame in decoded:
        tick = clock(frame)
        if shown is None:
            if sought and tick > due[0]:
                return False
            shown = frame
        done = _write_until(scaler, shown, due, done, tick, out, path)
        if done == len(out):
            return True
        shown = frame
    if shown is None:
        if sought:
            return False
        raise MediaError(path, "no frame of it can be decoded")
    # The last frame stays on show for its own length; one frame more of either rate is rounding in the time stamps.
    period = max(1 / fps, 1 / (stream.average_rate or fps)) / stream.time_base
    end = tick + max(shown.duration or 0, period) + 1
    done = _write_until(scaler, shown, due, done, math.ceil(end), out, path)
    if done < len(out):
        raise MediaError(path, f"decoding ended early: {done} of {len(out)} frames from {float(start):.3f} s on")
    return True


def _write_until(
    scaler: _Scaler, shown: VideoFrame, due: list[int], done: int, tick: int, out: np.ndarray, path: Path
) -> int:
    """Write `shown` as every output frame that is due before `tick`; the new number of frames done."""
    first = done
    while done < len(out) and due[done] < tick:
        if done == first:
            if shown.is_corrupt:
                raise MediaError(path, f"the picture at {float(shown.time or 0):.3f} s is damaged")
            scaler.write(shown, out[done])
        else:
            out[done] = out[first]
        done += 1
    return done


def _due_ticks(stream: VideoStream, start: Fraction, fps: Fraction, frames: int) -> list[int]:
    """Latest time stamp that counts as shown at each output frame, in ticks.

    Half a tick is given: containers round time stamps to their own clock (Matroska: 1 ms).
    """
    origin = (stream.start_time or 0) + Fraction(1, 2)
    return [math.floor(origin + (start + i / fps) / stream.time_base) for i in range(frames)]


def _clock(stream: VideoStream) -> Callable[[VideoFrame], int]:
    """Time stamp of each frame in ticks; counted where the file has none (raw streams, some AVI)."""
    rate = stream.average_rate or stream.guessed_rate
    step = 1 / (rate * stream.time_base) if rate else Fraction(1)
    counted = Fraction(stream.start_time or 0)

    def tick(frame: VideoFrame) -> int:
        nonlocal counted
        now = frame.pts if frame.pts is not None else round(counted)
        counted = now + step
        return now

    return tick
