"""The keys on ending a run and on numbers that are not finite: their defaults, and what is refused in which words."""

import pytest

from tests.helpers.configs import SPEC, complaints, folder, load, top  # noqa: F401 (a fixture)
from utils.config.rules import advice

pytestmark = pytest.mark.usefixtures("folder")


def test_by_default_a_bad_number_stops_the_run_and_no_time_is_kept():
    run = load().run
    assert (run.on_nonfinite, run.max_nonfinite, run.loss_spike_factor) == ("stop", 10, 10.0)
    assert (run.max_runtime_minutes, run.requeue_exit_code) == (None, 0)


@pytest.mark.parametrize(
    "line", ["requeue_exit_code = 85", "loss_spike_factor = 0", "loss_spike_factor = 5", "max_runtime_minutes = 0.5"]
)
def test_what_is_taken(line):
    load(run=top(line))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "requeue_exit_code = 1",
            "requeue_exit_code = 1 is no status to leave with; use 0, or a number from 64 to 113",
        ),
        ("requeue_exit_code = 130", "requeue_exit_code = 130 is no status to leave with"),
        ("requeue_exit_code = true", "requeue_exit_code = true is no status to leave with"),
        (
            "loss_spike_factor = 0.5",
            "loss_spike_factor = 0.5 is no factor; use a number above 1, or 0 to be told of none",
        ),
        ("loss_spike_factor = inf", "loss_spike_factor = inf is no factor"),
        ("on_nonfinite = 'ignore'", "on_nonfinite = 'ignore' is not known; use 'stop' or 'skip'"),
        ("max_nonfinite = 100", "max_nonfinite = 100 is too large; use 99 or less"),
        ("max_nonfinite = -1", "max_nonfinite = -1 is too small; use 0 or more"),
        ("max_runtime_minutes = 0", "max_runtime_minutes = 0 is too small; use more than 0"),
    ],
)
def test_what_is_refused(line, words):
    (complaint,) = complaints(run=top(line))
    assert words in complaint


def test_a_timeout_that_is_shorter_than_a_step_may_be_is_told_of():
    (said,) = [line for line in advice(load(run=top("stall_timeout_s = 3")), SPEC) if "stall" in line]
    assert said.startswith("run.toml:1: stall_timeout_s = 3 ends the run as soon as a step takes longer than that")
    assert "600 is the default" in said
    for value in ("0", "60", "600"):
        assert not [line for line in advice(load(run=top(f"stall_timeout_s = {value}")), SPEC) if "stall" in line]


def test_a_limit_of_steps_left_out_where_none_is():
    said = [line for line in advice(load(run=top("max_nonfinite = 5")), SPEC) if "nonfinite" in line]
    assert said == ["run.toml:1: max_nonfinite = 5 has no effect with on_nonfinite = 'stop'; it is for 'skip'"]
    for lines in (["max_nonfinite = 10"], ["on_nonfinite = 'skip'", "max_nonfinite = 5"]):
        assert not [line for line in advice(load(run=top(*lines)), SPEC) if "nonfinite" in line]
