"""Fills the cache: worker processes decode ahead, every rank's device encodes its share, one encoder at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

from models.base import Encoder
from utils.data.cache import CacheStore, write_whole
from utils.data.decode_pool import Decoded, PixelJob, decoded_clips
from utils.data.manifest import CaptionJob, Manifest
from utils.data.scan import Skipped, reason_of
from utils.data.workers import Progress, Silent

FAILED_FOLDER = "failed"  # in the cache's root: one note an item that could not be made


@dataclass(frozen=True)
class PrecacheReport:
    """What pre-caching did, over all ranks; the same on each."""

    latents: int  # encoded
    text: int  # encoded
    reused: int  # entries that were there before
    seconds: float
    failed: dict[str, Skipped]  # latents key -> why; only with skip_bad_media


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
    encoded: dict[str, int] = {}
    failed: dict[str, Skipped] = {}
    for encoder in encoders:
        jobs = _missing(manifests, encoder)
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
        encoded[encoder.kind] = len(jobs) - len(lost)
    return PrecacheReport(
        latents=encoded.get("latents", 0),
        text=encoded.get("text", 0),
        reused=_num_wanted(manifests) - sum(encoded.values()) - len(failed),
        seconds=monotonic() - begun,
        failed=failed,
    )


def _missing(manifests: Iterable[Manifest], encoder: Encoder) -> list[PixelJob] | list[CaptionJob]:
    """What all datasets together lack, once each, in the order in which batches form best."""
    if encoder.reads == "pixels":
        pixels = {job.key: job for manifest in manifests for job in manifest.latents_jobs}
        return sorted(pixels.values(), key=lambda job: (job.bucket, job.path, job.start))
    captions = {job.key: job for manifest in manifests for job in manifest.text_jobs}
    return sorted(captions.values(), key=lambda job: (len(job.caption), job.caption))


def _num_wanted(manifests: Sequence[Manifest]) -> int:
    latents = {entry.latents_key for manifest in manifests for entry in manifest.entries}
    texts = {key for manifest in manifests for entry in manifest.entries for key in entry.text_keys}
    texts |= {manifest.empty_text_key for manifest in manifests if manifest.empty_text_key}
    return len(latents) + len(texts)


# --- one rank's share -------------------------------------------------------------------------------------------------


def _encode_pixels(station: _Station, encoder: Encoder, jobs: Sequence[PixelJob]) -> None:
    # Closed by hand: after an error the traceback would keep the generator, and with it the workers, alive.
    with closing(decoded_clips(jobs, station.workers, station.batch_size, station.decode_timeout_s)) as decoded:
        for batch in _batches(_readable(decoded, station), station.batch_size):
            _encode_batch(station, encoder, [item.job for item in batch], [item.pixels for item in batch])


def _encode_captions(station: _Station, encoder: Encoder, jobs: Sequence[CaptionJob]) -> None:
    for first in range(0, len(jobs), station.batch_size):
        batch = jobs[first : first + station.batch_size]
        _encode_batch(station, encoder, batch, [job.caption for job in batch])


# what an encoder reads -> how its jobs are done
_ENCODE: dict[str, Callable[[_Station, Encoder, Sequence], None]] = {
    "pixels": _encode_pixels,
    "caption": _encode_captions,
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


def _encode_batch(station: _Station, encoder: Encoder, jobs: Sequence[PixelJob | CaptionJob], items: list) -> None:
    for job, tensors in zip(jobs, encoder.encode(items), strict=True):
        station.store.write(encoder.kind, job.key, tensors, {"name": job.name})
    station.progress.advance(len(jobs), jobs[-1].name)


# --- what came of it --------------------------------------------------------------------------------------------------


def _audit(store: CacheStore, kind: str, jobs: Sequence[PixelJob | CaptionJob]) -> dict[str, Skipped]:
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
