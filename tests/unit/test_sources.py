"""Listing folders: sub-folders, links, captions.json from the top."""

import json

import pytest

from tests.helpers.media import write_image
from tests.unit.test_scan import captioned_image, look
from utils.config.caption_rules import SOURCES
from utils.data.sources import SOURCE_SUFFIXES


@pytest.fixture
def folder(tmp_path):
    for name in ("", "b", "b/deep", ".hidden"):
        (tmp_path / "data" / name).mkdir()
    for number, name in enumerate(("a.png", "b/b.png", "b/deep/c.png", "d.png", ".hidden/e.png")):
        captioned_image(tmp_path / "data", name, f"caption of {name}", colour=(number, 0, 0))
    return tmp_path / "data"


def names(media, folder):
    return [file.path.relative_to(folder).as_posix() for file in media]


def test_sub_folders_when_asked_for(folder):
    media, skipped = look(folder, recursive=True)
    assert not skipped
    assert names(media, folder) == ["a.png", "b/b.png", "b/deep/c.png", "d.png"]
    assert media[2].captions == ("caption of b/deep/c.png",)
    media, skipped = look(folder)
    assert names(media, folder) == ["a.png", "d.png"] and len(skipped) == 1


def test_links_are_followed_once(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    captioned_image(tmp_path / "elsewhere", "x.png", colour=(9, 9, 9))
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "deep" / "up").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    media, skipped = look(folder, recursive=True)
    assert names(media, folder) == ["a.png", "b/b.png", "b/deep/c.png", "c/x.png", "d.png"]
    assert [str(item) for item in skipped] == [
        "up: leads to a folder that was read already, under another name",
        "itself: is not a media file (no suffix)",
    ]


def test_captions_json_names_files_from_the_top(folder):
    (folder / "captions.json").write_text(json.dumps({"b/deep/c.png": ["one", "two"], "c.png": "not this"}))
    (folder / "b" / "captions.json").write_text("{}")
    media, skipped = look(folder, recursive=True)
    assert names(media, folder) == ["b/deep/c.png"] and media[0].captions == ("one", "two")
    reasons = {item.path.relative_to(folder).as_posix(): item.reason for item in skipped}
    assert set(reasons) == {"b/captions.json", "captions.json", "a.png", "b/b.png", "d.png"}
    assert reasons["captions.json"] == "names 1 file that is not in the folder: c.png"
    assert reasons["b/captions.json"].startswith(f"is not read: the names in it belong into {folder}/captions.json")


def test_captions_of_another_extension(folder):
    (folder / "a.caption").write_text("from .caption")
    media, skipped = look(folder, caption_extension=".caption", default_caption="none")
    assert [file.captions for file in media] == [("from .caption",), ("none",)]
    assert [item.path.name for item in skipped] == ["b"]  # of the text files none is taken for lost media


def test_a_path_that_is_nothing_of_these(folder):
    with pytest.raises(ValueError, match=r"a\.png' is not a folder, nor a file that ends in \.csv, \.jsonl, \.tar"):
        look(folder / "a.png")


def test_the_config_knows_the_same_files():
    assert set(SOURCES) == SOURCE_SUFFIXES


def test_a_folder_that_cannot_be_listed(folder, monkeypatch):
    import os

    real = os.scandir

    def refuse(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list everything
    media, skipped = look(folder, recursive=True)
    assert len(media) == 3
    assert [(str(item), item.bad) for item in skipped] == [("deep: cannot be listed (Permission denied)", True)]


def test_the_order_is_by_name(folder):
    for name in ("Z.png", "aa.png", "a b.png"):
        write_image(folder / name)
    media, _ = look(folder, default_caption="x")
    assert names(media, folder) == ["Z.png", "a b.png", "a.png", "aa.png", "d.png"]
