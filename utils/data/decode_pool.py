"""Decodes clips ahead of their use in worker processes, into memory that is shared with them.

Free of torch: every worker imports this module.
"""

import math
import mmap
import os
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from multiprocess.reduction import DupFd

from utils.data.media import decode_clip
from utils.data.records import Bucket, Fill, Framing
from utils.data.workers import DECODE_TIMEOUT, WorkerPool

Shape = tuple[int, int, int, int]  # frames, h, w, 3
_HELD_FRAMES = 21  # see `decoder_bytes_of`
_BYTES_PER_PIXEL = 3
OVERTAKE_S = 2.0  # what is decoded waits for so long for one that takes longer


class PixelJob(NamedTuple):
    """One clip to decode, encode and store under `key`."""

    key: str
    path: Path
    is_video: bool
    start: Fraction  # s
    fps: Fraction  # 0 for an image
    bucket: Bucket
    source_fps: Fraction = Fraction(0)  # this, `fill` and `framing` as in `Clip`
    fill: Fill | None = None
    framing: Framing | None = None
    source_px: int = 0  # of a frame of the file, of which a decoder holds several; 0 of an image

    @property
    def name(self) -> str:
        return str(self.path)


class Decoded(NamedTuple):
    """`pixels` is uint8 [F, h, w, 3], [2, h, w, 3] of a clip's ends, or None where `error` says why not."""

    job: PixelJob
    pixels: np.ndarray | None
    error: Exception | None


def decoded_clips(
    jobs: Iterable[PixelJob],
    workers: int,
    held: int,
    timeout_s: float,
    ends_only: bool = False,
    *,
    slot_bytes: int | None = None,
    ring_bytes: int | None = None,
    decoder_bytes: int = 0,
    ahead: Callable[[int], int] = lambda most: most,
) -> Iterator[Decoded]:
    """`jobs` decoded ahead by `workers` processes (0: in this one), in their order but for those that take very long.

    The pixels of an item may be overwritten once `held` more were asked for: they live in a ring of shared memory, so
    that the 100 MB of an 81-frame clip are written once and never sent through a pipe.

    Args:
        timeout_s: how long one clip may take before its worker is given up.
        ends_only: give the first and the last frame of each clip alone, the same bytes as in the whole.
        slot_bytes: of the largest item (`decoded_bytes`); None: `jobs` is a sequence, and it is looked up there.
        ring_bytes: of all pixels at any time, but for `held` items and one more, and of all decoders, but for one;
            None: what keeps the workers busy.
        decoder_bytes: what decoding takes a worker besides, at most (`decoder_bytes_of`).
        ahead: given the most that may wait, how many jobs to pull before their turn; asked again and again.
    """
    slot_bytes = slot_bytes or decoded_bytes(jobs, ends_only)
    jobs = iter(jobs)
    first = next(jobs, None)  # while there is nothing to do nothing is started
    if first is None:
        return
    workers = min(workers, ahead(workers))
    if ring_bytes is not None:
        workers = workers_within(ring_bytes - held * slot_bytes, workers, slot_bytes + decoder_bytes)
        ring_bytes -= workers * decoder_bytes
    most = 2 * workers + held
    if ring_bytes is not None:
        most = max(1, min(most, ring_bytes // slot_bytes - held))
    ring = SharedRing(most + held, slot_bytes)
    free, recent = deque(range(most + held)), deque[int]()
    items = ((free.popleft(), job) for job in chain([first], jobs))
    with WorkerPool(_DecodeTask(ring, ends_only), min(workers, most), timeout_s, DECODE_TIMEOUT) as pool:
        outcomes = pool.run(items, lambda: min(most, ahead(most)), lambda item: item[1].name, OVERTAKE_S)
        for (slot, job), _, error in outcomes:
            pixels = None if error else ring.slot(slot, _shape(job.bucket, ends_only))
            yield Decoded(job, pixels, error)
            recent.append(slot)
            while len(recent) >= max(1, held):
                free.append(recent.popleft())


def decoded_bytes(jobs: Iterable[PixelJob], ends_only: bool = False) -> int:
    """Of the pixels of the largest of `jobs`; 0 where there are none."""
    return max((math.prod(_shape(job.bucket, ends_only)) for job in jobs), default=0)


def decoder_bytes_of(jobs: Iterable[PixelJob]) -> int:
    """An estimate of what a worker takes besides the pixels that it gives, for the largest source among `jobs`.

    A decoder keeps the frames that later ones are made from, 16 at most in H.264 and H.265, and a few that wait for
    their turn. Of 10 bits and 4:2:0 a pixel takes 3 bytes in each. What is scaled is smaller by far, and a worker has
    one thread. Of 4K in 10 bits, H.264 with 16 such frames was seen to take 485 MiB, H.265 with 5 of them 355; this
    says 498.
    """
    return max((job.source_px for job in jobs), default=0) * _HELD_FRAMES * _BYTES_PER_PIXEL


def workers_within(memory: int, workers: int, each: int) -> int:
    """As many of `workers` as there is `memory` for, of which one takes `each`; never less than one, but for 0."""
    return min(workers, max(1, memory // max(1, each)))


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
        """Slot `index` as uint8 of `shape`."""
        offset = index * self._slot_bytes
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
        source, how = (job.path, job.is_video, job.start, job.fps), (job.source_fps, job.fill, job.framing)
        decode_clip(*source, frames, width, height, only, out, *how)
