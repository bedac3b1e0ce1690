"""Tar archives: unpacked once, and nothing of them gets out of its folder."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from tests.helpers.media import write_image, write_video
from tests.unit.test_scan import captioned_image, look
from utils.data import archives
from utils.data.archives import Archives
from utils.data.stat_index import StatIndex


@pytest.fixture
def media(tmp_path):
    (tmp_path / "media").mkdir()
    write_video(tmp_path / "media" / "0.mp4", 20, 16)
    for name in ("1.png", "2.png"):
        write_image(tmp_path / "media" / name, colour=(int(name[0]), 0, 0))
    return tmp_path / "media"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def pack(path, members, odd=()):
    """A tar of (name, bytes or file) and of whole TarInfos."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in odd:
            archive.addfile(info)
    return path


def odd(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def clips(media):
    return [("x/0.mp4", media / "0.mp4"), ("x/0.txt", b"nought"), ("1.png", media / "1.png"), ("1.txt", b"one")]


def test_an_archive_alone_and_in_a_folder(media, folder):
    pack(folder / "a.tar", [*clips(media), ("x/0.cls", b"3"), ("._1.png", b"of a Mac")])
    found, skipped = look(folder / "a.tar")
    assert [(file.path.name, file.captions, file.frames) for file in found] == [
        ("1.png", ("one",), 1),
        ("0.mp4", ("nought",), 20),
    ]
    assert [str(item) for item in skipped] == ["0.cls: is not a media file (.cls)"]
    captioned_image(folder, "b.png", "beside it")
    assert [file.captions for file in look(folder)[0]] == [("one",), ("nought",), ("beside it",)]


def test_captions_json_in_the_archive_and_beside_it(media, folder):
    members = [("0.mp4", media / "0.mp4"), ("1.png", media / "1.png")]
    pack(folder / "a.tar", members)
    pack(folder / "b.tar", [("2.png", media / "2.png"), ("captions.json", json.dumps({"2.png": "own"}).encode())])
    (folder / "captions.json").write_text(json.dumps({"0.mp4": "outer", "1.png": ["outer too"], "2.png": "not this"}))
    found, skipped = look(folder)
    assert [file.captions for file in found] == [("outer",), ("outer too",), ("own",)] and not skipped


def test_it_is_unpacked_once_wherever_it_lies(media, folder, tmp_path, monkeypatch):
    path = pack(folder / "a.tar", clips(media), [odd("l", tarfile.SYMTYPE, "1.png")])
    first = look(path)
    home = tmp_path / "archives"
    unpacked = set(home.iterdir())
    assert {path.suffix for path in unpacked} == {"", ".json"} and len(unpacked) == 2

    def opened(*args, **kwargs):
        raise AssertionError("opened again")

    monkeypatch.setattr(archives.tarfile, "open", opened)
    assert look(path) == first  # what was refused is told again
    (folder / "more").mkdir()
    moved = path.rename(folder / "more" / "renamed.tar")
    os.utime(moved)
    assert look(moved)[0] == first[0]
    monkeypatch.undo()
    assert unpacked == set(home.iterdir())


@pytest.mark.parametrize("lost", ["", "*/1.png", "*.json"])
def test_a_part_that_was_deleted_comes_back(media, folder, tmp_path, lost):
    path = pack(folder / "a.tar", clips(media))
    first = look(path)
    home = tmp_path / "archives"
    [victim] = home.glob(lost) if lost else [home]
    victim.unlink() if victim.is_file() else shutil.rmtree(victim)
    assert look(path) == first and len(first[0]) == 2
    assert len(list(home.iterdir())) == 2


def test_members_that_could_do_harm_are_refused_by_name(media, folder, tmp_path):
    members = [
        ("/etc/passwd.png", b"x"),
        ("../out.png", b"x"),
        ("x/../../out.png", b"x"),
        ("ok.png", media / "1.png"),
        ("l/file.png", b"x"),
        ("ok.png/file.png", b"x"),
        (f"{'n' * 300}.png", b"x"),
    ]
    links = [
        odd("l", tarfile.SYMTYPE, str(tmp_path)),
        odd("hard.png", tarfile.LNKTYPE, "/etc/passwd"),
        odd("pipe.png", tarfile.FIFOTYPE),
        odd("dev.png", tarfile.CHRTYPE),
    ]
    with tarfile.open(folder / "a.tar", "w") as archive:
        for info in links:  # first, so that a later member could be written through one
            archive.addfile(info)
        for name, content in members:
            data = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    before = set(tmp_path.rglob("*"))
    found, skipped = look(folder / "a.tar", default_caption="x")
    assert [file.path.name for file in found] == ["ok.png"]
    new = set(tmp_path.rglob("*")) - before
    home = tmp_path / "archives"
    assert all(path == tmp_path / "probes.jsonl" or path == home or home in path.parents for path in new)
    refused = [item.reason for item in skipped if item.path.name == "a.tar"]
    assert all(item.bad for item in skipped)
    for name, why in [
        ("l", "is a link, to "),
        ("hard.png", "is a link, to '/etc/passwd'"),
        ("pipe.png", "is neither a file nor a folder"),
        ("dev.png", "is neither a file nor a folder"),
        ("/etc/passwd.png", "has an absolute path"),
        ("../out.png", "leads out of the archive"),
        ("x/../../out.png", "leads out of the archive"),
        ("ok.png/file.png", "is a file and a folder at once"),
        ("n" * 300 + ".png", "cannot be written (File name too long)"),
    ]:
        assert any(reason.startswith(f"its member {name!r} {why}") for reason in refused), name
    assert len(refused) == 9  # l/file.png is an ordinary file: the link before it was never made


def test_the_last_of_equal_names_counts(media, folder):
    pack(folder / "a.tar", [*clips(media), ("./1.txt", b"newer")])
    assert ("newer",) in [file.captions for file in look(folder)[0]]


def test_no_room_is_said_before_anything_is_written(media, folder, tmp_path, monkeypatch):
    path = pack(folder / "a.tar", clips(media))
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda root: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(
        ValueError, match=r"a\.tar: unpacks to [\d.]+ [KM]?i?B in the cache, and .* has \d+ B free; set cach"
    ):
        look(path)
    assert list((tmp_path / "archives").iterdir()) == []


def test_damaged_archives_are_named_and_leave_nothing(media, folder, tmp_path):
    whole = pack(tmp_path / "whole.tar", [("1.png", media / "1.png"), ("big.png", b"x" * 40_000)]).read_bytes()
    index = StatIndex(tmp_path / "probes.jsonl")
    cases = {
        "text.tar": b"not a tar at all " * 99,
        "empty.tar": b"",
        "cut.tar": whole[:20_000],
        "gzip.tar": b"\x1f\x8b" + whole,
    }
    for name, data in cases.items():
        (folder / name).write_bytes(data)
        unpacked = Archives(tmp_path / "archives", index).unpack(folder / name)
        assert unpacked.folder is None, name
        [refused] = unpacked.refused
        assert refused.bad and refused.reason.startswith("cannot be read as a tar archive: "), name
    assert list((tmp_path / "archives").iterdir()) == []


def test_mutated_archives_neither_crash_nor_get_out(media, folder, tmp_path):
    whole = np.frombuffer(pack(tmp_path / "whole.tar", clips(media)).read_bytes(), np.uint8)
    index = StatIndex(tmp_path / "probes.jsonl")
    random = np.random.default_rng(0)
    headers = [at for at in range(0, len(whole), 512) if bytes(whole[at + 257 : at + 262]) == b"ustar"]
    for turn in range(150):
        data = whole.copy()
        places = random.choice(headers, 3) + random.integers(0, 512, 3)
        data[places] = random.integers(0, 256, 3)
        (folder / "a.tar").write_bytes(data.tobytes())
        unpacked = Archives(tmp_path / "archives", index).unpack(folder / "a.tar")
        assert unpacked.folder is None or unpacked.folder.parent == tmp_path / "archives", turn
    assert {path.name for path in tmp_path.iterdir()} == {"archives", "data", "media", "probes.jsonl", "whole.tar"}
