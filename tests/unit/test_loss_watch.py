"""The running mean of the loss and what stands out of it; steps that were left out; both across a resume."""

import json
import math

import pytest

from utils.monitor.loss_watch import WARM_UP, WINDOW, LossWatch
from utils.monitor.meters import Meters


def told(watch: LossWatch, *losses: float, factor: float = 5.0) -> list[float | None]:
    return [watch.spike(loss, factor) for loss in losses]


def test_a_loss_far_above_the_mean_is_told_with_it():
    watch = LossWatch()
    assert told(watch, *[0.2] * WARM_UP) == [None] * WARM_UP
    assert told(watch, 0.99, 1.2) == [None, pytest.approx(0.2, rel=0.25)]


def test_nothing_is_told_before_the_mean_means_something():
    assert told(LossWatch(), 0.1, 100.0, *[0.1] * (WARM_UP - 3), 100.0) == [None] * WARM_UP


def test_one_spike_does_not_hide_the_next_and_a_loss_that_stays_up_becomes_usual():
    watch = LossWatch()
    told(watch, *[1.0] * 50)
    assert told(watch, 1e9, 1.0, 8.0)[::2] == [pytest.approx(1.0), pytest.approx(1.08, abs=0.1)]
    assert told(watch, *[20.0] * 200)[-1] is None


def test_0_tells_of_nothing():
    assert told(LossWatch(), *[1.0] * 50, 1e9, factor=0.0)[-1] is None


def test_experts_have_means_of_their_own():
    watch = LossWatch()
    for _ in range(WARM_UP):
        watch.spike(1.0, 5.0, "high")
    assert watch.spike(50.0, 5.0, "low") is None
    assert watch.spike(50.0, 5.0, "high") == pytest.approx(1.0)


def test_steps_left_out_are_forgotten_after_a_while():
    watch = LossWatch()
    for step in (3, 4, 90):
        watch.leave_out(step)
    assert watch.lately_left_out(91) == 3
    assert watch.lately_left_out(3 + WINDOW) == 2
    assert watch.lately_left_out(90 + WINDOW) == 0
    assert watch.total_left_out == 3


def test_a_resumed_run_goes_on_with_both():
    before = Meters()
    for number in range(30):
        before.watch.spike(0.1 + number / 7, 5.0)
    before.watch.leave_out(12)
    after = Meters()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    assert after.watch.spike(math.pi, 5.0) == before.watch.spike(math.pi, 5.0)
    assert after.watch.lately_left_out(13) == 1
    after.load_state_dict({"epoch_loss_sum": 0.0, "epoch_loss_samples": 0})  # of a version that kept none
    assert after.watch.lately_left_out(13) == 0
