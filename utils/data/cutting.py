"""Scans and cuts what a dataset names: its clips, and every file that gives none."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from models.base import MediaSpec
from utils.data.buckets import BucketSettings, bucket_table
from utils.data.cache import CacheStore
from utils.data.clips import ClipRules, ClipSettings, cut_clips, is_short, is_small
from utils.data.listing import Skipped
from utils.data.masks import too_short
from utils.data.records import Clip
from utils.data.scan import ScanSettings, scan_directory
from utils.data.stat_index import StatIndex
from utils.data.workers import Progress

# Beside the entries, in the cache's root.
PROBES_FILE = "probes.jsonl"
ARCHIVES_FOLDER = "archives"


class DirectorySettings(ScanSettings, BucketSettings, ClipSettings, Protocol):
    """What a `[[directory]]` says, its inheritance from the top level resolved."""

    @property
    def num_repeats(self) -> float: ...

    @property
    def weight(self) -> float: ...

    @property
    def is_regularization(self) -> bool: ...


class Cut(NamedTuple):
    """What scanning and cutting come to."""

    clips: list[Clip]
    skipped: list[Skipped]
    notices: list[str]  # what was done to clips that a person should know of


def cut_dataset(
    directories: Sequence[DirectorySettings],
    *,
    spec: MediaSpec,
    clip_mode: str,
    store: CacheStore,
    workers: int,
    progress: Progress | None = None,
) -> Cut:
    """The clips of one dataset, and every file that gives none. Arguments, errors: see `manifest.build_manifest`."""
    index, archives = StatIndex(store.root / PROBES_FILE), store.root / ARCHIVES_FOLDER
    clips: list[Clip] = []
    skipped: list[Skipped] = []
    notices: list[str] = []
    for group, settings in enumerate(directories):
        found, left_out, told = _clips_of(settings, group, spec, clip_mode, workers, index, archives, progress)
        clips += found
        skipped += left_out
        notices += told
    return Cut(clips, skipped, notices)


def _clips_of(
    settings: DirectorySettings,
    group: int,
    spec: MediaSpec,
    clip_mode: str,
    workers: int,
    index: StatIndex,
    archives: Path,
    progress: Progress | None,
) -> Cut:
    """`cut_dataset` of one directory."""
    folder = Path(settings.path)
    try:
        rules = ClipRules.of(settings, clip_mode)
        table = bucket_table(settings, spec, rules.any_length)
    except ValueError as error:
        raise ValueError(f"[[directory]] path = {str(folder)!r}: {error}") from error
    media, skipped, notices = scan_directory(
        settings, workers=workers, index=index, archives=archives, progress=progress
    )
    clips: list[Clip] = []
    short = small = alone = 0
    for file in media:
        cut = cut_clips(file, table, rules, group)
        if isinstance(cut, Skipped):
            skipped.append(cut)
        elif short_mask := next(filter(None, map(too_short, cut)), None):
            skipped.append(Skipped(file.path, short_mask, bad=True))
        else:
            clips += cut
            short += is_short(cut[0], table, rules)
            small += is_small(cut[0], table, rules)
            alone += file.is_video and cut[0].bucket.frames == 1
    if alone and (rules.any_length or max(table.frame_lengths()) > 1):
        notices.append(f"{folder}: {'1 video fills' if alone == 1 else f'{alone} videos fill'} no bucket: stills alone")
    if short:
        notices.append(_of_short(folder, short, rules.short_clips))
    if small:
        which = "1 file is smaller than its bucket" if small == 1 else f"{small} files are smaller than their buckets"
        done = "are trained at the largest size of their bucket's shape, or of size_buckets, that they fill"
        notices.append(f"{folder}: {which}; with bucket_no_upscale = true such {done}")
    return Cut(clips, skipped, notices)


_SHORT = {
    "loop": "start again from the first frame until it is full",
    "pad": "hold the last frame until it is full",
    "smaller_bucket": "are trained at the longest length that they fill",
}


def _of_short(folder: Path, count: int, how: str) -> str:
    which = "1 video is" if count == 1 else f"{count} videos are"
    done = _SHORT[how]
    return f"{folder}: {which} shorter than every bucket; with short_clips = '{how}' such {done}"
