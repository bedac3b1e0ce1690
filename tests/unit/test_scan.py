"""Listing a folder: captions, what is left out and why, and what is remembered."""

import json
import os

import pytest

from tests.helpers.media import write_image, write_video
from utils.config.dataset_schema import DirectoryConfig
from utils.data import scan
from utils.data.scan import scan_directory
from utils.data.stat_index import StatIndex, hash_file

MEND = "write one, set default_caption, or set skip_empty_caption = false to train without"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def look(path, workers=0, progress=None, **settings):
    """Media and what is left out."""
    return scan_notices(path, workers, progress, **settings)[:2]


def scan_notices(path, workers=0, progress=None, **settings):
    """The same with the notices; what is remembered, and unpacked, lies beside the folder `data`."""
    home = next(parent.parent for parent in (path, *path.parents) if parent.name == "data")
    index, archives = StatIndex(home / "probes.jsonl"), home / "archives"
    settings = DirectoryConfig(path=path, **settings)
    return scan_directory(settings, workers=workers, index=index, archives=archives, progress=progress)


def captioned_image(folder, name, caption="a caption", **kwargs):
    path = write_image(folder / name, **kwargs)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


class Recorder:
    def __init__(self):
        self.total, self.names, self.finished = 0, [], 0

    def start(self, total, label):
        self.total += total

    def advance(self, n, name):
        self.names.append(name)

    def done(self):
        self.finished += 1


def test_images_and_videos_with_their_captions(folder):
    captioned_image(folder, "b.png", "  a red square \n")
    video = write_video(folder / "a.mp4", 20, 24)
    video.with_suffix(".txt").write_bytes("\ufeffein Würfel".encode())  # a byte order mark, as Windows writes it
    media, skipped = look(folder, caption_prefix="tok, ")
    assert not skipped
    assert [(file.path.name, file.captions, file.is_video) for file in media] == [
        ("a.mp4", ("tok, ein Würfel",), True),
        ("b.png", ("tok, a red square",), False),
    ]
    assert (media[0].frames, media[0].fps, media[0].content_hash) == (20, 24, hash_file(video))


def test_media_without_a_caption(folder):
    write_image(folder / "none.png")
    captioned_image(folder, "blank.png", " \n")
    media, skipped = look(folder)
    assert not media
    assert [str(item) for item in skipped] == [
        f"blank.png: its caption in blank.txt is empty; {MEND}",
        f"none.png: its caption in none.txt is missing; {MEND}",
    ]
    assert not any(item.bad for item in skipped)
    media, skipped = look(folder, skip_empty_caption=False, caption_prefix="tok")
    assert [file.captions for file in media] == [("tok",), ("tok",)] and not skipped


