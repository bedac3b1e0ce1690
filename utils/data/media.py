"""Reads media files: what a file holds (`probe`), and the pixels of a clip at a given rate and size (`decode_clip`).

Free of torch, as is all that it imports, so that a decode worker starts in a fraction of a second.
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from utils.data.animation import ANIMATION_SUFFIXES, decode_animation, is_animation, probe_animation
from utils.data.image import decode_image, is_animated_gif, probe_image
from utils.data.media_types import MediaError, Probe
from utils.data.records import Fill
from utils.data.video import decode_video, probe_video

# fmt: off
VIDEO_SUFFIXES = frozenset([
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg",
    ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp", ".mxf",
])
IMAGE_SUFFIXES = frozenset([
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".ppm", ".tga",
])
# fmt: on
MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
VideoReader = Callable[[Path, Fraction, Fraction, Sequence[int], np.ndarray, Fraction], None]


def probe(path: Path) -> Probe:
    """What `path` holds; raises `MediaError`.

    One video frame, or the whole image, is decoded, so a file with a sound header and no sound picture is found here.
    """
    with _errors_named(path):
        _require_regular_file(path)
        if is_animation(path):
            return probe_animation(path)
        is_video = path.suffix.lower() in VIDEO_SUFFIXES or is_animated_gif(path)
        return probe_video(path) if is_video else probe_image(path)


def decode_clip(
    path: Path,
    is_video: bool,
    start: Fraction,
    fps: Fraction,
    frames: int,
    width: int,
    height: int,
    only: Sequence[int] | None = None,
    out: np.ndarray | None = None,
    source_fps: Fraction = Fraction(0),
    fill: Fill | None = None,
) -> np.ndarray:
    """Pixels of one clip; raises `MediaError`.

    Output frame i is the source frame on show at `start + i / fps` seconds after the first one. Each is scaled to cover
    width x height (bicubic for video, Lanczos for images) and the middle is kept. Rotation flags, pixel shape and EXIF
    orientation are honoured; transparency in images is laid on white, as diffusion-pipe does.

    Args:
        start, fps: s and frames/s, ignored for an image.
        width, height: px.
        only: numbers of the frames to return, ascending, byte for byte as they are in the whole; all when absent.
        out: uint8 [frames returned, height, width, 3] to write to, made when absent.
        source_fps: the rate to take the file's frames at, whatever its time stamps say: frame k is on show from
            k / source_fps on. 0: the time stamps tell.
        fill: what follows where the file has fewer frames than the clip.

    Returns:
        uint8 RGB [frames returned, height, width, 3]; `out` where it was given.
    """
    numbers = range(frames) if only is None else only
    if out is None:
        out = np.empty((len(numbers), height, width, 3), np.uint8)
    with _errors_named(path):
        _require_regular_file(path)
        if is_video and fill:
            _decode_filled(path, start, fps, [fill.number(number) for number in numbers], out, source_fps)
        elif is_video:
            _reader(path)(path, start, fps, numbers, out, source_fps)
        else:
            out[:] = decode_image(path, width, height)
    return out


def _reader(path: Path) -> VideoReader:
    return decode_animation if path.suffix.lower() in ANIMATION_SUFFIXES else decode_video


def _decode_filled(
    path: Path, start: Fraction, fps: Fraction, numbers: Sequence[int], out: np.ndarray, source_fps: Fraction
) -> None:
    """A video reader's work for numbers in any order: each frame is decoded once and copied to where it belongs."""
    distinct, place = np.unique(numbers, return_inverse=True)
    decoded = np.empty((len(distinct), *out.shape[1:]), np.uint8)
    _reader(path)(path, start, fps, distinct.tolist(), decoded, source_fps)
    decoded.take(place, axis=0, out=out, mode="clip")  # "raise" would make a copy of `out` first


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Whatever a decoder raises over a damaged file becomes a `MediaError` that names the file."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(path, "the file is not there") from error
    except av.InvalidDataError as error:
        raise MediaError(path, "FFmpeg cannot make sense of it: it is damaged, cut off, or no video at all") from error
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
