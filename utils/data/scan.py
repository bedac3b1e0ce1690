"""Lists a folder's media with their captions, probed by worker processes and remembered on disk."""

import json
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from utils.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES, MediaError, Probe, probe
from utils.data.records import MediaFile
from utils.data.stat_index import StatIndex, hash_file
from utils.data.workers import Progress, Silent, WorkerLost, WorkerPool

MEDIA_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES
CAPTIONS_FILE = "captions.json"
# What lies beside media without being meant as such: captions, caches, notes.
_COMPANION_SUFFIXES = frozenset([".txt", ".json", ".jsonl", ".npz", ".safetensors", ".parquet", ".bak", ".db"])
_PROBE_TIMEOUT_S = 120.0
_PROBE_VERSION = 1  # raise it when `probe` tells other numbers of the same file
_MAX_NAMES = 5


class Skipped(NamedTuple):
    """A file that gives no sample."""

    path: Path
    reason: str  # without the file's name
    bad: bool  # it cannot be read, in contrast to being out of place or too short

    def __str__(self) -> str:
        return f"{self.path.name}: {self.reason}"


def scan_directory(
    folder: Path,
    *,
    caption_prefix: str,
    skip_empty_caption: bool,
    workers: int,
    index: StatIndex,
    progress: Progress | None = None,
) -> tuple[list[MediaFile], list[Skipped]]:
    """Every file directly in `folder`, sorted by name: usable media, and the others with the reason.

    A caption is the text of `<stem>.txt`, or what `captions.json` says of the file; then text files are not read, as in
    diffusion-pipe.

    Args:
        caption_prefix: put before every caption, without a space.
        skip_empty_caption: leave out media without a caption, else the prefix alone is the caption.
        workers: processes that read files which `index` does not know; 0 reads them in this one.

    Raises:
        ValueError: `folder` is no folder, or captions.json is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"[[directory]] path = {str(folder)!r} is not a folder")
    files = sorted(folder.iterdir())
    listed = _read_captions_json(folder / CAPTIONS_FILE)
    media, skipped = _sort_out(files)
    captions: dict[Path, tuple[str, ...]] = {}
    for path in media:
        try:
            captions[path] = _captions(path, listed, caption_prefix, skip_empty_caption)
        except _Unusable as error:
            skipped.append(Skipped(path, str(error), error.bad))
    found, unreadable = _look_at(list(captions), workers, index, progress or Silent())
    skipped += unreadable
    skipped += _captions_without_file(folder, listed, media)
    return [MediaFile(path, *found[path], captions[path]) for path in captions if path in found], skipped


# --- what lies in the folder ------------------------------------------------------------------------------------------


def _sort_out(files: Sequence[Path]) -> tuple[list[Path], list[Skipped]]:
    media, skipped = [], []
    for path in files:
        suffix = path.suffix.lower()
        if path.name.startswith(".") or (suffix in _COMPANION_SUFFIXES and not path.is_dir()):
            continue
        if path.is_dir():
            inside = sum(entry.suffix.lower() in MEDIA_SUFFIXES for entry in path.iterdir())
            if inside:
                reason = (
                    f"sub-folders are not scanned, {inside} media files are left out; give it its own [[directory]]"
                )
                skipped.append(Skipped(path, reason, bad=False))
        elif suffix in MEDIA_SUFFIXES:
            media.append(path)
        else:
            skipped.append(Skipped(path, f"is not a media file ({suffix or 'no suffix'})", bad=False))
    return media, skipped


def _look_at(
    paths: Sequence[Path], workers: int, index: StatIndex, progress: Progress
) -> tuple[dict[Path, tuple[Any, ...]], list[Skipped]]:
    """Content hash and probe of each file, as `MediaFile` takes them; from memory where nothing changed."""
    found: dict[Path, tuple[Any, ...]] = {}
    unknown = []
    for path in paths:
        remembered = index.get(path)
        if remembered is None or remembered[0] != _PROBE_VERSION:
            unknown.append(path)
        else:
            found[path] = _from_json(remembered)
    bad = []
    if unknown:
        progress.start(len(unknown), "reading media files")
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
    return [_PROBE_VERSION, hash_file(path), *size, str(held.fps), str(held.duration), held.is_video]


def reason_of(error: Exception) -> str:
    """What went wrong with a file, without its name."""
    if isinstance(error, (MediaError, WorkerLost)):
        return error.reason
    return f"{type(error).__name__}: {error}"


def _from_json(value: Sequence[Any]) -> tuple[Any, ...]:
    _, digest, width, height, frames, fps, duration, is_video = value
    return digest, *Probe(width, height, frames, Fraction(fps), Fraction(duration), is_video)


# --- captions ---------------------------------------------------------------------------------------------------------


class _Unusable(Exception):
    def __init__(self, reason: str, bad: bool) -> None:
        super().__init__(reason)
        self.bad = bad


def _captions(path: Path, listed: Mapping[str, Sequence[str]] | None, prefix: str, skip_empty: bool) -> tuple[str, ...]:
    found = _read_text(path.with_suffix(".txt")) if listed is None else listed.get(path.name, ())
    captions = [caption.strip() for caption in found]
    captions = [caption for caption in captions if caption] or captions[:1]
    if not any(captions):
        if skip_empty:
            source = CAPTIONS_FILE if listed is not None else path.with_suffix(".txt").name
            lack = "is empty" if captions else "is missing"
            raise _Unusable(
                f"its caption in {source} {lack}; write one, or set skip_empty_caption = false to train without",
                bad=False,
            )
        captions = [""]
    return tuple(prefix + caption for caption in captions)


def _read_text(path: Path) -> Sequence[str]:
    try:
        return [path.read_bytes().decode("utf-8-sig")]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise _Unusable(
            f"its caption {path.name} is not UTF-8 (byte {error.start}); save it as UTF-8", bad=True
        ) from None


def _read_captions_json(path: Path) -> dict[str, list[str]] | None:
    """File name -> captions; None where there is no captions.json."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: cannot be read as UTF-8 JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object of file names and captions, is a {type(content).__name__}")
    return {name: _as_list(path, name, value) for name, value in content.items()}


def _as_list(path: Path, name: str, value: Any) -> list[str]:
    captions = [value] if isinstance(value, str) else value
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{path}: {name!r} must have a caption or a list of captions, has {value!r}")
    return captions


def _captions_without_file(folder: Path, listed: Mapping[str, Any] | None, media: Iterable[Path]) -> list[Skipped]:
    lost = sorted(set(listed or ()) - {path.name for path in media})
    if not lost:
        return []
    names = ", ".join(lost[:_MAX_NAMES]) + (", ..." if len(lost) > _MAX_NAMES else "")
    return [Skipped(folder / CAPTIONS_FILE, f"names {len(lost)} files that are not in the folder: {names}", bad=False)]
