"""Whether a checkpoint is one that a run may go on from."""

import json

import pytest

from utils.train.checkpoint import CheckpointError
from utils.train.order import refuse_other_model


def checkpoint_of(folder, course):
    (folder / "state.json").write_text(json.dumps({"course": course}))
    return folder


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """The two experts of A14B have tensors of the same names and shapes."""
    folder = checkpoint_of(tmp_path, {"model": "Wan2.2 T2V-A14B high noise"})
    refuse_other_model(folder, "Wan2.2 T2V-A14B high noise")
    with pytest.raises(CheckpointError, match=r"of Wan2.2 T2V-A14B high noise, and this run trains .* low noise; set"):
        refuse_other_model(folder, "Wan2.2 T2V-A14B low noise")


def test_one_that_does_not_tell_its_model_passes(tmp_path):
    refuse_other_model(checkpoint_of(tmp_path, {"order": "x"}), "Wan2.1 T2V 1.3B")
