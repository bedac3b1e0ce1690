"""Which tensor explains the others, how it is told, and files for --replay that are none."""

import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from models.base import MicroBatch
from utils.train.kept import FORMAT, MAX_KEPT, _cached, _keep, read_kept
from utils.train.nonfinite import (
    DATA,
    FROZEN,
    GRADIENT,
    LOSS,
    WEIGHT,
    Incident,
    NonFiniteError,
    Origin,
    Sample,
    bad_state,
    bad_weight,
    batch_origins,
    not_finite,
    refuse_bad_weights,
)
from utils.train.refused import stop_words
from utils.train.replay import nearest_checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_found_in_any_dtype(dtype, value):
    if dtype == torch.float8_e4m3fn and math.isinf(value):
        return  # it has no infinity
    good, bad = torch.ones(3, 4).to(dtype), torch.ones(3, 4)
    bad[1, 2] = value
    tensors = {"a": good, "b": bad.to(dtype), "c": torch.zeros(0), "d": torch.arange(3), "e": good}
    assert not_finite(tensors) == ["b"]


def test_what_was_read_so_is_not_for_the_learning_rate():
    data, loss = Origin(DATA, 0, 0, "input 0 of clip3.mp4"), Origin(LOSS, 1, 0, "the loss of micro-batch 0")
    of_data = stop_words(incident(loss, data), "kept", Path("global_step3"), 1, "stop")
    assert "it was read so, and no lr mends that: take the clip away, or start once with --regenerate_cache" in of_data
    assert "lower lr" not in of_data and "go on with --resume_from_checkpoint" in of_data
    assert "lower lr" in stop_words(incident(loss), "kept", None, 1, "stop")


def test_large_values_are_finite():
    assert not_finite({"a": torch.full((100,), 3e38), "b": torch.full((9,), -6e4, dtype=torch.float16)}) == []
    assert not_finite({}) == []


def incident(*origins: Origin, loss: float = math.nan) -> Incident:
    samples = [Sample(f"clip{i}.mp4", 0.5) for i in range(10)]
    return Incident(7, loss, math.nan, 1e-4, samples, origins)


def test_what_explains_the_others_is_told_first():
    ends = [Origin(GRADIENT, stage, 0, f"the gradient of {stage}") for stage in range(3)]
    assert incident(*ends).first is ends[2], "the backward pass came from there"
    loss = Origin(LOSS, 2, 1, "the loss of micro-batch 0")
    data = [Origin(DATA, stage, 1, "input 0 of clip3.mp4") for stage in (2, 0)]
    weight, frozen = Origin(WEIGHT, 1, 0, "the trained weight x"), Origin(FROZEN, 2, 0, "the frozen weight y")
    assert incident(*ends, loss).first is loss
    assert incident(*ends, loss, *data).first is data[1]
    assert not incident(*ends, loss, *data).is_hopeless
    assert incident(*ends, loss, *data, weight).first is weight
    assert incident(loss, weight, frozen).first is frozen
    assert incident(loss, weight).is_hopeless
    assert incident(loss, frozen).is_hopeless


def test_the_message_names_step_stage_tensor_samples_timesteps_and_rate():
    said = incident(Origin(GRADIENT, 1, 0, "the gradient of blocks.3.up.weight"), loss=0.25).words()
    for part in (
        "the gradient of step 7 is not finite (loss 0.25, gradient norm nan, learning rate 0.0001)",
        "no weight was changed",
        "the gradient of blocks.3.up.weight (stage 1, data rank 0)",
        "clip0.mp4 (t = 0.5), ",
        "clip7.mp4 (t = 0.5) and 2 more",
    ):
        assert part in said
    assert "the loss of step 7" in incident().words()
    assert "none: the norm is beyond what float32 can hold" in incident(loss=1.0).words()


def test_what_ails_the_cache_is_not_laid_at_the_door_of_lr(tmp_path):
    """Its file is named, and what to do comes before going on, which would meet the same step again."""
    data = Origin(DATA, 0, 0, "input 0 of clip3.mp4")
    path = "/cache/latents/ab/abc.safetensors"
    said = stop_words(incident(data)._replace(files=[path]), "kept", tmp_path / "global_step6", 1, "stop")
    assert f"not finite in the cache: {path}\n" in said
    assert "delete that file of the cache, and the next start makes it anew; on_nonfinite" in said
    assert said.index("delete that file") < said.index("go on with --resume_from_checkpoint")
    assert "lower lr" not in said
    many = incident(data)._replace(files=[f"/cache/{i}" for i in range(10)])
    said = stop_words(many, "kept", None, 11, "skip")
    assert "/cache/7 and 2 more\n" in said and "delete those files" in said
    assert "11 of the last 100 steps were left out, more than max_nonfinite" in said
    weight = Origin(WEIGHT, 0, 0, "the trained weight x")
    assert "lower lr" in stop_words(incident(data, weight), "kept", None, 1, "stop")


def test_the_files_of_a_step_that_was_read_so_are_named_by_all_ranks():
    asked = []

    class Loader:
        def not_finite(self, step):
            asked.append(step)
            return [Path("/cache/a"), Path("/cache/b")]

    run, plan = SimpleNamespace(loader=Loader()), SimpleNamespace(step=4)
    assert _cached(run, plan, Origin(DATA, 0, 0, "input 0 of a.mp4")) == ["/cache/a", "/cache/b"]
    assert _cached(run, plan, Origin(LOSS, 0, 0, "the loss")) == _cached(run, plan, None) == []
    assert _cached(SimpleNamespace(loader=None), plan, None) == []
    assert asked == [4], "the cache is read again only where that explains it"


