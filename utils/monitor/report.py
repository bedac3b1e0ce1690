"""The plan as one self-contained web page: contact sheet, histograms, warnings, and what is left out.

Plain values to HTML text; everything that comes from a file is escaped, and the page's own policy forbids it to load or
run anything that is not in it.
"""

import base64
import hashlib
import html
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.monitor.console import BUCKET_TITLES, BucketRow, counted, grouped

_STYLE, _SCRIPT = Path(__file__).with_name("report.css"), Path(__file__).with_name("report.js")
_MOST_BARS = 14  # of a histogram
_CHART_PX = (330, 120)  # width and height of a histogram's drawing
_MARGIN_PX = (6, 18, 20)  # left and right, above, below


class Picture(NamedTuple):
    """First, middle and last frame, side by side."""

    jpeg: bytes
    width: int  # px
    height: int  # px


class Card(NamedTuple):
    """One clip of the contact sheet."""

    dataset: str
    name: str
    path: str
    bucket: str  # `832x480x81`
    source: str  # `1920x1080, 24 fps, 4.2 s`
    captions: Sequence[str]
    warnings: Sequence[tuple[str, str]]  # (kind, sentence)
    picture: Picture | None


class LeftOut(NamedTuple):
    """One file that gives no clip."""

    dataset: str
    path: str
    reason: str


class Histogram(NamedTuple):
    """How a number is spread over the clips."""

    title: str
    values: Sequence[float]


class Report(NamedTuple):
    """All that is on the page."""

    title: str
    subtitle: str
    notes: Sequence[str]
    facts: Sequence[tuple[str, str]]  # (number, what it counts)
    arithmetic: str  # of an epoch
    buckets: Sequence[BucketRow]
    histograms: Sequence[Histogram]
    cards: Sequence[Card]
    left_out: Sequence[LeftOut]


def page(report: Report) -> str:
    """The whole document."""
    script, style = _SCRIPT.read_text(encoding="utf-8"), _STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    reasons = _Reasons(report)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(report.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>",
            *_head(report),
            "<main>",
            *_overview(report, reasons),
            *_controls(report, reasons),
            '<section class="sheet" aria-label="Clips">',
            *(_card(card, reasons) for card in report.cards),
            "</section>",
            '<p id="none" class="nothing" hidden>No clip fits.</p>',
            *_left_out(report, reasons),
            "</main>",
            f"<footer>Frames are cropped and resized as the model will see them.</footer>\n<script>{script}</script>",
            "</body>\n</html>\n",
        ]
    )


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


class _Reasons:
    """Short names for what can be filtered by, each with the words that people see and how many it concerns."""

    def __init__(self, report: Report) -> None:
        self.warnings = Counter(kind for card in report.cards for kind in {kind for kind, _ in card.warnings})
        self.left_out = Counter(kind_of_reason(item.reason) for item in report.left_out)
        self._ids = {words: f"w{number}" for number, words in enumerate(self.warnings)}
        self._ids |= {("left out", words): f"x{number}" for number, words in enumerate(self.left_out)}

    def of_warning(self, kind: str) -> str:
        return self._ids[kind]

    def of_left_out(self, kind: str) -> str:
        return self._ids["left out", kind]


def kind_of_reason(reason: str) -> str:
    """A reason without the numbers and names that differ from file to file."""
    plain = re.sub(r"'[^']*'|\S+\.[A-Za-z]\w{1,4}\b", "...", reason)
    return re.sub(r"\d+(\.\d+)?", "n", plain)


# --- parts of the page ------------------------------------------------------------------------------------------------


def _head(report: Report) -> Iterator[str]:
    yield f'<header>\n<h1>{_text(report.title)}</h1>\n<p class="sub">{_text(report.subtitle)}</p>'
    if report.notes:
        yield '<ul class="notes">' + "".join(f"<li>{_text(note)}</li>" for note in report.notes) + "</ul>"
    facts = "".join(f"<li><b>{_text(number)}</b><span>{_text(what)}</span></li>" for number, what in report.facts)
    yield f'<ul class="facts">{facts}</ul>\n</header>'


def _overview(report: Report, reasons: _Reasons) -> Iterator[str]:
    yield '<h2>Overview</h2>\n<div class="overview">'
    if report.buckets:
        yield '<div class="panel wide"><h3>Buckets</h3>' + _bucket_table(report.buckets)
        yield f"<pre>{_text(report.arithmetic)}</pre></div>"
    chips = "".join(
        f'<button type="button" class="chip" data-control="reason" value="{reasons.of_warning(kind)}">'
        f"{_text(kind)} {count}</button>"
        for kind, count in reasons.warnings.most_common()
    )
    told = f'<div class="chips">{chips}</div>' if chips else '<p class="sub">None.</p>'
    yield f'<div class="panel"><h3>Warnings</h3>{told}</div>'
    for histogram in report.histograms:
        if histogram.values:
            yield f'<div class="panel"><h3>{_text(histogram.title)}</h3>{_chart(histogram)}</div>'
    yield "</div>"


