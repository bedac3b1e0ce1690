"""What a dataset comes to: its samples, what was left out, and what the cache still lacks; decided once by rank 0."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from models.base import Encoder, MediaSpec
from utils.data.buckets import BucketSettings, bucket_table
from utils.data.cache import CacheStore, FingerprintIndex, write_whole
from utils.data.clips import cut_clips
from utils.data.decode_pool import PixelJob
from utils.data.keys import Keys
from utils.data.records import TEXT, Bucket, Clip, Entry
from utils.data.scan import Skipped, scan_directory
from utils.data.stat_index import StatIndex
from utils.data.workers import Progress

# Beside the entries, in the cache's root.
PROBES_FILE = "probes.jsonl"
WEIGHTS_FILE = "weights.jsonl"
_FIRST_REASONS = 5


class DirectorySettings(BucketSettings, Protocol):
    """What a `[[directory]]` says, its inheritance from the top level resolved."""

    @property
    def path(self) -> Path | str: ...

    @property
    def num_repeats(self) -> float: ...

    @property
    def skip_empty_caption(self) -> bool: ...

    @property
    def caption_prefix(self) -> str: ...


class Group(NamedTuple):
    """One [[directory]]."""

    path: Path
    num_repeats: float


class CaptionJob(NamedTuple):
    """One caption to encode and store under `key`."""

    key: str
    caption: str

    @property
    def name(self) -> str:
        return repr(self.caption if len(self.caption) <= 60 else self.caption[:57] + "...")


Job = PixelJob | CaptionJob


class Count(NamedTuple):
    """Distinct entries of one kind."""

    total: int
    present: int  # in the cache when the manifest was made


@dataclass(frozen=True)
class Manifest:
    """One dataset, complete."""

    entries: list[Entry]
    groups: list[Group]
    skipped: list[Skipped]
    jobs: dict[str, list[Job]]  # what the cache lacks, by kind of encoder
    counts: dict[str, Count]  # by kind of encoder
    empty_text_key: str  # of the empty caption, which dropout uses; "" where no encoder reads captions
    contents: dict[str, str] = field(default_factory=dict)  # content hash -> path, of the media in `entries`

    def save(self, path: Path) -> None:
        """Write it whole as JSON, for the other ranks."""
        write_whole(path, json.dumps(_to_json(self)).encode())

    @classmethod
    def load(cls, path: Path) -> "Manifest":
        """What `save` wrote."""
        return _from_json(json.loads(path.read_bytes()))

    def digest(self) -> str:
        """Of the samples: the same for equal content, frames, shapes and captions, wherever the files lie."""
        return hashlib.blake2b("".join(sorted(e.sample_id for e in self.entries)).encode(), digest_size=16).hexdigest()

    def without(self, failed: Mapping[str, Skipped]) -> "Manifest":
        """Less the entries of which anything could not be made; `failed` is the cache's key -> why."""
        lost = self.lost_with(failed)
        reasons = dict.fromkeys(failed[key] for entry in self.entries for key in entry.media_keys if key in failed)
        return replace(
            self,
            entries=[entry for entry in self.entries if lost.isdisjoint(entry.media_keys)],
            skipped=[*self.skipped, *reasons],
            jobs={kind: [job for job in jobs if job.key not in lost] for kind, jobs in self.jobs.items()},
        )

    def lost_with(self, failed: Collection[str]) -> set[str]:
        """`failed` and every other key of the clips that they are of: a clip counts whole or not at all."""
        lost = set(failed)
        return lost.union(*(entry.media_keys for entry in self.entries if not lost.isdisjoint(entry.media_keys)))


