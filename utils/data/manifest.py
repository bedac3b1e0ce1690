"""What a dataset comes to: its samples, what was left out, and what the cache still lacks; decided once by rank 0."""

import hashlib
import json
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from models.base import Encoder, MediaSpec
from utils.data.black_masks import known_black
from utils.data.cache import CacheStore, FingerprintIndex, write_whole
from utils.data.cutting import DirectorySettings, cut_dataset
from utils.data.decode_pool import PixelJob
from utils.data.keys import Keys
from utils.data.listing import Skipped, plural
from utils.data.masks import MaskJob, why_black
from utils.data.records import MASK, TEXT, Bucket, Clip, Entry, Fill, Framing
from utils.data.whole import lacking
from utils.data.workers import Progress

WEIGHTS_FILE = "weights.jsonl"  # in the cache's root
_FIRST_REASONS = 5


class Group(NamedTuple):
    """One [[directory]]."""

    path: Path
    num_repeats: float
    weight: float = 1.0  # what its samples count in the loss
    is_regularization: bool = False  # its samples hold the adapter to what the model knew without it

    @classmethod
    def of(cls, settings: DirectorySettings) -> "Group":
        return cls(Path(settings.path), settings.num_repeats, settings.weight, settings.is_regularization)


class CaptionJob(NamedTuple):
    """One caption to encode and store under `key`."""

    key: str
    caption: str

    @property
    def name(self) -> str:
        return repr(self.caption if len(self.caption) <= 60 else self.caption[:57] + "...")


Job = PixelJob | CaptionJob | MaskJob


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
    notices: list[str] = field(default_factory=list)  # what was done to clips that a person should know of
    held_out: bool = False  # of each sample the first turn alone is used

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

    def keys(self) -> dict[str, set[str]]:
        """Everything that its samples need of the cache, whether it is there or not, by kind."""
        keys: dict[str, set[str]] = {kind: set() for kind in self.jobs}
        for entry in self.entries:
            for kind, key in entry.media():
                keys.setdefault(kind, set()).add(key)
            for kind, more in ((TEXT, entry.text_keys), (MASK, entry.mask_keys)):
                if more:
                    keys.setdefault(kind, set()).update(more)
        if self.empty_text_key:
            keys.setdefault(TEXT, set()).add(self.empty_text_key)
        return keys

    def without(self, failed: Mapping[str, Skipped]) -> "Manifest":
        """Less the entries of which anything could not be made; `failed` is the cache's key -> why. Uses that are lost
        to black masks are no such thing, see `settled`."""
        lost = self.lost_with(failed)
        reasons = dict.fromkeys(failed[key] for entry in self.entries for key in entry.media_keys if key in failed)
        masks = self.lost_by_masks(failed)
        reasons |= dict.fromkeys(why._replace(reason=f"as the mask of {of.name}: {why.reason}") for of, why in masks)
        return replace(
            self,
            entries=[entry for entry in self.entries if entry.is_free_of(failed)],
            skipped=[*self.skipped, *reasons],
            jobs={kind: [job for job in jobs if job.key not in lost] for kind, jobs in self.jobs.items()},
        )

    def lost_by_masks(self, failed: Mapping[str, Skipped]) -> Iterator[tuple[Entry, Skipped]]:
        """The samples of which a loss mask is among `failed`, and why: of each its own file is told, whichever of those
        with equal bytes was looked at."""
        for entry in self.entries:
            for key in entry.mask_keys:
                if key in failed:
                    yield entry, failed[key]._replace(path=Path(entry.mask)) if entry.mask else failed[key]

    def settled(self, black: Container[str]) -> "Manifest":
        """Once all loss masks are made: less the turns of which the mask is `black`, where the sample has others, and
        of what is held out less all turns but the first of these."""
        lit = self.lit(black)
        entries = [entry.of_turns([0]) if entry.num_turns > 1 else entry for entry in lit.entries]
        return lit.with_entries(entries) if self.held_out else lit

    def lit(self, black: Container[str]) -> "Manifest":
        """Less the turns of which the mask is `black`, where the sample has others."""
        entries = [entry.lit(black) for entry in self.entries]
        uses = [old.num_turns - new.num_turns for old, new in zip(self.entries, entries, strict=True)]
        if not any(uses):
            return self
        notice = uses_left_out(sum(uses), sum(map(bool, uses)))
        return replace(self.with_entries(entries), notices=[*self.notices, notice])

    def with_entries(self, entries: list[Entry]) -> "Manifest":
        """The same samples, of which fewer turns are used: what they no longer need is not made."""
        needed: set[str] = set()
        for entry in entries:
            needed.update(entry.media_keys, entry.mask_keys)
        jobs = {
            kind: [job for job in wanted if kind == TEXT or job.key in needed] for kind, wanted in self.jobs.items()
        }
        return replace(self, entries=entries, jobs=jobs)

    def lost_with(self, failed: Collection[str]) -> set[str]:
        """`failed` and every other key of the clips that they are of, but for what others need: a clip counts whole or
        not at all."""
        kept: set[str] = set()
        lost = set(failed)
        for entry in self.entries:
            (kept if entry.is_free_of(failed) else lost).update(entry.media_keys, entry.mask_keys)
        return lost - kept


