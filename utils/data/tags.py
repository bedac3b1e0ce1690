"""Reads what a video's tags say of its pictures: how they lie, what their colours mean, which parts are clear."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from utils.data.colour import Colours, colours_of
from utils.data.media_types import MediaError

MOST_PIXELS = 2**26  # of a frame: 8192 x 8192; a few damaged bytes can claim 65535 x 65535, and decoders believe them
RGB_OF_GBR = (2, 0, 1)  # planes of the format gbrp that hold red, green and blue

# Matrices of H.273 that libswscale cannot undo; it would say "Operation not supported".
_MATRICES = {
    8: "YCgCo",
    10: "BT.2020 with constant luminance",
    11: "SMPTE ST 2085",
    12: "a matrix derived from its primaries",
    13: "a matrix derived from its primaries",
    14: "ICtCp",
    15: "IPT-C2 (Dolby Vision profile 5)",
    16: "YCgCo-R",
    17: "YCgCo-R",
}
# Their own decoders in FFmpeg leave the clear parts out.
_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# A GIF's clear parts come as white already; the fourth byte of uncompressed video is filler more often than not.
_OPAQUE = frozenset(["gif", "rawvideo"])


def require_readable(path: Path, stream: VideoStream) -> None:
    """Raises `MediaError` where nothing good can come of decoding."""
    context = stream.codec_context
    if context.width * context.height > MOST_PIXELS:
        size = f"{context.width}x{context.height}"
        raise MediaError(path, f"is {size}, more than can be read here (8192x8192), or its header is damaged")
    matrix = _MATRICES.get(context.colorspace)
    if context.codec_tag in ("dvhe", "dvh1") and context.colorspace == 2:  # 2: untagged
        matrix = _MATRICES[15]
    if matrix:
        mend = "`ffmpeg -i old.mkv -vf zscale=matrix=709 new.mkv` may convert it"
        raise MediaError(path, f"its colours are coded as {matrix}, which cannot be turned into RGB here; {mend}")


def decoded(container: InputContainer, stream: VideoStream, begun: Sequence[Packet] = ()) -> Iterator[VideoFrame]:
    """The stream's frames from where `container` stands, with their clear parts where a decoder here gives them.

    Args:
        begun: packets that were read before, to be decoded first.
    """
    packets = chain(begun, container.demux(stream))
    name = _DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if name not in av.codecs_available:
        for packet in packets:
            yield from packet.decode()
        return
    decoder = av.VideoCodecContext.create(name, "r")
    decoder.thread_count = 1
    for packet in packets:
        yield from decoder.decode(packet if packet.size else None)


# --- geometry ---------------------------------------------------------------------------------------------------------


def turns_of(frame: VideoFrame) -> int:
    """Quarter turns counter-clockwise that bring the stored picture upright, after `is_mirrored` is seen to."""
    return round(frame.rotation / 90) % 4


def is_mirrored(frame: VideoFrame) -> bool:
    """Whether the stored picture must be turned upside down, as in a mirror below it, before it is turned."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    (a, b, _), (c, d, _), _ = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3).astype(float)
    return a * d < b * c


def pixel_shape(stream: VideoStream) -> Fraction:
    """Width of a stored pixel over its height; 1 where the file is silent or absurd."""
    shape = stream.sample_aspect_ratio or Fraction(1)
    return shape if Fraction(1, 4) <= shape <= 4 else Fraction(1)


def shown_size(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """Width and height, px, with square pixels."""
    width, height = round(frame.width * pixel_shape(stream)), frame.height
    return (height, width) if turns_of(frame) % 2 else (width, height)


# --- colours ----------------------------------------------------------------------------------------------------------


def special_of(stream: VideoStream, frame: VideoFrame) -> str:
    """As `MediaFile.special`; `frame` is any of the stream."""
    colours = colours_in(stream)
    names = (colours and colours.name, has_clear_parts(stream) and "alpha", is_mirrored(frame) and "mirrored")
    return "+".join(name for name in names if name)


def colours_in(stream: VideoStream) -> Colours | None:
    """What is to be done to the stream's colours; as the header tells, so that no frame of it differs."""
    context = stream.codec_context
    return colours_of(context.color_trc, context.color_primaries)


def has_clear_parts(stream: VideoStream) -> bool:
    """Whether `decoded` gives frames with an alpha channel that must be looked at."""
    context = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and context.name in _DECODERS:
        return _DECODERS[context.name] in av.codecs_available
    if context.name in _OPAQUE or context.format is None or colours_in(stream):
        return False
    return any(component.is_alpha for component in context.format.components)


def on_white(frame: VideoFrame) -> VideoFrame:
    """`frame` in planar RGB of 8 bits, with what is clear laid on white."""
    planar = frame.reformat(format="gbrap", interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND, threads=1)
    *colours, alpha = (np.frombuffer(plane, np.uint8).reshape(planar.height, -1) for plane in planar.planes)
    laid = VideoFrame(planar.width, planar.height, "gbrp")
    for plane, colour in zip(laid.planes, colours, strict=True):
        rows = np.full((planar.height, plane.line_size), 255, np.uint8)
        # c * a + 255 * (1 - a), rounded; in 16 bits, for 255 * 255 + 127 fits.
        clear = (255 - colour[:, : planar.width].astype(np.uint16)) * alpha[:, : planar.width]
        rows[:, : planar.width] = 255 - (clear + 127) // 255
        plane.update(rows)
    return laid