def build_manifest(
    directories: Sequence[DirectorySettings],
    *,
    spec: MediaSpec,
    clip_mode: str,
    encoders: Sequence[Encoder],
    store: CacheStore,
    workers: int,
    skip_bad_media: bool = False,
    regenerate: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Scan, cut and look up one dataset.

    Args:
        encoders: at most one of them reads captions.
        workers: processes that read files not seen before.
        regenerate: plan every entry anew, whatever the cache holds.

    Raises:
        ValueError: a setting is wrong, media cannot be read (all are listed), or nothing is left to train on.
    """
    index = StatIndex(store.root / PROBES_FILE)
    clips: list[Clip] = []
    skipped: list[Skipped] = []
    for group, settings in enumerate(directories):
        found, left_out = _clips_of(settings, group, spec, clip_mode, workers, index, progress)
        clips += found
        skipped += left_out
    bad = [item for item in skipped if item.bad]
    if bad and not skip_bad_media:
        lines = "".join(f"\n  {item.path}: {item.reason}" for item in bad)
        raise ValueError(f"{len(bad)} media files cannot be used (skip_bad_media = true goes on without them):{lines}")
    if not clips:
        raise ValueError(_nothing_left(directories, skipped))
    entries, wanted, empty = _collect(clips, Keys(encoders, FingerprintIndex(store.root / WEIGHTS_FILE)))
    missing = {
        kind: [job for job in jobs.values() if regenerate or not store.has(kind, job.key)]
        for kind, jobs in wanted.items()
    }
    return Manifest(
        entries=entries,
        groups=[Group(Path(settings.path), settings.num_repeats) for settings in directories],
        skipped=skipped,
        jobs=missing,
        counts={kind: Count(len(jobs), len(jobs) - len(missing[kind])) for kind, jobs in wanted.items()},
        empty_text_key=empty,
        contents={clip.media.content_hash: str(clip.media.path) for clip in clips},
    )


def overlap(train: Manifest, held_out: Manifest) -> list[str]:
    """One line for each file of `held_out` whose bytes are also in `train`, whatever the names."""
    shared = sorted(set(train.contents) & set(held_out.contents), key=held_out.contents.__getitem__)
    return [f"{held_out.contents[digest]} is also a training file: {train.contents[digest]}" for digest in shared]


def _clips_of(
    settings: DirectorySettings,
    group: int,
    spec: MediaSpec,
    clip_mode: str,
    workers: int,
    index: StatIndex,
    progress: Progress | None,
) -> tuple[list[Clip], list[Skipped]]:
    folder = Path(settings.path)
    try:
        table = bucket_table(settings, spec)
    except ValueError as error:
        raise ValueError(f"[[directory]] path = {str(folder)!r}: {error}") from error
    media, skipped = scan_directory(
        folder,
        caption_prefix=settings.caption_prefix,
        skip_empty_caption=settings.skip_empty_caption,
        workers=workers,
        index=index,
        progress=progress,
    )
    clips: list[Clip] = []
    for file in media:
        cut = cut_clips(file, table, clip_mode, group)
        if isinstance(cut, Skipped):
            skipped.append(cut)
        else:
            clips += cut
    return clips, skipped


def _nothing_left(directories: Sequence[DirectorySettings], skipped: Sequence[Skipped]) -> str:
    folders = ", ".join(str(settings.path) for settings in directories)
    if not skipped:
        return f"no media files in {folders}"
    lines = "".join(f"\n  {item}" for item in skipped[:_FIRST_REASONS])
    more = f"\n  and {len(skipped) - _FIRST_REASONS} more" if len(skipped) > _FIRST_REASONS else ""
    return f"nothing to train on in {folders}; left out:{lines}{more}"


# --- entries and jobs -------------------------------------------------------------------------------------------------


def _collect(clips: Sequence[Clip], keys: Keys) -> tuple[list[Entry], dict[str, dict[str, Job]], str]:
    """The entries, everything that must be in the cache by kind and key, and the key of the empty caption."""
    jobs: dict[str, dict[str, Job]] = {kind: {} for kind in keys.kinds}

    def want(caption: str) -> str:
        key = keys.text(caption)
        jobs[TEXT].setdefault(key, CaptionJob(key, caption))
        return key

    starts: dict[Path, set[Fraction]] = {}
    for clip in clips:
        starts.setdefault(clip.media.path, set()).add(clip.start)
    entries = []
    for clip in clips:
        media, media_keys = clip.media, keys.media(clip)
        for kind, key in zip(keys.media_kinds, media_keys, strict=True):
            jobs[kind].setdefault(key, PixelJob(key, media.path, media.is_video, clip.start, clip.fps, clip.bucket))
        several = len(starts[media.path]) > 1
        entries.append(
            Entry(
                sample_id=keys.sample(clip),
                name=f"{media.path.name}@{float(clip.start):.2f}s" if several else media.path.name,
                bucket=clip.bucket,
                group=clip.group,
                media_kinds=keys.media_kinds,
                media_keys=media_keys,
                text_keys=tuple(map(want, media.captions)) if TEXT in keys.kinds else (),
            )
        )
    return entries, jobs, want("") if TEXT in keys.kinds else ""


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _to_json(manifest: Manifest) -> dict[str, Any]:
    clips: dict[tuple[Any, ...], int] = {}  # what is decoded -> its row; several encoders look at the same clip
    jobs = {
        kind: wanted if kind == TEXT else [[job.key, clips.setdefault(job[1:], len(clips))] for job in wanted]
        for kind, wanted in manifest.jobs.items()
    }
    return {
        "media_kinds": manifest.entries[0].media_kinds if manifest.entries else (),
        "entries": [[e.sample_id, e.name, e.bucket, e.group, e.media_keys, e.text_keys] for e in manifest.entries],
        "groups": [[str(group.path), group.num_repeats] for group in manifest.groups],
        "skipped": [[str(item.path), item.reason, item.bad] for item in manifest.skipped],
        "clips": [[str(path), is_video, str(start), str(fps), bucket] for path, is_video, start, fps, bucket in clips],
        "jobs": jobs,
        "counts": manifest.counts,
        "empty_text_key": manifest.empty_text_key,
        "contents": manifest.contents,
    }


def _from_json(content: Mapping[str, Any]) -> Manifest:
    kinds = tuple(content["media_kinds"])
    clips = [
        (Path(path), is_video, Fraction(start), Fraction(fps), Bucket(*bucket))
        for path, is_video, start, fps, bucket in content["clips"]
    ]
    return Manifest(
        entries=[
            Entry(sample_id, name, Bucket(*bucket), group, kinds, tuple(media_keys), tuple(text_keys))
            for sample_id, name, bucket, group, media_keys, text_keys in content["entries"]
        ],
        groups=[Group(Path(path), num_repeats) for path, num_repeats in content["groups"]],
        skipped=[Skipped(Path(path), reason, bad) for path, reason, bad in content["skipped"]],
        jobs={
            kind: [CaptionJob(*row) if kind == TEXT else PixelJob(row[0], *clips[row[1]]) for row in rows]
            for kind, rows in content["jobs"].items()
        },
        counts={kind: Count(*count) for kind, count in content["counts"].items()},
        empty_text_key=content["empty_text_key"],
        contents=content["contents"],
    )
