"""What a resumed run takes from its checkpoint, and what it says of settings that changed since."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.configs import RUN, folder, load  # noqa: F401 (a fixture)
from utils.monitor.meters import Meters
from utils.train import assemble, checkpoint
from utils.train.optimizers import build_optimizer
from utils.train.state import TrainState

pytestmark = pytest.mark.usefixtures("folder")
FUSED = RUN.replace("[model]", "fuse_adapters = [{path = 'a', weight = 0.5}]\n[model]")


def config_of(text: str, alpha: float) -> object:
    return load(text.replace("rank = 8", f"rank = 8\nalpha = {alpha}"))


def resumed(tmp_path, caplog, before, now, reset_dataloader: bool, orders=({"order": "x"},) * 2) -> list[str]:
    """The warnings of a run with the settings `now` that goes on from one with the settings `before`."""
    parameters = {"a": nn.Parameter(torch.zeros(2, 2))}
    optimizer = build_optimizer("sgd", list(parameters.items()), lr=0.1)
    saved = checkpoint.save(
        tmp_path,
        TrainState(4, 8),
        epochs_done=1,
        course=orders[0] | assemble.quiet_course(before),
        meters=Meters().state_dict(),
        parts={"": checkpoint.Part(parameters, optimizer)},
        stage=0,
        data_rank=0,
        keep_last=None,
    )
    flags = SimpleNamespace(reset_optimizer=False, reset_dataloader=reset_dataloader)
    built = SimpleNamespace(trained=parameters, optimizer=optimizer)
    job = SimpleNamespace(flags=flags, loaded=now, resume=saved)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state = assemble.resume(
            job, {"": SimpleNamespace(built=built)}, orders[1] | assemble.quiet_course(now), Meters()
        )
    assert state == (TrainState(4, 8, 4, 1) if reset_dataloader else TrainState(4, 8))
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("reset_dataloader", [False, True])
def test_weights_that_come_to_mean_something_else_are_told(tmp_path, caplog, reset_dataloader):
    """Another alpha, or another base, and what was trained makes another model; nothing else would show it."""
    before, now = config_of(FUSED, 8), config_of(RUN, 4)
    assert resumed(tmp_path, caplog, before, before, reset_dataloader) == []
    assert resumed(tmp_path, caplog, before, now, reset_dataloader) == [
        "changed since the checkpoint: alpha 8.0 -> 4.0",
        "changed since the checkpoint: fuse_adapters [['a', 0.5, '']] -> []",
    ]


@pytest.mark.parametrize("reset_dataloader", [False, True])
def test_other_timesteps_and_another_loss_are_told(tmp_path, caplog, reset_dataloader):
    """Nothing that the order hangs on, so nothing is refused; the curves would show it with no reason given."""
    now = config_of(RUN.replace("[model]", "pseudo_huber_c = 0.5\n[model]\nmin_t = 0.25\nsigmoid_scale = 1.5"), 8)
    assert resumed(tmp_path, caplog, config_of(RUN, 8), now, reset_dataloader) == [
        "changed since the checkpoint: pseudo_huber_c None -> 0.5",
        "changed since the checkpoint: model.sigmoid_scale 1.0 -> 1.5",
        "changed since the checkpoint: model.min_t 0.0 -> 0.25",
    ]


def test_a_model_that_has_moved_and_one_that_older_versions_did_not_note_are_unchanged(tmp_path, caplog):
    Path("elsewhere").mkdir()
    moved = config_of(RUN.replace("'weights'", "'elsewhere'\ntransformer_path = 'elsewhere'"), 8)
    assert resumed(tmp_path, caplog, config_of(RUN, 8), moved, False) == []
    saved = {"alpha": 8.0}  # of a version that kept no [model]
    assert checkpoint.course_changes(saved, assemble.quiet_course(moved)) == []


def test_a_refused_order_is_not_blamed_on_what_does_not_decide_it(tmp_path, caplog):
    before, now = config_of(RUN, 8), config_of(RUN.replace("[model]", "[model]\nmin_t = 0.25"), 8)
    orders = {"order": "x", "seed": 1}, {"order": "y", "seed": 2}
    with pytest.raises(checkpoint.CheckpointError, match=r": seed 1 -> 2 changed, and with it the order"):
        resumed(tmp_path, caplog, before, now, False, orders)
