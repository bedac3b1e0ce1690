"""Decodes clips ahead of their use in worker processes, into memory that is shared with them.

Free of torch: every worker imports this module.
"""

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from multiprocess.reduction import DupFd

from utils.data.media import decode_clip
from utils.data.records import Bucket
from utils.data.workers import WorkerPool

Shape = tuple[int, int, int, int]  # frames, h, w, 3
_AHEAD_BYTES = 4 * 2**30  # decoded pixels that may wait, at most


class PixelJob(NamedTuple):
    """One clip to decode, encode and store under `key`."""

    key: str
    path: Path
    is_video: bool
    start: Fraction  # s
    fps: Fraction  # 0 for an image
    bucket: Bucket

    @property
    def name(self) -> str:
        return str(self.path)


class Decoded(NamedTuple):
    """`pixels` is uint8 [F, h, w, 3], [2, h, w, 3] of a clip's ends, or None where `error` says why not."""

    job: PixelJob
    pixels: np.ndarray | None
    error: Exception | None


def decoded_clips(
    jobs: Sequence[PixelJob], workers: int, held: int, timeout_s: float, ends_only: bool = False
) -> Iterator[Decoded]:
    """`jobs` in their order, decoded ahead by `workers` processes (0: in this one).

    The pixels of an item may be overwritten once `held` more were asked for: they live in a ring of shared memory, so
    that the 100 MB of an 81-frame clip are written once and never sent through a pipe.

    Args:
        timeout_s: how long one clip may take before its worker is given up.
        ends_only: give the first and the last frame of each clip alone, the same bytes as in the whole.
    """
    if not jobs:
        return
    workers = min(workers, len(jobs))
    largest = max(math.prod(_shape(job.bucket, ends_only)) for job in jobs)
    ahead = max(workers, min(2 * workers + held, _AHEAD_BYTES // largest))
    ring = SharedRing(ahead + held, largest)
    with WorkerPool(_DecodeTask(ring, ends_only), workers, timeout_s) as pool:
        for outcome in pool.run(enumerate(jobs), ahead, name=lambda item: item[1].name):
            index, job = outcome.item
            pixels = None if outcome.error else ring.slot(index, _shape(job.bucket, ends_only))
            yield Decoded(job, pixels, outcome.error)


def _shape(bucket: Bucket, ends_only: bool) -> Shape:
    return 2 if ends_only else bucket.frames, bucket.height, bucket.width, 3


class SharedRing:
    """Equal slots of memory that worker processes write to and this one reads.

    Anonymous memory behind a file descriptor, which a spawned process inherits by pickling. Unlike /dev/shm it has no
    size limit of its own (containers often give that 64 MB), and it vanishes with the last process that holds it. Pages
    take up memory only when first written.
    """

    def __init__(self, slots: int, slot_bytes: int, descriptor: int | None = None) -> None:
        self._slots, self._slot_bytes = slots, slot_bytes
        self._descriptor = _anonymous_file(slots * slot_bytes) if descriptor is None else descriptor
        self._memory = mmap.mmap(self._descriptor, slots * slot_bytes)
        # The mapping keeps the memory for as long as arrays look at it.
        weakref.finalize(self, os.close, self._descriptor)

    def slot(self, index: int, shape: Shape) -> np.ndarray:
        """Slot `index` modulo the ring's length as uint8 of `shape`."""
        offset = index % self._slots * self._slot_bytes
        return np.frombuffer(self._memory, np.uint8, math.prod(shape), offset).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (self._slots, self._slot_bytes, DupFd(self._descriptor))


def _attach(slots: int, slot_bytes: int, duplicate: Any) -> SharedRing:
    return SharedRing(slots, slot_bytes, duplicate.detach())


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("reelpipe-clips")
    else:  # not Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class _DecodeTask:
    """Decodes (index, job) into the ring's slot; what the worker processes run."""

    def __init__(self, ring: SharedRing, ends_only: bool) -> None:
        self._ring, self._ends_only = ring, ends_only

    def __call__(self, item: tuple[int, PixelJob]) -> None:
        index, job = item
        width, height, frames = job.bucket
        only = (0, frames - 1) if self._ends_only else None
        out = self._ring.slot(index, _shape(job.bucket, self._ends_only))
        decode_clip(job.path, job.is_video, job.start, job.fps, frames, width, height, only=only, out=out)
