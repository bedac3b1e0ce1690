"""Chooses which part of the picture a clip shows, and whether mirrored."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

from utils.data.media_types import cover_size, picture_box
from utils.data.plan import counter_draws, counter_hash
from utils.data.records import Clip, Framing

Size = tuple[int, int]  # width, height, px

# (size of the file, of the bucket, the file's content, how many) -> the framing of each crop
Crops = Callable[[Size, Size, str, int], Sequence[Framing | None]]


def _center(size: Size, shape: Size, content: str, count: int) -> Sequence[Framing | None]:
    return (None,)


def _anywhere(size: Size, shape: Size, content: str, count: int) -> Sequence[Framing | None]:
    over = [whole - kept for whole, kept in zip(cover_size(size, shape), shape, strict=True)]
    # Of the content alone: another seed or name finds the same crops in the cache, and more of them add to it.
    offsets_px = counter_draws(count, max(over) + 1, "crop", content, *shape)
    return [
        _named_once(Framing(*(Fraction(offset, px) if px else Fraction(1, 2) for px in over))) for offset in offsets_px
    ]


def _whole_picture(size: Size, shape: Size, content: str, count: int) -> Sequence[Framing | None]:
    framing = Framing(pad=True)
    return (None if picture_box(size, shape, framing) == (0, 0, *shape) else framing,)


def _named_once(framing: Framing) -> Framing | None:
    """The middle is no framing, so that it is one entry of the cache however it was chosen."""
    return None if framing == Framing() else framing


# name in `crop` -> rule
CROPS: dict[str, Crops] = {"center": _center, "random": _anywhere, "pad": _whole_picture}


def framed(clip: Clip, crop: str, count: int, flip: bool) -> Clip:
    """`clip` with all framings that the uses of its sample take in turn.

    Args:
        crop: a name in `CROPS`.
        count: different crops of "random"; fewer where there are not so many, px by px.
        flip: each in turn with its mirror image; half of all files begin with that, so that an epoch shows both.
    """
    media, bucket = clip.media, clip.bucket
    crops = CROPS[crop]((media.width, media.height), (bucket.width, bucket.height), media.content_hash, count)
    if flip:
        step = -1 if counter_hash("mirrored first", media.content_hash) % 2 else 1
        crops = [turn for each in crops for turn in (each, (each or Framing())._replace(flip=True))[::step]]
    first, *others = crops
    return replace(clip, framing=first, framings=tuple(others)) if first or others else clip
