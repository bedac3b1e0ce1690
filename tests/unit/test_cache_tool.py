"""Starts on a cache and the tool that looks after it: uses, checks, and what may be deleted."""

import errno
import os
import shutil
import tarfile
import time
from types import SimpleNamespace

import pytest

import models
from models.base import Outline
from tests.helpers.media import write_video
from tests.helpers.toy import ToyFamily
from tests.unit.test_buckets import SPEC
from utils.config.load import load_config
from utils.data.cache import CacheStore
from utils.data.care import entries
from utils.data.crew import Crew
from utils.data.room import free_memory, full_disk_told
from utils.data.uses import recorded_uses
from utils.data.workers import Silent
from utils.train import cache_tool, prepare
from utils.train.prepare import prepare as prepare_data

RUN = """
output_dir = '{root}/runs'
dataset = '{root}/{name}_data.toml'
epochs = 1
save_every_n_epochs = 1
{more}
[model]
type = 'toy'
[adapter]
type = 'lora'
rank = 2
[optimizer]
type = 'adamw'
lr = 1e-4
"""
DATA = "resolutions = [64]\nframe_buckets = [1, 9]\n[[directory]]\npath = '{root}/{name}'\n"


class Place:
    """Two runs, `one` and `two`, that share a cache and the clip `shared.mp4`, and have one of their own each."""

    def __init__(self, root):
        self.root, self.cache = root, root / "runs" / "cache"
        for name, frames in {"one": 12, "two": 14}.items():
            (root / name).mkdir()
            write_video(root / name / f"{name}.mp4", frames)
            write_video(root / name / "shared.mp4", 10)
            for clip in (name, "shared"):
                (root / name / f"{clip}.txt").write_text(clip)
            self.write(name)

    def write(self, name, more=""):
        (self.root / f"{name}.toml").write_text(RUN.format(root=self.root, name=name, more=more))
        (self.root / f"{name}_data.toml").write_text(DATA.format(root=self.root, name=name))
        return self.root / f"{name}.toml"

    def start(self, name, run_dir=None, **kwargs):
        loaded = load_config(self.root / f"{name}.toml", ())
        arguments = {"workers": 0, "regenerate": False, "progress": Silent(), "check": lambda train: None}
        return prepare_data(loaded, ToyFamily(), run_dir=run_dir, **(arguments | kwargs))

    def tool(self, *words):
        command, *rest = map(str, words)
        return cache_tool.main([command, str(self.cache), *rest])

    def keys(self):
        return {found.key for found in entries(self.cache)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "toy", "tests.helpers.toy:ToyFamily")
    monkeypatch.setenv("COLUMNS", "200")
    return Place(tmp_path)


@pytest.fixture
def filled(place):
    place.start("one", run_dir=place.root / "runs")
    place.start("two")
    assert len(place.keys()) == 3 + 4, "3 clips, 3 captions and the empty one"
    return place


def spoil(place, kind="latents"):
    """Flip a bit of the newest entry of a kind; its length says nothing."""
    found = max((entry for entry in entries(place.cache) if entry.kind == kind), key=lambda entry: entry.written)
    content = bytearray(found.path.read_bytes())
    content[-3] ^= 1
    found.path.write_bytes(content)
    return found


def test_a_start_records_what_it_uses_and_leaves_nothing_else(filled):
    uses = recorded_uses(filled.cache)
    assert sorted((use.name, len(use.keys)) for use in uses) == [("--cache_only", 5), ("runs", 5)]
    assert set().union(*(use.keys for use in uses)) == filled.keys()
    filled.start("one")
    assert len(recorded_uses(filled.cache)) == 2, "the same set is recorded once"
    assert not list((filled.cache / "jobs").iterdir()) and not list((filled.cache / "claims").iterdir())


def test_stats_count_by_kind_and_encoder(filled, capfd):
    assert filled.tool("stats") == 0
    told = capfd.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told.splitlines() if "Toy" in line]
    assert [row[:3] for row in rows] == [["latents", "ToyVAE", "3"], ["text", "ToyText", "4"]]
    assert "--cache_only" in told and "nobody that is known" in told


