"""Datasets to manifests and a filled cache, agreed on by all ranks."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from models.base import Encoder, ModelFamily
from utils import dist
from utils.config.load import LoadedConfig
from utils.data.cache import CacheStore
from utils.data.manifest import Manifest, build_manifest, overlap
from utils.data.precache import PrecacheReport, precache
from utils.data.scan import Skipped
from utils.data.workers import Progress
from utils.monitor.console import counted

DEFAULT_WORKERS = 8
MAX_SHOWN = 20  # lines of one message
TRAIN = ""  # the training set's name among manifests; eval sets have their own


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
        ValueError: bad media, nothing to train on, or a file that is in training and eval data.
    """
    run, encoders = loaded.run, family.encoders()
    store = open_cache(run.cache_dir)

    # runs may share the cache; what rank 0 decides is what every rank reads
    named = dist.text_from_main(f"{run_dir.name if run_dir else 'cache_only'}-{os.getpid()}")
    folder = store.root / "manifests" / named
    if dist.is_main():
        manifests = scan(loaded, family, encoders, store, workers=workers, regenerate=regenerate, progress=progress)
        refuse_overlap(manifests)
        check(manifests[TRAIN])
        save_manifests(manifests, folder)
    dist.barrier()
    manifests = load_manifests([TRAIN, *loaded.eval_datasets], folder)
    report = precache(
        list(manifests.values()),
        encoders,
        store,
        device=dist.device(),
        workers=workers,
        batch_size=run.caching_batch_size,
        rank=dist.rank(),
        world=dist.world_size(),
        barrier=dist.barrier,
        progress=progress,
        skip_bad_media=run.skip_bad_media,
    )
    manifests = {name: manifest.without(report.failed) for name, manifest in manifests.items()}
    if dist.is_main():
        shutil.rmtree(folder, ignore_errors=True)  # all ranks have met since they read it
        if run_dir:
            write_skipped(run_dir / "skipped.jsonl", manifests)
    return Prepared(store, manifests, report)


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
    return {
        name: build_manifest(
            dataset.directory,
            spec=family.media_spec(),
            clip_mode=loaded.run.video_clip_mode,
            encoders=encoders,
            store=store,
            workers=workers,
            skip_bad_media=loaded.run.skip_bad_media,
            regenerate=regenerate,
            progress=progress,
        )
        for name, dataset in {TRAIN: loaded.dataset, **loaded.eval_datasets}.items()
    }


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


def write_skipped(path: Path, manifests: Mapping[str, Manifest]) -> None:
    """One JSON object a file that is left out."""
    rows = [{"dataset": name, "path": str(item.path), "reason": item.reason} for name, item in skipped(manifests)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
