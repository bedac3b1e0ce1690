"""From what is written of a file to the captions that are trained on."""

import codecs
from collections import Counter
from fractions import Fraction

import pytest

from utils.config.dataset_schema import DirectoryConfig
from utils.data.captions import (
    Unusable,
    Weighted,
    lacks_trigger,
    read_caption_file,
    trained_captions,
    trigger_notices,
    weighted_captions,
)

TAGS = "one, two, three, four, five"
# as the first release that shuffles wrote them: cached texts are found again by these
SHUFFLED = (
    "five, four, three, one, two",
    "four, two, one, five, three",
    "one, two, five, four, three",
)


def trained(*written, **settings):
    rows = [row if isinstance(row, Weighted) else Weighted(row) for row in written]
    return trained_captions(rows, "a.txt", DirectoryConfig(path="clips", **settings))


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        "ein Würfel".encode(),
        codecs.BOM_UTF8 + "ein Würfel".encode(),
        codecs.BOM_UTF16_LE + "ein Würfel".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "ein Würfel".encode("utf-16-be"),
        codecs.BOM_UTF32_LE + "ein Würfel".encode("utf-32-le"),
    ],
)
def test_encodings_that_name_themselves(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_caption_file(tmp_path / "a.txt") == [Weighted("ein Würfel")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Würfel".encode("latin-1"), r"its caption a\.txt is not UTF-8 \(byte 1\); save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"odd", r"its caption a\.txt is not UTF-16-LE \(byte \d\)"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, reason):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(Unusable, match=reason) as caught:
        read_caption_file(tmp_path / "a.txt")
    assert caught.value.bad


def test_a_caption_that_is_no_file_does_not_hang(tmp_path):
    assert read_caption_file(tmp_path / "a.txt") == []
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(Unusable, match="is not a regular file"):
        read_caption_file(tmp_path / "b.txt")


def test_weights_in_json():
    value = [{"caption": "one", "weight": 2}, "two", {"caption": "three", "weight": 0.5}]
    assert weighted_captions("a.mp4", value) == [
        Weighted("one", Fraction(2)),
        Weighted("two", Fraction(1)),
        Weighted("three", Fraction(1, 2)),
    ]
    assert weighted_captions("a.mp4", {"caption": "alone"}) == [Weighted("alone")]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "'a.mp4' must have a caption or a list of captions, has 3"),
        ([{"caption": "x", "wieght": 2}], "must have a caption or a list"),
        ([{"weight": 2}], "must have a caption or a list"),
        ([{"caption": "x", "weight": 0}], "has a caption with weight 0; use a number above 0"),
        ([{"caption": "x", "weight": float("inf")}], "weight inf; use a number above 0"),
        ([{"caption": "x", "weight": True}], "weight True"),
    ],
)
def test_what_is_no_caption(value, reason):
    with pytest.raises(ValueError, match=reason):
        weighted_captions("a.mp4", value)


# --- what is trained on -----------------------------------------------------------------------------------------------


def test_weights_are_exact_shares_of_the_draws():
    rows = [Weighted("a", Fraction("0.5")), Weighted("b", Fraction("0.25")), Weighted("c", Fraction("0.75"))]
    assert Counter(trained(*rows)) == {"a": 2, "b": 1, "c": 3}
    assert trained(Weighted("a", Fraction(3)), Weighted("b", Fraction(3))) == ("a", "b")


def test_weights_that_are_too_fine_are_refused():
    with pytest.raises(Unusable, match="are as 333 : 667, more than 100 parts; use rounder ones") as caught:
        trained(Weighted("a", Fraction("0.333")), Weighted("b", Fraction("0.667")))
    assert caught.value.bad


def test_the_default_caption_stands_in_for_missing_and_empty_ones():
    assert trained(default_caption="a cat", caption_prefix="sks, ") == ("sks, a cat",)
    assert trained(" \n", default_caption="a cat") == ("a cat",)
    assert trained("a dog", default_caption="a cat") == ("a dog",)
    with pytest.raises(Unusable, match=r"its caption in a\.txt is empty; write one, set default_caption, or set skip_"):
        trained(" \n", default_caption=" ")
    assert trained(skip_empty_caption=False) == ("",)


def test_the_trigger_word_takes_its_place():
    settings = {"trigger_word": "sks", "caption_prefix": "[trigger] style, "}
    assert trained("[trigger] runs, [trigger] stops", **settings) == ("sks style, sks runs, sks stops",)
    assert trained("[trigger] runs") == ("[trigger] runs",)  # without a word it is text like any other


def test_captions_without_the_trigger_word_are_counted():
    settings = DirectoryConfig(path="clips", trigger_word="sks")
    assert not lacks_trigger(["SKS runs"], "sks") and lacks_trigger(["sks runs", "a cat"], "sks")
    assert trigger_notices([("sks runs",), ("a dog",), ("a cat", "sks")], settings) == [
        "captions of 2 of 3 files lack the trigger word 'sks'; write [trigger] into them, or into caption_prefix"
    ]
    assert trigger_notices([("sks runs",)], settings) == []
    assert trigger_notices([("[trigger] runs",), ("a dog",)], DirectoryConfig(path="clips")) == [
        "captions of 1 of 2 files hold [trigger] as it stands; set trigger_word"
    ]


# --- tags -------------------------------------------------------------------------------------------------------------


def test_tags_are_shuffled_the_same_way_everywhere():
    assert trained(TAGS, cache_shuffle_num=3) == SHUFFLED
    assert trained(TAGS, cache_shuffle_num=2) == SHUFFLED[:2]  # more of them leave the cached ones as they are
    assert trained(TAGS, shuffle_tags=True) == SHUFFLED[:1]
    assert trained(TAGS) == (TAGS,)


def test_every_order_is_alike_likely():
    orders = Counter(trained("a, b, c", cache_shuffle_num=3000))
    assert len(orders) == 6 and all(400 < count < 600 for count in orders.values())


def test_the_first_tags_can_stay():
    variants = trained(TAGS, cache_shuffle_num=20, keep_first=2)
    assert all(variant.startswith("one, two, ") for variant in variants)
    assert {tuple(sorted(variant.split(", "))) for variant in variants} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(variants)) == 6
    assert set(trained(TAGS, cache_shuffle_num=5, keep_first=9)) == {TAGS}


def test_the_prefix_stays_in_front_and_the_trigger_moves_with_its_tag():
    settings = {"cache_shuffle_delimiter": ";", "caption_prefix": "p;", "trigger_word": "two;words"}
    variants = trained("a;[trigger];b", cache_shuffle_num=30, **settings)
    assert all(variant.startswith("p;") and "two;words" in variant for variant in variants)
    assert len(set(variants)) == 6


def test_shuffling_keeps_the_weights():
    rows = [Weighted("only", Fraction(2)), Weighted("a, b, c")]
    drawn = trained(*rows, cache_shuffle_num=5)
    assert drawn.count("only") == 10 and len(drawn) == 15