@pytest.mark.parametrize("words", [("stats",), ("verify",), ("gc", "--days", "0", "--delete")])
def test_a_folder_that_is_no_cache_is_not_called_whole(place, capfd, words):
    command, *rest = words
    (place.root / "weights").mkdir()
    (place.root / "weights/model.safetensors").write_bytes(b"not an entry")
    assert cache_tool.main([command, str(place.root / "weights"), *rest]) == 2
    assert "holds no cache; name the cache_dir of a run" in capfd.readouterr().out


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "x"])
def test_days_that_would_keep_nothing_or_mean_nothing_are_refused(filled, capfd, days):
    with pytest.raises(SystemExit):
        filled.tool("gc", "--days", days, "--delete")
    assert "--days" in capfd.readouterr().err and len(filled.keys()) == 7


def test_a_cache_that_only_a_plan_has_begun_is_one(place, capfd):
    place.cache.mkdir(parents=True)
    (place.cache / "probes.jsonl").write_text("")
    assert place.tool("verify") == 0 and "0 entries" in capfd.readouterr().out


def test_verify_reads_everything(filled, capfd):
    assert filled.tool("verify") == 0 and "7 entries" in capfd.readouterr().out
    found = spoil(filled)
    assert filled.tool("verify") == 1
    told = capfd.readouterr().out
    assert str(found.path) in told.replace("\n", "") and "1 damaged" in told and found.path.exists()
    assert filled.tool("verify", "--delete") == 1 and not found.path.exists()
    assert filled.tool("verify") == 0
    assert filled.start("two").report.made["latents"] == (1, 1)


def test_an_entry_that_is_cut_short_is_made_anew_and_told_of(filled):
    found = next(entry for entry in entries(filled.cache) if entry.kind == "text")
    found.path.write_bytes(found.path.read_bytes()[:-4])
    reports = [filled.start(name).report for name in ("one", "two")]
    assert [report.damaged for report in reports].count(1) == 1
    assert filled.tool("verify") == 0


def test_gc_keeps_what_the_configs_need_and_deletes_only_when_told(filled, capfd):
    before = filled.keys()
    one = filled.root / "one.toml"
    assert filled.tool("gc", "--config", one) == 0
    told = capfd.readouterr().out
    assert "5 entries stay, 2 entries of" in told and "2 of them were used by --cache_only" in told
    assert filled.keys() == before
    assert filled.tool("gc", "--config", one, "--delete") == 0
    assert len(filled.keys()) == 5
    assert filled.start("one").report.made == {"latents": (0, 2), "text": (0, 3)}
    assert filled.start("two").report.made == {"latents": (1, 1), "text": (1, 2)}


def test_gc_keeps_what_was_used_lately(filled, capfd):
    old = time.time() - 5 * 86400
    for path in (*(entry.path for entry in entries(filled.cache)), *(filled.cache / "uses").iterdir()):
        os.utime(path, (old, old))
    filled.start("two")
    assert filled.tool("gc", "--days", 9, "--delete") == 0 and len(filled.keys()) == 7
    assert filled.tool("gc", "--days", 2, "--delete") == 0 and len(filled.keys()) == 5
    assert [use.name for use in recorded_uses(filled.cache)] == ["--cache_only", "runs"], "some of its entries are left"
    assert filled.start("two").report.made == {"latents": (0, 2), "text": (0, 3)}


def test_gc_deletes_nothing_it_is_not_sure_of(filled, capfd):
    before, other = filled.keys(), filled.write("one", more="cache_dir = 'elsewhere'")
    for words, complaint in (
        (["gc"], "must be told what to keep"),
        (["gc", "--config", other, "--delete"], "its cache_dir is"),
        (["gc", "--config", filled.root / "absent.toml", "--delete"], "absent.toml"),
    ):
        assert filled.tool(*words) == 2
        assert complaint in capfd.readouterr().out.replace("\n", " ")
    shutil.rmtree(filled.root / "two")
    assert filled.tool("gc", "--config", filled.root / "two.toml", "--delete") == 2
    with Crew.alone(filled.cache):
        assert filled.tool("gc", "--days", 0, "--delete") == 2
        assert "fills this cache now" in capfd.readouterr().out.replace("\n", " ")
    assert filled.keys() == before


