"""What is due after a step, in which order, and what a stop that is asked for meanwhile leaves to the next start."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from utils.train import due, loop
from utils.train.checkpoint_write import Ended
from utils.train.saving import COURSE_MARK, EVALUATION, mark_of
from utils.train.state import Milestones, TrainState
from utils.train.stopping import AT_ONCE, TimeLimit
from utils.train.triggers import SIGNAL_FILES, Decision, Every

TERMINATED = AT_ONCE | Decision.TERMINATED


class Signals:
    """SIGTERM comes at the look of that number, if at any."""

    def __init__(self, at: int | None = None):
        self.at, self.looks = at, -1

    def poll(self) -> Decision:
        self.looks += 1
        return Decision.NONE if self.at is None or self.looks < self.at else TERMINATED


class Checkpointer:
    """One is being written, by a thread that is busy still or has ended."""

    is_busy = is_writing = False

    def poll(self) -> Ended | None:
        return None


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Step 4 of 8, which ends an epoch; `done` gets what is done, in its order."""
    every = Every(n_steps=4)
    settings = SimpleNamespace(
        total_steps=8, eval_every=every, save_every=every, checkpoint_every=every, eval_before_first_step=True
    )
    run = SimpleNamespace(
        run_dir=tmp_path,
        settings=settings,
        state=TrainState(4, 8),
        milestones=lambda: Milestones(4, 1, 8),
        course={"seed": 1},
        meters=SimpleNamespace(state_dict=lambda: {"epoch_loss_sum": 1.5}),
        eval_sets=["held out"],
        owed=(),
        came_with=(-1, ""),
        asked=Decision.NONE,
        signals=Signals(),
        limit=TimeLimit(None),
        checkpointer=Checkpointer(),
        last_eval=-1,
        last_saved=-1,
        last_checkpoint=-1,
        checkpointed=None,
        done=[],
    )

    def save_checkpoint(run, *, wait=False, owed=()):
        run.done.append(("checkpoint", wait, list(owed)))
        run.last_checkpoint = run.state.step

    def evaluate_all(run):
        run.done.append(EVALUATION)
        run.last_eval = run.state.step

    for module in (loop, due):
        monkeypatch.setattr(module, "save_checkpoint", save_checkpoint)
    monkeypatch.setattr(due, "save_model", lambda run, name: run.done.append(name))
    monkeypatch.setattr(due, "evaluate_all", evaluate_all)
    return run


def act(run, asked=Decision.NONE) -> list:
    run.asked = asked
    loop.act(run, Milestones(3, 0, 6), asked)
    return run.done


def test_the_checkpoint_is_begun_before_what_takes_long_and_owes_it(run):
    assert act(run) == [("checkpoint", False, [EVALUATION, "epoch1"]), EVALUATION, "epoch1"]


@pytest.mark.parametrize("total", [4, 8])
def test_so_it_is_at_the_end_whatever_the_cadence(run, total):
    run.settings.checkpoint_every, run.settings.total_steps = Every(), total
    assert act(run)[0] == (("checkpoint", False, [EVALUATION, "epoch1"]) if total == 4 else EVALUATION)


def test_a_signal_asks_for_nothing_but_a_checkpoint_and_a_file_for_all(run):
    assert act(run, TERMINATED) == [("checkpoint", True, [EVALUATION, "epoch1"])]
    run.done.clear()
    run.last_checkpoint = run.last_eval = -1
    assert act(run, SIGNAL_FILES["save_quit"])[1:] == [EVALUATION, "epoch1"]
    run.done.clear()
    run.last_checkpoint = run.last_eval = -1
    assert act(run, SIGNAL_FILES["save_quit"] | TERMINATED) == [("checkpoint", True, [EVALUATION, "epoch1"])]


