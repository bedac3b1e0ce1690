"""What is worth a warning: of one clip, of its captions, and of files that are there twice."""

from dataclasses import replace

import pytest

from tests.helpers.clips import clip_of
from tests.helpers.media import write_video
from utils.data.findings import Measured, findings
from utils.data.inspection import Look
from utils.data.records import Bucket

FINE = Look(0.0, 0.0, (0.0, 0.0), (), "")


@pytest.fixture
def clip(tmp_path):
    return clip_of(write_video(tmp_path / "a.mp4", 12))


def told(*items, **kwargs):
    return [(found.dataset, found.path.rpartition("/")[2], found.kind) for found in findings(items, **kwargs)]


@pytest.mark.parametrize(
    ("look", "kind", "words"),
    [
        (FINE._replace(black=1.0, still=1.0), "black", "from beginning to end"),
        (FINE._replace(black=0.25), "black", "25% of its frames"),
        (FINE._replace(still=1.0), "frozen", "nothing moves"),
        (FINE._replace(still=0.6), "frozen", "60% of its length"),
        (FINE._replace(bars=(0.2, 0.0)), "black bars", "20% of it above and below"),
        (FINE._replace(bars=(0.0, 0.3)), "black bars", "30% of it on the left and right"),
        (FINE._replace(cuts=(0.25, 0.5)), "scene cut", "0.25 s, 0.50 s"),
    ],
)
def test_a_look_gives_its_warning_alone(clip, look, kind, words):
    (found,) = findings([Measured("train", clip, look)])
    assert found.kind == kind
    assert words in found.text
    assert findings([Measured("train", clip, FINE)]) == []


def test_much_enlarged_clips_are_told(clip):
    assert told(Measured("train", replace(clip, bucket=Bucket(80, 64, 9)), FINE)) == []
    (found,) = findings([Measured("train", replace(clip, bucket=Bucket(640, 480, 9)), FINE)])
    assert found.text.startswith("64x48 is enlarged 10.0 times to fill 640x480")


def test_captions_that_lack_or_exceed(clip):
    def with_captions(*captions, **kwargs):
        return Measured("train", replace(clip, media=replace(clip.media, captions=captions)), FINE, **kwargs)

    assert told(with_captions("")) == [("train", "a.mp4", "no caption")]
    assert told(with_captions("a dog", trigger="sks")) == [("train", "a.mp4", "no trigger word")]
    assert told(with_captions("a SKS dog", trigger="sks")) == []
    assert told(with_captions("x", caption_tokens=(600,)), max_caption_tokens=512) == [
        ("train", "a.mp4", "caption too long")
    ]
    assert told(with_captions("x", caption_tokens=(512,)), max_caption_tokens=512) == []


def test_files_that_are_there_twice(tmp_path, clip):
    copy, held_out = tmp_path / "b.mp4", tmp_path / "c.mp4"
    for path in (copy, held_out):
        path.write_bytes(clip.media.path.read_bytes())
    items = [Measured("train", clip, FINE), Measured("train", clip_of(copy), FINE)]
    assert told(*items) == [("train", "b.mp4", "duplicate")]
    assert told(*items, Measured("eval", clip_of(held_out), FINE)) == [
        ("train", "b.mp4", "duplicate"),
        ("eval", "c.mp4", "train and eval"),
    ]
    resized = replace(clip, bucket=Bucket(32, 32, 9))
    assert told(items[0], Measured("train", resized, FINE)) == [], "one file at two sizes is no duplicate"


def test_other_bytes_of_the_same_pictures(tmp_path, clip):
    other = clip_of(write_video(tmp_path / "b.mp4", 13))
    alike, unlike = "00" * 24, "00" * 20 + "ff" * 4
    first = Measured("train", clip, FINE._replace(print=alike))
    assert told(first, Measured("train", other, FINE._replace(print="0f" + "00" * 23))) == [
        ("train", "b.mp4", "looks alike")
    ]
    assert told(first, Measured("train", other, FINE._replace(print=unlike))) == []
    assert told(first, Measured("train", other, FINE)) == []
