"""What a dataset comes to, found out before anything is encoded: the part of `--plan` that shows nothing."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from models import family_class
from models.base import Outline
from utils import dist
from utils.config.load import ConfigError, LoadedConfig, load_config
from utils.config.rules import check_paths, check_rules
from utils.config.schema import RunConfig
from utils.data.black_masks import known_black
from utils.data.cache import CacheStore
from utils.data.cutting import cut_dataset
from utils.data.findings import TRAIN_AND_EVAL, Finding, Measured, findings
from utils.data.inspection import LOOKS_FILE, look_at, view_of
from utils.data.keys import Keys
from utils.data.listing import Skipped
from utils.data.manifest import Count, Group, Job, Manifest, black_mask, uses_left_out
from utils.data.masks import MaskJob
from utils.data.plan import EpochPlan
from utils.data.precache import precache
from utils.data.records import MASK, Bucket, Clip, Entry
from utils.data.room import unwritable
from utils.data.stat_index import StatIndex
from utils.data.whole import lacking
from utils.data.workers import Progress
from utils.monitor import console as show
from utils.train.order import never_used, plan_of, smaller_batches
from utils.train.prepare import DEFAULT_WORKERS, open_cache, ring_share

TRAIN = "train"  # the training set's name in what is told
PLAN_FOLDER = "plan"  # in output_dir
TOKENS_A_WORD = 4 / 3  # of English, a rule of thumb: for the size of the cache where there is no tokenizer


@dataclass
class Survey:
    """What was found out."""

    loaded: LoadedConfig
    outline: Outline
    ranks: int
    workers: int
    clips: list[tuple[str, Clip]] = field(default_factory=list)  # with the dataset's name; the training set's first
    skipped: list[tuple[str, Skipped]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)  # what was done to clips
    black: frozenset[str] = frozenset()  # keys of loss masks: uses of clips that are left out
    measured: list[Measured] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    plan: EpochPlan | None = None  # None where there is nothing to train on

    @property
    def config(self) -> RunConfig:
        return self.loaded.run

    @property
    def folder(self) -> Path:
        return self.config.output_dir / PLAN_FOLDER

    @property
    def steps(self) -> int:
        """Of the whole run."""
        steps = self.plan.first_step(self.config.epochs + 1) if self.plan else 0
        return min(steps, self.config.max_steps or steps)

    @property
    def num_masked(self) -> int:
        """Clips with a loss mask, of all datasets."""
        return sum(clip.media.mask is not None for _, clip in self.clips)

    def datasets(self) -> dict[str, Sequence]:
        """The directories of each dataset."""
        others = {name: dataset.directory for name, dataset in self.loaded.eval_datasets.items()}
        return {TRAIN: self.loaded.dataset.directory, **others}

    def caption_length(self, caption: str) -> int:
        """In tokens, or in words where there is no tokenizer."""
        count = self.outline.count_caption_tokens
        return count(caption) if count else len(caption.split())


def begin(flags: argparse.Namespace) -> Survey:
    """The config, checked as for a start, less what only weights can tell."""
    loaded = load_config(flags.config, flags.set)
    outline = family_class(loaded.family_name).outline(loaded.model)
    # without the launcher: as many ranks as hold one copy of the model
    ranks = dist.world_size() if "WORLD_SIZE" in os.environ else loaded.run.pipeline_stages
    errors = check_rules(loaded, ranks, outline.media) + check_paths(loaded, weights=False)
    if errors:
        raise ConfigError(errors)
    workers = loaded.run.map_num_proc or max(1, min(DEFAULT_WORKERS, os.cpu_count() or 1))
    return Survey(loaded, outline, ranks, workers)


def explore(survey: Survey, progress: Progress) -> None:
    """Scan, cut and look at every dataset, and plan the first."""
    store = open_cache(survey.config.cache_dir)
    for name, directories in survey.datasets().items():
        cut = cut_dataset(
            directories,
            spec=survey.outline.media,
            clip_mode=survey.config.video_clip_mode,
            store=store,
            workers=survey.workers,
            progress=progress,
        )
        survey.clips += [(name, clip) for clip in cut.clips]
        survey.skipped += [(name, item) for item in cut.skipped]
        survey.notices += cut.notices
    try_masks(survey, store, progress)
    measure(survey, store, progress)
    entries = [Entry("", "", clip.bucket, clip.group, (), (), ()) for name, clip in survey.clips if name == TRAIN]
    groups = [Group.of(folder) for folder in survey.loaded.dataset.directory]
    if entries:
        train = Manifest(entries, groups, [], {}, {}, "")
        data_ranks = survey.ranks // survey.config.pipeline_stages
        survey.plan = plan_of(survey.config, train, data_ranks, survey.outline.tokens)


def try_masks(survey: Survey, store: CacheStore, progress: Progress) -> None:
    """Make the loss masks, which takes no weights; clips with one that cannot be used are left out, and the uses of
    others under which nothing would be trained."""
    wanted, known = masks_of(survey), known_black(store.root)
    by_clip = [[job.key for job in masks_by_turn(survey, clip)] for _, clip in survey.clips]
    absent = lacking(store, MASK, wanted) - known
    failed, black = _make_masks(survey, store, [wanted[key] for key in wanted if key in absent], progress)
    survey.black = black | known.intersection(wanted)
    failed |= {key: black_mask(wanted[key]) for key in survey.black}
    lost: dict[tuple[str, Skipped], None] = {}  # a file's clips may all fail for one reason
    kept, left_out = [], []
    for (name, clip), keys in zip(survey.clips, by_clip, strict=True):
        unusable = [key for key in keys if key in failed]
        if unusable and (len(unusable) == len(keys) or not survey.black.issuperset(unusable)):
            why = next(failed[key] for key in unusable)
            mask = clip.media.mask.path if clip.media.mask else why.path  # masks of equal bytes are looked at once
            lost[name, why._replace(path=mask, reason=f"as the mask of {clip.media.path.name}: {why.reason}")] = None
        else:
            kept.append((name, clip))
            left_out += [len(unusable)] if unusable else []
    survey.clips, survey.skipped = kept, [*survey.skipped, *lost]
    if left_out:
        survey.notices.append(uses_left_out(sum(left_out), len(left_out)))


def _make_masks(
    survey: Survey, store: CacheStore, jobs: list[Job], progress: Progress
) -> tuple[dict[str, Skipped], frozenset[str]]:
    """Why some could not be made, by key, and which of these are black."""
    if jobs and (why := unwritable(store.root)):
        masks = show.counted(len(jobs), "loss mask")
        survey.notices.append(f"cache_dir = '{store.root}' cannot be written to ({why}), so {masks} could not be tried")
    elif jobs:
        report = precache(
            [Manifest([], [], [], {MASK: jobs}, {MASK: Count(len(jobs), 0)}, "")],
            (),
            store,
            device=torch.device("cpu"),
            workers=survey.workers,
            batch_size=1,
            progress=progress,
            decode_timeout_s=survey.config.decode_timeout_s,
            ring_bytes=ring_share(survey.config.cache_ram_gb),
            skip_bad_media=True,
        )
        return report.failed, report.black
    return {}, frozenset()


def measure(survey: Survey, store: CacheStore, progress: Progress) -> None:
    """Look at the clips; those that cannot be decoded are left out."""
    looks, reasons = look_at(
        [clip for _, clip in survey.clips],
        workers=survey.workers,
        index=StatIndex(store.root / LOOKS_FILE),
        progress=progress,
        timeout_s=survey.config.decode_timeout_s,
    )
    lost = {(name, clip.media.path): reasons[view] for name, clip in survey.clips if (view := view_of(clip)) in reasons}
    survey.skipped += [(name, Skipped(path, reason, bad=True)) for (name, path), reason in lost.items()]
    survey.clips = [(name, clip) for name, clip in survey.clips if view_of(clip) not in reasons]
    count = survey.outline.count_caption_tokens
    datasets = survey.datasets()
    survey.measured = [
        Measured(
            name,
            clip,
            looks[view_of(clip)],
            tuple(map(count, clip.media.captions)) if count else (),
            datasets[name][clip.group].trigger_word,
        )
        for name, clip in survey.clips
    ]
    survey.findings = findings(survey.measured, survey.outline.max_caption_tokens)


def decoded(survey: Survey) -> dict[tuple, Bucket]:
    """Bucket of each clip that encoders will see, equal ones once."""
    return {
        (clip.media.content_hash, turn.start, turn.fps, turn.source_fps, turn.fill, *framed): turn.bucket
        for name, clip in survey.clips
        for turn in used_turns(survey, name, clip)
        for framed in [(turn.framing, turn.bucket)]
    }


def used_turns(survey: Survey, name: str, clip: Clip) -> Sequence[Clip]:
    """What is encoded of a clip of the dataset `name`: of held-out ones the first turn alone."""
    turns: Sequence[Clip] = clip.each_turn()
    if survey.black:
        made = [(turn, Keys.mask(turn, survey.outline.media)) for turn in turns]
        turns = [turn for turn, job in made if not job or job.key not in survey.black]
    return turns if name == TRAIN else turns[:1]


def masks_of(survey: Survey) -> dict[str, MaskJob]:
    """Loss masks that are made, by their key."""
    return {job.key: job for _, clip in survey.clips for job in masks_by_turn(survey, clip)}


def masks_by_turn(survey: Survey, clip: Clip) -> list[MaskJob]:
    """The mask of each turn of a clip; none where all of it counts."""
    made = (Keys.mask(turn, survey.outline.media) for turn in clip.each_turn())
    return [job for job in made if job]


def cache_size(survey: Survey) -> dict[str, tuple[int, int]]:
    """Distinct entries and bytes of their tensors, by kind of encoder; empty where the family tells no sizes."""
    sizes = survey.outline.cache_bytes
    if sizes is None:
        return {}
    counts: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for bucket in decoded(survey).values():
        for kind, size in sizes(*bucket).items():
            counts[kind] += 1
            total[kind] += size
    if masks := masks_of(survey):
        counts[MASK], total[MASK] = len(masks), sum(job.cells for job in masks.values())
    captions = {"", *(caption for _, clip in survey.clips for caption in clip.media.captions)}
    factor = 1 if survey.outline.count_caption_tokens else TOKENS_A_WORD
    most = survey.outline.max_caption_tokens or 2**30
    tokens = sum(min(most, max(1, round(factor * survey.caption_length(caption)))) for caption in captions)
    counts["text"], total["text"] = len(captions), tokens * survey.outline.caption_token_bytes
    return {kind: (counts[kind], total[kind]) for kind in counts}


def refusals(survey: Survey) -> list[str]:
    """Why the start would stop, or leave clips unused."""
    told = stops(survey)
    bad = sum(item.bad for _, item in survey.skipped)
    if bad and survey.config.skip_bad_media:
        told.append(f"the start will go on without {show.counted(bad, 'file')} that cannot be read")
    if survey.plan is not None and survey.steps:
        told += never_used(survey.config, survey.plan, survey.config.epochs)
    return told


def stops(survey: Survey) -> list[str]:
    """Why the start would stop."""
    told = []
    bad = sum(item.bad for _, item in survey.skipped)
    if bad and not survey.config.skip_bad_media:
        told.append(f"the start will stop at {show.counted(bad, 'file')} that cannot be read")
    if shared := len({finding.path for finding in survey.findings if finding.kind == TRAIN_AND_EVAL}):
        told.append(f"the start will stop at {show.counted(shared, 'file')} in both training and eval data")
    for name in list(survey.datasets())[1:]:
        if not any(of == name for of, _ in survey.clips):
            told.append(f"the start will stop: nothing is left in {name} to evaluate")
    if survey.plan is None:
        folders = ", ".join(str(folder.path) for folder in survey.loaded.dataset.directory)
        found = "is left to train on" if survey.skipped else "to train on: there are no media files"
        told.append(f"nothing {found} in {folders}")
    elif not survey.steps:
        told.append(f"no bucket fills a single batch in this run; {smaller_batches(survey.config)}")
    return told
