"""What a dataset comes to: its samples, what was left out, and what the cache still lacks; decided once by rank 0."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from models.base import Encoder, MediaSpec
from utils.data.buckets import BucketSettings, bucket_table
from utils.data.cache import CacheStore, FingerprintIndex, write_whole
from utils.data.clips import cut_clips
from utils.data.decode_pool import PixelJob
from utils.data.media_types import DECODE_VERSION
from utils.data.records import Bucket, Clip, Entry
from utils.data.scan import Skipped, scan_directory
from utils.data.stat_index import StatIndex
from utils.data.workers import Progress

# Beside the entries, in the cache's root.
PROBES_FILE = "probes.jsonl"
WEIGHTS_FILE = "weights.jsonl"
# What an encoder reads -> its cache folder.
KINDS = {"pixels": "latents", "caption": "text"}
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
    latents_jobs: list[PixelJob]  # what the cache lacks
    text_jobs: list[CaptionJob]
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

    def without(self, failed: Mapping[str, Skipped]) -> "Manifest":
        """Less the entries whose latents could not be made; `failed` is latents key -> why."""
        lost = sorted({entry.latents_key for entry in self.entries} & set(failed))
        return replace(
            self,
            entries=[entry for entry in self.entries if entry.latents_key not in failed],
            skipped=self.skipped + [failed[key] for key in lost],
            latents_jobs=[job for job in self.latents_jobs if job.key not in failed],
        )


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
        encoders: at most one that reads pixels and one that reads captions.
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
    keys = _Keys(encoders, FingerprintIndex(store.root / WEIGHTS_FILE))
    latents, texts, empty = _jobs(clips, keys)
    missing = {
        kind: [job for job in jobs.values() if regenerate or not store.has(kind, job.key)]
        for kind, jobs in (("latents", latents), ("text", texts))
    }
    return Manifest(
        entries=_entries(clips, keys),
        groups=[Group(Path(settings.path), settings.num_repeats) for settings in directories],
        skipped=skipped,
        latents_jobs=missing["latents"],
        text_jobs=missing["text"],
        counts={
            "latents": Count(len(latents), len(latents) - len(missing["latents"])),
            "text": Count(len(texts), len(texts) - len(missing["text"])),
        },
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


# --- keys and jobs ----------------------------------------------------------------------------------------------------


class _Keys:
    """Names of cache entries, and of samples."""

    def __init__(self, encoders: Sequence[Encoder], fingerprints: FingerprintIndex) -> None:
        self._known: dict[str, tuple[str, Mapping[str, Any]]] = {}  # what it reads -> (kind, fingerprint)
        for encoder in encoders:
            assert encoder.reads not in self._known, f"two encoders read {encoder.reads}: Entry has one key for each"
            assert encoder.kind == KINDS[encoder.reads], f"{encoder.kind} is not the kind of what reads {encoder.reads}"
            self._known[encoder.reads] = (encoder.kind, fingerprints.resolve(encoder.fingerprint()))

    def reads(self, what: str) -> bool:
        return what in self._known

    def latents(self, clip: Clip) -> str:
        kind, encoder = self._known["pixels"]
        return CacheStore.key(kind, {"clip": _recipe(clip), "encoder": encoder})

    def text(self, caption: str) -> str:
        kind, encoder = self._known["caption"]
        return CacheStore.key(kind, {"caption": caption, "encoder": encoder})

    def sample(self, clip: Clip) -> str:
        """Free of the encoders, so that another VAE or text encoder draws the same noise for the same sample."""
        return CacheStore.key("sample", {"clip": _recipe(clip), "captions": clip.media.captions})


def _recipe(clip: Clip) -> dict[str, Any]:
    """All that decides a clip's pixels."""
    return {
        "media": clip.media.content_hash,
        "start": str(clip.start),
        "fps": str(clip.fps),
        "bucket": list(clip.bucket),
        "decode": DECODE_VERSION,
    }


def _jobs(clips: Iterable[Clip], keys: _Keys) -> tuple[dict[str, PixelJob], dict[str, CaptionJob], str]:
    """Everything that must be in the cache, by key, and the key of the empty caption."""
    latents: dict[str, PixelJob] = {}
    texts: dict[str, CaptionJob] = {}

    def want(caption: str) -> str:
        key = keys.text(caption)
        texts.setdefault(key, CaptionJob(key, caption))
        return key

    for clip in clips:
        key, media = keys.latents(clip), clip.media
        latents.setdefault(key, PixelJob(key, media.path, media.is_video, clip.start, clip.fps, clip.bucket))
        if keys.reads("caption"):
            for caption in media.captions:
                want(caption)
    return latents, texts, want("") if keys.reads("caption") else ""


def _entries(clips: Sequence[Clip], keys: _Keys) -> list[Entry]:
    starts: dict[Path, set[Fraction]] = {}
    for clip in clips:
        starts.setdefault(clip.media.path, set()).add(clip.start)
    entries = []
    for clip in clips:
        media = clip.media
        several = len(starts[media.path]) > 1
        entries.append(
            Entry(
                sample_id=keys.sample(clip),
                name=f"{media.path.name}@{float(clip.start):.2f}s" if several else media.path.name,
                bucket=clip.bucket,
                group=clip.group,
                latents_key=keys.latents(clip),
                text_keys=tuple(map(keys.text, media.captions)) if keys.reads("caption") else (),
            )
        )
    return entries


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "entries": [[e.sample_id, e.name, e.bucket, e.group, e.latents_key, e.text_keys] for e in manifest.entries],
        "groups": [[str(group.path), group.num_repeats] for group in manifest.groups],
        "skipped": [[str(item.path), item.reason, item.bad] for item in manifest.skipped],
        "latents_jobs": [
            [job.key, str(job.path), job.is_video, str(job.start), str(job.fps), job.bucket]
            for job in manifest.latents_jobs
        ],
        "text_jobs": manifest.text_jobs,
        "counts": manifest.counts,
        "empty_text_key": manifest.empty_text_key,
        "contents": manifest.contents,
    }


def _from_json(content: Mapping[str, Any]) -> Manifest:
    return Manifest(
        entries=[
            Entry(sample_id, name, Bucket(*bucket), group, latents_key, tuple(text_keys))
            for sample_id, name, bucket, group, latents_key, text_keys in content["entries"]
        ],
        groups=[Group(Path(path), num_repeats) for path, num_repeats in content["groups"]],
        skipped=[Skipped(Path(path), reason, bad) for path, reason, bad in content["skipped"]],
        latents_jobs=[
            PixelJob(key, Path(path), is_video, Fraction(start), Fraction(fps), Bucket(*bucket))
            for key, path, is_video, start, fps, bucket in content["latents_jobs"]
        ],
        text_jobs=[CaptionJob(*job) for job in content["text_jobs"]],
        counts={kind: Count(*count) for kind, count in content["counts"].items()},
        empty_text_key=content["empty_text_key"],
        contents=content["contents"],
    )
