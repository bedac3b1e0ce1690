"""Where the model is cut: balance, limits and messages."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import nn

from tests.helpers.toy import ToyFamily
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, check_settings, prepare_skeleton
from utils.train.stages import choose_bounds, partition, stage_rows


@pytest.mark.parametrize("weights", [[5, 1, 1, 1, 1, 5], [1] * 7, [9, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_heaviest_stage_is_as_light_as_can_be(weights, stages):
    def heaviest(bounds):
        return max(sum(weights[a:b]) for a, b in pairwise(bounds))

    every = [[0, *cuts, len(weights)] for cuts in combinations(range(1, len(weights)), stages - 1)]
    bounds = partition(weights, stages)
    assert len(bounds) == stages + 1
    assert heaviest(bounds) == min(map(heaviest, every))


def bounds(stages, method="parameters", split=None, trainable=lambda p: True):
    skeleton = ToyFamily().build_skeleton()
    return choose_bounds(ToyFamily().pipeline_layers(skeleton), stages, method, split, trainable)


def test_embedding_and_head_stay_with_a_block():
    assert bounds(1) == [0, 6]
    assert bounds(4) == [0, 2, 3, 4, 6]
    assert bounds(2, "uniform") == [0, 3, 6]


def test_more_stages_than_blocks():
    with pytest.raises(ValueError, match=r"pipeline_stages = 5 is more than the model can be cut into.*<= 4"):
        bounds(5)


def test_manual_split():
    assert bounds(3, "manual", [2, 3]) == [0, 2, 3, 6]
    with pytest.raises(ValueError, match=r"partition_split = \[1\] leaves stage 0 .* without a transformer block"):
        bounds(2, "manual", [1])
    with pytest.raises(ValueError, match=r"partition_split = \[3, 2\] must be 2 rising layer numbers"):
        bounds(3, "manual", [3, 2])
    with pytest.raises(ValueError, match=r"must be 1 rising layer numbers between 1 and 5"):
        bounds(2, "manual", [9])


def test_a_stage_without_anything_to_train():
    settings = EngineSettings(2, 1, OptimizerSettings("sgd", 0.1), adapter=AdapterSettings(2, 2))
    skeleton = prepare_skeleton(ToyFamily(), settings.adapter)
    last = {id(p) for n, p in skeleton.named_parameters() if "blocks.3" in n and "lora" in n}
    with pytest.raises(ValueError, match=r"stage 0 .* would hold nothing to train"):
        choose_bounds(ToyFamily().pipeline_layers(skeleton), 2, "uniform", None, lambda p: id(p) in last)


def test_frozen_parameters_count():
    """All memory and time should be even, so a LoRA is cut as the whole model is."""
    settings = EngineSettings(2, 1, OptimizerSettings("sgd", 0.1), adapter=AdapterSettings(2, 2))
    cut = check_settings(ToyFamily(), settings)
    rows = stage_rows(cut.layers, cut.bounds)
    assert cut.bounds == bounds(2)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in cut.skeleton.parameters())
    assert [row.trainable > 0 for row in rows] == [True, True]
    assert rows[0].weight_bytes == 4 * rows[0].parameters


def test_settings_are_refused_before_weights_are_read():
    class NoWeights(ToyFamily):
        def open_weights(self):
            raise AssertionError("weights were opened")

    with pytest.raises(ValueError, match=r"adamx"):
        check_settings(NoWeights(), EngineSettings(1, 1, OptimizerSettings("adamx", 0.1)))


def test_what_is_trained_and_in_which_dtype():
    skeleton = prepare_skeleton(ToyFamily(), AdapterSettings(2, 4, dtype=torch.bfloat16))
    for name, parameter in skeleton.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.bfloat16 if "lora_" in name else torch.float32)
    assert all(p.requires_grad for p in prepare_skeleton(ToyFamily(), None).parameters())
    assert isinstance(skeleton, nn.Module)
