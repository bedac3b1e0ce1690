"""Damaged media for tests: mutations of good files, and headers that claim more than there is; the same for a seed."""

import re
import resource
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.media import write_video
from utils.data.media import decode_clip, probe
from utils.data.records import Fill


def write_good(folder: Path) -> dict[str, bytes]:
    """One whole file of each kind in `folder`; their bytes by name."""
    y, x = np.mgrid[:96, :128]
    image = Image.fromarray(np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8))
    turned = [image.rotate(10 * i) for i in range(6)]
    image.save(folder / "a.jpg", quality=90, exif=image.getexif())
    image.save(folder / "a.png")
    for name in ("a.gif", "a.webp"):
        turned[0].save(folder / name, save_all=True, append_images=turned[1:], duration=60)
    for name in ("a.mp4", "a.mkv"):
        write_video(folder / name, 30, 24, grain=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def mutated(content: bytes, seed: int) -> bytes:
    """`content` with one to a few of: bytes changed, a piece cut out, doubled, zeroed or moved, the end cut off."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, place = rng.integers(6), int(rng.integers(len(data)))
        length = int(min(2 ** rng.integers(0, 11), len(data) - place))
        piece = data[place : place + length]
        if kind == 0:
            data[place] = rng.integers(256)
        elif kind == 1:  # a number in a header becomes a large one
            data[place : place + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\1\0\0"])
        elif kind == 2:
            data[place : place + length] = bytes(length)
        elif kind == 3:
            del data[place : place + length]
        elif kind == 4:
            data[place:place] = piece
        else:
            data[place : place + length] = rng.integers(256, size=length, dtype=np.uint8).tobytes()
        if len(data) < 2:
            break
    if rng.random() < 0.1:
        del data[int(rng.integers(1, len(data))) :]
    return bytes(data)


def tried(path: Path) -> tuple[str, int]:
    """What becomes of a file in a worker process: "" or why it cannot be used, and the process's most memory so far,
    MiB. Raises what is no `MediaError`."""
    reason = ""
    try:
        held = probe(path)
        fps = Fraction(16) if held.is_video else Fraction(0)
        pixels = decode_clip(
            path, held.is_video, Fraction(0), fps, 9, 64, 48, fill=Fill("pad", min(9, held.frames)) if fps else None
        )
        assert pixels.dtype == np.uint8 and pixels.shape[1:] == (48, 64, 3)
    except ValueError as error:
        reason = str(error)
        assert str(path) in reason, reason
    return reason, peak_mib()


def peak_mib() -> int:
    """The most memory that this process has held, MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage tells is handed down by the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# --- headers that claim more than there is ----------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims any size, with 40,000 bytes of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(40_000))) + chunk(b"IEND", b"")


def gif_header(width: int, height: int, frames: int) -> bytes:
    """A GIF that claims any size up to 65535, with `frames` frames of one pixel's data."""
    screen = b"GIF89a" + struct.pack("<2H3B", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    picture = b"\x21\xf9\4\0\5\0\0\0" + b"\x2c" + struct.pack("<4HB", 0, 0, width, height, 0) + b"\2\2\x44\1\0"
    return screen + picture * frames + b";"


def jpeg_of_size(content: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header is made to claim another size."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">2H", height, width) + content[place + 4 :]


def mp4_of_frames(content: bytes, frames: int) -> bytes:
    """An mp4 whose tables are made to claim `frames` frames of 64 bytes, each of one tick."""
    data = bytearray(content)
    sizes, times = data.index(b"stsz"), data.index(b"stts")
    data[sizes + 8 : sizes + 16] = struct.pack(">2I", 64, frames)
    data[times + 12 : times + 16] = struct.pack(">I", frames)
    place = data.index(b"stsc") + 16  # frames of the first chunk
    data[place : place + 4] = struct.pack(">I", frames)
    return bytes(data)
