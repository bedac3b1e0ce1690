"""A 33-frame clip from the end of a 4K video of ten minutes: seconds, and the most memory of the process that decodes.

python tests/bench/long_source.py [--folder FOLDER]
"""

import argparse
import os
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.damage import peak_mib
from tests.helpers.ffmpeg import run
from utils.data.decode_pool import PixelJob, decoded_clips
from utils.data.media import decode_clip, probe
from utils.data.records import Bucket
from utils.data.workers import WorkerPool

SECONDS, GROUP, BUCKET = 600, 240, Bucket(832, 480, 33)  # s, frames between key frames, what a clip is brought to
RING_BYTES = 2**28


def make(path: Path, depth: int) -> Path:
    """3840x2160 at 24 frames a second: ten seconds, sixty times over."""
    if not path.exists():
        short = path.with_name(f"short-{path.name}")
        source = ("-f", "lavfi", "-i", f"testsrc2=s=3840x2160:r=24:d={GROUP / 24}")
        encoder = ("-c:v", "libx264", "-preset", "ultrafast", "-crf", "30", "-g", GROUP)
        hdr = ("-color_trc", "smpte2084", "-color_primaries", "bt2020", "-colorspace", "bt2020nc")
        form = ("-pix_fmt", "yuv420p10le", *hdr) if depth == 10 else ("-pix_fmt", "yuv420p")
        run(*source, *map(str, encoder), *form, short, timeout_s=900)
        run("-stream_loop", str(SECONDS * 24 // GROUP - 1), "-i", short, "-c", "copy", path, timeout_s=900)
    return path


def clip_at(job: tuple[Path, float]) -> tuple[float, int]:
    """Runs in a worker of its own: seconds of one clip, and the process's most memory, MiB."""
    path, start = job
    begun = perf_counter()
    decode_clip(path, True, Fraction(start), Fraction(16), BUCKET.frames, BUCKET.width, BUCKET.height)
    return perf_counter() - begun, peak_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "reelpipe-bench")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for depth in (8, 10):
        path = make(folder / f"long-{depth}.mp4", depth)
        begun = perf_counter()
        held = probe(path)
        size = f"{held.width}x{held.height}, {held.frames} frames, {os.path.getsize(path) / 2**20:.0f} MiB"
        print(f"{depth} bits: {size}; probed in {perf_counter() - begun:.2f} s, special {held.special!r}")
        for start in (0, 299.9, 595):
            with WorkerPool(clip_at, 1) as pool:
                [outcome] = pool.run([(path, start)], 1)
            took, mib = outcome.value
            print(f"  from {start} s on: {took:.1f} s, {mib} MiB")
        jobs = [PixelJob(str(i), path, True, Fraction(70 * i), Fraction(16), BUCKET) for i in range(8)]
        begun, before = perf_counter(), peak_mib()
        for decoded in decoded_clips(jobs, 2, 1, 300.0, ring_bytes=RING_BYTES):
            assert decoded.pixels is not None, decoded.error
            decoded.pixels.max()  # as an encoder reads them: the ring's pages count as this process's own from then on
        ring = f"{RING_BYTES // 2**20} MiB for pixels"
        grown = peak_mib() - before
        print(f"  8 clips by 2 workers, {ring}: {perf_counter() - begun:.1f} s, this process grew by {grown} MiB")


if __name__ == "__main__":
    main()
