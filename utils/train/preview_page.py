"""A survey as the values that the page is made of, pictures included."""

from collections import defaultdict
from collections.abc import Sequence

from utils.data.findings import Finding, Measured
from utils.data.records import Clip
from utils.data.thumbnails import pictures
from utils.data.workers import Progress
from utils.monitor import console as show
from utils.monitor.report import Card, Histogram, LeftOut, Picture, Report
from utils.train import tell
from utils.train.survey import TRAIN, Survey, cache_size, refusals

# most clips -> longer side of a frame, px. A frame of 128 px takes 3 to 5 KB as the page has it.
SIDES_PX = ((200, 208), (600, 160), (1200, 128), (2000, 112))
MOST_CARDS = 2000  # a page with more opens slowly; those with warnings come first
MOST_LEFT_OUT = 5000  # rows of 300 bytes


def report_of(survey: Survey, progress: Progress) -> Report:
    """Decodes three frames of every clip that is shown."""
    warnings: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in survey.findings:
        warnings[finding.dataset, finding.path].append(finding)
    shown = chosen(survey.measured, warnings)
    side_px = next((side for most, side in SIDES_PX if len(shown) <= most), SIDES_PX[-1][1])
    drawn = pictures([item.clip for item in shown], side_px=side_px, workers=survey.workers, progress=progress)
    cards = [
        card_of(item, warnings[item.dataset, str(item.clip.media.path)], Picture(*picture) if picture else None)
        for item, picture in zip(shown, drawn, strict=True)
    ]
    rows, arithmetic = tell.epoch_rows(survey.plan, survey.outline.tokens) if survey.plan else ([], "")
    return Report(
        title=survey.outline.title,
        subtitle=f"What {survey.config.dataset} comes to, before anything is encoded",
        notes=[*survey.outline.notes, *survey.notices, *refusals(survey), *_not_shown(survey, shown, warnings)],
        facts=facts(survey),
        arithmetic=arithmetic,
        buckets=rows,
        histograms=histograms(survey),
        cards=cards,
        left_out=[LeftOut(name, str(item.path), item.reason) for name, item in survey.skipped[:MOST_LEFT_OUT]],
    )


def chosen(clips: Sequence[Measured], warnings: dict[tuple[str, str], list[Finding]]) -> list[Measured]:
    """As many clips as a page holds, in their order."""
    if len(clips) <= MOST_CARDS:
        return list(clips)
    order = sorted(range(len(clips)), key=lambda i: not warnings.get((clips[i].dataset, str(clips[i].clip.media.path))))
    return [clips[i] for i in sorted(order[:MOST_CARDS])]


def _not_shown(survey: Survey, shown: Sequence[Measured], warnings: dict[tuple[str, str], list[Finding]]) -> list[str]:
    """What the page leaves out to stay small."""
    told = []
    if rest := len(survey.measured) - len(shown):
        warned = sum(bool(warnings.get((item.dataset, str(item.clip.media.path)))) for item in survey.measured)
        which = (
            f", {show.grouped(warned - MOST_CARDS)} of them with warnings,"
            if warned > MOST_CARDS
            else " without warnings"
        )
        told.append(f"{show.counted(rest, 'clip')}{which} are not shown, to keep the page small")
    if (rest := len(survey.skipped) - MOST_LEFT_OUT) > 0:
        told.append(f"{show.counted(rest, 'more file')} that are left out stand in {survey.folder / 'skipped.jsonl'}")
    return told


def card_of(item: Measured, found: Sequence[Finding], picture: Picture | None) -> Card:
    clip = item.clip
    at = f" @ {float(clip.start):.2f} s" if clip.start else ""
    return Card(
        dataset=item.dataset,
        name=clip.media.path.name + at,
        path=str(clip.media.path),
        bucket=str(clip.bucket),
        source=source_of(clip),
        captions=clip.media.captions,
        warnings=[(finding.kind, finding.text) for finding in found],
        picture=picture,
    )


def source_of(clip: Clip) -> str:
    """`1920x1080, 24 fps, 4.2 s`."""
    media = clip.media
    size = f"{media.width}x{media.height}"
    return f"{size}, {float(media.fps):.4g} fps, {float(media.duration):.1f} s" if media.is_video else size


def facts(survey: Survey) -> list[tuple[str, str]]:
    """The numbers at the top of the page."""
    train = sum(name == TRAIN for name, _ in survey.clips)
    held_out = len(survey.clips) - train
    warned = len({(finding.dataset, finding.path) for finding in survey.findings})
    told = [(show.grouped(train), "clips to train on")]
    if held_out:
        told.append((show.grouped(held_out), "clips held out"))
    if survey.num_masked:
        told.append((show.grouped(survey.num_masked), "clips with a loss mask"))
    told.append((show.grouped(len(survey.skipped)), "files left out"))
    told.append((show.grouped(warned), "files with warnings"))
    told.append((show.grouped(survey.steps), f"steps in {show.counted(survey.config.epochs, 'epoch')}"))
    if sizes := cache_size(survey):
        told.append((show.short_bytes(sum(size for _, size in sizes.values())), "in the cache"))
    return told


def histograms(survey: Survey) -> list[Histogram]:
    """Of files, each counted once."""
    files = {clip.media.path: clip.media for _, clip in survey.clips}.values()
    unit = "tokens" if survey.outline.count_caption_tokens else "words"
    return [
        Histogram("Length of videos, s", [float(media.duration) for media in files if media.is_video]),
        Histogram("Shorter side of files, px", [min(media.width, media.height) for media in files]),
        Histogram(f"Captions, {unit}", [survey.caption_length(text) for media in files for text in media.captions]),
    ]
