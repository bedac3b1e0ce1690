"""Lists what a [[directory]] names: a folder with its sub-folders and archives, an index file, or an archive."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from utils.data.archives import ARCHIVE_SUFFIX, Archives
from utils.data.captions import CAPTIONS_FILE, Unusable, Weighted, read_captions_json
from utils.data.index_file import READERS, list_index
from utils.data.listing import Item, Listing, Skipped, plural, shown, some
from utils.data.mask_files import MaskFolder
from utils.data.media import MEDIA_SUFFIXES

SOURCE_SUFFIXES = frozenset([*READERS, ARCHIVE_SUFFIX])  # of files that can stand in a folder's place
# What lies beside media without being meant as such: captions, caches, notes.
_COMPANION_SUFFIXES = frozenset([".txt", ".json", ".jsonl", ".npz", ".safetensors", ".parquet", ".bak", ".db"])
Listed = Mapping[str, Sequence[Weighted]] | None  # captions.json


def list_source(
    path: Path, *, recursive: bool, caption_extension: str, archives: Archives, masks: MaskFolder | None = None
) -> Listing:
    """The media that `path` names, in an order that is the same everywhere, and everything else with the reason.

    Names in a folder's captions.json are paths from that folder on; where there is one, text files are not read, as in
    diffusion-pipe. An archive in a folder counts as its members: their captions are in the archive's own captions.json,
    else in the folder's, else in text files beside them in the archive.

    Args:
        recursive: look into sub-folders too. Hidden ones are passed over, and of several ways to one folder the first
            is taken.
        caption_extension: what captions in text files are called: `.txt`.
        masks: where each file's mask is looked for, by the file's path from `path`'s folder or archive on. Where that
            is among the media, nothing in it counts as media.

    Raises:
        ValueError: `path` is none of these, or an index or captions.json is damaged.
    """
    suffix = path.suffix.lower()
    if path.is_file() and suffix in READERS:
        return list_index(path, masks)
    lister = _Lister(recursive, caption_extension, archives, masks)
    if path.is_file() and suffix == ARCHIVE_SUFFIX:
        lister.archive(path, None)
    elif path.is_dir():
        lister.folder(path)
    else:
        kinds = ", ".join(sorted(SOURCE_SUFFIXES))
        raise ValueError(f"[[directory]] path = {str(path)!r} is not a folder, nor a file that ends in {kinds}")
    return Listing(lister.items, lister.skipped, [])


class _Lister:
    """Gathers one folder or archive with all that is in it."""

    def __init__(self, recursive: bool, caption_extension: str, archives: Archives, masks: MaskFolder | None) -> None:
        self.items: list[Item] = []
        self.skipped: list[Skipped] = []
        self._recursive, self._archives, self._masks = recursive, archives, masks
        self._companions = _COMPANION_SUFFIXES | {caption_extension.lower()}

    def folder(self, folder: Path) -> None:
        """Everything in `folder`."""
        listed = read_captions_json(folder / CAPTIONS_FILE)
        named: set[str] = set()
        for name in self._files(folder, self._recursive):
            if name.lower().endswith(ARCHIVE_SUFFIX):
                named |= self.archive(folder / name, listed)
            else:
                self._file(folder, name, listed)
                named.add(name)
        self._captions_without_file(folder, listed, named)

    def archive(self, path: Path, listed: Listed) -> set[str]:
        """Every member of `path`; their names."""
        folder, refused = self._archives.unpack(path)
        self.skipped += refused
        if folder is None:
            return set()
        own = read_captions_json(folder / CAPTIONS_FILE)
        named = set(self._files(folder, recursive=True))
        for name in sorted(named):
            self._file(folder, name, listed if own is None else own)
        self._captions_without_file(folder, own, named)
        return named

    def _file(self, folder: Path, name: str, listed: Listed) -> None:
        """Sorts in one file, which is no archive to be read."""
        suffix = _suffix(name)
        if suffix in MEDIA_SUFFIXES:
            written = None if listed is None else listed.get(name, ())
            try:
                mask = self._masks.of(name) if self._masks else None
            except Unusable as error:
                self.skipped.append(Skipped(folder / name, str(error), error.bad))
                return
            self.items.append(Item(folder / name, written, CAPTIONS_FILE, mask=mask))
        elif name.endswith("/" + CAPTIONS_FILE):
            reason = f"is not read: the names in it belong into {folder / CAPTIONS_FILE}, with their folders in front"
            self.skipped.append(Skipped(folder / name, reason, bad=False))
        elif suffix not in self._companions:
            self.skipped.append(Skipped(folder / name, f"is not a media file ({suffix or 'no suffix'})", bad=False))

    def _captions_without_file(self, folder: Path, listed: Listed, named: set[str]) -> None:
        if lost := set(listed or ()) - named:
            are = "is" if len(lost) == 1 else "are"
            reason = f"names {plural(len(lost), 'file')} that {are} not in the folder: {some(lost)}"
            self.skipped.append(Skipped(folder / CAPTIONS_FILE, reason, bad=False))

    def _files(
        self, folder: Path, recursive: bool, inside: str = "", seen: set[tuple[int, int]] | None = None
    ) -> Iterator[str]:
        """Names from `folder` on of all files in `inside` that are not hidden, sorted, a sub-folder's in its place.

        Names and not paths: at 100,000 files pathlib's own work takes longer than the disk's.
        """
        here = folder / inside
        seen = set() if seen is None else seen
        info = here.stat()
        if (info.st_dev, info.st_ino) in seen:  # a link; it may lead in a circle
            reason = "leads to a folder that was read already, under another name"
            self.skipped.append(Skipped(here, reason, bad=False))
            return
        seen.add((info.st_dev, info.st_ino))
        for entry in self._entries(here):
            name = inside + entry.name
            if not _is_folder(entry):
                yield name
            elif self._masks and _identity(entry) == self._masks.identity:
                continue
            elif recursive:
                yield from self._files(folder, recursive, name + "/", seen)
            else:
                self._left_out(folder / name)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            return shown(folder)
        except OSError as error:
            self.skipped.append(Skipped(folder, f"cannot be listed ({error.strerror})", bad=True))
            return []

    def _left_out(self, folder: Path) -> None:
        inside = sum(_suffix(entry.name) in MEDIA_SUFFIXES for entry in self._entries(folder))
        if inside:
            left = f"{plural(inside, 'media file')} {'is' if inside == 1 else 'are'} left out"
            reason = f"sub-folders are not scanned, {left}; set recursive = true"
            self.skipped.append(Skipped(folder, f"{reason}, or give it its own [[directory]]", bad=False))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: os.DirEntry[str]) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