def test_gc_takes_archives_that_nobody_reads(filled, capfd):
    for name in ("one", "two"):
        clip = write_video(filled.root / f"packed_{name}.mp4", 15 if name == "one" else 16)
        with tarfile.open(filled.root / name / f"{name}.tar", "w") as archive:
            archive.add(clip, "packed.mp4")
            archive.add(filled.root / name / f"{name}.txt", "packed.txt")
        filled.start(name)
    folders = [path for path in (filled.cache / "archives").iterdir() if path.is_dir()]
    assert len(folders) == 2
    for path in (filled.cache / "archives").iterdir():
        os.utime(path, (time.time() - 5 * 86400,) * 2)
    words = ("gc", "--config", filled.root / "one.toml", "--days", 1)
    assert filled.tool(*words) == 0 and all(path.exists() for path in folders)
    told = capfd.readouterr().out
    assert "the archive two.tar, " in told and "was last read 5" in told and "one.tar" not in told
    assert filled.tool(*words, "--delete") == 0
    assert "1 unpacked archive of" in capfd.readouterr().out
    assert [path.is_dir() for path in folders].count(True) == 1 and len([*(filled.cache / "archives").iterdir()]) == 2
    assert filled.start("one").report.made["latents"] == (0, 3)
    assert filled.start("two").report.made["latents"] == (0, 3), "unpacked anew, and nothing encoded"


def test_gc_takes_what_killed_processes_left(filled):
    left = filled.cache / "latents" / "ab" / ".x.safetensors.1234.tmp"
    left.parent.mkdir(exist_ok=True)
    left.touch()
    claim = filled.cache / "claims" / "latents-0"
    claim.write_text("jobs/gone/rank-0.json")
    assert filled.tool("gc", "--days", 1, "--delete") == 0 and left.exists() and not claim.exists()
    os.utime(left, (time.time() - 7200,) * 2)
    assert filled.tool("gc", "--days", 1, "--delete") == 0 and not left.exists()


# --- room -------------------------------------------------------------------------------------------------------------


def test_clips_must_fit_the_memory_that_is_set(place):
    place.write("one", more="cache_ram_gb = 0.0001")
    with pytest.raises(ValueError, match=r"cache_ram_gb = 0\.0001 is 0\.0001 GiB for each rank, and the largest clip"):
        place.start("one")
    place.write("one", more="cache_ram_gb = 0.001")
    assert place.start("one").report.made["latents"] == (2, 0)


def test_what_is_free_is_known():
    assert 2**20 < free_memory() < 2**45


class Outlined(ToyFamily):
    @classmethod
    def outline(cls, config):
        return Outline("toy", SPEC, lambda *size: 1, lambda *size: {"latents": 2**30}, 100, 4)


def test_the_disk_is_looked_at_before_anything_is_encoded(place, monkeypatch):
    free = 2 * 2**30 + 500 - 1  # of two clips, two captions of a word and the empty one, each with its end
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    loaded = load_config(place.write("one"), ())
    store = CacheStore(place.cache)
    manifests = prepare.scan(
        loaded, ToyFamily(), ToyFamily().encoders(), store, workers=0, regenerate=False, progress=Silent()
    )
    with pytest.raises(ValueError, match=r"encoding takes 2 GiB of disk and 2 GiB are free; make room, or name"):
        prepare.require_room(loaded, Outlined(), manifests, store, 2**30)
    free += 1
    prepare.require_room(loaded, Outlined(), manifests, store, 2**30)


def test_a_disk_that_fills_up_is_told_with_what_is_missing(place, monkeypatch):
    synced, fsync = [], os.fsync

    def no_space(descriptor):
        synced.append(descriptor)
        if len(synced) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        OSError, match=r"the disk of cache_dir = .* is full: .* are free, and about .* still to be writ"
    ):
        place.start("one")
    monkeypatch.undo()
    monkeypatch.setitem(models.FAMILIES, "toy", "tests.helpers.toy:ToyFamily")
    there = len(place.keys())
    assert place.tool("verify") == 0 and not list(place.cache.rglob(".*.tmp"))
    report = place.start("one").report
    assert sum(made.encoded for made in report.made.values()) == 5 - there and 0 < there < 5


def test_other_errors_of_the_system_pass(tmp_path):
    with pytest.raises(PermissionError), full_disk_told(tmp_path, lambda: 0):
        raise PermissionError(errno.EACCES, "no")
