"""Meters: rates from a clock, the epoch's mean loss across a resume, and the time left."""

import json
import math

import pytest

from utils.monitor.meters import Meters, peak_memory_gib


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def step(meters: Meters, clock: Clock, loss=1.0, samples=4, frames=132, wait=0.5, work=1.5):
    def slow_items():
        for item in range(2):
            clock.now += wait / 2
            yield item

    meters.begin_step()
    for _ in meters.waiting(slow_items()):
        clock.now += work / 2
    return meters.end_step(loss, samples, frames)


def test_rates_come_from_the_whole_step():
    clock = Clock()
    times = step(Meters(clock), clock)
    assert times.step_s == pytest.approx(2.0)
    assert times.data_wait_s == pytest.approx(0.5)
    assert times.samples_per_s == pytest.approx(2.0)
    assert times.frames_per_s == pytest.approx(66.0)


def test_waiting_passes_every_item_on_and_starts_again_each_step():
    clock = Clock()
    meters = Meters(clock)
    assert list(meters.waiting("abc")) == ["a", "b", "c"]
    step(meters, clock)
    assert step(meters, clock).data_wait_s == pytest.approx(0.5)


def test_what_happens_between_steps_is_not_counted():
    clock = Clock()
    meters = Meters(clock)
    step(meters, clock)
    clock.now += 1000
    assert step(meters, clock).step_s == pytest.approx(2.0)


def test_epoch_loss_is_the_mean_over_samples_and_starts_again():
    clock = Clock()
    meters = Meters(clock)
    step(meters, clock, loss=1.0, samples=8)
    step(meters, clock, loss=4.0, samples=4)
    assert meters.end_epoch() == pytest.approx(2.0)
    step(meters, clock, loss=5.0)
    assert meters.end_epoch() == 5.0
    assert math.isnan(meters.end_epoch())


def test_a_loss_that_is_not_finite_does_not_spoil_the_epoch():
    clock = Clock()
    meters = Meters(clock)
    step(meters, clock, loss=1.0)
    step(meters, clock, loss=math.nan)
    assert meters.end_epoch() == 1.0


def test_epoch_loss_is_the_same_bits_after_a_resume():
    losses = [0.1 * i + 1 / 3 for i in range(6)]
    clock = Clock()
    whole = Meters(clock)
    for loss in losses:
        step(whole, clock, loss=loss, samples=3)
    first, second = Meters(clock), Meters(clock)
    for loss in losses[:3]:
        step(first, clock, loss=loss, samples=3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in losses[3:]:
        step(second, clock, loss=loss, samples=3)
    assert second.end_epoch() == whole.end_epoch()


def test_eta_is_not_fooled_by_a_slow_first_step():
    clock = Clock()
    meters = Meters(clock)
    assert meters.eta_s(10) is None
    step(meters, clock, work=300)
    for _ in range(4):
        step(meters, clock)
    assert meters.eta_s(10) == pytest.approx(20.0)


def test_peak_memory_counts_in_gib_and_never_falls():
    before = peak_memory_gib()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    after = peak_memory_gib()
    assert 0.005 < before <= after < 1024
