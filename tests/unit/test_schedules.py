"""Schedules: the curve at its ends, warm-up against torch's own, and the errors."""

import itertools

import pytest
import torch

from utils.train.schedules import SCHEDULES, learning_rate_factor, warmup_factor


def test_warmup_then_constant_is_torchs_linear_then_constant():
    warmup, total = 7, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [linear, constant], milestones=[warmup])
    for step in range(total):
        assert learning_rate_factor("constant", step, warmup, total) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-12
        )
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_is_at_the_full_rate(name):
    assert learning_rate_factor(name, 0, 0, 10) == 1.0


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_falls_to_zero_one_step_past_the_last(name):
    factors = [learning_rate_factor(name, step, 4, 24) for step in range(26)]
    assert factors[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[4:25]))
    assert factors[23] > 0
    assert factors[24] == factors[25] == pytest.approx(0, abs=1e-15)
    assert factors[14] == pytest.approx(0.5)


def test_a_constant_rate_may_warm_up_for_the_whole_run():
    assert learning_rate_factor("constant", 5, 10, 10) < 1
    assert learning_rate_factor("constant", 5, 100, 10) > 0


def test_unknown_name_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"lr_scheduler = 'cosin' is not known; did you mean 'cosine'\?"):
        learning_rate_factor("cosin", 0, 0, 10)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    factors = [learning_rate_factor("linear", step, 10, 5) for step in range(5)]
    assert factors == [warmup_factor(step, 10) for step in range(5)]
