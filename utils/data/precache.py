"""Fills the cache: worker processes decode ahead, every rank's device encodes its share, one encoder at a time."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from models.base import ClipEnds, Encoder
from utils.data.cache import CacheStore, write_whole
from utils.data.decode_pool import Decoded, PixelJob, decoded_clips
from utils.data.manifest import CaptionJob, Job, Manifest
from utils.data.records import TEXT
from utils.data.scan import Skipped, reason_of
from utils.data.workers import Progress, Silent

FAILED_FOLDER = "failed"  # in the cache's root: one note an item that could not be made


class Made(NamedTuple):
    """Distinct cache entries of one kind."""

    encoded: int
    reused: int  # there before


@dataclass(frozen=True)
class PrecacheReport:
    """What pre-caching did, over all ranks; the same on each."""

    made: dict[str, Made]  # by kind of encoder, in the order in which they ran
    seconds: float
    failed: dict[str, Skipped]  # the cache's key -> why, one key a clip; only with skip_bad_media


@dataclass(frozen=True)
class _Station:
    """What one rank works with."""

    store: CacheStore
    device: torch.device
    workers: int
    batch_size: int
    decode_timeout_s: float
    progress: Progress


def precache(
    manifests: Sequence[Manifest],
    encoders: Sequence[Encoder],
    store: CacheStore,
    *,
    device: torch.device,
    workers: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    decode_timeout_s: float = 120.0,
    skip_bad_media: bool = False,
) -> PrecacheReport:
    """Make every entry that `manifests` lack; call it on every rank with the same manifests.

    Ranks share nothing but the cache folder: each takes every `world`-th missing item, and waits for the others once an
    encoder. Items that fail are noted in the folder, so that all ranks come to the same end.

    Args:
        workers: decoding processes of this rank; 0 decodes in this one.
        batch_size: items a forward pass, of one shape.
        decode_timeout_s: how long one clip may take before it counts as unreadable.
        skip_bad_media: report clips that cannot be decoded in `failed`; drop them with `Manifest.without`.

    Raises:
        ValueError: clips cannot be decoded (all are listed), or an encoder gave NaN.
        RuntimeError: entries are missing though nobody reported a failure.
    """
    begun = monotonic()
    station = _Station(store, device, workers, max(1, batch_size), decode_timeout_s, progress or Silent())
    made: dict[str, Made] = {}
    failed: dict[str, Skipped] = {}
    for encoder in encoders:
        missing = _missing(manifests, encoder)
        jobs = _less_lost(missing, manifests, failed)
        share = jobs[rank::world]
        if share:
            whose = "" if world == 1 else f", rank {rank}'s share of {len(jobs)}"
            station.progress.start(len(share), f"encoding {encoder.kind}{whose}")
            encoder.load(device)
            try:
                with torch.inference_mode():
                    _ENCODE[encoder.reads](station, encoder, share)
            finally:
                encoder.unload()
                station.progress.done()
        barrier()
        lost = _audit(store, encoder.kind, jobs)
        if lost and not skip_bad_media:
            raise ValueError(_failure_list(lost))
        failed |= lost
        made[encoder.kind] = Made(len(jobs) - len(lost), _num_wanted(manifests, encoder.kind) - len(missing))
    return PrecacheReport(made, monotonic() - begun, failed)


def _missing(manifests: Iterable[Manifest], encoder: Encoder) -> list[Job]:
    """What all datasets together lack, once each, in the order in which batches form best."""
    jobs = {job.key: job for manifest in manifests for job in manifest.jobs.get(encoder.kind, ())}
    return sorted(jobs.values(), key=_ORDER[encoder.reads])


def _less_lost(jobs: list[Job], manifests: Iterable[Manifest], failed: Collection[str]) -> list[Job]:
    """`jobs` without the clips that an earlier encoder failed on: they are left out, and were told of."""
    if not failed:
        return jobs
    lost = set().union(*(manifest.lost_with(failed) for manifest in manifests))
    return [job for job in jobs if job.key not in lost]


def _num_wanted(manifests: Iterable[Manifest], kind: str) -> int:
    """Distinct entries of one kind that all datasets together need."""
    wanted: set[str] = set()
    for manifest in manifests:
        if kind == TEXT:
            wanted.add(manifest.empty_text_key)
            wanted.update(key for entry in manifest.entries for key in entry.text_keys)
        else:
            wanted.update(key for entry in manifest.entries for of, key in entry.media() if of == kind)
    return len(wanted)


# --- one rank's share -------------------------------------------------------------------------------------------------


def _encode_clips(station: _Station, encoder: Encoder, jobs: Sequence[PixelJob], ends_only: bool) -> None:
    decoding = decoded_clips(jobs, station.workers, station.batch_size, station.decode_timeout_s, ends_only)
    # Closed by hand: after an error the traceback would keep the generator, and with it the workers, alive.
    with closing(decoding) as decoded:
        for batch in _batches(_readable(decoded, station), station.batch_size):
            items = [ClipEnds(item.pixels, item.job.bucket.frames) if ends_only else item.pixels for item in batch]
            _encode_batch(station, encoder, [item.job for item in batch], items)


def _encode_captions(station: _Station, encoder: Encoder, jobs: Sequence[CaptionJob]) -> None:
    for first in range(0, len(jobs), station.batch_size):
        batch = jobs[first : first + station.batch_size]
        _encode_batch(station, encoder, batch, [job.caption for job in batch])


# what an encoder reads -> how its jobs are done
_ENCODE: dict[str, Callable[[_Station, Encoder, Sequence], None]] = {
    "pixels": partial(_encode_clips, ends_only=False),
    "ends": partial(_encode_clips, ends_only=True),
    "caption": _encode_captions,
}


def _by_shape(job: PixelJob) -> tuple[object, ...]:
    return job.bucket, job.path, job.start


def _by_length(job: CaptionJob) -> tuple[object, ...]:
    return len(job.caption), job.caption


# what an encoder reads -> the order of its jobs
_ORDER: dict[str, Callable[[Any], tuple[object, ...]]] = {
    "pixels": _by_shape,
    "ends": _by_shape,
    "caption": _by_length,
}


def _readable(decoded: Iterable[Decoded], station: _Station) -> Iterator[Decoded]:
    """Those that were decoded; a note is left of each of the others."""
    for item in decoded:
        if item.error is None:
            yield item
        else:
            note = {"path": str(item.job.path), "reason": reason_of(item.error)}
            write_whole(_note_path(station.store, item.job.key), json.dumps(note).encode())
            station.progress.advance(1, item.job.path.name)


def _batches(decoded: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Neighbours of one shape, `size` at most; holds no more than `size` items at any time."""
    batch: list[Decoded] = []
    for item in decoded:
        if batch and item.job.bucket != batch[0].job.bucket:
            yield batch
            batch = []
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode_batch(station: _Station, encoder: Encoder, jobs: Sequence[Job], items: list) -> None:
    for job, tensors in zip(jobs, encoder.encode(items), strict=True):
        station.store.write(encoder.kind, job.key, tensors, {"name": job.name})
    station.progress.advance(len(jobs), jobs[-1].name)


# --- what came of it --------------------------------------------------------------------------------------------------


def _audit(store: CacheStore, kind: str, jobs: Sequence[Job]) -> dict[str, Skipped]:
    """Key -> why, of the jobs that failed on whatever rank; every other one must have its entry."""
    failed: dict[str, Skipped] = {}
    for job in jobs:
        if store.has(kind, job.key):
            continue
        note_path = _note_path(store, job.key)
        if not note_path.exists():
            raise RuntimeError(
                f"{job.name} is missing from the cache at {store.path(kind, job.key)} after pre-caching, and no rank"
                " reported a failure; do all nodes see the same cache folder?"
            )
        note = json.loads(note_path.read_bytes())
        failed[job.key] = Skipped(Path(note["path"]), note["reason"], bad=True)
    return failed


def _note_path(store: CacheStore, key: str) -> Path:
    return store.root / FAILED_FOLDER / f"{key}.json"


def _failure_list(failed: dict[str, Skipped]) -> str:
    lines = "".join(f"\n  {item.path}: {item.reason}" for item in failed.values())
    return f"{len(failed)} clips cannot be decoded (skip_bad_media = true goes on without them):{lines}"
