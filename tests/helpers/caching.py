"""Starts that only fill a cache, each in a process of its own: to be slowed down, killed, or run side by side."""

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import torch

from models.base import Encoder
from tests.helpers.launch import ROOT, rank_environment
from utils import dist
from utils.data.cache import CacheStore
from utils.data.crew import JOBS_FOLDER, Crew
from utils.data.decode_pool import PixelJob
from utils.data.manifest import CaptionJob, Manifest
from utils.data.precache import precache
from utils.data.records import Bucket


class LoggingEncoder(Encoder):
    """Captions to one number; takes its time, and writes down which caption it was given, before and after."""

    kind, reads = "text", "caption"

    def __init__(self, root: Path, seconds: float) -> None:
        self._begun, self._done, self._seconds = root / "begun.log", root / "done.log", seconds

    def fingerprint(self):
        return {}

    def load(self, device): ...

    def encode(self, items):
        for log in (self._begun, self._done):
            with log.open("a") as file:
                file.writelines(f"{os.getpid()} {item}\n" for item in items)
            time.sleep(self._seconds / 2 * len(items))
        return [{self.kind: torch.ones(1)} for _ in items]

    def unload(self): ...


class LoggingVAE(LoggingEncoder):
    """The same of clips."""

    kind, reads = "latents", "pixels"

    def encode(self, items):
        super().encode([int(item[0, 0, 0, 0]) for item in items])
        return [{self.kind: torch.ones(1)} for _ in items]


def captions(count: int) -> Manifest:
    jobs = [CaptionJob(f"{number:040x}", f"caption{number:03d}") for number in range(count)]
    return Manifest([], [], [], {"text": jobs}, {}, "")


def clips(paths: list[Path], bucket: Bucket) -> Manifest:
    jobs = [PixelJob(f"{n:040x}", path, True, Fraction(0), Fraction(16), bucket) for n, path in enumerate(paths)]
    return Manifest([], [], [], {"latents": jobs}, {}, "")


def start(root: Path, count: int, seconds: float, *, rank: int = 0, world: int = 1, port: int) -> subprocess.Popen:
    """Encode `count` captions, each of which takes `seconds`, into the cache at `root`. Jobs differ by `port`."""
    words = [str(root), str(count), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.caching", *words],
        cwd=ROOT,
        env=rank_environment(rank, world, port),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def times_done(root: Path, log: str = "done.log") -> Counter:
    """How often each caption was encoded, by all processes."""
    path = root / log
    return Counter(line.split()[1] for line in path.read_text().splitlines()) if path.exists() else Counter()


def wait_until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if dist.world_size() > 1:
        torch.distributed.init_process_group("gloo")
    store, encoder = CacheStore(arguments.root), LoggingEncoder(arguments.root, arguments.seconds)

    def end(why: str) -> None:
        sys.stdout.write(f"ended: {why}\n")
        sys.stdout.flush()
        os._exit(7)

    crew = Crew(store.root / JOBS_FOLDER / f"job-{os.environ['MASTER_PORT']}", dist.rank(), dist.world_size(), end)
    with crew:
        report = precache(
            [captions(arguments.count)], [encoder], store, device=torch.device("cpu"), workers=0, batch_size=1,
            crew=crew, barrier=dist.barrier,
        )  # fmt: skip
        crew.meet(dist.barrier)
    sys.stdout.write(f"encoded {report.made['text'].encoded}\n")


if __name__ == "__main__":
    main()