@pytest.mark.parametrize(("at", "done"), [(0, []), (1, [EVALUATION]), (2, [EVALUATION, "epoch1"])])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_what_a_stop_leaves_undone_is_owed(run, caplog, at, done, has_checkpoint):
    """By the checkpoint that was begun before, or by one that is written now."""
    run.signals, run.settings.checkpoint_every = Signals(at), Every(n_steps=4 if has_checkpoint else 100)
    before, after = [("checkpoint", wait, [EVALUATION, "epoch1"]) for wait in (False, True)]
    caplog.set_level("INFO")
    assert act(run) == ([before, *done] if has_checkpoint else [*done, after])
    assert run.asked & Decision.QUIT
    assert [record.getMessage() for record in caplog.records] == ["stopping after step 4: SIGTERM came"]


def test_a_checkpoint_goes_on_to_its_end_while_others_are_evaluated(run, monkeypatch):
    looks = []
    monkeypatch.setattr(due, "look_at_checkpoint", looks.append)
    run.experts = SimpleNamespace(engine=SimpleNamespace(num_stages=2))
    question = due.question_of(run)
    run.checkpointer.is_busy = True
    busy = question.ask()
    assert not question.hear(busy) and not looks, "nobody waits for a disk"
    run.checkpointer.is_busy = False
    assert not question.hear(question.ask()) and looks == [run]
    assert question.hear(busy | int(TERMINATED)) and run.asked == TERMINATED


def saved(run, name: str, mark: str) -> None:
    (run.run_dir / name).mkdir()
    save_file({"w": torch.ones(1)}, run.run_dir / name / "adapter.safetensors", {COURSE_MARK: mark})


def test_a_folder_of_another_course_pays_no_debt(run):
    run.owed, run.last_checkpoint, run.last_eval = (EVALUATION, "epoch1"), 4, 4
    saved(run, "epoch1", "of what was left")
    due.catch_up(run)
    assert run.done == ["epoch1"] and run.last_saved == -1
    run.done.clear()
    (run.run_dir / "epoch1" / "adapter.safetensors").write_bytes(b"torn")
    due.catch_up(run)
    assert run.done == ["epoch1"]


def test_what_was_done_after_the_checkpoint_was_begun_is_not_done_again(run):
    run.owed, run.last_checkpoint, run.last_eval = (EVALUATION, "epoch1"), 4, 4
    saved(run, "epoch1", mark_of(run))
    due.catch_up(run)
    assert run.done == []
    assert run.last_saved == 4, "and an end at this step saves it under no other name"


@pytest.mark.parametrize("name", ["epoch1", "step4"])
def test_other_settings_make_no_other_model_of_the_same_weights(run, name):
    run.last_checkpoint = run.last_eval = 4
    saved(run, name, mark_of(run))
    run.came_with, run.course = (4, mark_of(run)), {"seed": 1, "lr": 0.5}
    due.catch_up(run)
    assert run.last_saved == 4 and run.saved == run.run_dir / name
    run.state = TrainState(5, 10)
    assert mark_of(run) != run.came_with[1]


def test_another_course_has_another_mark(run):
    first = mark_of(run)
    assert mark_of(run) == first and len(first) == 16
    for key, value in {"state": TrainState(5, 8), "course": {"seed": 2}, "meters": Losses()}.items():
        before = getattr(run, key)
        setattr(run, key, value)
        assert mark_of(run) != first
        setattr(run, key, before)
    assert mark_of(run) == first


class Losses:
    def state_dict(self):
        return {"epoch_loss_sum": 1.6}


def test_before_the_first_step_it_is_evaluated_once(run):
    run.state, run.milestones = TrainState(), lambda: Milestones(0, 0, 0)
    due.catch_up(run)
    assert run.done == [EVALUATION]
    due.catch_up(run)
    assert run.done == [EVALUATION], "as a start does that goes on from a checkpoint of step 0"
    run.last_eval, run.settings.eval_before_first_step = -1, False
    due.catch_up(run)
    assert run.done == [EVALUATION]


def test_the_end_is_left_to_the_next_start_where_a_stop_is_asked_for(run, monkeypatch):
    monkeypatch.setattr(loop, "bad_weight_of", lambda run: None)
    monkeypatch.setattr(loop, "save_last_model", lambda run, *_: pytest.fail("waits"))
    run.signals = Signals(1)
    assert not loop.finish(run, lambda: Decision.NONE)
    assert run.done == [("checkpoint", False, []), EVALUATION]