def test_captions_json_stands_in_for_text_files(folder):
    captioned_image(folder, "a.png", "from the text file")
    for name in ("b.png", "c.png", "d.png"):
        write_image(folder / name)
    listed = {"a.png": "one", "b.png": ["two", "three"], "c.png": [], "gone.png": ["four"]}
    (folder / "captions.json").write_text(json.dumps(listed))
    media, skipped = look(folder)
    assert [file.captions for file in media] == [("one",), ("two", "three")]
    assert [item.path.name for item in skipped] == ["captions.json", "c.png", "d.png"]
    assert skipped[0].reason == "names 1 file that is not in the folder: gone.png"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read as UTF-8 JSON"),
        (b"[]", "must be an object of file names and captions, is a list"),
        (b'{"a.png": 3}', "'a.png' must have a caption or a list of captions, has 3"),
    ],
)
def test_a_damaged_captions_json_is_an_error(folder, content, message):
    (folder / "captions.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        look(folder)
    assert str(caught.value).startswith(str(folder / "captions.json"))


def test_a_caption_that_is_not_utf8_is_bad(folder):
    captioned_image(folder, "a.png").with_suffix(".txt").write_bytes("Würfel".encode("latin-1"))
    _, skipped = look(folder)
    assert [(item.reason, item.bad) for item in skipped] == [
        ("its caption a.txt is not UTF-8 (byte 1); save it as UTF-8", True)
    ]


def test_what_is_left_out_is_said(folder):
    captioned_image(folder, "a.png")
    (folder / "notes.pdf").write_text("x")
    (folder / ".hidden.mp4").write_text("x")
    (folder / "latents.npz").write_text("x")
    (folder / "empty").mkdir()
    (folder / "more").mkdir()
    write_image(folder / "more" / "b.png")
    media, skipped = look(folder)
    assert len(media) == 1
    assert [str(item) for item in skipped] == [
        "more: sub-folders are not scanned, 1 media file is left out; set recursive = true, or give it its own "
        "[[directory]]",
        "notes.pdf: is not a media file (.pdf)",
    ]


def test_unreadable_media_are_bad_and_the_rest_goes_on(folder):
    captioned_image(folder, "a.png")
    for name in ("b.mp4", "c.jpg"):
        (folder / name).write_bytes(b"nonsense")
        (folder / name).with_suffix(".txt").write_text("x")
    media, skipped = look(folder, workers=2)
    assert [file.path.name for file in media] == ["a.png"]
    assert [(item.path.name, item.bad) for item in skipped] == [("b.mp4", True), ("c.jpg", True)]


def test_a_second_start_reads_only_what_changed(folder, tmp_path, monkeypatch):
    first, second = captioned_image(folder, "a.png"), captioned_image(folder, "b.png", colour=(1, 2, 3))
    assert len(look(folder)[0]) == 2

    read = []
    real = scan.describe
    monkeypatch.setattr(scan, "describe", lambda path: read.append(path) or real(path))
    before, _ = look(folder)
    assert read == [] and len(before) == 2  # a new index, read from disk

    write_image(second, size=(32, 32))
    after, _ = look(folder)
    assert read == [second] and after[1].width == 32 and after[1].content_hash != before[1].content_hash

    os.utime(first, ns=(1, 1))
    look(folder)
    assert read == [second, first]


def test_a_damaged_index_costs_a_second_look_and_no_more(folder, tmp_path):
    captioned_image(folder, "a.png")
    look(folder)
    index = tmp_path / "probes.jsonl"
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    recorder = Recorder()
    assert len(look(folder, progress=recorder)[0]) == 1
    assert (recorder.total, recorder.names, recorder.finished) == (1, ["a.png"], 1)
    recorder = Recorder()
    look(folder, progress=recorder)
    assert recorder.total == 0


def test_the_index_does_not_grow_for_ever(tmp_path):
    file = tmp_path / "a"
    file.write_text("x")
    index = StatIndex(tmp_path / "index.jsonl")
    for turn in range(300):
        index.put(file, [turn])
    assert StatIndex(tmp_path / "index.jsonl").get(file) == [299]
    assert (tmp_path / "index.jsonl").read_bytes().count(b"\n") <= 2


def test_a_link_to_nothing_is_named(folder):
    captioned_image(folder, "a.png")
    real = write_image(folder.parent / "real.png")
    (folder / "b.png").symlink_to(real)
    (folder / "c.png").symlink_to(folder / "gone.png")
    media, skipped = look(folder, default_caption="x")
    assert [file.path.name for file in media] == ["a.png", "b.png"]
    assert [(str(item), item.bad) for item in skipped] == [("c.png: the file is not there", True)]
    real.unlink()  # what is remembered of it is of no use
    media, skipped = look(folder, default_caption="x")
    assert [file.path.name for file in media] == ["a.png"]
    assert {str(item) for item in skipped} == {
        "b.png: cannot be looked at (No such file or directory)",
        "c.png: the file is not there",
    }


def test_a_path_that_is_no_folder(folder):
    with pytest.raises(ValueError, match="is not a folder"):
        look(folder / "nowhere")
