"""Datasets to manifests and a filled cache, agreed on by all ranks."""

import gc
import logging
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.base import Encoder, ModelFamily
from utils import dist
from utils.config.dataset_schema import DirectoryConfig
from utils.config.load import LoadedConfig
from utils.data.cache import CacheStore, FingerprintIndex, write_lines
from utils.data.crew import JOBS_FOLDER, Crew, sweep
from utils.data.decode_pool import decoded_bytes
from utils.data.listing import Skipped
from utils.data.manifest import WEIGHTS_FILE, Manifest, build_manifest, overlap
from utils.data.precache import PrecacheReport, precache
from utils.data.records import MASK, TEXT
from utils.data.room import FREE_SHARE, GIB, free_memory, require_disk, unwritable
from utils.data.scan_memory import ScanMemory
from utils.data.uses import keys_of, record_use
from utils.data.whole import lacking
from utils.data.workers import Progress
from utils.monitor.console import counted

DEFAULT_WORKERS = 8
MAX_SHOWN = 20  # lines of one message
TRAIN = ""  # the training set's name among manifests; eval sets have their own


logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """All datasets, cached."""

    store: CacheStore
    manifests: dict[str, Manifest]
    report: PrecacheReport

    @property
    def train(self) -> Manifest:
        return self.manifests[TRAIN]


def prepare(
    loaded: LoadedConfig,
    family: ModelFamily,
    *,
    workers: int,
    regenerate: bool,
    progress: Progress,
    run_dir: Path | None,
    check: Callable[[Manifest], None],
) -> Prepared:
    """Rank 0 scans and decides what is missing; every rank encodes its share.

    Args:
        check: looks at the training set before anything is encoded; what it raises ends the start.

    Raises:
        ValueError: bad media, nothing to train on, a file that is in training and eval data, no room for the cache.
        PeerLost: another rank has ended before its time.
    """
    run, encoders = loaded.run, family.encoders()
    store = open_cache(run.cache_dir)
    ring_bytes = ring_share(run.cache_ram_gb)

    read_only = unwritable(store.root)
    folder = _meeting_place(store.root, run_dir, run.output_dir if read_only else None)
    with Crew(folder, dist.rank(), dist.world_size(), leave) as crew:
        if dist.is_main():
            manifests = scan(loaded, family, encoders, store, workers=workers, regenerate=regenerate, progress=progress)
            refuse_overlap(manifests)
            check(manifests[TRAIN])
            if read_only:
                require_complete(manifests, store.root, read_only)
            require_room(loaded, family, manifests, store, ring_bytes)
            if dist.world_size() > 1:
                save_manifests(manifests, folder)
        crew.meet(dist.barrier)
        if not dist.is_main():
            manifests = load_manifests([TRAIN, *loaded.eval_datasets], folder)
        report = precache(
            list(manifests.values()),
            encoders,
            store,
            device=dist.device(),
            workers=workers,
            batch_size=run.caching_batch_size,
            crew=crew,
            barrier=dist.barrier,
            progress=progress,
            decode_timeout_s=run.decode_timeout_s,
            ring_bytes=ring_bytes,
            skip_bad_media=run.skip_bad_media,
            regenerate=regenerate,
        )
        crew.meet(dist.barrier)  # so that nobody misses the files of one that is done
    manifests = {name: each.settled(report.black).without(report.failed) for name, each in manifests.items()}
    if dist.is_main():
        shutil.rmtree(folder, ignore_errors=True)
        _note_down(store, manifests, run_dir, read_only=bool(read_only))
    return Prepared(store, manifests, report)


def _meeting_place(root: Path, run_dir: Path | None, instead: Path | None) -> Path:
    """This start's own folder, as rank 0 names it: in the cache at `root`, which runs may share, or in the run's, or
    `instead`, where that can only be read."""
    named = f"{run_dir.name if run_dir else 'cache_only'}-{os.getpid()}-{secrets.token_hex(4)}"
    beside = (run_dir or instead or root) / f".{JOBS_FOLDER}-{named}"
    return Path(dist.text_from_main(str(beside if instead else root / JOBS_FOLDER / named)))


def _note_down(store: CacheStore, manifests: Mapping[str, Manifest], run_dir: Path | None, *, read_only: bool) -> None:
    """What later starts and the cache's tool want to know, and the list of what is left out."""
    if not read_only:
        remember_made(store, manifests.values())
        record_use(store.root, keys_of(manifests.values()), run_dir.name if run_dir else "--cache_only")
        sweep(store.root)
    if run_dir:
        write_skipped(run_dir / "skipped.jsonl", skipped(manifests))


def require_complete(manifests: Mapping[str, Manifest], root: Path, why: str) -> None:
    """Tells of a cache to which nothing can be written; raises `ValueError` where something must be."""
    if lacks := len({(kind, job.key) for each in manifests.values() for kind in each.jobs for job in each.jobs[kind]}):
        entries = "1 entry is" if lacks == 1 else f"{lacks:,} entries are"
        raise ValueError(
            f"cache_dir = '{root}' cannot be written to ({why}), and {entries} to be made; change its rights, or name "
            "a folder of yours: a copy of this one needs those alone"
        )
    logger.warning(
        "cache_dir = '%s' cannot be written to (%s): everything is there, so it is only read. What files and weights "
        "hold is found out anew at each start",
        root,
        why,
    )


def remember_made(store: CacheStore, manifests: Iterable[Manifest]) -> None:
    """Open what was just made, so that the next start need not."""
    made: dict[str, set[str]] = {}
    for manifest in manifests:
        for kind, jobs in manifest.jobs.items():
            made.setdefault(kind, set()).update(job.key for job in jobs)
    for kind, keys in made.items():
        lacking(store, kind, keys)


