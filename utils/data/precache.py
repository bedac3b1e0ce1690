"""Fills the cache: worker processes decode ahead, every rank's device encodes what it takes, one encoder at a time."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch

from models.base import ClipEnds, Encoder, NotFiniteError
from utils.data.cache import CacheStore, refuse_not_finite
from utils.data.crew import Crew
from utils.data.decode_pool import Decoded, PixelJob, decoded_bytes, decoded_clips, decoder_bytes_of
from utils.data.handout import Handout
from utils.data.listing import Skipped
from utils.data.manifest import CaptionJob, Job, Manifest
from utils.data.mask_encoder import MaskEncoder
from utils.data.masks import AllBlack, MaskJob, mask_grid
from utils.data.outcome import audit, black_of, less_spared, num_wanted, refuse_losses
from utils.data.records import MASK
from utils.data.room import full_disk_told
from utils.data.scan import reason_of
from utils.data.workers import DECODE_TIMEOUT, Progress, Silent, WorkerPool

_ALL_REFUSED = 3  # clips that came out with NaN before any that did not: no further one is tried


class Made(NamedTuple):
    """Distinct cache entries of one kind."""

    encoded: int  # by this job
    reused: int  # there before, or made meanwhile by another run


@dataclass(frozen=True)
class PrecacheReport:
    """What pre-caching did, over all ranks; the same on each."""

    made: dict[str, Made]  # by kind of encoder, in the order in which they ran
    seconds: float
    failed: dict[str, Skipped]  # the cache's key -> why, one key a clip; only with skip_bad_media
    damaged: int = 0  # entries among `made` that were there, cut short, and were made anew
    black: frozenset[str] = frozenset()  # loss masks: uses under which nothing would be trained, for `Manifest.settled`


@dataclass
class _Station:
    """What one rank works with at one encoder."""

    store: CacheStore
    crew: Crew
    encoder: Encoder
    jobs: Sequence[Job]  # what all ranks are to make
    handout: Handout
    device: torch.device
    workers: int
    batch_size: int
    decode_timeout_s: float
    ring_bytes: int | None
    progress: Progress
    begun: float = field(default_factory=monotonic)
    made: int = 0  # by this rank
    told: int = 0  # of those that others made, what the progress has heard of
    loaded: bool = False
    label: str = ""  # of the encoder
    refused: list[str] = field(default_factory=list)  # clips that came out with NaN or infinity, and what was said
    entry_bytes: int = 0  # of the last entry


def precache(
    manifests: Sequence[Manifest],
    encoders: Sequence[Encoder],
    store: CacheStore,
    *,
    device: torch.device,
    workers: int,
    batch_size: int,
    crew: Crew | None = None,
    barrier: Callable[[], None] = lambda: None,
    progress: Progress | None = None,
    decode_timeout_s: float = 120.0,
    ring_bytes: int | None = None,
    skip_bad_media: bool = False,
    regenerate: bool = False,
) -> PrecacheReport:
    """Make every entry that `manifests` lack; call it on every rank with the same manifests.

    Ranks share nothing but the cache folder: each takes what nobody else is at, other runs on the same folder included,
    and waits for the others once an encoder. Items that fail are noted in the folder, so that all ranks come to the
    same end.

    Args:
        workers: decoding processes of this rank; 0 decodes in this one.
        batch_size: items a forward pass, of one shape.
        crew: the ranks of this job, entered; None: this one alone.
        decode_timeout_s: how long one clip may take before it counts as unreadable.
        ring_bytes: memory of this rank for decoded clips, at most.
        skip_bad_media: report clips that cannot be decoded in `failed`; drop them with `Manifest.without`.
        regenerate: make what the manifests list even where it is there.

    Raises:
        ValueError: clips cannot be decoded or come out with NaN (all are listed), or are larger than the memory; or
            no sample of a dataset is left.
        OSError: the disk is full.
        PeerLost: another rank has ended before its time.
        RuntimeError: entries are missing though nobody reported a failure.
    """
    begun, made = monotonic(), dict[str, Made]()
    failed, damaged, black = dict[str, Skipped](), 0, frozenset[str]()
    how = (device, workers, max(1, batch_size), decode_timeout_s, ring_bytes, progress or Silent())
    with nullcontext(crew) if crew else Crew.alone(store.root) as crew:
        # first, since they are soon made: what is wrong with one is told before the hours that clips take
        masks = [MaskEncoder()] if any(MASK in manifest.counts for manifest in manifests) else []
        for encoder in (*masks, *encoders):
            missing = _missing(manifests, encoder)
            jobs = _less_lost(missing, manifests, failed)
            lost, ours, mended = {}, 0, 0
            if jobs:  # the same on every rank; where there are none, the cache may be one to read from alone
                handout = Handout(store, encoder.kind, jobs, crew, regenerate=regenerate)
                lost, ours, mended = _fill(_Station(store, crew, encoder, jobs, handout, *how), barrier)
            there = num_wanted(manifests, encoder.kind) - len(missing) + len(jobs)
            made[encoder.kind] = Made(ours, there - len(lost) - ours)
            if encoder in masks:
                black = black_of(lost, store.root if crew.rank == 0 else None)
                lost, manifests = less_spared(lost, manifests, black)
            failed |= lost
            refuse_losses(lost, failed, manifests, encoder.kind, skip_bad_media)
            damaged += mended
    return PrecacheReport(made, monotonic() - begun, failed, damaged, black)


def _missing(manifests: Iterable[Manifest], encoder: Encoder) -> list[Job]:
    """What all datasets together lack, once each, in the order in which batches form best."""
    jobs = {job.key: job for manifest in manifests for job in manifest.jobs.get(encoder.kind, ())}
    return sorted(jobs.values(), key=_ORDER[encoder.reads])


def _less_lost(jobs: list[Job], manifests: Iterable[Manifest], failed: Collection[str]) -> list[Job]:
    """`jobs` without the clips that an earlier encoder failed on: they are left out, and were told of."""
    if not failed:
        return jobs
    lost = set().union(*(manifest.lost_with(failed) for manifest in manifests))
    kept = (entry for manifest in manifests for entry in manifest.entries if entry.is_free_of(failed))
    lost.difference_update(*((*entry.media_keys, *entry.mask_keys) for entry in kept))
    return [job for job in jobs if job.key not in lost]


# --- one rank's share -------------------------------------------------------------------------------------------------


def _fill(station: _Station, barrier: Callable[[], None]) -> tuple[dict[str, Skipped], int, int]:
    """Make everything of one kind, together with the other ranks: what failed, and how many of all ranks' entries are
    new, and were damaged."""
    crew, kind = station.crew, station.encoder.kind
    _work(station)
    crew.post(f"made-{kind}", station.made)
    crew.post(f"damaged-{kind}", station.handout.damaged)
    crew.meet(barrier)
    lost = audit(station.store, kind, station.jobs, crew)
    return lost, crew.total(f"made-{kind}"), crew.total(f"damaged-{kind}")


def _work(station: _Station) -> None:
    """Take and encode until everything is made, by whomever."""
    if not station.jobs:
        return
    encoder, handout = station.encoder, station.handout
    station.progress.start(len(station.jobs), f"encoding {encoder.kind}")
    try:
        with torch.inference_mode(), full_disk_told(station.store.root, lambda: handout.num_left * station.entry_bytes):
            _ENCODE[encoder.reads](station)
            while handout.wait(partial(_tell_of_others, station)):
                _ENCODE[encoder.reads](station)
        _tell_of_others(station)
    finally:
        handout.drop()
        if station.loaded:
            encoder.unload()
        station.progress.done()


def _encode_clips(station: _Station, ends_only: bool) -> None:
    decoding = decoded_clips(
        station.handout.take(),
        station.workers,
        station.batch_size,
        station.decode_timeout_s,
        ends_only,
        slot_bytes=decoded_bytes(station.jobs, ends_only),
        ring_bytes=station.ring_bytes,
        decoder_bytes=decoder_bytes_of(station.jobs),
        ahead=station.handout.ahead,
    )
    # Closed by hand: after an error the traceback would keep the generator, and with it the workers, alive.
    with closing(decoding) as decoded:
        for batch in _batches(_readable(decoded, station), station.batch_size):
            items = [ClipEnds(item.pixels, item.job.bucket.frames) if ends_only else item.pixels for item in batch]
            _encode_batch(station, [item.job for item in batch], items)


def _encode_captions(station: _Station) -> None:
    jobs = station.handout.take()
    while batch := list(islice(jobs, station.batch_size)):
        _encode_batch(station, batch, [job.caption for job in batch])


def _make_masks(station: _Station) -> None:
    """They are so small that they come back through the workers' pipes."""
    jobs = station.handout.take()
    first = next(jobs, None)  # while there is nothing to do nothing is started
    if first is None:
        return
    bytes_each = decoded_bytes(station.jobs)
    share = station.workers if station.ring_bytes is None else max(1, station.ring_bytes // bytes_each)
    workers = min(station.workers, share, station.handout.ahead(station.workers))
    with WorkerPool(mask_grid, workers, station.decode_timeout_s, DECODE_TIMEOUT) as pool:
        ahead = partial(station.handout.ahead, 2 * workers + 1)
        for job, grid, error in pool.run(chain([first], jobs), ahead, lambda job: job.name):
            if error is None:
                _encode_batch(station, [job], [grid])
            else:
                _give_up(station, job, error)


# what an encoder reads -> how its jobs are done
_ENCODE: dict[str, Callable[[_Station], None]] = {
    "mask": _make_masks,
    "pixels": partial(_encode_clips, ends_only=False),
    "ends": partial(_encode_clips, ends_only=True),
    "caption": _encode_captions,
}


def _by_shape(job: PixelJob) -> tuple[object, ...]:
    """The largest first: what takes longest is begun first, and memory that runs out does so at once."""
    return -math.prod(job.bucket), job.bucket, job.path, job.start


def _by_length(job: CaptionJob) -> tuple[object, ...]:
    return -len(job.caption), job.caption


def _by_mask(job: MaskJob) -> tuple[object, ...]:
    return -math.prod(job.bucket), job.name, job.key


# what an encoder reads -> the order of its jobs
_ORDER: dict[str, Callable[[Any], tuple[object, ...]]] = {
    "mask": _by_mask,
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
            _give_up(station, item.job, item.error)


def _give_up(station: _Station, job: PixelJob | MaskJob, error: Exception) -> None:
    station.handout.finish(job, Skipped(job.path, reason_of(error), True, isinstance(error, AllBlack)))
    station.progress.advance(1, job.path.name)


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


def _encode_batch(station: _Station, jobs: Sequence[Job], items: list) -> None:
    station.crew.check()
    if not station.loaded:  # only now: a rank that finds nothing to do needs no weights
        station.loaded, station.label = True, _label(station.encoder)
        station.encoder.load(station.device)
    try:
        encoded = station.encoder.encode(items)
        for job, tensors in zip(jobs, encoded, strict=True):
            refuse_not_finite(tensors, job.name)
    except NotFiniteError as error:
        _leave_out_not_finite(station, jobs, items, error)
        return
    for job, tensors in zip(jobs, encoded, strict=True):
        station.entry_bytes = sum(tensor.nbytes for tensor in tensors.values())
        station.store.write(station.encoder.kind, job.key, tensors, {"name": job.name, "encoder": station.label})
        station.handout.finish(job)
    station.made += len(jobs)
    station.progress.advance(len(jobs), jobs[-1].name + _own_part(station))
    station.handout.look()
    _tell_of_others(station)


def _leave_out_not_finite(station: _Station, jobs: Sequence[Job], items: list, error: NotFiniteError) -> None:
    """Find out which of a batch it is, and leave a note as of a clip that cannot be decoded. Raises where it seems to
    be all of them, or a caption: then it is the encoder's dtype or its file."""
    if len(jobs) > 1:
        for job, item in zip(jobs, items, strict=True):
            _encode_batch(station, [job], [item])
        return
    (job,) = jobs
    station.refused.append(f"{error}" if job.name in str(error) else f"{job.name}: {error}")
    if station.encoder.reads == "caption" or (not station.made and len(station.refused) >= _ALL_REFUSED):
        raise ValueError(station.refused[0]) from error
    station.handout.finish(job, Skipped(job.path, str(error), bad=True))
    station.progress.advance(1, job.name)


def _label(encoder: Encoder) -> str:
    """What an entry says of its maker, for people: the key alone decides what it is good for."""
    told = encoder.fingerprint()
    words = (told.get("encoder", type(encoder).__name__), told.get("dtype", ""), *told.get("files", ())[:1])
    return " ".join(Path(word).name for word in map(str, words) if word)


def _tell_of_others(station: _Station) -> None:
    """The progress counts everything, whoever made it, so that its rate and time left are those of the whole."""
    news, others = station.handout.came - station.told, station.handout.num_elsewhere
    station.told += news
    if news or not station.handout.num_left - others:
        at = f"{others} are being made elsewhere" if others else "made elsewhere"
        station.progress.advance(news, at + _own_part(station))


def _own_part(station: _Station) -> str:
    """This rank's part of the rate that is shown, where it is not all."""
    if station.crew.world == 1 and not station.handout.came:
        return ""
    return f" (this rank: {station.made}, {station.made / max(monotonic() - station.begun, 1e-3):.3g}/s)"