def uses_left_out(uses: int, clips: int) -> str:
    """What is told of so many uses of so many clips, whose masks are black."""
    what = "1 crop or start" if uses == 1 else f"{uses} crops or starts"
    return f"{what} of {plural(clips, 'clip')}: left out, since the loss mask is black there; their others stay"


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
    held_out: bool = False,
) -> Manifest:
    """Scan, cut and look up one dataset.

    Args:
        clip_mode: of the directories that set none.
        encoders: at most one of them reads captions.
        workers: processes that read files not seen before.
        regenerate: plan every entry anew, whatever the cache holds.
        held_out: the first turn of each sample is all that is used, and so all that is made.

    Raises:
        ValueError: a setting is wrong, media cannot be read (all are listed), or nothing is left to train on.
    """
    clips, skipped, notices = cut_dataset(
        directories, spec=spec, clip_mode=clip_mode, store=store, workers=workers, progress=progress
    )
    bad = [item for item in skipped if item.bad]
    if bad and not skip_bad_media:
        lines = "".join(f"\n  {item.path}: {item.reason}" for item in bad)
        files = "1 media file" if len(bad) == 1 else f"{len(bad)} media files"
        raise ValueError(f"{files} cannot be used (skip_bad_media = true goes on without):{lines}")
    if not clips:
        raise ValueError(_nothing_left(directories, skipped))
    groups = [Group.of(settings) for settings in directories]
    keys = Keys(encoders, FingerprintIndex(store.root / WEIGHTS_FILE))
    entries, wanted, empty = _collect(clips, groups, keys, spec)
    whole = Manifest(
        entries=entries,
        groups=groups,
        skipped=skipped,
        jobs={kind: [*jobs.values()] for kind, jobs in wanted.items()},
        counts={},
        empty_text_key=empty,
        contents={clip.media.content_hash: str(clip.media.path) for clip in clips},
        notices=notices,
        held_out=held_out,
    )
    return _lacking(whole, store, regenerate, skip_bad_media)


def overlap(train: Manifest, held_out: Manifest) -> list[str]:
    """One line for each file of `held_out` whose bytes are also in `train`, whatever the names."""
    shared = sorted(set(train.contents) & set(held_out.contents), key=held_out.contents.__getitem__)
    return [f"{held_out.contents[digest]} is also a training file: {train.contents[digest]}" for digest in shared]


def _lacking(whole: Manifest, store: CacheStore, regenerate: bool, skip_bad_media: bool) -> Manifest:
    """`whole`, whose jobs are everything that it needs, with those that the cache lacks alone."""
    black = frozenset[str]() if regenerate or MASK not in whole.jobs else known_black(store.root)
    lit = whole.lit(black)
    if skip_bad_media:  # else `precache` tells of all that must be mended, these masks among them
        lit = _less_black(lit, black)
    masks = [job.key for job in lit.jobs.get(MASK, ())]
    if not (masks and regenerate) and not lacking(store, MASK, masks):  # else `precache` finds out what is black
        lit = lit.settled(black)
    missing = {
        kind: jobs if regenerate else [job for job in jobs if job.key in absent]
        for kind, jobs in lit.jobs.items()
        for absent in [() if regenerate else lacking(store, kind, [job.key for job in jobs])]
    }
    counts = {kind: Count(len(jobs), len(jobs) - len(missing[kind])) for kind, jobs in lit.jobs.items()}
    return replace(lit, jobs=missing, counts=counts)


def _less_black(lit: Manifest, black: Container[str]) -> Manifest:
    """Without the samples that have but black masks, which nobody need make again to know it."""
    masks = [job for job in lit.jobs.get(MASK, ()) if isinstance(job, MaskJob) and job.key in black]
    lost = {job.key: black_mask(job) for job in masks}
    if lost and not any(entry.is_free_of(lost) for entry in lit.entries):
        raise ValueError(nothing_left_without(lit, lost))
    return lit.without(lost) if lost else lit


def black_mask(job: MaskJob) -> Skipped:
    """What is told of a mask that is known to be black."""
    return Skipped(job.path, why_black(job), bad=True, black=True)


def nothing_left_without(manifest: Manifest, failed: Mapping[str, Skipped]) -> str:
    """The error of a dataset that has no sample free of `failed`, the cache's key -> why."""
    folders = ", ".join(dict.fromkeys(str(group.path) for group in manifest.groups))
    lost = manifest.without(failed).skipped[len(manifest.skipped) :]
    lines = "".join(f"\n  {item.path}: {item.reason}" for item in lost)
    return f"no sample is left of {folders}; mend some of these at least:{lines}"


