"""Triggers: crossings are due once, signal files act once."""

import itertools
from typing import NamedTuple

import pytest

from utils.train.triggers import Decision, Every, SignalFiles


class Progress(NamedTuple):
    step: int = 0
    epochs_done: int = 0
    examples: int = 0


def steps_due(every: Every, states: list[Progress]) -> list[int]:
    return [b.step for a, b in itertools.pairwise(states) if every.due(a, b)]


def test_steps_epochs_and_examples_are_due_when_a_multiple_is_passed():
    # 3 steps an epoch, 8 examples a step
    states = [Progress(step, step // 3, step * 8) for step in range(13)]
    assert steps_due(Every(n_steps=4), states) == [4, 8, 12]
    assert steps_due(Every(n_epochs=2), states) == [6, 12]
    assert steps_due(Every(n_examples=20), states) == [3, 5, 8, 10]
    assert steps_due(Every(n_steps=5, n_epochs=2), states) == [5, 6, 10, 12]


def test_several_multiples_passed_at_once_are_due_once():
    assert Every(n_examples=3).due(Progress(0, 0, 0), Progress(1, 0, 8)) is True


def test_resuming_at_a_multiple_does_not_repeat_it():
    at = Progress(4, 1, 32)
    assert Every(n_steps=4).due(at, Progress(5, 1, 40)) is False


def test_nothing_set_is_never_due():
    every = Every()
    assert not every
    assert not every.due(Progress(), Progress(100, 100, 100))
    assert not every.minutes_due(1e9)
    assert not Every(n_steps=0).due(Progress(), Progress(1, 1, 1))


def test_minutes_are_measured_by_the_caller():
    every = Every(minutes=2)
    assert every
    assert not every.minutes_due(119.9)
    assert every.minutes_due(120.0)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], Decision.NONE),
        (["save"], Decision.CHECKPOINT),
        (["save_quit"], Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT),
        (["save", "save_quit"], Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT),
    ],
)
def test_signal_files_act_once(tmp_path, names, expected):
    for name in names:
        (tmp_path / name).touch()
    files = SignalFiles(tmp_path)
    assert files.poll() == expected
    assert files.poll() == Decision.NONE
    assert list(tmp_path.iterdir()) == []


def test_what_was_meant_for_an_earlier_start_is_taken_away_and_told(tmp_path, caplog):
    (tmp_path / "save_quit").touch()
    files = SignalFiles(tmp_path)
    files.drop()
    assert f"{tmp_path}/save_quit was there before this start, and is taken away" in caplog.text
    assert files.poll() == Decision.NONE and list(tmp_path.iterdir()) == []
    caplog.clear()
    files.drop()
    assert caplog.text == ""


def test_a_folder_of_that_name_is_no_signal(tmp_path):
    (tmp_path / "save").mkdir()
    assert SignalFiles(tmp_path).poll() == Decision.NONE


def test_a_decision_survives_being_sent_as_an_int():
    decision = Decision.SAVE | Decision.QUIT
    assert Decision(int(decision)) == decision
