"""Media files with their captions, of what a [[directory]] names: probed by worker processes, remembered on disk."""

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from utils.data.archives import Archives
from utils.data.captions import CaptionSettings, Unusable, read_caption_file, trained_captions, trigger_notices
from utils.data.listing import Item, Skipped
from utils.data.mask_files import MaskFolder, fitting_mask, without_mask
from utils.data.media import MediaError, Probe, probe
from utils.data.records import MediaFile
from utils.data.sources import list_source
from utils.data.stat_index import StatIndex, hash_file
from utils.data.workers import Progress, Silent, WorkerLost, WorkerPool

_PROBE_TIMEOUT_S = 120.0
_fraction = lru_cache(2**16)(Fraction)  # files of one dataset have few rates and lengths, and to read one takes 5 us
_PROBE_VERSION = 3  # raise it when `probe` tells other numbers of the same file


class ScanSettings(CaptionSettings, Protocol):
    """What a `[[directory]]` says of where its media and captions are."""

    @property
    def path(self) -> Path | str: ...

    @property
    def recursive(self) -> bool: ...

    @property
    def media(self) -> str:
        """'all', 'videos' or 'images'."""

    @property
    def mask_path(self) -> Path | None:
        """The folder of the loss masks."""

    @property
    def default_mask_file(self) -> Path | None:
        """The mask of files that have none there."""


class Scan(NamedTuple):
    """What a `[[directory]]` comes to."""

    media: list[MediaFile]
    skipped: list[Skipped]
    notices: list[str]  # what a person should know of


def scan_directory(
    settings: ScanSettings,
    *,
    workers: int,
    index: StatIndex,
    archives: Path,
    progress: Progress | None = None,
) -> Scan:
    """Every file that `settings.path` names, in an order that is the same everywhere: usable media, and the others with
    the reason.

    Args:
        workers: processes that read files which `index` does not know; 0 reads them in this one.
        archives: the folder where tar archives are unpacked.

    Raises:
        ValueError: the path is no folder, index or archive, or its captions.json or index is damaged; or that of the
            masks is no folder of its own.
    """
    path = Path(settings.path)
    masks = MaskFolder(Path(settings.mask_path), path) if settings.mask_path else None
    items, skipped, notices = list_source(
        path,
        recursive=settings.recursive,
        caption_extension=settings.caption_extension,
        archives=Archives(archives, index),
        masks=masks,
    )
    notices += masks.notices() if masks else ()
    captioned: list[tuple[Item, tuple[str, ...]]] = []
    for item in items:
        try:
            captioned.append((item, _captions(item, settings)))
        except Unusable as error:
            skipped.append(Skipped(item.path, str(error), error.bad))
    distinct = dict.fromkeys(item.path for item, _ in captioned)  # an index may use several parts of one video
    found, unreadable = _look_at(list(distinct), workers, index, progress or Silent(), "reading media files")
    skipped += unreadable
    masked = _Masks(settings, [item for item, _ in captioned], workers, index, progress or Silent())
    media: list[MediaFile] = []
    for item, captions in captioned:
        if item.path in found:
            digest, held = found[item.path]
            file = MediaFile(item.path, digest, *held[:6], captions, special=held.special, weight=item.weight)
            if settings.media == ("images" if file.is_video else "videos"):
                skipped.append(Skipped(item.path, _not_wanted(file), bad=False))
                continue
            try:
                media.append(_part(item, masked.given(item, file)))
            except Unusable as error:
                skipped.append(Skipped(item.path, str(error), error.bad))
    notices += [*trigger_notices([file.captions for file in media], settings), *masked.notices(media)]
    return Scan(media, skipped, [f"{path}: {notice}" for notice in notices])


def _captions(item: Item, settings: CaptionSettings) -> tuple[str, ...]:
    if item.written is not None:
        return trained_captions(item.written, item.source, settings)
    beside = item.path.with_suffix(settings.caption_extension)
    return trained_captions(read_caption_file(beside), beside.name, settings)


def _not_wanted(media: MediaFile) -> str:
    kind, others = ("a video", "images") if media.is_video else ("an image", "videos")
    return f"is {kind}, and of this folder only {others} are used"


