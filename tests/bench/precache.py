"""Pre-caching against bare decoding: clips a second with 1 and 2 workers when encoding is free.

    python tests/bench/precache.py [--clips 24] [--rounds 5]

Both sides read the same h264 clips, made on the spot, and need the same frames of them: the 33 that a clip of the
model shows at 16 fps out of 50 at 24 fps.

- ours: `precache` with a free encoder: worker start, decoding, scaling to the bucket, shared memory, one small cache
  entry a clip, written and synced to disk;
- bare rgb: as many spawned processes that decode with PyAV up to the last needed frame and turn each needed frame into
  a full-size RGB array, `frame.to_ndarray(format="rgb24")`: what one would write by hand, without any scaling;
- bare yuv: the same without the conversion: frames stay in the decoder's planes, so this is FFmpeg's decoder alone.

Every process decodes with one thread. Rounds alternate between the three; each ratio is the median over rounds.
"""

import argparse
import statistics
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[2]))

import av
import multiprocess
import numpy as np
import torch

from models.base import Encoder
from tests.bench.common import machine_line
from utils.data.cache import CacheStore
from utils.data.decode_pool import PixelJob
from utils.data.manifest import Manifest
from utils.data.precache import precache
from utils.data.records import Bucket

SOURCE_FPS, MODEL_FPS, FRAMES, SOURCE_FRAMES = Fraction(24), Fraction(16), 33, 60
CASES = [((640, 360), Bucket(512, 288, FRAMES)), ((1280, 720), Bucket(832, 480, FRAMES))]


class FreeEncoder(Encoder):
    kind, reads = "latents", "pixels"

    def fingerprint(self):
        return {}

    def load(self, device): ...

    def encode(self, items):
        return [{"latents": torch.from_numpy(item[0, 0, :4].copy())} for item in items]

    def unload(self): ...


def make_clip(path, size, seed):
    """A textured picture that drifts, with fresh grain on every frame: about as hard to decode as filmed material."""
    width, height = size
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 40, width // 6 + 40, 1), dtype=np.uint8)
    texture = np.kron(coarse, np.ones((6, 6, 3), np.uint8)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=SOURCE_FPS, options={"crf": "20", "preset": "medium"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(SOURCE_FRAMES):
            view = texture[i : i + height, 2 * i : 2 * i + width]
            grain = rng.integers(-6, 7, (height, width, 1), dtype=np.int16)
            picture = np.clip(view + grain, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def bare(item):
    """Decode one clip by hand; `rgb` converts the frames that the model's clip shows."""
    path, rgb = item
    needed = {int(i / MODEL_FPS * SOURCE_FPS) for i in range(FRAMES)}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if rgb and number in needed:
                frame.to_ndarray(format="rgb24")
            if number == max(needed):
                return


def time_bare(paths, workers, rgb):
    begun = perf_counter()
    with multiprocess.get_context("spawn").Pool(workers) as pool:
        pool.map(bare, [(path, rgb) for path in paths], chunksize=1)
    return perf_counter() - begun


def time_ours(paths, workers, bucket):
    jobs = [PixelJob(f"{i:040x}", path, True, Fraction(0), MODEL_FPS, bucket) for i, path in enumerate(paths)]
    manifest = Manifest([], [], [], {"latents": jobs}, {}, "")
    with tempfile.TemporaryDirectory() as folder:
        store, begun = CacheStore(Path(folder)), perf_counter()
        precache([manifest], [FreeEncoder()], store, device=torch.device("cpu"), workers=workers, batch_size=1)
        return perf_counter() - begun


def compare(size, bucket, workers, queue, rounds):
    """One line of the table."""
    seconds = [
        (time_ours(queue, workers, bucket), time_bare(queue, workers, True), time_bare(queue, workers, False))
        for _ in range(rounds)
    ]
    rates = [len(queue) / statistics.median(column) for column in zip(*seconds, strict=True)]
    ratios = [statistics.median(row[other] / row[0] for row in seconds) for other in (1, 2)]
    figures = "".join(f"{rate:>10.2f}" for rate in rates) + "".join(f"{ratio:>10.2f}" for ratio in ratios)
    return f"{size[0]}x{size[1]:<5}{bucket!s:>12}{workers:>9}{figures}\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write = sys.stdout.write
    write(f"{machine_line(torch)}, av {av.__version__}\nclips a second; ratios are ours / bare\n")
    write("source        bucket  workers      ours  bare rgb  bare yuv    to rgb    to yuv\n")
    with tempfile.TemporaryDirectory() as folder:
        for size, bucket in CASES:
            paths = [Path(folder) / f"{size[0]}_{seed}.mp4" for seed in range(4)]
            for seed, path in enumerate(paths):
                make_clip(path, size, seed)
            queue = [paths[i % len(paths)] for i in range(arguments.clips)]
            for workers in (1, 2):
                write(compare(size, bucket, workers, queue, arguments.rounds))


if __name__ == "__main__":
    main()
