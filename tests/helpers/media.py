"""Small real media for tests: videos whose frames carry their own number as a grey level, and plain images."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

FIRST_LUMA, LUMA_STEP = 20, 2  # frame i has luma 20 + 2 i, so up to 100 frames fit into the limited range


def write_video(
    path: Path,
    frames: int,
    fps: Fraction | int = 16,
    size: tuple[int, int] = (64, 48),
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int = 0,
    pixel_shape: Fraction | None = None,
    half: bool = False,
    grain: bool = False,
) -> Path:
    """A video in which frame i is a flat grey of luma 20 + 2 i.

    Args:
        pts: time stamps in `time_base`, for a variable rate; frame i at i / fps when absent.
        rotation: display matrix, degrees counter-clockwise.
        half: paint the left half black, so that orientation can be seen.
        grain: add noise, other on each frame, so that no two pixels are alike; the numbers can still be read.
    """
    rate = Fraction(fps)
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or _lossless(codec))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if time_base is not None:
            stream.time_base = stream.codec_context.time_base = time_base
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            frame = _grey(width, height, FIRST_LUMA + LUMA_STEP * i, half, np.random.default_rng(i) if grain else None)
            frame.pts = i if pts is None else pts[i]
            frame.time_base = 1 / rate if time_base is None else time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _lossless(codec: str) -> dict[str, str]:
    return {"libx264": {"qp": "0", "preset": "ultrafast", "bf": "2", "g": "12"}}.get(codec, {})


def _grey(width: int, height: int, luma: int, half: bool, grain: np.random.Generator | None) -> av.VideoFrame:
    frame = av.VideoFrame(width, height, "yuv420p")
    for index, (plane, value) in enumerate(zip(frame.planes, (luma, 128, 128), strict=True)):
        rows = np.full((plane.height, plane.line_size), value, np.uint8)
        if half and index == 0:
            rows[:, : width // 2] = 16
        if grain:
            rows += grain.integers(-9, 10, rows.shape, dtype=np.int8).view(np.uint8)  # wraps, so this subtracts too
        plane.update(rows.tobytes())
    return frame


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """The numbers burned into decoded frames [F, h, w, 3], read at the lower right quarter."""
    h, w = pixels.shape[1:3]
    grey = pixels[:, h // 2 :, w // 2 :].reshape(len(pixels), -1).mean(axis=1)
    return [round((value * 219 / 255 + 16 - FIRST_LUMA) / LUMA_STEP) for value in grey]


def write_image(path: Path, size: tuple[int, int] = (64, 48), colour: tuple[int, ...] = (200, 30, 60)) -> Path:
    mode = "RGBA" if len(colour) == 4 else "RGB"
    Image.new(mode, size, colour).save(path)
    return path


def write_frames(
    path: Path,
    frames: np.ndarray,
    fps: Fraction | int = 16,
    *,
    rotation: int = 0,
    pixel_shape: Fraction | None = None,
) -> Path:
    """A video of `frames`, uint8 [F, h, w, 3], that gives back every byte of them; a `.mov`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "rgb24"
        if pixel_shape is not None:
            stream.codec_context.sample_aspect_ratio = pixel_shape
        if rotation:
            stream.set_display_rotation(rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    return path
