"""What a start remembers of the whole of a dataset, and everything that makes it look again."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.large_data import make_dataset, opened, scanned
from tests.helpers.media import write_image
from tests.unit.test_mask_cache import Masked
from utils.data import scan_memory
from utils.data.scan_memory import ScanMemory, forget_scans
from utils.train import prepare

LATER = 3600 * 10**9


@pytest.fixture
def bench(tmp_path):
    """Its cache is full."""
    bench = Masked(tmp_path)
    inside = bench.data / "inside"
    inside.mkdir()
    shutil.copy(bench.data / "still.png", inside / "more.png")
    shutil.copy(bench.data / "still.txt", inside / "more.txt")
    (bench.data / ".hidden").write_text("of nobody's concern")
    bench.run(bench.settings(recursive=True))
    return bench


def memory(bench, *settings, decided_by=("settings",)):
    settings = settings or (bench.settings(recursive=True),)
    return ScanMemory(bench.store, settings, decided_by, now_ns=time.time_ns() + LATER)


def keep(bench, **kwargs):
    made = bench.manifest(bench.settings(**{"recursive": True} | kwargs))
    memory(bench, bench.settings(**{"recursive": True} | kwargs)).keep(made)
    return made


def test_it_is_what_a_scan_comes_to(bench):
    made = keep(bench)
    assert len(made.entries) == 6 and any(entry.mask_keys for entry in made.entries) and made.notices
    assert memory(bench).manifest() == made


def edited(path, text):
    """With as many bytes as before, and the same time of modification."""
    told = path.stat()
    assert len(text) == told.st_size
    path.write_bytes(text)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))


CHANGES = {
    "a caption": lambda data: edited(data / "clip0.txt", b"clip 9"),
    "a caption further down": lambda data: edited(data / "inside" / "more.txt", b"a stall"),
    "a file more": lambda data: write_image(data / "another.png"),
    "a caption less": lambda data: (data / "clip1.txt").unlink(),
    "another name": lambda data: (data / "clip1.mp4").rename(data / "clip3.mp4"),
    "a file that is touched": lambda data: os.utime(data / "clip2.mp4"),
    "captions.json": lambda data: (data / "captions.json").write_text('{"clip0.mp4": "another"}'),
    "a mask": lambda data: shutil.copy(data.parent / "masks" / "clip0.png", data.parent / "masks" / "clip2.png"),
    "a link to nothing": lambda data: (data / "lost.mp4").symlink_to(data / "nowhere.mp4"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_seen(bench, change):
    keep(bench)
    CHANGES[change](bench.data)
    assert memory(bench).manifest() is None


def test_what_nobody_reads_may_change(bench):
    made = keep(bench)
    (bench.data / ".hidden").write_text("another text")
    assert memory(bench).manifest() == made


def test_a_folder_that_is_not_scanned_is_told_by_the_names_in_it(bench):
    keep(bench, recursive=False)
    (bench.data / "inside" / "more.txt").write_text("of no concern")
    assert memory(bench, bench.settings()).manifest()
    shutil.copy(bench.data / "still.png", bench.data / "inside" / "third.png")
    assert memory(bench, bench.settings()).manifest() is None, "how many are left out is told"


def test_other_settings_code_and_masks_are_scanned(bench, monkeypatch):
    mask = Path(shutil.copy(bench.masks / "clip0.png", bench.store.root.parent))
    with_mask = bench.settings(recursive=True, default_mask_file=mask)
    bench.run(with_mask)
    keep(bench, default_mask_file=mask)
    assert memory(bench, with_mask).manifest()
    assert memory(bench, with_mask, decided_by=("others",)).manifest() is None
    monkeypatch.setattr(scan_memory, "_code", lambda: ["of another release"])
    assert memory(bench, with_mask).manifest() is None
    monkeypatch.undo()
    edited(mask, mask.read_bytes()[::-1])
    assert memory(bench, with_mask).manifest() is None


def test_what_the_cache_lacks_is_scanned_for(bench):
    made = keep(bench)
    for kind, key in (("latents", made.entries[0].media_keys[0]), ("text", made.empty_text_key)):
        path = bench.store.path(kind, key)
        content = path.read_bytes()
        path.unlink()
        assert memory(bench).manifest() is None
        path.write_bytes(content)
        assert memory(bench).manifest() == made


def test_a_first_start_is_remembered_before_anything_is_encoded(tmp_path):
    bench = Masked(tmp_path)
    settings = bench.settings()
    before = memory(bench, settings)
    made, _ = bench.run(settings)
    before.keep(made)
    again = memory(bench, settings).manifest()
    assert again == bench.manifest(settings) and not any(again.jobs.values())
    assert all(count.present == count.total for count in again.counts.values())


def test_what_cannot_be_told_by_its_folder_is_scanned_each_time(bench, tmp_path):
    index = tmp_path / "clips.jsonl"
    index.write_text('{"path": "data/clip0.mp4", "caption": "a clip"}')
    with_archive = Path(shutil.copytree(bench.data, tmp_path / "other"))
    (with_archive / "more.tar").write_bytes(b"")
    made = bench.manifest(bench.settings())
    for path in (index, with_archive, tmp_path / "absent"):
        settings = replace(bench.settings(), path=path, mask_path=None)
        memory(bench, settings).keep(made)
        assert memory(bench, settings).manifest() is None
    moment_ago = ScanMemory(bench.store, [bench.settings()], (), now_ns=time.time_ns())
    moment_ago.keep(made)
    assert not (bench.store.root / "scans").exists(), "a second change within a tick of the clock would not be seen"


def test_a_file_that_cannot_be_read_is_tried_again(bench):
    (bench.data / "bad.mp4").write_text("no video")
    (bench.data / "bad.txt").write_text("a caption")
    memory(bench).keep(bench.manifest(bench.settings(recursive=True), skip_bad_media=True))
    assert memory(bench).manifest() is None


def test_a_damaged_or_unwritable_memory_is_as_good_as_none(bench):
    keep(bench)
    [path] = (bench.store.root / "scans").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert memory(bench).manifest() is None
    path.write_text('{"entries": [[]]}')
    assert memory(bench).manifest() is None
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder")
    keep(bench)
    assert memory(bench).manifest() is None


def test_links_in_a_circle_end(bench):
    (bench.data / "inside" / "circle").symlink_to(bench.data)
    made = keep(bench)
    assert memory(bench).manifest() == made


def test_a_link_to_what_was_seen_before_tells_where_it_leads(tmp_path):
    """The masks lie among the media, where a scan passes over them but for such a link."""
    bench = Masked(tmp_path)
    masks = bench.data / "masks"
    for name in ("one", "two"):
        (masks / name).mkdir(parents=True)
        shutil.copy(bench.data / "still.png", masks / name / f"{name}.png")
        (masks / name / f"{name}.txt").write_text(name)
    link = bench.data / "more"
    link.symlink_to(masks / "one")
    settings = bench.settings(recursive=True, mask_path=masks)
    made, _ = bench.run(settings)
    memory(bench, settings).keep(bench.manifest(settings))
    assert memory(bench, settings).manifest().entries == made.entries
    link.unlink()
    link.symlink_to(masks / "two")
    assert bench.manifest(settings).entries != made.entries and memory(bench, settings).manifest() is None


def test_the_newest_are_kept(bench, monkeypatch):
    made = keep(bench)
    [path] = (bench.store.root / "scans").iterdir()
    monkeypatch.setattr(scan_memory, "_MOST_BYTES", int(8.5 * path.stat().st_size))
    path.unlink()
    for number in range(10):
        memory(bench, decided_by=[number]).keep(made)
        for path in (bench.store.root / "scans").iterdir():
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10))
    assert [bool(memory(bench, decided_by=[number]).manifest()) for number in range(10)] == [False] * 2 + [True] * 8
    forget_scans(bench.store.root, time.time() + 60)
    assert not list((bench.store.root / "scans").iterdir())


def test_a_start_scans_once(tmp_path, monkeypatch):
    make_dataset(tmp_path, "whole", 6, 1)
    run = opened(tmp_path, "whole")
    caption = next((tmp_path / "whole").glob("*.txt"))
    monkeypatch.setattr(scan_memory, "_TICK_NS", 0)
    made = scanned(*run)
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "build_manifest", None)
        assert scanned(*run) == made and len(made.entries) == 6
    caption.write_text("another caption")
    assert sum(map(len, scanned(*run).jobs.values())) == 1, "of the caption that changed"
