"""The ffmpeg program as a second opinion: files made by it, and the pixels that its own filters give."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

PATCHES = [
    [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0)],
    [(0, 0, 255), (128, 128, 128), (200, 150, 120), (30, 60, 90)],
    [(250, 200, 10), (10, 200, 250), (90, 10, 60), (64, 64, 64)],
]


@cache
def program() -> str | None:
    """Its path: what imageio-ffmpeg ships, else what the system has."""
    try:
        import imageio_ffmpeg
    except ImportError:
        return shutil.which("ffmpeg")
    return imageio_ffmpeg.get_ffmpeg_exe()


needs_ffmpeg = pytest.mark.skipif(program() is None, reason="no ffmpeg program: pip install imageio-ffmpeg")


def run(*arguments: str | Path, data: bytes | None = None, timeout_s: float = 60.0) -> bytes:
    """What `ffmpeg arguments` writes to its output."""
    command = [str(program()), "-hide_banner", "-loglevel", "error", "-nostdin" if data is None else "-y", "-y"]
    done = subprocess.run([*command, *map(str, arguments)], input=data, capture_output=True, timeout=timeout_s)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout


def patches(width: int = 96, height: int = 48) -> np.ndarray:
    """`PATCHES` as a picture, uint8 [height, width, 3]."""
    colours = np.array(PATCHES, np.uint8)
    return colours.repeat(height // 3, 0).repeat(width // 4, 1)


def patch_colours(picture: np.ndarray) -> np.ndarray:
    """The colour in the middle of each patch of a picture [h, w, 3], int [12, 3]."""
    height, width = picture.shape[:2]
    return picture[height // 6 :: height // 3, width // 8 :: width // 4].reshape(-1, 3).astype(int)


def write_pictures(path: Path, pictures: np.ndarray, filters: str, *encoder: str) -> Path:
    """A video of 16 frames a second of `pictures`, uint8 [N, h, w, 3 or 4], sRGB and alpha."""
    height, width, bands = pictures.shape[1:]
    order = [1, 2, 0, 3][:bands]
    planar = np.ascontiguousarray(pictures[..., order].transpose(0, 3, 1, 2))
    source = ("-f", "rawvideo", "-pix_fmt", "gbrp" if bands == 3 else "gbrap", "-s", f"{width}x{height}", "-r", "16")
    told = "setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc"
    filters = f"{told},{filters}" if bands == 3 else filters
    run(*source, "-i", "-", "-vf", filters, *encoder, path, data=planar.tobytes())
    return path


def pixels(path: Path, width: int, height: int, filters: str = "null") -> np.ndarray:
    """All frames as ffmpeg shows them behind `filters`, which end at width x height: uint8 [N, height, width, 3]."""
    raw = run("-i", path, "-vf", f"{filters},format=gbrp", "-f", "rawvideo", "-")
    planes = np.frombuffer(raw, np.uint8).reshape(-1, 3, height, width)
    return planes[:, [2, 0, 1]].transpose(0, 2, 3, 1)
