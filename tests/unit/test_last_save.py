"""A full disk at the very end: the last model waits for room, and what is told is true."""

import logging
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.disks import CountedDisk
from utils.train import loop, saving
from utils.train.activity import Activity
from utils.train.state import TrainState
from utils.train.triggers import Decision

GIB = 2**30


class Filled(CountedDisk):
    """Has as much room at each look as the list says, and then as the last one says."""

    def __init__(self, *free):
        super().__init__()
        self.left = list(free)

    def free(self, folder):
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]


class Family:
    title = "a model"

    def __init__(self, failures):
        self.failures = failures  # saves that find the disk full

    def save_full(self, tensors, folder, metadata):
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(28, "No space left on device")
        (folder / "model.safetensors").write_bytes(b"weights")


class Experts(dict):
    engine = SimpleNamespace(data_rank=0, stage_id=0)


def make_run(folder, failures, asked=Decision.NONE):
    optimizer = SimpleNamespace(param_groups=[])
    trained = {"w": nn.Parameter(torch.zeros(3 << 18))}
    built = SimpleNamespace(trained=trained, base=None, optimizer=optimizer)
    settings = SimpleNamespace(is_adapter=False, save_dtype=torch.bfloat16, formats=(), total_steps=2)
    return SimpleNamespace(
        run_dir=folder,
        experts=Experts({"": SimpleNamespace(family=Family(failures), built=built)}),
        settings=settings,
        state=TrainState(2),
        course={},
        came_with=(-1, ""),
        meters=SimpleNamespace(state_dict=dict),
        activity=Activity(),
        asked=asked,
        metadata={},
        milestones=lambda: SimpleNamespace(step=2, epochs_done=1),
        write_configs=lambda folder: None,
        eval_sets=(),
        last_saved=-1,
        last_checkpoint=2,
        saved=None,
        checkpointer=SimpleNamespace(is_writing=False),
    )


def save(run, disk, asked=lambda: Decision.NONE):
    saving.save_last_model(run, "step2", asked, room_s=0.05, look_s=0.01, disk=disk)


def test_what_is_needed_counts_the_parts_and_the_model(tmp_path):
    assert saving.model_bytes(make_run(tmp_path, 0)) == 2 * 2 * 3 * 2**18


def test_it_is_saved_as_soon_as_there_is_room(tmp_path, caplog):
    run, disk = make_run(tmp_path, 1), Filled(1 << 20, 1 << 20, 1 << 20, GIB)
    save(run, disk)
    assert run.saved == tmp_path / "step2" and (run.saved / "model.safetensors").exists()
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "is full: the trained weights of this run need 67 MiB, and 1 MiB are free. Waiting up to" in warning
    assert "delete or move what else lies on that disk" in warning
    assert "training goes on" not in caplog.text, "it is over"
    assert run.activity.phase == "saving step2"


def test_the_waiting_ends(tmp_path):
    for asked, looks in ((Decision.NONE, 5), (Decision.QUIT, 1)):
        run, seen = make_run(tmp_path, 9), []
        save(run, Filled(1 << 20), lambda asked=asked, seen=seen: seen.append(0) or asked)
        assert run.last_saved == -1 and len(seen) == looks


def test_what_is_no_matter_of_room_is_not_waited_for(tmp_path, caplog):
    run = make_run(tmp_path, 9)
    save(run, Filled(GIB), lambda: pytest.fail("waits"))
    assert run.last_saved == -1 and "is full" not in caplog.text


@pytest.mark.parametrize("where", ["the weight w (stage 0)", "the optimizer's exp_avg_sq of w (stage 0)"])
def test_no_checkpoint_holds_what_is_not_finite(tmp_path, caplog, where):
    """Nor is an earlier one touched: nothing is begun."""
    run = make_run(tmp_path, 0)
    built = run.experts[""].built
    built.optimizer = torch.optim.AdamW(built.trained.values())
    built.trained["w"].grad = torch.zeros_like(built.trained["w"])
    built.optimizer.step()
    bad = built.trained["w"] if "weight" in where else built.optimizer.state[built.trained["w"]]["exp_avg_sq"]
    bad.data[5] = float("inf")
    run.last_checkpoint, run.checkpoint_clock = 1, 0.0
    before = time.monotonic()
    saving.save_checkpoint(run)
    assert f"no checkpoint of step 2: {where} is not finite; keeping earlier ones" in caplog.text
    assert run.last_checkpoint == 1
    assert run.checkpoint_clock >= before, "the next one is due after as many minutes, not after the next step"


def make_checkpoint(folder):
    folder.mkdir()
    (folder / "manifest.json").write_text('{"format": 1, "save": 1, "files": {}}')


def test_the_last_words_name_what_there_is(tmp_path):
    run = make_run(tmp_path, 9)
    lost = "there is no checkpoint, so what was trained is lost; mend that, then start again from the beginning"
    with pytest.raises(OSError, match=f"of step 2 could not be saved to {tmp_path}, see above; {lost}$"):
        loop.finish(run, lambda: Decision.NONE)
    make_checkpoint(tmp_path / "global_step1")
    assert saving.way_on(run).startswith(f"the newest checkpoint is {tmp_path}/global_step1; mend that, then start")
    (tmp_path / "global_step1").rename(tmp_path / "global_step2")
    assert "global_step2, which holds them; mend that, then start again with --resume" in saving.way_on(run)
    run.last_checkpoint = 1
    with pytest.raises(OSError, match=r"the run stops after step 2 without a checkpoint of it, see above; the newest"):
        loop.refuse_to_lose(run)


@pytest.mark.parametrize("failures", [1, 2])
def test_the_last_checkpoint_is_tried_once_more_after_the_model(tmp_path, caplog, monkeypatch, failures):
    """For which room may have been made. What still fails is the last word on it, and no reason to fail."""
    run, tries = make_run(tmp_path, 0), []

    def save_checkpoint(run, **_):
        tries.append(run.last_saved)
        run.last_checkpoint = -1 if len(tries) <= failures else run.state.step

    for module in (loop, saving):
        monkeypatch.setattr(module, "save_checkpoint", save_checkpoint)
    run.last_checkpoint = 1
    make_checkpoint(tmp_path / "global_step1")
    loop.finish(run, lambda: Decision.NONE)
    assert tries == [-1, 2], "before the model and after it"
    warned = (
        f"the run ends at step 2 without a checkpoint of it, see above; the newest checkpoint is {tmp_path}/global_s"
    )
    assert (warned in caplog.text) == (failures == 2)
