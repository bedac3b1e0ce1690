"""Finds the loss mask of each media file, and tells whether it fits: a folder of masks, or one for all."""

import os
from collections.abc import Iterator
from pathlib import Path

from utils.data.captions import Unusable
from utils.data.image import opened
from utils.data.listing import shown, some
from utils.data.media import IMAGE_SUFFIXES, MEDIA_SUFFIXES
from utils.data.media_types import Probe
from utils.data.records import Mask, MediaFile

_MOST_OFF = 0.01  # of a mask's shape against its media's: what rounding an odd size may come to


class MaskFolder:
    """The masks of a `[[directory]]`: each has its media's name, with the suffix of any image or video.

    Sub-folders are as those of the media, and an archive's masks lie as its members do.

    Raises:
        ValueError: it is no folder, cannot be read, or is that of the media itself.
    """

    def __init__(self, path: Path, media: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise ValueError(f"mask_path = '{path}' is not a folder; name the folder that holds the masks")
        if media.is_dir() and os.path.samefile(path, media):
            raise ValueError(f"mask_path = '{path}' is the folder of the clips; put the masks into one of their own")
        info = path.stat()
        self.identity = (info.st_dev, info.st_ino)  # to know it again where it lies among the media
        self._masks: dict[str, list[str]] = {}
        for name in _files(path, "", set()):
            self._masks.setdefault(os.path.splitext(name)[0], []).append(name)
        self._used: set[str] = set()
        self._without: dict[str, str] = {}  # media that have none, by name in small letters and without suffix

    def of(self, name: str) -> Path | None:
        """The mask of the media file `name`, a path from the media's folder on. Raises `Unusable` if there are two."""
        stem = os.path.splitext(name)[0]
        found = self._masks.get(stem, [])
        self._used.add(stem)
        if not found:
            self._without[stem.casefold()] = name
        if len(found) > 1:
            raise Unusable(f"has {len(found)} masks in {self.path}: {some(found)}; keep one of them", bad=True)
        return self.path / found[0] if found else None

    def notices(self) -> Iterator[str]:
        """What a person should know of it, once every media file was asked for."""
        unused = sorted(set(self._masks) - self._used)
        for stem in unused:
            if media := self._without.get(stem.casefold()):
                names = some(self._masks[stem])
                yield f"the mask {names} is not taken for {media}, whose name has other capitals; rename one of them"
        if unused := [stem for stem in unused if stem.casefold() not in self._without]:
            names = [name for stem in unused for name in self._masks[stem]]
            which = "1 mask has" if len(names) == 1 else f"{len(names)} masks have"
            yield f"{which} no clip of that name: {some(names)}"


def _files(folder: Path, inside: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """Names from `folder` on of all that could be masks in `inside`, sorted; hidden ones are passed over."""
    here = folder / inside
    try:
        info = here.stat()
        entries = shown(here)
    except OSError as error:
        raise ValueError(f"mask_path: {here} cannot be read ({error.strerror}); change its rights") from error
    if (info.st_dev, info.st_ino) in seen:  # a link; it may lead in a circle
        return
    seen.add((info.st_dev, info.st_ino))
    for entry in entries:
        if os.path.isdir(entry):
            yield from _files(folder, f"{inside}{entry.name}/", seen)
        elif os.path.splitext(entry.name)[1].lower() in MEDIA_SUFFIXES:
            yield inside + entry.name


def fitting_mask(media: MediaFile, path: Path, digest: str, held: Probe) -> Mask:
    """The mask in `path`, which was found to hold `held`.

    Raises:
        Unusable: it is a video and the media an image, it is a video with clear parts, or its shape is another.
    """
    if held.is_video and not media.is_video:
        raise Unusable(f"its mask {path} is a video, and this is an image", bad=True)
    if held.is_video and _has_clear_parts(path, held):  # they are laid on white, which would train what was left clear
        raise Unusable(f"its mask {path} is a video with transparency; save it in black and white alone", bad=True)
    if abs(held.width * media.height / (held.height * media.width) - 1) > _MOST_OFF:
        sizes = f"is {held.width}x{held.height}, and the file itself {media.width}x{media.height}"
        raise Unusable(f"its mask {path} {sizes}: make one of the same shape, of any resolution", bad=True)
    clock = held.is_video and "clock" in held.special.split("+")
    return Mask(path, digest, held.is_video, held.frames, held.fps, held.duration, clock)


def _has_clear_parts(path: Path, held: Probe) -> bool:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return "alpha" in held.special
    with opened(path) as image:  # an animation
        return image.has_transparency_data


def without_mask(count: int, total: int, folder: Path | None) -> str:
    """What is told of `count` files that have none."""
    which = f"1 of {total} files has" if count == 1 else f"{count} of {total} files have"
    where = f" in {folder}" if folder else ""
    return f"{which} no mask{where}: such are trained whole; default_mask_file gives them one"
