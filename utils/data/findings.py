"""What is worth a warning about the clips of a plan: a table of checks, each a sentence about one file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from utils.data.captions import lacks_trigger
from utils.data.inspection import Look
from utils.data.records import Clip

TRAIN_AND_EVAL = "train and eval"  # the one kind that stops the start
_ALIKE_BITS = 12  # of 192: prints that differ in no more are of the same pictures
_MOST_COMPARED = 5_000  # prints; each is held against every other
_LONG_STILL = 0.5  # share of a clip that stands still
_MANY_BLACK = 0.1  # share of black frames
_MUCH_ENLARGED = 1.5  # times, on each side


class Finding(NamedTuple):
    """One warning."""

    dataset: str
    path: str
    kind: str  # a few words that many findings share, to sort by
    text: str  # the whole sentence, without the file's name


class Measured(NamedTuple):
    """One clip with what is known of it."""

    dataset: str
    clip: Clip
    look: Look | None  # None where it was not looked at
    caption_tokens: tuple[int, ...] = ()  # one a caption; empty where there is no tokenizer
    trigger: str = ""  # the word that every caption should hold


def findings(clips: Sequence[Measured], max_caption_tokens: int | None = None) -> list[Finding]:
    """All warnings, those of one file together, each once however many clips it gives.

    Args:
        clips: of all datasets; the first dataset is what is trained on.
        max_caption_tokens: the model reads no more of a caption.
    """
    found = [*_in_two_datasets(clips), *_duplicates(clips), *_lookalikes(clips)]
    for item in clips:
        media = item.clip.media
        for kind, says in _OF_A_LOOK.items() if item.look else ():
            if text := says(item.clip, item.look):
                found.append(Finding(item.dataset, str(media.path), kind, text))
        found += [Finding(item.dataset, str(media.path), *said) for said in _captions(item, max_caption_tokens)]
    return sorted(set(found), key=lambda finding: (finding.path, finding.kind, finding.text))


def _captions(item: Measured, max_tokens: int | None) -> Iterator[tuple[str, str]]:
    """Kind and text."""
    captions, longest = item.clip.media.captions, max(item.caption_tokens, default=0)
    if max_tokens and longest > max_tokens:
        text = f"its caption has {longest} tokens, of which the model is given {max_tokens}: shorten it"
        yield "caption too long", text
    if not any(caption.strip() for caption in captions):
        yield "no caption", "is trained without a caption"
    elif item.trigger and lacks_trigger(captions, item.trigger):
        yield "no trigger word", f"its caption lacks the trigger word {item.trigger!r}"


# --- of one clip ------------------------------------------------------------------------------------------------------


def _black(clip: Clip, look: Look) -> str:
    if look.black == 1:
        return "is black from beginning to end" if clip.media.is_video else "is a black picture"
    return f"{look.black:.0%} of its frames are black: a fade, or a gap" if look.black >= _MANY_BLACK else ""


def _frozen(clip: Clip, look: Look) -> str:
    if not clip.media.is_video or look.black == 1:
        return ""
    if look.still == 1:
        return "nothing moves in it: use it as an image, or leave it out"
    return f"stands still for {look.still:.0%} of its length" if look.still >= _LONG_STILL else ""


def _letterboxed(clip: Clip, look: Look) -> str:
    sides = zip(("above and below", "on the left and right"), look.bars, strict=True)
    told = [f"{share:.0%} of it {where}" for where, share in sides if share]
    return f"black bars, or a black ground: {' and '.join(told)}; crop them away, the model learns them" if told else ""


def _cut(clip: Clip, look: Look) -> str:
    at = ", ".join(f"{cut:.2f} s" for cut in look.cuts)
    begins = f"{float(clip.start):.2f} s into the file" if clip.start else "at the file's beginning"
    return f"another scene begins {at} into the clip, which begins {begins}; split it there" if at else ""


def _enlarged(clip: Clip, look: Look) -> str:
    (width, height, _), media = clip.bucket, clip.media
    times = max(width / media.width, height / media.height)
    told = f"{media.width}x{media.height} is enlarged {times:.1f} times to fill {width}x{height}, which blurs it"
    return f"{told}; train at a lower resolution" if times >= _MUCH_ENLARGED else ""


# kind -> what it says of a clip, or nothing
_OF_A_LOOK: dict[str, Callable[[Clip, Look], str]] = {
    "black": _black,
    "frozen": _frozen,
    "black bars": _letterboxed,
    "scene cut": _cut,
    "enlarged": _enlarged,
}


# --- of several -------------------------------------------------------------------------------------------------------


def _by_content(clips: Iterable[Measured]) -> dict[str, dict[str, str]]:
    """Content -> path -> dataset."""
    places: dict[str, dict[str, str]] = {}
    for item in clips:
        places.setdefault(item.clip.media.content_hash, {}).setdefault(str(item.clip.media.path), item.dataset)
    return places


def _in_two_datasets(clips: Sequence[Measured]) -> Iterable[Finding]:
    """Files that are trained on and held out, whatever their names: the start refuses them."""
    train = clips[0].dataset if clips else ""
    of_dataset: dict[str, dict[str, str]] = {}  # content -> dataset -> a path
    for item in clips:
        of_dataset.setdefault(item.clip.media.content_hash, {}).setdefault(item.dataset, str(item.clip.media.path))
    for paths in of_dataset.values():
        for name, path in paths.items():
            if name != train and train in paths:
                text = f"is also a training file: {paths[train]}; the start refuses this, take it out of one of the two"
                yield Finding(name, path, TRAIN_AND_EVAL, text)


def _duplicates(clips: Sequence[Measured]) -> Iterable[Finding]:
    """The same bytes under two names of one dataset."""
    for places in _by_content(clips).values():
        for dataset in dict.fromkeys(places.values()):
            first, *others = sorted(path for path, of in places.items() if of == dataset)
            yield from (Finding(dataset, path, "duplicate", f"is the same file as {first}") for path in others)


def _lookalikes(clips: Sequence[Measured]) -> Iterable[Finding]:
    """Other bytes that show the same pictures: encoded anew, resized, with a changed colour."""
    seen: dict[tuple[str, str], Measured] = {}
    for item in clips:
        if item.look and item.look.print:
            seen.setdefault((item.clip.media.content_hash, item.look.print), item)
    items = list(seen.values())[:_MOST_COMPARED]
    if len(items) < 2:
        return
    prints = np.array([list(bytes.fromhex(item.look.print)) for item in items if item.look], np.uint8)
    for i, item in enumerate(items[1:], 1):
        apart = _BITS[prints[:i] ^ prints[i]].sum(1)
        for j in np.flatnonzero(apart <= _ALIKE_BITS)[:1]:
            other = items[j]
            same_length = other.clip.media.is_video == item.clip.media.is_video
            if same_length and other.clip.media.content_hash != item.clip.media.content_hash:
                text = f"shows the same pictures as {other.clip.media.path}"
                yield Finding(item.dataset, str(item.clip.media.path), "looks alike", text)


_BITS = np.array([number.bit_count() for number in range(256)], np.uint8)
