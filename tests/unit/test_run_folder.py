"""Which checkpoint `--resume_from_checkpoint` means, and what is said where there is none."""

import json
import os
import signal
import time

import pytest

from utils.train.checkpoint import FORMAT, CheckpointError, prune
from utils.train.run_folder import find_checkpoint, go_on, new_run_folder
from utils.train.run_lock import NAME, RunLock

RUN = "20260101_00-00-00"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / RUN
    for step in (6, 12):
        written(folder, step)
    (folder / "epoch1").mkdir()
    return folder


def written(folder, step):
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": {}}))
    (folder / "latest").write_text(f"global_step{step}\n")


def test_the_newest_is_what_was_written_last(run, tmp_path):
    assert find_checkpoint(tmp_path, "").name == "global_step12"
    written(run, 8)  # a start that went back to step 6
    assert find_checkpoint(tmp_path, "").name == "global_step8"
    (run / "latest").unlink()
    assert find_checkpoint(tmp_path, RUN).name == "global_step12"


def test_pruning_never_takes_what_was_just_written(run):
    written(run, 8)
    prune(run, keep_last=1, newest=8)
    assert sorted(path.name for path in run.glob("global_step*")) == ["global_step8"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (f"{RUN}/epoch1", "holds weights only.*init_from_existing"),
        (".", f" is a folder of runs; name one of them, or none for the newest with a checkpoint. The newest: {RUN}$"),
        (f"{RUN}/latest", f"/latest is a file; name its folder: --resume_from_checkpoint {RUN}$"),
        (f"{RUN}/global_step6/manifest.json", f"name its folder: --resume_from_checkpoint {RUN}/global_step6$"),
        (f"{RUN}/global_step7", "no global_step7 in .*found: global_step12, global_step6; epoch1 hold"),
        ("2025", f"no such run.*{RUN}"),
    ],
)
def test_what_cannot_be_resumed_is_explained(run, tmp_path, asked, told):
    with pytest.raises(CheckpointError, match=told):
        find_checkpoint(tmp_path, asked)


def test_a_folder_of_other_runs_is_not_held(run, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match=f"folder of runs; name one of them. The newest: {run}$"):
        go_on(tmp_path / "mine", str(tmp_path), print)
    assert not (tmp_path / NAME).exists()


def test_an_output_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        new_run_folder(tmp_path / "file" / "runs")


NEWER = "20270101_00-00-00"


def test_a_newer_run_without_a_checkpoint_is_passed_over_and_told(run, tmp_path, caplog):
    for name in (NEWER, f"{NEWER}_1"):
        (tmp_path / name).mkdir()
    found, lock = go_on(tmp_path, "", print)
    assert found == run / "global_step12"
    assert f"going on with the newest run that has a checkpoint, {RUN}; newer ones without one are passed over: " in (
        caplog.text
    )
    assert f"{NEWER}_1, {NEWER}" in caplog.text
    assert (run / NAME).exists() and not list(tmp_path.glob(f"{NEWER}*/*")), "what is passed over is not held"
    lock.release(is_main=True, clean=True)


def test_the_first_checkpoint_of_the_newest_run_may_lack_its_last_rename(run, tmp_path, caplog):
    written(tmp_path / NEWER, 2)
    (tmp_path / NEWER / "global_step2").rename(tmp_path / NEWER / "tmp-global_step2")
    found, lock = go_on(tmp_path, "", print)
    assert found == tmp_path / NEWER / "global_step2" and found.is_dir()
    assert "passed over" not in caplog.text
    lock.release(is_main=True, clean=True)


def test_one_that_is_named_too(run, tmp_path):
    (run / "global_step12").rename(run / "tmp-global_step12")
    found, lock = go_on(tmp_path, f"{RUN}/global_step12", print)
    assert found == run / "global_step12" and found.is_dir()
    lock.release(is_main=True, clean=True)


def hold_elsewhere(folder) -> int:
    """A process that is at work in the folder."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(folder).take(lambda _: None)
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    return pid


def test_the_newest_run_that_is_still_at_work_is_not_passed_over(run, tmp_path):
    """It may be in its first save. An older one would be trained on under its config."""
    (tmp_path / NEWER).mkdir()
    pid = hold_elsewhere(tmp_path / NEWER)
    try:
        with pytest.raises(ValueError, match=f"{NEWER} is in use by process {pid} ") as refused:
            go_on(tmp_path, "", print)
        assert f"(--resume_from_checkpoint {RUN} is the newest of those with a checkpoint)" in str(refused.value)
        assert "if it is yours, stop it (touch " in str(refused.value)
        assert not (run / NAME).exists()
        found, lock = go_on(tmp_path, RUN, print)
        assert found == run / "global_step12", "that one is free"
        lock.release(is_main=True, clean=True)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("asked", ["", RUN, f"{RUN}/global_step7", f"{RUN}/epoch1", "2025"])
def test_a_refusal_leaves_nothing_held(tmp_path, asked):
    (tmp_path / RUN / "epoch1").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError):
        go_on(tmp_path, asked, print)
    assert sorted(tmp_path.rglob("*")) == before
