"""`--plan`: what a run would come to, told before anything is encoded; needs no GPU and no weights."""

import argparse
import os
import shutil
from collections import Counter
from pathlib import Path

from rich.console import Console

from utils import dist
from utils.config.rules import advice
from utils.data.cache import write_lines, write_whole
from utils.data.listing import by_reason
from utils.data.manifest import Group
from utils.data.pace import pixels_of, read_pace
from utils.monitor import console as show
from utils.monitor.logs import quiet_libraries, setup_logging, terminal
from utils.monitor.progress import CacheProgress
from utils.train import tell
from utils.train.order import over_budget
from utils.train.prepare import write_skipped
from utils.train.survey import TRAIN, Survey, begin, cache_size, decoded, explore, refusals, stops

EXIT_STOPS = 1


def preview(flags: argparse.Namespace) -> int:
    """Read, count, look and tell; writes the two lists, the page that was asked for, and what the cache remembers of
    the files. Returns the exit status: 1 where the start would stop.

    Raises:
        ConfigError: all that is wrong with the files.
        ValueError: the page cannot be written where it was asked for.
    """
    if not dist.is_main():
        return 0
    quiet_libraries()
    console = terminal()
    setup_logging(dist.rank(), console)
    survey = begin(flags)
    if flags.html:
        make_room(flags.html)
    introduce(console, survey)
    with CacheProgress(console) as progress:
        explore(survey, progress)
        write_lists(survey)
        conclude(console, survey)
        if flags.html:
            from utils.monitor.report import page
            from utils.train.preview_page import report_of  # brings Pillow

            write_whole(flags.html, page(report_of(survey, progress)).encode("utf-8", "replace"))
            show.show(console, show.closing_panel({"contact sheet": flags.html.absolute()}, {}, title="Open"))
    return EXIT_STOPS if stops(survey) else 0


def make_room(page: Path) -> None:
    """The folder of the page, before the looking, which takes long. Raises `ValueError` where it cannot be."""
    if page.is_dir():
        raise ValueError(f"--html {page} is a folder; name the file to write, {page / 'plan.html'}")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--html {page}: its folder cannot be made ({error.strerror}); name another") from error


def write_lists(survey: Survey) -> None:
    """`skipped.jsonl` and `warnings.jsonl`."""
    write_skipped(survey.folder / "skipped.jsonl", survey.skipped)
    write_lines(survey.folder / "warnings.jsonl", (finding._asdict() for finding in survey.findings))


# --- telling ----------------------------------------------------------------------------------------------------------


def introduce(console: Console, survey: Survey) -> None:
    """What the counting starts from."""
    config, media = survey.config, survey.outline.media
    data_ranks = survey.ranks // config.pipeline_stages
    started = "" if "WORLD_SIZE" in os.environ else "; for more, start it with deepspeed --num_gpus=N"
    stages, parallel = show.counted(config.pipeline_stages, "pipeline stage"), show.counted(data_ranks, "data rank")
    show.show(
        console,
        f"plan for {survey.outline.title} at {float(media.fps):g} frames a second, on "
        f"{show.counted(survey.ranks, 'rank')} ({stages} x {parallel}{started})",
    )
    notes = [*survey.outline.notes, *survey.loaded.notices, *advice(survey.loaded, media)]
    for note in dict.fromkeys(notes):
        show.show(console, f"note: {note}")


def conclude(console: Console, survey: Survey) -> None:
    """Everything that was found out, in tables."""
    for notice in survey.notices:
        show.show(console, f"note: {notice}")
    tell.sets(console, map(Group.of, survey.loaded.dataset.directory))
    if survey.plan:
        tell.epoch(console, survey.plan, survey.outline.tokens)
        show.show(
            console, f"{show.counted(survey.steps, 'step')} in all, in {show.counted(survey.config.epochs, 'epoch')}"
        )
    if masked := survey.num_masked:
        show.show(console, f"loss masks: {masked} of {show.counted(len(survey.clips), 'clip')} have one")
    held_out = [clip.bucket for of, clip in survey.clips if of != TRAIN]
    for note in over_budget(survey.config, survey.plan, survey.outline.tokens, held_out):
        show.show(console, f"note: {note}")
    for warning in refusals(survey):
        show.show(console, f"warning: {warning}")
    for name in list(survey.datasets())[1:]:
        buckets = Counter(str(clip.bucket) for of, clip in survey.clips if of == name)
        told = ", ".join(f"{bucket}: {count}" for bucket, count in sorted(buckets.items()))
        show.show(console, f"{name}: {show.counted(buckets.total(), 'clip')} held out ({told or 'none is left'})")
    for line in cache_lines(survey):
        show.show(console, line)
    if survey.skipped:
        rows, full_list = by_reason(item for _, item in survey.skipped), str(survey.folder / "skipped.jsonl")
        show.show(console, show.skipped_table(rows, full_list=full_list, files=len(survey.skipped)))
    if survey.findings:
        rows = [(Path(finding.path).name, finding.kind, finding.text) for finding in survey.findings]
        show.show(console, show.warning_table(rows, full_list=str(survey.folder / "warnings.jsonl")))
    elif survey.clips:
        seen = "no clip is black, frozen, letterboxed, cut within, much enlarged or there twice"
        show.show(console, f"no warnings: {seen}")


def cache_lines(survey: Survey) -> list[str]:
    """What encoding will take on disk, and what there is."""
    sizes = cache_size(survey)
    if not sizes:
        return []
    total = sum(size for _, size in sizes.values())
    place = survey.config.cache_dir
    free = shutil.disk_usage(place).free
    about = "" if survey.outline.count_caption_tokens else "about "
    time = cache_time(survey) or "How long it takes is known once the first clips are encoded"
    parts = ", ".join(
        f"{show.counted(count, tell.NOUNS.get(kind, kind))} {show.short_bytes(size)}"
        for kind, (count, size) in sizes.items()
    )
    told = [
        f"cache: {about}{show.short_bytes(total)} ({parts}) in {place}, where {show.short_bytes(free)} are free; what "
        f"is there already is not made again. {time}"
    ]
    if total > free:
        lack = show.short_bytes(total - free)
        told.append(f"warning: the cache does not fit, {lack} are wanting; set cache_dir to another disk")
    return told


def cache_time(survey: Survey) -> str:
    """What encoding all of it would take, where this cache was filled before; else nothing."""
    pace, sizes = read_pace(survey.config.cache_dir), survey.outline.cache_bytes
    if pace is None or sizes is None:
        return ""
    pixels = pixels_of(bucket for bucket in decoded(survey).values() for _ in sizes(*bucket))
    speed, on = pace.pixels / pace.seconds, f"{show.counted(pace.ranks, 'rank')} with {pace.device}"
    took = show.duration(pixels / speed)
    return (
        f"All of it would take about {took} at the pace measured here ({on}, {speed / 1e6:.3g} million pixels a second)"
    )
