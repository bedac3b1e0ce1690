"""Saves that are cut short by an exception, a power cut, or a disk that fails while a step is saved anew."""

import errno
import json
import logging
import threading
import time

import pytest

from tests.helpers.checkpoints import Training, check, held_up
from tests.helpers.disks import CountedDisk, failing
from utils.train import checkpoint, checkpoint_read


def saved_anew(folder) -> Training:
    """Gone back to before the step that was saved last, and there again."""
    training = Training(folder)
    training.save()
    training.now = 0
    training.step()
    return training


def test_a_disk_that_fails_while_a_step_is_saved_anew_leaves_one_of_the_two(tmp_path, caplog):
    """Then the older one is in the place where the newer one goes."""
    (tmp_path / "counted").mkdir()
    counted = saved_anew(tmp_path / "counted")
    counted.writer._disk = disk = CountedDisk()
    counted.begin()
    counted.writer.settle()
    saves, renames = [], [number for number, call in enumerate(disk.calls) if call == "rename"]
    cases = [(n, lasting) for n, call in enumerate(disk.calls) if call != "write" for lasting in (False, True)]
    for number, lasting in cases:
        folder = tmp_path / f"{number}{lasting}"
        folder.mkdir()
        training = saved_anew(folder)
        training.writer._disk = failing(number, errno.EIO, lasting)
        training.begin()
        ended = training.writer.settle()
        if ended.folder is None and (number, lasting) != (renames[1], True):  # then it cannot be put back yet
            assert checkpoint.manifest_of(folder / "global_step1") is not None
        there = checkpoint.manifest_of(checkpoint.find(folder))  # by the next start, on a disk that works again
        assert checkpoint.save_of(there) == (1 if ended.folder is None else 2), (number, lasting)
        assert checkpoint_read.verify(folder / "global_step1") == []
        saves.append(checkpoint.save_of(there))
    assert len(renames) == 3 and 1 in saves and 2 in saves


def power_cuts(calls: list[tuple[str, str]], final: str) -> list[str]:
    """What a power cut could take of a save, by the order of its calls: what is renamed must be on the disk by then,
    and nothing may be removed before the rename is."""
    wrong, unsynced, renamed = [], set(), False
    for call, name in calls:
        if call == "open":
            unsynced |= {name, "staging"}
        elif call == "sync":
            unsynced.discard(name)
        elif call == "rename" and name == final:
            wrong += [f"{each} is renamed before it is on the disk" for each in sorted(unsynced)]
            unsynced.add("run")
            renamed = True
        elif call == "remove" and renamed and "run" in unsynced:
            wrong.append(f"{name} is removed before the rename is on the disk")
    return wrong + (["the rename is told before it is on the disk"] if "run" in unsynced or not renamed else [])


@pytest.mark.parametrize("before", [0, 1, "the same step"])
def test_nothing_is_taken_by_a_power_cut(tmp_path, before):
    """The first save of a run, the next one, which prunes, and one in the place of another."""

    class Told(CountedDisk):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[tuple[str, str]] = []

        def open(self, path):
            self.told.append(("open", path.name))
            return super().open(path)

        def sync(self, path):
            name = "run" if path == tmp_path else "staging" if path.name.startswith("tmp-global") else path.name
            self.told.append(("sync", name))
            super().sync(path)

        def rename(self, old, new):
            self.told.append(("rename", new.name))
            super().rename(old, new)

        def remove(self, folder):
            self.told.append(("remove", folder.name))
            super().remove(folder)

    training = Training(tmp_path, keep_last=1)
    for _ in range(0 if before == 0 else 1):
        training.save()
    training.now -= before == "the same step"
    training.writer._disk = disk = Told()
    ended = training.save()
    assert power_cuts(disk.told, ended.folder.name) == []
    dropped = [each for each in disk.told if each != ("sync", "run")]
    assert power_cuts(dropped, ended.folder.name), "the model can tell"
    assert power_cuts([each for each in disk.told if each != ("sync", "staging")], ended.folder.name)


class TestAnExceptionBesideASave:
    def begun(self, run_dir, disk):
        training = Training(run_dir, disk=disk)
        training.step()
        training.begin()
        return training

    def test_it_waits_for_what_is_being_written(self, tmp_path):
        disk, go = held_up()
        training = self.begun(tmp_path, disk)
        threading.Timer(0.3, go.set).start()
        training.writer.rescue(20)
        assert not training.writer.is_writing
        check(tmp_path / "global_step1", training.held)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step1"], "nothing is left beside it"

    def test_what_is_whole_by_then_is_taken_by_the_next_start(self, tmp_path, caplog):
        """The threads are done, and no step has asked them yet."""
        training = self.begun(tmp_path, CountedDisk())
        training.writer._flight.wait(lambda: None)
        assert checkpoint.parts_of(tmp_path / "tmp-global_step1") and not list(tmp_path.glob("global_step*"))
        with caplog.at_level(logging.INFO):
            check(checkpoint.find(tmp_path), training.held)
        assert "global_step1: its save was cut short after the last file; taken as it is" in caplog.text
        assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step1"], "the start clears up"

    def test_it_does_not_wait_for_what_will_never_come(self, tmp_path):
        training = self.begun(tmp_path, failing(3, errno.EIO, lasting=False))
        begun = time.monotonic()
        training.writer.rescue(20)
        assert time.monotonic() - begun < 5
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.find(tmp_path)

    def test_nor_for_ever(self, tmp_path):
        disk, go = held_up()
        training = self.begun(tmp_path, disk)
        begun = time.monotonic()
        training.writer.rescue(0.2)
        assert time.monotonic() - begun < 5 and not list(tmp_path.glob("global_step*"))
        go.set()

    @pytest.mark.parametrize("harm", ["state.json", "optimizer_00.pt", "rank_0000.json", "of two"])
    def test_parts_that_are_not_all_there_are_not_taken(self, tmp_path, harm):
        training = self.begun(tmp_path, CountedDisk())
        training.writer._flight.wait(lambda: None)
        staged = tmp_path / "tmp-global_step1"
        part = checkpoint.parts_folder(staged) / "rank_0000.json"
        if harm == "of two":
            part.write_text(json.dumps({**json.loads(part.read_text()), "parts": 2}))
        else:
            path = part if harm == part.name else staged / harm
            path.write_bytes(path.read_bytes()[:-1])
        assert checkpoint.parts_of(staged) is None

    def test_one_of_the_same_step_takes_the_place_of_an_earlier_start_s(self, tmp_path):
        Training(tmp_path).save()
        training = self.begun(tmp_path, CountedDisk())
        training.writer._flight.wait(lambda: None)
        found = checkpoint.find(tmp_path)
        assert checkpoint.save_of(checkpoint.manifest_of(found)) == 2
        assert checkpoint_read.verify(found) == []