def _part(item: Item, media: MediaFile) -> MediaFile:
    """`media` cut down to the part that `item` leaves of it."""
    if not item.start and item.end is None:
        return media
    if not media.is_video:
        raise Unusable(f"{item.source}: start and end are for videos, and this is an image", bad=True)
    end = media.duration if item.end is None else min(item.end, media.duration)
    # No frame may be asked for that comes on show at `end` or later.
    frames = math.floor((end - item.start) * media.fps)
    if frames < 1:
        part, whole = f"{float(item.start):g} s to {float(end):g} s", f"{float(media.duration):g} s"
        raise Unusable(f"{item.source}: there is no frame from {part}; the video has {whole}", bad=True)
    return replace(media, frames=frames, duration=frames / media.fps, offset=item.start)


class _Masks:
    """The loss masks of all files of a `[[directory]]`, looked at as these are."""

    def __init__(
        self, settings: ScanSettings, items: Sequence[Item], workers: int, index: StatIndex, progress: Progress
    ) -> None:
        self._folder, self._default = settings.mask_path, settings.default_mask_file
        distinct = dict.fromkeys(path for item in items if (path := self._path(item)))
        self._found, unreadable = _look_at(list(distinct), workers, index, progress, "reading masks")
        self._reasons = {item.path: item.reason for item in unreadable}

    def _path(self, item: Item) -> Path | None:
        return item.mask or self._default

    def given(self, item: Item, media: MediaFile) -> MediaFile:
        """`media` with its mask; raises `Unusable` where that cannot be read, or does not fit."""
        path = self._path(item)
        if path is None:
            return media
        if path not in self._found:
            raise Unusable(f"its mask {path} cannot be used: {self._reasons[path]}", bad=True)
        return replace(media, mask=fitting_mask(media, path, *self._found[path]))

    def notices(self, media: Sequence[MediaFile]) -> list[str]:
        without = sum(file.mask is None for file in media)
        asked = self._folder or without < len(media)
        return [without_mask(without, len(media), self._folder)] if asked and without else []


# --- what the files hold ----------------------------------------------------------------------------------------------


def _look_at(
    paths: Sequence[Path], workers: int, index: StatIndex, progress: Progress, label: str
) -> tuple[dict[Path, tuple[str, Probe]], list[Skipped]]:
    """Content hash and probe of each file; from memory where nothing changed."""
    found: dict[Path, tuple[str, Probe]] = {}
    unknown: list[Path] = []
    bad: list[Skipped] = []
    for path in paths:
        try:
            remembered = index.get(path)
        except OSError as error:  # a link to nothing, or a folder that may not be entered
            bad.append(Skipped(path, f"cannot be looked at ({error.strerror})", bad=True))
            continue
        if remembered is None or remembered[0] != _PROBE_VERSION:
            unknown.append(path)
        else:
            found[path] = _from_json(remembered)
    if unknown:
        progress.start(len(unknown), label)
        with WorkerPool(describe, min(workers, len(unknown)), _PROBE_TIMEOUT_S) as pool:
            for outcome in pool.run(unknown, ahead=4 * max(1, workers), name=lambda path: path.name):
                path = outcome.item
                if outcome.error is None:
                    index.put(path, outcome.value)
                    found[path] = _from_json(outcome.value)
                else:
                    bad.append(Skipped(path, reason_of(outcome.error), bad=True))
                progress.advance(1, path.name)
        progress.done()
    return found, bad


def describe(path: Path) -> list[Any]:
    """What is remembered of a file, JSON-able; runs in the worker processes."""
    held = probe(path)
    size = (held.width, held.height, held.frames)
    return [_PROBE_VERSION, hash_file(path), *size, str(held.fps), str(held.duration), held.is_video, held.special]


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its name."""
    if isinstance(error, (MediaError, WorkerLost)):
        return error.reason
    return f"{type(error).__name__}: {error}"


def _from_json(value: Sequence[Any]) -> tuple[str, Probe]:
    _, digest, width, height, frames, fps, duration, is_video, special = value
    return digest, Probe(width, height, frames, _fraction(fps), _fraction(duration), is_video, special)