def ring_share(cache_ram_gb: float | None) -> int:
    """Bytes of host memory for this rank's decoded clips: ranks of one host share what is set, or a part of what is
    free."""
    whole = free_memory() * FREE_SHARE if cache_ram_gb is None else cache_ram_gb * GIB
    return int(whole / dist.ranks_here())


def require_room(
    loaded: LoadedConfig, family: ModelFamily, manifests: Mapping[str, Manifest], store: CacheStore, ring_bytes: int
) -> None:
    """Raises `ValueError` where the disk cannot take what is to be encoded, or the memory that is set no clip of it."""
    run, outline = loaded.run, type(family).outline(loaded.model)
    jobs = {
        (kind, job.key): job for manifest in manifests.values() for kind in manifest.jobs for job in manifest.jobs[kind]
    }
    clips = [job for (kind, _), job in jobs.items() if kind not in (TEXT, MASK)]
    least = decoded_bytes(clips) * (run.caching_batch_size + 1)
    if run.cache_ram_gb is not None and least > ring_bytes:
        raise ValueError(
            f"cache_ram_gb = {run.cache_ram_gb:g} is {ring_bytes / GIB:.2g} GiB for each rank, and the largest clip "
            f"needs {least / GIB:.2g} GiB with caching_batch_size = {run.caching_batch_size}; raise cache_ram_gb to "
            f"{math.ceil(least * dist.ranks_here() / GIB * 100) / 100:g}, or lower caching_batch_size"
        )
    need = 0
    for (kind, key), job in jobs.items():
        if store.path(kind, key).exists():
            continue  # made anew in its own place
        if kind == TEXT:  # a token a word at least, and one for the end
            tokens = len(job.caption.split()) + 1
            need += outline.caption_token_bytes * min(tokens, outline.max_caption_tokens or tokens)
        elif kind == MASK:
            need += job.cells
        elif outline.cache_bytes:
            need += outline.cache_bytes(*job.bucket).get(kind, 0)
    require_disk(store.root, need)


def leave(why: str) -> None:
    """End this rank, which another has left waiting where no error reaches it."""
    logger.error("%s", why)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def scan(
    loaded: LoadedConfig,
    family: ModelFamily,
    encoders: Sequence[Encoder],
    store: CacheStore,
    *,
    workers: int,
    regenerate: bool,
    progress: Progress,
) -> dict[str, Manifest]:
    """Each dataset's samples, and what the cache lacks of them."""
    settings: dict[str, Any] = {
        "spec": family.media_spec(),
        "clip_mode": loaded.run.video_clip_mode,
        "skip_bad_media": loaded.run.skip_bad_media,
    }
    weights = FingerprintIndex(store.root / WEIGHTS_FILE)
    made_by = [[encoder.kind, weights.resolve(encoder.fingerprint())] for encoder in encoders]

    def found(directories: Sequence[DirectoryConfig], held_out: bool) -> Manifest:
        decided_by = [[of.model_dump(mode="json") for of in directories], repr(settings), made_by, held_out]
        memory = ScanMemory(store, directories, decided_by, now_ns=time.time_ns())
        if not regenerate and (remembered := memory.manifest()):
            return remembered
        options = {"workers": workers, "regenerate": regenerate, "progress": progress, "held_out": held_out}
        scanned = build_manifest(directories, encoders=encoders, store=store, **settings, **options)
        memory.keep(scanned)
        return scanned

    with _collector_paused():
        datasets = {TRAIN: loaded.dataset, **loaded.eval_datasets}
        return {name: found(dataset.directory, held_out=name != TRAIN) for name, dataset in datasets.items()}


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Records by the hundred thousand hold no cycles, and to look for some among them takes a tenth of a start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def open_cache(root: Path) -> CacheStore:
    """Raises `ValueError` where the folder cannot be made."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir = '{root}' cannot be made ({error.strerror}); name another folder") from error
    return CacheStore(root)


def save_manifests(manifests: Mapping[str, Manifest], folder: Path) -> None:
    for name, manifest in manifests.items():
        manifest.save(folder / f"{name or 'train'}.json")


def load_manifests(names: Iterable[str], folder: Path) -> dict[str, Manifest]:
    with _collector_paused():
        return {name: Manifest.load(folder / f"{name or 'train'}.json") for name in names}


def refuse_overlap(manifests: Mapping[str, Manifest]) -> None:
    """Raises `ValueError` naming the files that are in training and eval data alike, by content."""
    for name, manifest in manifests.items():
        if name != TRAIN and (shared := overlap(manifests[TRAIN], manifest)):
            lines = "".join(f"\n  {line}" for line in shared[:MAX_SHOWN])
            more = f"\n  and {len(shared) - MAX_SHOWN} more" if len(shared) > MAX_SHOWN else ""
            raise ValueError(
                f"eval dataset {name!r} shares {counted(len(shared), 'file')} with the training data, so its loss "
                f"would measure nothing; take them out of one of the two:{lines}{more}"
            )


def skipped(manifests: Mapping[str, Manifest]) -> list[tuple[str, Skipped]]:
    """(dataset, file and reason) of all that is left out."""
    return [(name or "train", item) for name, manifest in manifests.items() for item in manifest.skipped]


def write_skipped(path: Path, rows: Iterable[tuple[str, Skipped]]) -> None:
    """One JSON object a file that is left out, with its dataset."""
    write_lines(path, ({"dataset": name, "path": str(item.path), "reason": item.reason} for name, item in rows))
