"""Reads media files: what a file holds (`probe`), and the pixels of a clip at a given rate and size (`decode_clip`).

Free of torch, as is all that it imports, so that a decode worker starts in a fraction of a second.
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from utils.data.animation import ANIMATION_SUFFIXES, decode_animation, is_animation, probe_animation
from utils.data.image import decode_image, is_animated_gif, probe_image
from utils.data.media_types import MediaError, Probe
from utils.data.records import Fill, Framing
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
_LONGEST_STRIP = 32  # sides; scaled to cover a bucket, 1 x 10000 px would take gigabytes
VideoReader = Callable[[Path, Fraction, Fraction, Sequence[int], np.ndarray, Fraction, Framing | None], None]


def probe(path: Path) -> Probe:
    """What `path` holds; raises `MediaError`.

    One video frame, or the whole image, is decoded, so a file with a sound header and no sound picture is found here.
    """
    with errors_named(path):
        _require_regular_file(path)
        if is_animation(path):
            held = probe_animation(path)
        elif path.suffix.lower() in VIDEO_SUFFIXES or is_animated_gif(path):
            held = probe_video(path)
        else:
            held = probe_image(path)
        if max(held[:2]) > _LONGEST_STRIP * min(held[:2]):
            size = f"{held.width}x{held.height}"
            raise MediaError(path, f"is {size}: one side is over {_LONGEST_STRIP} times the other, and most is cut off")
        return held


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
    framing: Framing | None = None,
) -> np.ndarray:
    """Pixels of one clip; raises `MediaError`.

    Output frame i is the source frame on show at `start + i / fps` seconds after the first one. Each is scaled to cover
    width x height (bicubic for video, Lanczos for images) and the middle is kept, or what `framing` says. Rotation
    flags, pixel shape and EXIF orientation are honoured; what is clear is laid on white. Colours become ordinary ones
    (`colour.ordinary`, `icc.in_srgb`); untagged video is taken for BT.601, as FFmpeg takes it. Interlaced frames are
    left woven.

    Args:
        start, fps: s and frames/s, ignored for an image.
        width, height: px.
        only: numbers of the frames to return, ascending, byte for byte as they are in the whole; all when absent.
        out: uint8 [frames returned, height, width, 3] to write to, made when absent.
        source_fps: the rate to take the file's frames at, whatever its time stamps say: frame k is on show from
            k / source_fps on. 0: the time stamps tell.
        fill: what follows where the file has fewer frames than the clip.
        framing: another part than the middle, the whole picture on black, or either mirrored.

    Returns:
        uint8 RGB [frames returned, height, width, 3]; `out` where it was given.
    """
    numbers = range(frames) if only is None else only
    if out is None:
        out = np.empty((len(numbers), height, width, 3), np.uint8)
    with errors_named(path):
        _require_regular_file(path)
        if is_video:
            read = partial(_decode_video, path, start, fps, source_fps=source_fps, framing=framing)
            if fill:
                _each_once(read, [fill.number(number) for number in numbers], out)
            else:
                read(numbers, out)
        else:
            _seen_through(out, framing)[:] = decode_image(path, width, height, framing and framing._replace(flip=False))
    return out


def _seen_through(out: np.ndarray, framing: Framing | None) -> np.ndarray:
    """[N, h, w, 3] to write to as if nothing were mirrored: a view of `out`."""
    return out[:, :, ::-1] if framing and framing.flip else out


def _decode_video(
    path: Path,
    start: Fraction,
    fps: Fraction,
    numbers: Sequence[int],
    out: np.ndarray,
    source_fps: Fraction,
    framing: Framing | None,
) -> None:
    """A video reader's work, and what of the framing is the same for all."""
    reader: VideoReader = decode_animation if path.suffix.lower() in ANIMATION_SUFFIXES else decode_video
    if framing and framing.pad:
        out[:] = 0  # readers write the picture alone
    reader(path, start, fps, numbers, _seen_through(out, framing), source_fps, framing and framing._replace(flip=False))


def _each_once(read: Callable[[Sequence[int], np.ndarray], None], numbers: Sequence[int], out: np.ndarray) -> None:
    """`read`, which takes ascending numbers, for numbers in any order: each frame is decoded once and copied to where
    it belongs."""
    distinct, place = np.unique(numbers, return_inverse=True)
    decoded = np.empty((len(distinct), *out.shape[1:]), np.uint8)
    read(distinct.tolist(), decoded)
    decoded.take(place, axis=0, out=out, mode="clip")  # "raise" would make a copy of `out` first


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Whatever a decoder raises over a damaged file becomes a `MediaError` that names the file."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(path, "the file is not there") from error
    except (av.InvalidDataError, av.EOFError) as error:
        raise MediaError(path, "FFmpeg cannot make sense of it: it is damaged, cut off, or no video at all") from error
    except av.FFmpegError as error:
        raise MediaError(path, f"FFmpeg cannot read it ({error.strerror}); it may be damaged") from error
    except Exception as error:  # Pillow raises more than ten different types over damaged bytes
        raise MediaError(path, f"cannot be read ({type(error).__name__}: {error})") from error


def _require_regular_file(path: Path) -> None:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # reading a fifo would wait for ever
        raise MediaError(path, "is not a regular file")
    if info.st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")
