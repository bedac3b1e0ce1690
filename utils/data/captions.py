"""Captions of media files: read, weighted, given their trigger word, tags shuffled."""

import codecs
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

CAPTIONS_FILE = "captions.json"
TRIGGER = "[trigger]"  # stands for the directory's trigger_word, as in ai-toolkit
_MAX_PARTS = 100  # that the weights of one file may come to: each is a key in every sample
# The mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class CaptionSettings(Protocol):
    """What a `[[directory]]` says of its captions; the dataset's schema explains each."""

    @property
    def caption_extension(self) -> str: ...

    @property
    def skip_empty_caption(self) -> bool: ...

    @property
    def default_caption(self) -> str: ...

    @property
    def caption_prefix(self) -> str: ...

    @property
    def trigger_word(self) -> str: ...

    @property
    def shuffle_tags(self) -> bool: ...

    @property
    def cache_shuffle_num(self) -> int: ...

    @property
    def cache_shuffle_delimiter(self) -> str: ...

    @property
    def keep_first(self) -> int: ...


class Weighted(NamedTuple):
    """A caption as written, and how often it is drawn, against the file's other captions."""

    text: str
    weight: Fraction = Fraction(1)


class Unusable(Exception):
    """Why a file gives no sample, without its name; `bad` as in `Skipped`."""

    def __init__(self, reason: str, bad: bool = False) -> None:
        super().__init__(reason)
        self.bad = bad


# --- reading ----------------------------------------------------------------------------------------------------------


def decode_text(data: bytes) -> str:
    """Text in UTF-8, or in the encoding that its byte order mark names; raises `UnicodeDecodeError`."""
    return data.decode(next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8"))


def read_caption_file(path: Path) -> list[Weighted]:
    """The one caption in `path`, none where there is no such file; raises `Unusable`."""
    try:
        return [Weighted(decode_text(_content(path)))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Unusable(f"its caption {path.name} cannot be read ({error.strerror})", bad=True) from None
    except UnicodeDecodeError as error:
        reason = f"its caption {path.name} is not {error.encoding.upper()} (byte {error.start}); save it as UTF-8"
        raise Unusable(reason, bad=True) from None


def _content(path: Path) -> bytes:
    """Without a buffer, since there is one such file for each of the media."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # or to open a fifo would wait for ever
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unusable(f"its caption {path.name} is not a regular file", bad=True)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()  # to its end: one bare read may bring less of it
    finally:
        os.close(descriptor)


def read_captions_json(path: Path) -> dict[str, list[Weighted]] | None:
    """File name -> captions; None where there is no captions.json. Raises `ValueError`."""
    if not path.is_file():
        return None
    try:
        content = json.loads(decode_text(path.read_bytes()))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"{path}: cannot be read as UTF-8 JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be an object of file names and captions, is a {type(content).__name__}")
    try:
        return {name: weighted_captions(name, value) for name, value in content.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def weighted_captions(name: str, value: Any) -> list[Weighted]:
    """Captions from JSON: text, an object of `caption` and `weight`, or a list of these.

    Raises:
        ValueError: `value` is none of these; names `name`.
    """
    rows = value if isinstance(value, list) else [value]
    found = []
    for row in rows:
        caption, weight = (row.get("caption"), row.get("weight", 1)) if isinstance(row, dict) else (row, 1)
        strange = set(row) - {"caption", "weight"} if isinstance(row, dict) else ()
        if not isinstance(caption, str) or strange:
            raise ValueError(
                f"{name!r} must have a caption or a list of captions, has {value!r}; "
                'a caption is a text, or {"caption": "...", "weight": 2}'
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{name!r} has a caption with weight {weight!r}; use a number above 0")
        found.append(Weighted(caption, Fraction(str(weight))))
    return found


# --- what is trained on -----------------------------------------------------------------------------------------------


def trained_captions(written: Sequence[Weighted], source: str, settings: CaptionSettings) -> tuple[str, ...]:
    """The captions of one file that a draw picks from, each alike likely: a weight of 2 stands as two of them.

    Of shuffled tags each caption gives `cache_shuffle_num` orders, equal ones included, so that a caption of few tags
    keeps its weight among others. An order follows from the caption alone: every run and machine finds it in the cache.

    Args:
        source: name of the file that has, or lacks, the captions.

    Raises:
        Unusable: there is no caption and the settings ask for one, or the weights are too fine.
    """
    captions = [Weighted(text, row.weight) for row in written if (text := row.text.strip())]
    if not captions and (default := settings.default_caption.strip()):
        captions = [Weighted(default)]
    if not captions and settings.skip_empty_caption:
        lack = "is empty" if written else "is missing"
        mend = "write one, set default_caption, or set skip_empty_caption = false to train without"
        raise Unusable(f"its caption in {source} {lack}; {mend}")
    captions = captions or [Weighted("")]
    return tuple(
        _finished(variant, settings)
        for caption, parts in zip(captions, _parts([row.weight for row in captions]), strict=True)
        for variant in _variants(caption.text, settings)
        for _ in range(parts)
    )


def lacks_trigger(captions: Iterable[str], word: str) -> bool:
    """Whether one of a file's finished captions goes without `word`, in capitals or not."""
    return any(word.casefold() not in caption.casefold() for caption in captions)


def trigger_notices(files: Sequence[Sequence[str]], settings: CaptionSettings) -> list[str]:
    """What to tell of the finished captions of a directory's files."""
    word = settings.trigger_word
    if not word:
        count = sum(any(TRIGGER in caption for caption in captions) for captions in files)
        text = f"captions of {count} of {len(files)} files hold {TRIGGER} as it stands; set trigger_word"
        return [text] if count else []
    count = sum(lacks_trigger(captions, word) for captions in files)
    mend = f"write {TRIGGER} into them, or into caption_prefix"
    return [f"captions of {count} of {len(files)} files lack the trigger word {word!r}; {mend}"] if count else []


def _parts(weights: Sequence[Fraction]) -> list[int]:
    """The smallest whole numbers in the ratio of `weights`."""
    if len(weights) == 1:
        return [1]
    whole = [int(weight * math.lcm(*(item.denominator for item in weights))) for weight in weights]
    parts = [weight // math.gcd(*whole) for weight in whole]
    if sum(parts) > _MAX_PARTS:
        told = " : ".join(map(str, parts))
        raise Unusable(
            f"the weights of its captions are as {told}, more than {_MAX_PARTS} parts; use rounder ones", bad=True
        )
    return parts


def _variants(caption: str, settings: CaptionSettings) -> list[str]:
    count = max(settings.cache_shuffle_num, int(settings.shuffle_tags))  # either of the two asks for it: diffusion-pipe
    if not count:
        return [caption]
    tags = caption.split(settings.cache_shuffle_delimiter)
    head, rest = tags[: settings.keep_first], tags[settings.keep_first :]
    return [
        settings.cache_shuffle_delimiter.join(head + [rest[i] for i in _order(caption, turn, len(rest))])
        for turn in range(count)
    ]


def _order(caption: str, turn: int, length: int) -> list[int]:
    def rank(index: int) -> bytes:
        words = f"tags\0{turn}\0{index}\0{caption}".encode(errors="surrogatepass")
        return hashlib.blake2b(words, digest_size=8).digest()

    return sorted(range(length), key=rank)


def _finished(caption: str, settings: CaptionSettings) -> str:
    text = settings.caption_prefix + caption
    return text.replace(TRIGGER, settings.trigger_word) if settings.trigger_word else text
