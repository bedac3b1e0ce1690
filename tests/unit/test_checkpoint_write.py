"""Checkpoints are written beside training from a copy, and a disk that fails costs the one that it fails, no more."""

import errno
import json
import logging
import os
import resource
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoints import Training, check, held_up, save
from tests.helpers.disks import CountedDisk, failing, killing, short
from utils.train import beside, checkpoint, checkpoint_write, host_copies
from utils.train.activity import Activity
from utils.train.disk import HashedFile


def test_later_steps_do_not_reach_what_is_being_written(tmp_path):
    disk, go = held_up()
    training = Training(tmp_path, disk=disk)
    for _ in range(3):
        training.step()
    assert training.begin()
    for _ in range(4):
        training.step()
        assert training.writer.poll() is None
        assert training.writer.is_writing
    go.set()
    ended = training.writer.settle()
    assert ended[:2] == (3, tmp_path / "global_step3")
    check(ended.folder, training.held)
    assert not training.writer.is_writing
    assert training.writer.settle() is None


def test_it_is_finished_between_steps_too(tmp_path):
    training = Training(tmp_path)
    training.step()
    training.begin()
    ended = None
    while ended is None:
        training.step()
        ended = training.writer.poll()
    check(ended.folder, training.held)


def test_the_memory_of_a_copy_is_used_again_and_nothing_is_copied_where_training_waits(tmp_path):
    training = Training(tmp_path)
    training.step()
    training.begin(wait=True)
    training.writer.settle()
    assert training.writer._copies._chunks == []
    training.save()
    chunks = [chunk.data_ptr() for chunk in training.writer._copies._chunks]
    assert chunks
    training.save()
    assert [chunk.data_ptr() for chunk in training.writer._copies._chunks] == chunks


def test_where_the_host_has_no_room_training_waits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(host_copies, "free_memory", lambda: 64)
    training = Training(tmp_path)
    training.step()
    assert not training.begin()
    assert "no room for a copy of what is trained; training waits" in caplog.text
    check(training.writer.settle().folder, training.held)


def test_a_copy_has_every_kind_of_tensor_and_shares_nothing(tmp_path):
    value = {
        "state": {"a": {"m": torch.randn(5, 3).mT, "step": torch.tensor(3.0), "none": None, "n": 3}},
        "list": [
            torch.zeros(0, 2),
            torch.arange(4, dtype=torch.uint8),
            torch.randn(3).bfloat16(),
            (torch.tensor(True),),
        ],
    }
    copied = host_copies.HostCopies().of(value)
    assert [t.tolist() for t in copied["list"][:3]] == [t.tolist() for t in value["list"][:3]]
    assert copied["list"][3][0].item() is True
    assert torch.equal(copied["state"]["a"]["m"], value["state"]["a"]["m"])
    assert copied["state"]["a"]["m"].is_contiguous()
    assert copied["state"]["a"]["m"].untyped_storage().nbytes() == 60, (
        "a storage of its own: torch.save writes all of it"
    )
    assert (copied["state"]["a"]["none"], copied["state"]["a"]["n"]) == (None, 3)
    value["list"][1].zero_()
    assert copied["list"][1].tolist() == [0, 1, 2, 3]


def test_what_is_waited_for_is_told_to_the_watchdog(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "LOOK_S", 0.001)
    told: list[str] = []
    activity = SimpleNamespace(note=lambda what, peers=(): told.append(what))
    training = Training(tmp_path, disk=CountedDisk(lambda *_: threading.Event().wait(0.004)), activity=activity)
    training.step()
    training.begin(wait=True)
    training.writer.settle()
    names = ["writing weights_00.safetensors", "writing optimizer_00.pt", "putting it in its place"]
    assert [what for what in dict.fromkeys(told) if what in names] == names
    assert len(told) > 10, "each piece counts as a move"


