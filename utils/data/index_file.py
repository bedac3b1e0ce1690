"""Index files, JSON lines or CSV: a row a clip, with its path, captions and the part of it to use."""

import csv
import difflib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from utils.data.captions import Unusable, decode_text, weighted_captions
from utils.data.listing import Item, Listing, Skipped, some
from utils.data.mask_files import MaskFolder
from utils.data.media import MEDIA_SUFFIXES

COLUMNS = ("path", "caption", "start", "end", "weight", "mask_path")
# They would change the training, so to pass over them would be to train on something else.
_NOT_YET = ("control_path",)
_OWN_DIRECTORY = "is_regularization"  # holds for a whole [[directory]]
# In musubi-tuner's lists the media stand under these names, as seen from the working directory; its later versions look
# in the list's own folder too.
_FROM_HERE = ("video_path", "image_path")
_SAME_BEGINNING = 4  # letters
_DELIMITERS = (",", ";", "\t")  # a spreadsheet writes what its user's country has
_NOTHING = (None, "")

Row = tuple[int, Mapping[str, Any] | str]  # number of the line; what it says, or what is wrong with it


def list_index(path: Path, masks: MaskFolder | None = None) -> Listing:
    """The media that the rows of `path` name, from its own folder on; each row is in the listing.

    `caption` is as `weighted_captions` takes it, in a CSV as text, in several columns of that name, or as JSON. Where a
    row has none, the text file beside the media is read. `start` and `end` are seconds of the video,
    and `weight` is what it counts in the loss. `mask_path` names the file that says where it does.

    Args:
        masks: where the mask of a row is looked for that names none.

    Raises:
        ValueError: the file is not text, has no column `path`, or columns that are not supported.
    """
    try:
        text = decode_text(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not {error.encoding.upper()} (byte {error.start}); save it as UTF-8") from None
    items: list[Item] = []
    skipped: list[Skipped] = []
    seen: dict[tuple[Any, ...], int] = {}
    strange: set[str] = set()
    for line, row in READERS[path.suffix.lower()](path, text):
        where = f"line {line} of {path.name}"
        if isinstance(row, str):
            skipped.append(Skipped(path, f"line {line}: {row}", bad=True))
            continue
        strange |= set(row) - {*COLUMNS, *_FROM_HERE, *_NOT_YET, _OWN_DIRECTORY}
        if unknown := [key for key in _NOT_YET if row.get(key) not in _NOTHING]:
            raise ValueError(f"{path}: line {line}: column {unknown[0]!r} is not supported yet; remove it")
        if row.get(_OWN_DIRECTORY) not in _NOTHING:
            mend = f"give such clips a [[directory]] of its own with {_OWN_DIRECTORY} = true, and remove the column"
            raise ValueError(f"{path}: line {line}: column {_OWN_DIRECTORY!r} is not for single clips; {mend}")
        media = _media(path.parent, row)
        if media is None:
            skipped.append(Skipped(path, f"line {line}: has no path", bad=True))
            continue
        try:
            item = _item(media, row, where)._replace(mask=_mask(media, row, path.parent, masks))
        except Unusable as error:
            skipped.append(Skipped(media, f"{where}: {error}", error.bad))
            continue
        first = seen.setdefault((os.path.abspath(media), item.start, item.end), line)
        if first == line:
            items.append(item)
        else:
            reason = f"{where}: was named by line {first} already; several captions go into one row as a list"
            skipped.append(Skipped(media, reason, bad=False))
    return Listing(items, skipped, _without_effect(strange))


def _without_effect(columns: set[str]) -> list[str]:
    """Notices of columns that nothing is done with; those that look like a column of ours have one each."""
    meant = {name: known for name in sorted(columns) if (known := _nearest(name))}
    notices = [f"column '{name}' is without effect; did you mean '{known}'?" for name, known in meant.items()]
    rest = columns - set(meant)
    return notices + ([f"columns without effect: {some(rest)}"] if rest else [])


def _nearest(name: str) -> str | None:
    """The column that was meant: misspelt, in capitals, or longer or shorter from some letter on (`mask`, `is_reg`)."""
    known, written = (*COLUMNS, _OWN_DIRECTORY), str(name).strip().lower()
    if near := difflib.get_close_matches(written, known, n=1, cutoff=0.75):
        return near[0]
    beginning = written[:_SAME_BEGINNING]
    return next((key for key in known if len(beginning) == _SAME_BEGINNING and key.startswith(beginning)), None)


def _media(folder: Path, row: Mapping[str, Any]) -> Path | None:
    """The file that a row of an index in `folder` names."""
    key = next((key for key in ("path", *_FROM_HERE) if row.get(key) not in _NOTHING), "path")
    name = row.get(key)
    if not isinstance(name, str) or not name.strip():
        return None
    from_here = key in _FROM_HERE and os.path.exists(name.strip())
    return Path(name.strip()) if from_here else Path(os.path.join(folder, name.strip()))


def _item(media: Path, row: Mapping[str, Any], where: str) -> Item:
    if media.suffix.lower() not in MEDIA_SUFFIXES:
        raise Unusable(f"is not a media file ({media.suffix or 'no suffix'})")
    try:
        if not media.exists():
            raise Unusable("the file is not there")
    except OSError as error:
        raise Unusable(f"cannot be looked at ({error.strerror})", bad=True) from None
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end is not None and end <= (start or 0):
        raise Unusable(f"its end, {row['end']} s, is not after its start, {row.get('start') or 0} s", bad=True)
    try:
        written = None if row.get("caption") is None else weighted_captions(media.name, row["caption"])
    except ValueError as error:
        raise Unusable(str(error), bad=True) from None
    return Item(media, written, where, start or Fraction(0), end, _weight(row))


def _seconds(row: Mapping[str, Any], key: str) -> Fraction | None:
    value = row.get(key)
    if value in _NOTHING:
        return None
    try:
        if isinstance(value, bool) or not 0 <= float(value) < math.inf:
            raise ValueError
        return Fraction(str(value).strip())
    except (TypeError, ValueError):
        raise Unusable(f"its {key} is {value!r}; write seconds as a number, 0 or more, such as 2.5", bad=True) from None


def _mask(media: Path, row: Mapping[str, Any], folder: Path, masks: MaskFolder | None) -> Path | None:
    value = row.get("mask_path")
    if value in _NOTHING:
        name = os.path.relpath(media, folder)
        return masks.of(media.name if name.startswith("..") else name) if masks else None
    mask = Path(os.path.join(folder, value.strip())) if isinstance(value, str) else None
    if mask is None or not mask.is_file():
        raise Unusable(f"its mask_path is {value!r}, and no such file is there, seen from {folder}", bad=True)
    return mask


def _weight(row: Mapping[str, Any]) -> float:
    value = row.get("weight")
    if value in _NOTHING:
        return 1.0
    try:
        if isinstance(value, bool) or not 0 < float(value) < math.inf:
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        mend = "write a number above 0, or remove the row to train without it"
        raise Unusable(f"its weight is {value!r}; {mend}", bad=True) from None


# --- the formats ------------------------------------------------------------------------------------------------------


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    if text.lstrip().startswith("["):  # no row does, so one wrong line would become as many as the list has
        raise ValueError(f"{path}: is one JSON list; write each of its objects on a line of its own, without [ and ,")
    # Not splitlines(): JSON may hold the line separators of Unicode as they are.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            yield line, f"is not JSON: {error}"
            continue
        yield line, row if isinstance(row, dict) else f'must be an object with a "path", is a {type(row).__name__}'


def _csv(path: Path, text: str) -> Iterator[Row]:
    first = text.partition("\n")[0].strip()
    delimiter = next((sign for sign in _DELIMITERS if "path" in _header(first, sign)), _DELIMITERS[0])
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if "path" not in header:
        raise ValueError(f"{path}: has no column 'path'; its first line must name the columns, and has: {first!r}")
    if twice := {name for name in header if name != "caption" and header.count(name) > 1}:
        raise ValueError(f"{path}: has the column {some(twice)} more than once")
    while True:
        begin = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            # a quote left open swallows all lines to the file's end, which is where the reader gives up
            end = f", line {reader.line_num}; close the quotes" if reader.line_num > begin else ""
            yield begin, f"is not CSV: {error}{end}"
            continue
        if cells is None:
            return
        if len(cells) > len(header):
            mend = f"put text that holds a {delimiter!r} in quotes"
            yield reader.line_num, f"has {len(cells)} cells for {len(header)} columns; {mend}"
        elif any(cells):
            yield reader.line_num, _csv_row(header, cells)


def _header(line: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"') for name in line.split(delimiter)]


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    captions: list[Any] = []
    for name, cell in zip(header, cells, strict=False):
        if name == "caption":
            captions += _csv_captions(cell)
        else:
            row[name] = cell
    return {**row, "caption": captions} if "caption" in header else row


def _csv_captions(cell: str) -> list[Any]:
    """A JSON list is several captions. `[trigger] runs` is none, so it is one."""
    if cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            pass
    return [cell]


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {".jsonl": _json_lines, ".csv": _csv}