def test_data_is_named_by_its_sample():
    inputs, target = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    batch = MicroBatch((inputs, torch.arange(2)), (target,), torch.ones(2))
    names = [["a.mp4", "b.mp4"]]
    assert batch_origins([batch], names, True) == batch_origins([batch], names, False) == []
    inputs[1, 2, 0], target[0, 1] = math.inf, math.nan
    assert batch_origins([batch], names, True) == ["input 0 of b.mp4"]
    assert batch_origins([batch], names, False) == ["target 0 of a.mp4"]


def test_a_trained_weight_that_is_not_finite_is_not_written():
    trained = {"": {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}}
    assert bad_weight({"": {"a": torch.ones(2)}}, 0) is None
    refuse_bad_weights(None, "the end")
    with pytest.raises(NonFiniteError, match=r"the trained weight b \(stage 3\) is not finite; go on from an earlier"):
        refuse_bad_weights(bad_weight(trained, 3), "the end")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_an_optimizer_remembers_is_looked_at(value):
    """A mean that is infinite stays so, and its weight never moves again, which nothing else would tell."""
    trained = {"a": torch.nn.Parameter(torch.ones(2)), "b": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.AdamW(trained.values())
    assert bad_state({"": (trained, optimizer)}, 2) is None, "nothing yet"
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert bad_state({"": (trained, optimizer)}, 2) is None
    optimizer.state[trained["b"]]["exp_avg_sq"][1] = value
    assert bad_state({"": (trained, optimizer)}, 2) == "exp_avg_sq of b (stage 2)"
    assert bad_weight({"": trained}, 2) is None


def test_reports_of_replays_take_no_place_of_a_step(tmp_path):
    engine = SimpleNamespace(is_first_stage=lambda: True, data_rank=0)
    batch = MicroBatch((torch.ones(1, 2),), (torch.ones(1),), torch.ones(1))

    def keep(step):
        return _keep(tmp_path, engine, [batch], {"format": FORMAT, "step": step}, None)

    for step in range(1, MAX_KEPT + 1):
        (tmp_path / f"step_{step}_replay.json").touch()
        assert keep(step) == f"look into it with --replay {tmp_path}/step_{step}.json"
    assert keep(3).startswith("look into it"), "the same step again, of a resumed run"
    assert keep(11) == f"its batch is not kept: {MAX_KEPT} are there already"


def test_a_batch_for_which_there_is_no_room_leaves_nothing(tmp_path, monkeypatch):
    def write(file, tensors):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    engine = SimpleNamespace(is_first_stage=lambda: True, data_rank=0)
    batch = MicroBatch((torch.ones(1, 2),), (torch.ones(1),), torch.ones(1))
    monkeypatch.setattr("utils.train.kept.write_safetensors", write)
    assert "No space left" in _keep(tmp_path, engine, [batch], {"format": FORMAT, "step": 3}, None)
    assert list(tmp_path.iterdir()) == []


def test_the_words_to_look_into_it_can_be_copied(tmp_path):
    engine = SimpleNamespace(is_first_stage=lambda: True, data_rank=0)
    words = _keep(tmp_path / "my run", engine, [], {"format": FORMAT, "step": 3}, None)
    assert shlex.split(words)[-2:] == ["--replay", str(tmp_path / "my run" / "step_3.json")]


def test_a_replay_takes_the_checkpoint_before_the_step_and_else_the_next(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "manifest.json").write_text('{"format": 1, "save": 1, "files": {}}')
    assert [nearest_checkpoint(tmp_path, step).name for step in (3, 5, 9, 99)] == [
        f"global_step{step}" for step in (4, 4, 8, 12)
    ]
    assert nearest_checkpoint(tmp_path / "global_step4", 3) is None


def kept(folder, **changed):
    sample = {"name": "a.mp4", "t": 0.5, "entry": 0, "turn": 0, "held": True}
    facts = {"format": FORMAT, "model": "toy", "expert": "", "step": 3, "micro_batches": {"1": [[sample]]}, **changed}
    (folder / "step_3.json").write_text(json.dumps(facts))
    save_file({"0.input.0": torch.ones(1, 2), "0.target.0": torch.ones(1), "0.weights.0": torch.ones(1)},
              folder / "step_3_data_01.safetensors")  # fmt: skip
    return folder / "step_3.json"


def test_a_kept_step_reads_back(tmp_path):
    step = read_kept(kept(tmp_path))
    (batch,) = step.batches
    assert (step.step, batch.data_rank, batch.index, batch.held) == (3, 1, 0, [0])
    assert batch.samples == [Sample("a.mp4", 0.5)]
    assert batch.read().inputs[0].equal(torch.ones(1, 2))


@pytest.mark.parametrize(
    "changed",
    [{"format": 9}, {"micro_batches": 3}, {"micro_batches": {"1": [[{"name": "a"}]]}}, {"micro_batches": {"x": [[]]}}],
)
def test_another_file_is_refused_with_what_to_name(tmp_path, changed):
    with pytest.raises(
        ValueError, match=r"^--replay .*step_3\.json: is no batch that this version kept .*; name a step_N"
    ):
        read_kept(kept(tmp_path, **changed))


def test_a_file_that_is_absent_cut_short_or_no_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^--replay .*cannot be read \(No such file"):
        read_kept(tmp_path / "step_1.json")
    path = kept(tmp_path)
    data = tmp_path / "step_3_data_01.safetensors"
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"step_3_data_01\.safetensors: cannot be read"):
        read_kept(path).batches[0].read()
    save_file({"1.input.0": torch.ones(1)}, data)
    with pytest.raises(ValueError, match="micro-batch 0 is not in it"):
        read_kept(path).batches[0].read()
    path.write_bytes(b"\x93\xff\x00")
    with pytest.raises(ValueError, match="is no batch that this version kept"):
        read_kept(path)
