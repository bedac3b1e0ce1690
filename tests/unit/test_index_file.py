"""Index files: every row gives a clip or a reason."""

import json
from fractions import Fraction

import pytest

from tests.helpers.media import write_image, write_video
from tests.unit.test_scan import look, scan_notices


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for name, frames in (("a.mp4", 32), ("b.mp4", 16)):
        write_video(tmp_path / "data" / name, frames, 16)
    write_image(tmp_path / "data" / "c.png")
    return tmp_path / "data"


def jsonl(folder, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "clips.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "clips.jsonl"


def csv(folder, text, **how):
    (folder / "clips.csv").write_text(text, **how)
    return folder / "clips.csv"


def test_json_lines(folder, tmp_path):
    elsewhere = write_image(tmp_path / "d.png", colour=(1, 2, 3))
    path = jsonl(
        folder,
        {"path": "b.mp4", "caption": "a\u2028line"},  # JSON may hold this separator as it is
        "",
        {"path": "a.mp4", "caption": ["one", {"caption": "two", "weight": 2}]},
        {"path": str(elsewhere), "caption": "elsewhere"},
    )
    media, skipped = look(path, caption_prefix="p ")
    assert not skipped
    assert [(file.path, file.captions) for file in media] == [
        (folder / "b.mp4", ("p a\u2028line",)),
        (folder / "a.mp4", ("p one", "p two", "p two")),
        (elsewhere, ("p elsewhere",)),
    ]


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_csv(folder, sign):
    rows = [
        ["path", "caption", "caption", "start"],
        ["a.mp4", '"one, or; more"', "", "0.5"],
        ["b.mp4", '"[""one"", {""caption"": ""two"", ""weight"": 2}]"', "three", ""],
        ["c.png", '"[trigger] on\ntwo lines"', "", ""],
    ]
    path = csv(folder, "\n".join(sign.join(row) for row in rows), encoding="utf-8-sig")
    media, skipped = look(path, trigger_word="sks")
    assert not skipped
    assert [file.captions for file in media] == [
        ("one, or; more",),
        ("one", "two", "two", "three"),
        ("sks on\ntwo lines",),
    ]
    assert media[0].offset == Fraction(1, 2)


def test_a_part_of_a_video(folder):
    path = jsonl(
        folder,
        {"path": "a.mp4", "caption": "x", "end": 0.5},
        {"path": "a.mp4", "caption": "x", "start": 0.5, "end": 1.51},
        {"path": "a.mp4", "caption": "x", "start": 1, "end": 99},
        {"path": "a.mp4", "caption": "x", "start": 0},
    )
    media, skipped = look(path)
    assert not skipped
    assert [(file.offset, file.frames, file.duration) for file in media] == [
        (0, 8, Fraction(1, 2)),
        (Fraction(1, 2), 16, 1),
        (1, 16, 1),
        (0, 32, 2),
    ]
    assert len({file.content_hash for file in media}) == 1


def test_rows_without_a_caption_have_text_files(folder):
    (folder / "a.txt").write_text("from the text file")
    media, skipped = look(csv(folder, "path\na.mp4\nb.mp4\n"))
    assert [file.captions for file in media] == [("from the text file",)]
    assert "its caption in b.txt is missing" in skipped[0].reason


def test_every_row_that_gives_nothing_has_a_reason(folder):
    path = jsonl(
        folder,
        {"path": "a.mp4", "caption": "x"},
        {"path": "gone.mp4", "caption": "x"},
        {"path": "./a.mp4", "caption": "y", "start": 0},
        {"path": "b.mp4", "caption": ""},
        {"path": "notes.pdf", "caption": "x"},
        "{",
        "[]",
        {"caption": "x"},
        {"path": "b.mp4", "caption": 3},
        {"path": "b.mp4", "caption": "x", "start": "soon"},
        {"path": "b.mp4", "caption": "x", "start": 2, "end": 1},
        {"path": "b.mp4", "caption": "x", "start": 1},
        {"path": "c.png", "caption": "x", "end": 1},
    )
    media, skipped = look(path)
    assert [file.path.name for file in media] == ["a.mp4"]
    reasons = sorted((str(item), item.bad) for item in skipped)
    expected = sorted(
        [
            ("gone.mp4: line 2 of clips.jsonl: the file is not there", False),
            (
                "a.mp4: line 3 of clips.jsonl: was named by line 1 already; several captions go into one row as a list",
                False,
            ),
            (
                "b.mp4: its caption in line 4 of clips.jsonl is empty; "
                "write one, set default_caption, or set skip_empty_caption = false to train without",
                False,
            ),
            ("notes.pdf: line 5 of clips.jsonl: is not a media file (.pdf)", False),
            ('clips.jsonl: line 7: must be an object with a "path", is a list', True),
            ("clips.jsonl: line 8: has no path", True),
            (
                "b.mp4: line 9 of clips.jsonl: 'b.mp4' must have a caption or a list of captions, has 3; "
                'a caption is a text, or {"caption": "...", "weight": 2}',
                True,
            ),
            (
                "b.mp4: line 10 of clips.jsonl: its start is 'soon'; write seconds as a number, 0 or more, such as 2.5",
                True,
            ),
            ("b.mp4: line 11 of clips.jsonl: its end, 1 s, is not after its start, 2 s", True),
            ("b.mp4: line 12 of clips.jsonl: there is no frame from 1 s to 1 s; the video has 1 s", True),
            ("c.png: line 13 of clips.jsonl: start and end are for videos, and this is an image", True),
        ]
    )
    json_error = next(row for row in reasons if row[0].startswith("clips.jsonl: line 6: is not JSON: "))
    reasons.remove(json_error)
    assert json_error[1] and reasons == expected


def test_a_csv_row_with_a_comma_too_many_is_named(folder):
    media, skipped = look(csv(folder, "path,caption\na.mp4,one\nb.mp4,one, two\n"))
    assert len(media) == 1
    assert [str(item) for item in skipped] == [
        "clips.csv: line 3: has 3 cells for 2 columns; put text that holds a ',' in quotes"
    ]


def test_a_quote_left_open_is_named_with_all_the_lines_that_it_takes(folder):
    media, skipped = look(csv(folder, 'path,caption\na.mp4,one\nb.mp4,"two\na.mp4,three\n'))
    assert len(media) == 1
    assert [str(item) for item in skipped] == [
        "clips.csv: line 3: is not CSV: unexpected end of data, line 4; close the quotes"
    ]


def test_weights(folder):
    rows = [{"path": name, "caption": "x", "weight": weight} for name, weight in (("a.mp4", 2), ("b.mp4", 0.5))]
    media, _ = look(jsonl(folder, *rows, {"path": "c.png", "caption": "x", "weight": None}))
    assert [file.weight for file in media] == [2, 0.5, 1]
    text = "path,caption,weight\na.mp4,x,0.25\nb.mp4,x,\nc.png,x,0\na.mp4,x,-1\nb.mp4,x,nan\nc.png,x,much\n"
    media, skipped = look(csv(folder, text))
    assert [(file.path.name, file.weight) for file in media] == [("a.mp4", 0.25), ("b.mp4", 1)]
    mend = "write a number above 0, or remove the row to train without it"
    lines = enumerate((("c.png", "0"), ("a.mp4", "-1"), ("b.mp4", "nan"), ("c.png", "much")), start=4)
    assert [(str(item), item.bad) for item in skipped] == [
        (f"{name}: line {line} of clips.csv: its weight is {value!r}; {mend}", True) for line, (name, value) in lines
    ]
    assert "true" in str(look(jsonl(folder, {"path": "a.mp4", "caption": "x", "weight": True}))[1][0]).lower()


def test_a_json_file_under_the_name_of_json_lines(folder):
    path = folder / "clips.jsonl"
    path.write_text(json.dumps([{"path": "a.mp4", "caption": "x"}], indent=1))
    with pytest.raises(ValueError, match=r"clips\.jsonl: is one JSON list; write each of its objects on a line"):
        look(path)


def test_columns_without_effect_are_named(folder):
    path = jsonl(folder, {"path": "a.mp4", "caption": "x", "id": 1}, {"path": "b.mp4", "caption": "x", "captoin": ""})
    assert scan_notices(path).notices == [
        f"{path}: column 'captoin' is without effect; did you mean 'caption'?",
        f"{path}: columns without effect: id",
    ]


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("mask", "mask_path"),
        ("mask_file", "mask_path"),
        ("Weight", "weight"),
        ("weights", "weight"),
        ("is_reg", "is_regularization"),
        ("index", None),
        ("width", None),
    ],
)
def test_a_column_that_nearly_is_one_of_ours_is_asked_about(folder, column, meant):
    path = jsonl(folder, {"path": "a.mp4", "caption": "x", column: 1})
    asked = f"column '{column}' is without effect; did you mean '{meant}'?"
    assert scan_notices(path).notices == [f"{path}: {asked if meant else f'columns without effect: {column}'}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,caption\na.mp4,x\n", "has no column 'path'; its first line must name the columns, and has: 'file,capt"),
        ("", "has no column 'path'"),
        ("path,start,start\na.mp4,1,2\n", "has the column start more than once"),
        (
            "path,is_regularization\na.mp4,true\n",
            r"line 2: column 'is_regularization' is not for single clips; give such clips a \[\[directory\]\] of its "
            "own with is_regularization = true, and remove the column",
        ),
    ],
)
def test_a_csv_that_cannot_be_used(folder, text, message):
    with pytest.raises(ValueError, match=message):
        look(csv(folder, text))


def test_an_encoding_that_is_not_named(folder):
    with pytest.raises(ValueError, match=r"clips\.csv: is not UTF-8 \(byte 17\); save it as UTF-8"):
        look(csv(folder, "path,caption\na,eW\u00fcrfel", encoding="latin-1"))
    path = csv(folder, "path,caption\na.mp4,Würfel", encoding="utf-16")
    assert look(path)[0][0].captions == ("Würfel",)
