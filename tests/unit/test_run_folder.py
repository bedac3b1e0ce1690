"""Which checkpoint `--resume_from_checkpoint` means, and what is said where there is none."""

import json

import pytest

from utils.train.checkpoint import FORMAT, CheckpointError, prune
from utils.train.run_folder import find_checkpoint, new_run_folder

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
        (f"{RUN}/global_step7", "no global_step7 in .*found: global_step12, global_step6; epoch1 hold"),
        ("2025", f"no such run.*{RUN}"),
    ],
)
def test_what_cannot_be_resumed_is_explained(run, tmp_path, asked, told):
    with pytest.raises(CheckpointError, match=told):
        find_checkpoint(tmp_path, asked)


def test_an_output_dir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        new_run_folder(tmp_path / "file" / "runs")