def _bucket_table(rows: Sequence[BucketRow]) -> str:
    first, *titles = BUCKET_TITLES
    head = f"<th>{first}</th>" + "".join(f'<th class="number">{title}</th>' for title in titles)
    lines = []
    for row in rows:
        chip = f'<button type="button" class="chip" data-control="bucket" value="{_text(row.bucket)}">'
        cells = (cell if isinstance(cell, str) else grouped(cell) for cell in row.cells()[1:])
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        lines.append(f"<tr><td>{chip}{_text(row.bucket)}</button></td>{numbers}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _controls(report: Report, reasons: _Reasons) -> Iterator[str]:
    datasets = dict.fromkeys(item.dataset for item in (*report.cards, *report.left_out))
    buckets = Counter(card.bucket for card in report.cards)
    yield '<div class="bar" id="sheet">'
    yield '<input id="words" type="search" placeholder="Search captions and names  ( / )" aria-label="Search">'
    yield _select("dataset", "every dataset", [(name, name) for name in datasets])
    yield _select("bucket", "every bucket", [(name, f"{name} ({buckets[name]})") for name in sorted(buckets)])
    warned = [(reasons.of_warning(kind), f"{kind} ({count})") for kind, count in reasons.warnings.most_common()]
    gone = [(reasons.of_left_out(kind), f"{kind} ({count})") for kind, count in reasons.left_out.most_common()]
    groups = {"Warnings": [("any", "any warning"), *warned] if warned else [], "Left out": gone}
    options = "".join(
        f'<optgroup label="{label}">{_options(rows)}</optgroup>' for label, rows in groups.items() if rows
    )
    yield f'<select id="reason" aria-label="Reason"><option value="">every reason</option>{options}</select>'
    yield '<button type="button" class="chip" id="reset" hidden>show all</button>'
    yield '<output id="count"></output></div>'


def _select(name: str, everything: str, rows: Sequence[tuple[str, str]]) -> str:
    return f'<select id="{name}" aria-label="{name}"><option value="">{everything}</option>{_options(rows)}</select>'


def _options(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(f'<option value="{_text(value)}">{_text(words)}</option>' for value, words in rows)


def _card(card: Card, reasons: _Reasons) -> str:
    kinds = " ".join(dict.fromkeys(reasons.of_warning(kind) for kind, _ in card.warnings))
    warned = " warned" if card.warnings else ""
    parts = [
        f'<article class="card{warned}" data-item="card" data-dataset="{_text(card.dataset)}" '
        f'data-bucket="{_text(card.bucket)}" data-reasons="{kinds}">',
        f"<figure>{_image(card)}</figure>",
        f'<div><h3 title="{_text(card.path)}">{_text(card.name)}</h3>',
        f'<p class="facts-line">{_text(card.dataset)} · {_text(card.bucket)} from {_text(card.source)}</p>',
        *(f'<p class="warning"><b>{_text(kind)}</b>: {_text(says)}</p>' for kind, says in card.warnings),
        *(f'<p class="caption">{_text(caption)}</p>' for caption in card.captions),
        "</div></article>",
    ]
    return "".join(parts)


def _image(card: Card) -> str:
    if card.picture is None:
        return "<span>no picture</span>"
    jpeg, width, height = card.picture
    source = f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
    size = f'width="{width}" height="{height}"'
    return f'<img src="{source}" {size} alt="frames of {_text(card.name)}" loading="lazy" decoding="async">'


def _left_out(report: Report, reasons: _Reasons) -> Iterator[str]:
    if not report.left_out:
        return
    yield f'<section id="left-out"><h2>Left out <small>{counted(len(report.left_out), "file")}</small></h2>'
    yield '<div class="panel"><table><thead><tr><th>dataset</th><th>file</th><th>reason</th></tr></thead><tbody>'
    for item in report.left_out:
        reason = reasons.of_left_out(kind_of_reason(item.reason))
        yield (
            f'<tr data-item="row" data-dataset="{_text(item.dataset)}" data-reasons="{reason}">'
            f'<td>{_text(item.dataset)}</td><td class="path">{_text(item.path)}</td><td>{_text(item.reason)}</td></tr>'
        )
    yield "</tbody></table></div></section>"


# --- histograms -------------------------------------------------------------------------------------------------------


def bins(values: Sequence[float], most: int = _MOST_BARS) -> list[tuple[float, int]]:
    """(lower edge, count) of equal bins of a round width that cover all of `values`; at most `most` of them."""
    low, high = min(values), max(values)
    rough = max((high - low) / (most - 1), 1e-9)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    if all(float(value).is_integer() for value in values):
        width = max(width, 1.0)
    first = math.floor(low / width + 1e-9)
    counts = Counter(math.floor(value / width + 1e-9) - first for value in values)
    return [(round((first + i) * width, 9), counts[i]) for i in range(max(counts) + 1)]


def _chart(histogram: Histogram) -> str:
    bars = bins(histogram.values)
    (width, height), (side, above, below) = _CHART_PX, _MARGIN_PX
    step = (width - 2 * side) / len(bars)
    top = max(count for _, count in bars)
    parts = []
    base = height - below
    for i, (edge, count) in enumerate(bars):
        x, tall = side + i * step, (base - above) * count / top
        if count:
            box = f'x="{x + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}" rx="2"'
            parts.append(f"<rect {box}><title>from {edge:g}: {grouped(count)}</title></rect>")
            place = f'x="{x + step / 2:.1f}" y="{base - tall - 4:.1f}" text-anchor="middle"'
            parts.append(f"<text {place}>{count}</text>")
        if i % math.ceil(len(bars) / 7) == 0:
            parts.append(f'<text x="{x + 1:.1f}" y="{height - 6}">{edge:g}</text>')
    axis = f'<line x1="{side}" y1="{base}" x2="{width - side}" y2="{base}"/>'
    frame = f'viewBox="0 0 {width} {height}" role="img" aria-label="{_text(histogram.title)}"'
    return f"<svg {frame}>{axis}{''.join(parts)}</svg>"