def _nothing_left(directories: Sequence[DirectorySettings], skipped: Sequence[Skipped]) -> str:
    folders = ", ".join(str(settings.path) for settings in directories)
    if not skipped:
        return f"no media files in {folders}"
    lines = "".join(f"\n  {item}" for item in skipped[:_FIRST_REASONS])
    more = f"\n  and {len(skipped) - _FIRST_REASONS} more" if len(skipped) > _FIRST_REASONS else ""
    return f"nothing to train on in {folders}; left out:{lines}{more}"


# --- entries and jobs -------------------------------------------------------------------------------------------------


def _collect(
    clips: Sequence[Clip], groups: Sequence[Group], keys: Keys, spec: MediaSpec
) -> tuple[list[Entry], dict[str, dict[str, Job]], str]:
    """The entries, everything that must be in the cache by kind and key, and the key of the empty caption."""
    jobs: dict[str, dict[str, Job]] = {kind: {} for kind in keys.kinds}

    @cache  # captions repeat by their weights, and a file's with each of its clips
    def want(caption: str) -> str:
        key = keys.text(caption)
        jobs[TEXT].setdefault(key, CaptionJob(key, caption))
        return key

    starts: dict[Path, set[Fraction]] = {}
    for clip in clips:
        starts.setdefault(clip.media.path, set()).add(clip.start)
    entries = []
    for clip in clips:
        media, media_keys, mask_keys = clip.media, (), ()
        for turn in clip.each_turn():
            when = (turn.start, turn.fps, turn.bucket, turn.source_fps, turn.fill)
            source = (media.path, media.is_video, *when, turn.framing, media.is_video * media.width * media.height)
            found = keys.media(turn)
            media_keys += found
            for kind, key in zip(keys.media_kinds, found, strict=True):
                jobs[kind].setdefault(key, PixelJob(key, *source))
            if mask := keys.mask(turn, spec):
                jobs.setdefault(MASK, {}).setdefault(mask.key, mask)
                mask_keys += (mask.key,)
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
                weight=media.weight * groups[clip.group].weight,
                mask_keys=mask_keys,
                mask=str(media.mask.path) if media.mask else "",
            )
        )
    return entries, jobs, want("") if TEXT in keys.kinds else ""


# --- as JSON ----------------------------------------------------------------------------------------------------------


def _to_json(manifest: Manifest) -> dict[str, Any]:
    clips: dict[tuple[Any, ...], int] = {}  # what is decoded -> its row; several encoders look at the same clip

    def of_pixels(job: PixelJob) -> list[Any]:
        return [job.key, clips.setdefault(job[1:], len(clips))]

    row: dict[str, Callable[[Any], Any]] = {TEXT: list, MASK: MaskJob.row}  # of a job, by kind
    jobs = {kind: [*map(row.get(kind, of_pixels), wanted)] for kind, wanted in manifest.jobs.items()}
    return {
        "media_kinds": manifest.entries[0].media_kinds if manifest.entries else (),
        "entries": [
            [e.sample_id, e.name, e.bucket, e.group, e.media_keys, e.text_keys, e.weight, e.mask_keys, e.mask]
            for e in manifest.entries
        ],
        "groups": [[str(group.path), *group[1:]] for group in manifest.groups],
        "skipped": [[str(item.path), *item[1:]] for item in manifest.skipped],
        "clips": [
            [str(path), is_video, str(start), str(fps), bucket, str(source_fps), fill, framing and framing.row(), px]
            for path, is_video, start, fps, bucket, source_fps, fill, framing, px in clips
        ],
        "jobs": jobs,
        "counts": manifest.counts,
        "empty_text_key": manifest.empty_text_key,
        "contents": manifest.contents,
        "notices": manifest.notices,
        "held_out": manifest.held_out,
    }


def _from_json(content: Mapping[str, Any]) -> Manifest:
    kinds = tuple(content["media_kinds"])
    clips = [
        (
            *(Path(path), is_video, Fraction(start), Fraction(fps), Bucket(*bucket), Fraction(taken)),
            *(fill and Fill(*fill), framing and Framing.of_row(framing), px),
        )
        for path, is_video, start, fps, bucket, taken, fill, framing, px in content["clips"]
    ]

    def of_pixels(row: Any) -> Job:
        return PixelJob(row[0], *clips[row[1]])

    job: dict[str, Callable[[Any], Job]] = {TEXT: CaptionJob._make, MASK: MaskJob.of_row}  # by kind
    return Manifest(
        entries=[
            Entry(sample_id, name, Bucket(*bucket), group, kinds, tuple(media), tuple(text), weight, tuple(masks), mask)
            for sample_id, name, bucket, group, media, text, weight, masks, mask in content["entries"]
        ],
        groups=[Group(Path(path), *rest) for path, *rest in content["groups"]],
        skipped=[Skipped(Path(path), *rest) for path, *rest in content["skipped"]],
        jobs={kind: [*map(job.get(kind, of_pixels), rows)] for kind, rows in content["jobs"].items()},
        counts={kind: Count(*count) for kind, count in content["counts"].items()},
        empty_text_key=content["empty_text_key"],
        contents=content["contents"],
        notices=content["notices"],
        held_out=content["held_out"],
    )
