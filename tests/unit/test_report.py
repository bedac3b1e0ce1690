"""The page: whole, self-contained, safe against what files and captions are called, and light for a thousand clips."""

import base64
import hashlib
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from utils.monitor.console import BucketRow
from utils.monitor.report import Card, Histogram, LeftOut, Picture, Report, bins, kind_of_reason, page

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\'"&'
VOID = {"meta", "img", "input", "br"}


class Reader(HTMLParser):
    """The tags of a page with their attributes, and whether each is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


def jpeg(size=(60, 20)):
    content = io.BytesIO()
    Image.new("RGB", size, (90, 120, 150)).save(content, "JPEG")
    return Picture(content.getvalue(), *size)


def card(name="a.mp4", **changed):
    one = Card("train", name, f"/data/{name}", "64x48x9", "128x96, 16 fps, 2.0 s", ("a dog runs",), (), jpeg())
    return one._replace(**changed)


def report(cards=(), left_out=(), **changed):
    return Report(
        title="Wan2.1 T2V",
        subtitle="a dataset",
        notes=["a note"],
        facts=[("2", "clips")],
        arithmetic="1 epoch = 2 clips",
        buckets=[BucketRow("64x48x9", 2, 1, 2, 0, 36)],
        histograms=[Histogram("Length, s", [1.0, 2.5, 2.5])],
        cards=list(cards),
        left_out=list(left_out),
    )._replace(**changed)


def test_clips_and_what_is_left_out_can_be_filtered():
    warned = card("b.mp4", warnings=[("scene cut", "at 1 s"), ("black", "is black")])
    gone = [
        LeftOut("train", "/data/c.mp4", "12 frames at 30 fps"),
        LeftOut("held_out", "/data/d.mp4", "9 frames at 8 fps"),
    ]
    read = Reader(page(report([card(), warned], gone)))
    plain, marked = read.all("article")
    assert (plain["data-reasons"], plain["data-bucket"], plain["data-dataset"]) == ("", "64x48x9", "train")
    reasons = {attrs["value"] for attrs in read.all("option")}
    assert len(marked["data-reasons"].split()) == 2 and set(marked["data-reasons"].split()) <= reasons
    first, second = read.all("tr", **{"data-item": "row"})
    assert first["data-reasons"] == second["data-reasons"], "they differ in numbers alone"
    assert first["data-reasons"] in reasons
    assert {"64x48x9", "held_out", "any"} <= reasons
    assert {chip["value"] for chip in read.all("button", **{"class": "chip"}) if "value" in chip} == {
        "64x48x9",
        *marked["data-reasons"].split(),
    }
    assert "a dog runs" in read.texts


def test_nothing_that_a_file_says_becomes_markup():
    evil = card(EVIL, dataset=EVIL, bucket=EVIL, source=EVIL, captions=(EVIL,), warnings=[(EVIL, EVIL)], path=EVIL)
    text = page(
        report(
            [evil], [LeftOut(EVIL, EVIL, EVIL)], title=EVIL, subtitle=EVIL, notes=[EVIL], facts=[(EVIL, EVIL)]
        )._replace(arithmetic=EVIL, histograms=[Histogram(EVIL, [1.0])], buckets=[BucketRow(EVIL, 1, 1, 1, 0, 1)])
    )
    read, harmless = Reader(text), Reader(page(report([card(warnings=[("a", "b")])], [LeftOut("a", "b", "c")])))
    assert {tag for tag, _ in read.tags} == {tag for tag, _ in harmless.tags}
    assert len(read.all("script")) == 1
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)
    assert all(attrs["src"].startswith("data:image/jpeg;base64,") for attrs in read.all("img"))
    assert EVIL in read.texts


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone():
    text = page(report([card()]))
    read = Reader(text)
    assert not re.search(r'(?:src|href|action)="(?!data:)|url\(|@import|fetch\(|https?:', text)
    (policy,) = [meta["content"] for meta in read.all("meta", **{"http-equiv": "Content-Security-Policy"})]
    script = text.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy and policy.count("unsafe-inline") == 1, "for styles alone"


def test_pictures_are_lazy_and_sized():
    (image,) = Reader(page(report([card()]))).all("img")
    assert (image["loading"], image["width"], image["height"]) == ("lazy", "60", "20")
    shown = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    assert shown.size == (60, 20)
    assert "no picture" in Reader(page(report([card(picture=None)]))).texts


def test_a_thousand_clips_cost_little_beyond_their_pictures():
    empty, full = (len(page(report([card(picture=None)] * count))) for count in (1, 1001))
    assert (full - empty) / 1000 < 600


def test_nothing_at_all_is_a_page_too():
    read = Reader(page(report(histograms=[Histogram("Length, s", [])], buckets=[], facts=[], notes=[])))
    assert read.all("article") == [] and read.all("svg") == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5.0], [(5.0, 1)]),
        ([1, 1, 2, 4], [(1, 2), (2, 1), (3, 0), (4, 1)]),
        ([0.1, 0.35, 1.3], [(0.1, 1), (0.2, 0), (0.3, 1), *((round(0.4 + i / 10, 1), 0) for i in range(9)), (1.3, 1)]),
    ],
)
def test_bins_are_round_and_hold_all(values, expected):
    assert [(pytest.approx(edge), count) for edge, count in expected] == bins(values)


def test_bins_are_few():
    for values in ([480, 1080], [0.001, 7200.0], list(range(1000))):
        found = bins(values)
        assert len(found) <= 15
        assert sum(count for _, count in found) == len(values)


def test_reasons_are_alike_but_for_numbers_and_names():
    assert kind_of_reason("12 frames at 29.97 fps; the smallest is 17") == "n frames at n fps; the smallest is n"
    assert kind_of_reason("its caption in a-b.txt is missing") == kind_of_reason("its caption in c.txt is missing")