def test_a_safetensors_file_is_what_the_library_reads(tmp_path):
    tensors = {
        "b": torch.randn(2, 3).bfloat16(),
        "a": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "c": torch.ones(3),
    }
    with HashedFile(short(7), tmp_path / "x.safetensors") as file:
        checkpoint_write.write_tensors(file, tensors)
    read = load_file(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def calls_of_a_save(folder) -> list[str]:
    """Of the second checkpoint of a run that keeps one, so that all there can be is there."""
    training = Training(folder, keep_last=1)
    training.save()
    training.writer._disk = disk = CountedDisk()
    training.save()
    return disk.calls


def telling(calls: list[str]) -> list[int]:
    """All calls but most writes: torch.save makes a hundred of them."""
    return [number for number, call in enumerate(calls) if call != "write" or number % 12 == 0]


def test_a_disk_that_fails_at_any_call_costs_at_most_that_checkpoint(tmp_path, caplog):
    """Each call of a save, three errors in turn, for once and for good: no exception, and one of the two is there."""
    (tmp_path / "counted").mkdir()
    calls = calls_of_a_save(tmp_path / "counted")
    assert {"make", "open", "write", "sync", "rename", "remove"} == set(calls)
    codes, lost = (errno.ENOSPC, errno.EIO, errno.EROFS), 0
    cases = [(number, lasting) for number in telling(calls) for lasting in (False, True)]
    for index, (number, lasting) in enumerate(cases):
        code, folder = codes[index % 3], tmp_path / str(index)
        folder.mkdir()
        training = Training(folder, keep_last=1)
        training.save()
        caplog.clear()
        training.writer._disk = failing(number, code, lasting)
        ended = training.save()
        found = checkpoint.find(folder)
        check(found, training.held)
        assert found.name == ("global_step1" if ended.folder is None else "global_step2")
        lost += ended.folder is None
        assert os.strerror(code) in caplog.text
        wanted = "keeping the previous one, training goes on" if ended.folder is None else "after checkpoint"
        assert wanted in caplog.text
        training.writer._disk = CountedDisk()
        assert training.save().folder == folder / "global_step3"
        assert sorted(p.name for p in folder.iterdir()) == ["global_step3", "latest"]
    assert 0 < lost < len(cases), "some failures come after the checkpoint is there"


def test_a_process_that_is_killed_at_any_call_loses_no_complete_checkpoint(tmp_path):
    (tmp_path / "counted").mkdir()
    calls = calls_of_a_save(tmp_path / "counted")
    found, numbers = [], [*telling(calls), len(calls)]
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        training = Training(folder, keep_last=1)
        training.save()
        training.step()
        child = os.fork()
        if child == 0:
            training.writer._disk = killing(number)
            training.begin()
            training.writer.settle()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert (number == len(calls)) == (status == 0), "killed, but for the last"
        newest = checkpoint.find(folder)
        check(newest, training.held)
        found.append(newest.name)
        assert not list(folder.glob("tmp-*global_step*")), "cleared by the load"
    opened = [number for number, call in enumerate(calls) if call == "open"]
    last_part = opened[3] + 1  # its only write: weights, optimizer and state are on the disk
    after = {number: name for number, name in zip(numbers, found, strict=True) if number > last_part}
    assert {name for number, name in zip(numbers, found, strict=True) if number not in after} == {"global_step1"}
    assert set(after.values()) == {"global_step2"}, "whole from the last word of its ranks on, before its manifest"
    assert len(after) > 6


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path, caplog):
    """A real error of write(2), in the middle of what torch.save and the writer of safetensors do."""
    training = Training(tmp_path)
    training.save()
    before, previous = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (100, 1500):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            assert training.save().folder is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert caplog.text.count("File too large; keeping the previous one, training goes on") == 2
    assert checkpoint.find(tmp_path).name == "global_step1"


def test_too_little_room_is_told_before_anything_is_written(tmp_path, caplog):
    class Full(CountedDisk):
        def free(self, folder):
            return 1 << 20

    training = Training(tmp_path)
    training.save()
    training.writer._disk = Full()
    assert training.save().folder is None
    assert "checkpoint at step 2 not written: need 64 MiB, 1 MiB free at " in caplog.text
    assert caplog.text.endswith("keeping the previous one, training goes on\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step1", "latest"]


def test_the_first_one_that_fails_has_none_before_it(tmp_path, caplog):
    assert save(tmp_path, disk=failing(3, errno.EIO, lasting=False)) is None
    assert caplog.text.endswith("there is no earlier one\n")


def test_a_mistake_of_ours_is_not_taken_for_one_of_the_disk(tmp_path):
    def wrong(*_):
        raise KeyError("ours")

    training = Training(tmp_path, disk=CountedDisk(wrong))
    training.step()
    with pytest.raises(KeyError, match="ours"):
        training.begin()


def test_what_is_written_is_the_same_each_time(tmp_path):
    """Bytes of the files too: nothing of what lay in memory before gets into them."""
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        training = Training(tmp_path / name)
        training.save()
        training.save()
        files.append(json.loads((tmp_path / name / "global_step2" / "manifest.json").read_text()))
    assert files[0] == files[1]


def test_only_the_first_data_rank_of_a_stage_writes(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        training = Training(tmp_path, data_rank=1, activity=Activity())
        training.step()
        assert training.begin()
        ended = training.writer.settle()
    assert sorted(p.name for p in ended.folder.iterdir()) == ["manifest.json", "state.json"]
