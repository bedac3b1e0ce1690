"""Optimizers: names, groups, keywords, and state by name that resumes bit for bit."""

import io

import pytest
import pytorch_optimizer
import torch
from torch import nn

from utils.train.optimizers import (
    OPTIMIZERS,
    UNSUITABLE,
    build_optimizer,
    eval_mode,
    load_optimizer_state_by_name,
    merge_optimizer_states,
    optimizer_class,
    optimizer_state_by_name,
    parameter_groups,
    step_size_estimate,
)


def tiny(dtype: torch.dtype = torch.float32, vectors: bool = True) -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16, bias=vectors), nn.GELU(), nn.Linear(16, 4, bias=vectors))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model.to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step)).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        torch.manual_seed(step)  # a few optimizers draw from the global generator
        optimizer.step()


def through_disk(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed_equals_uninterrupted(name: str, dtype: torch.dtype, vectors: bool = True, **kwargs) -> None:
    lr = kwargs.pop("lr", 1e-2)
    whole = tiny(dtype, vectors)
    train(whole, build_optimizer(name, whole.named_parameters(), lr, **kwargs), range(6))

    first = tiny(dtype, vectors)
    optimizer = build_optimizer(name, first.named_parameters(), lr, **kwargs)
    train(first, optimizer, range(3))
    saved = through_disk(optimizer_state_by_name(optimizer, first.named_parameters()))

    second = tiny(dtype, vectors)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(name, second.named_parameters(), lr, **kwargs)
    assert load_optimizer_state_by_name(optimizer, second.named_parameters(), saved) == []
    train(second, optimizer, range(3, 6))
    for key, expected in whole.state_dict().items():
        # kron's products of many factors round by how their tensors lie in memory
        rtol, atol = (1e-5, 1e-8) if name == "kron" else (0, 0)
        torch.testing.assert_close(second.state_dict()[key], expected, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("adamw", {"betas": [0.9, 0.99]}),
        ("adamw_optimi", {}),
        ("stableadamw", {}),
        ("sgd", {"momentum": 0.9}),
        ("sgd", {}),
        ("lion", {}),
        ("prodigy", {"lr": 1.0, "d0": 1e-3}),
        ("ScheduleFreeAdamW", {}),
    ],
)
def test_three_steps_saved_and_three_more_are_six(name, kwargs, dtype):
    resumed_equals_uninterrupted(name, dtype, **kwargs)


OFFERED = sorted(set(pytorch_optimizer.get_supported_optimizers()) - UNSUITABLE.keys() - OPTIMIZERS.keys())


@pytest.mark.parametrize("name", OFFERED)
def test_every_offered_name_of_pytorch_optimizer_trains_and_resumes(name):
    matrices_only = {"spectralsphere"}  # fine for a LoRA, which has no vectors
    resumed_equals_uninterrupted(name, torch.float32, vectors=name not in matrices_only)


@pytest.mark.parametrize("name", sorted(UNSUITABLE))
def test_names_that_cannot_work_say_why(name):
    with pytest.raises(ValueError, match=r"\[optimizer\] type = .* cannot be used: "):
        optimizer_class(name)


def test_state_keeps_its_own_dtype():
    model = tiny(torch.bfloat16)
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-2)
    train(model, optimizer, range(1))
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].float() + 1e-4
    saved = through_disk(optimizer_state_by_name(optimizer, model.named_parameters()))
    fresh = build_optimizer("adamw", model.named_parameters(), 1e-2)
    load_optimizer_state_by_name(fresh, model.named_parameters(), saved)
    for p, state in fresh.state.items():
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], optimizer.state[p]["exp_avg"])
        assert state["exp_avg"] is not optimizer.state[p]["exp_avg"]


def test_kahan_buffers_are_there_and_saved():
    model = tiny(torch.bfloat16)
    optimizer = build_optimizer("adamw_optimi", model.named_parameters(), 1e-2)
    train(model, optimizer, range(2))
    saved = optimizer_state_by_name(optimizer, model.named_parameters())
    assert saved["state"]["0.weight"]["kahan_comp"].abs().sum() > 0


def test_state_follows_the_name_when_the_order_changes():
    model = tiny()
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-2)
    train(model, optimizer, range(2))
    saved = through_disk(optimizer_state_by_name(optimizer, model.named_parameters()))
    other = build_optimizer("adamw", reversed(list(model.named_parameters())), 1e-2)
    load_optimizer_state_by_name(other, model.named_parameters(), saved)
    for p in model.parameters():
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_states_of_two_stages_merge_into_one():
    whole = tiny(torch.bfloat16)
    optimizer = build_optimizer("adamw_optimi", whole.named_parameters(), 1e-2)
    train(whole, optimizer, range(3))
    state = through_disk(optimizer_state_by_name(optimizer, whole.named_parameters()))
    stages = [
        {
            "state": {n: v for n, v in state["state"].items() if n.startswith(prefix)},
            "shapes": {n: v for n, v in state["shapes"].items() if n.startswith(prefix)},
            "shared": {},
            "groups": [{**g, "names": [n for n in g["names"] if n.startswith(prefix)]} for g in state["groups"]],
        }
        for prefix in ("0.", "2.")
    ]
    fresh = build_optimizer("adamw_optimi", whole.named_parameters(), 1e-2)
    merged = merge_optimizer_states(stages)
    assert load_optimizer_state_by_name(fresh, whole.named_parameters(), merged) == []
    assert [g["kahan_sum"] for g in fresh.param_groups] == [True, True]
    assert [int(g["step"]) for g in fresh.param_groups] == [3, 3]
    for p in whole.parameters():
        assert torch.equal(fresh.state[p]["kahan_comp"], optimizer.state[p]["kahan_comp"])


def test_unknown_parameters_are_told_and_other_shapes_refused():
    model = tiny()
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-2)
    train(model, optimizer, range(1))
    saved = through_disk(optimizer_state_by_name(optimizer, model.named_parameters()))
    model.add_module("extra", nn.Linear(2, 2, bias=False))
    wider = build_optimizer("adamw", model.named_parameters(), 1e-2)
    assert load_optimizer_state_by_name(wider, model.named_parameters(), saved) == ["extra.weight"]

    changed = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match=r"state of 0.weight: saved for shape \[16, 8\], now it is \[32, 8\]"):
        load_optimizer_state_by_name(
            build_optimizer("adamw", changed.named_parameters(), 1e-2), changed.named_parameters(), saved
        )


def test_an_edited_config_counts_on_resume():
    model = tiny()
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-2, weight_decay=0.1, betas=[0.9, 0.99])
    train(model, optimizer, range(1))
    saved = through_disk(optimizer_state_by_name(optimizer, model.named_parameters()))
    edited = build_optimizer("adamw", model.named_parameters(), 5e-3, weight_decay=0.2, betas=[0.8, 0.9])
    load_optimizer_state_by_name(edited, model.named_parameters(), saved)
    assert [(g["lr"], g["weight_decay"], g["betas"]) for g in edited.param_groups] == [
        (5e-3, 0.2, (0.8, 0.9)),
        (5e-3, 0.0, (0.8, 0.9)),
    ]


def test_vectors_are_not_decayed_and_frozen_parameters_left_out():
    model = tiny()
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), weight_decay=0.1, lr=1e-3)
    assert [(len(g["params"]), g["weight_decay"]) for g in groups] == [(1, 0.1), (2, 0.0)]
    assert len(parameter_groups(tiny(vectors=False).named_parameters(), 0.1, 1e-3)) == 1


def test_weight_decay_defaults_to_the_classs_own():
    groups = build_optimizer("adamw", tiny().named_parameters(), 1e-3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.01, 0.0]


@pytest.mark.parametrize(
    ("name", "cls"), [("AdamW", "AdamW"), ("SGD", "SGD"), ("Prodigy", "Prodigy"), ("came", "CAME")]
)
def test_names_are_case_insensitive(name, cls):
    assert optimizer_class(name).__name__ == cls


def test_unknown_optimizer_names_the_nearest():
    with pytest.raises(ValueError, match=r"type = 'adamw_optimy' is not known; the nearest are: adamw_optimi"):
        optimizer_class("adamw_optimy")


@pytest.mark.parametrize("name", ["adamw", "lion", "adamw_optimi"])
def test_unknown_keyword_names_the_key_and_the_nearest(name):
    with pytest.raises(ValueError, match=rf"\[optimizer\] beta is not a setting of '{name}'; did you mean 'betas'\?"):
        build_optimizer(name, tiny().named_parameters(), 1e-3, beta=[0.9, 0.99])


def test_a_keyword_like_no_other_still_gets_the_list():
    with pytest.raises(ValueError, match=r"zzz is not a setting of 'sgd'\. Known: dampening"):
        build_optimizer("sgd", tiny().named_parameters(), 1e-3, zzz=1)


def test_hidden_options_of_pytorch_optimizer_pass():
    optimizer = build_optimizer("lion", tiny().named_parameters(), 1e-3, cautious=True)
    assert optimizer.param_groups[0]["cautious"] is True


def test_a_refused_value_tells_the_settings():
    with pytest.raises(ValueError, match=r"type = 'adamw' refuses its settings \(lr = -1"):
        build_optimizer("adamw", tiny().named_parameters(), -1.0)


def test_a_missing_package_tells_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)  # import then fails as if not installed
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        optimizer_class("AdamW8bit")


def test_only_some_optimizers_estimate_their_step_size():
    model = tiny()
    optimizer = build_optimizer("prodigy", model.named_parameters(), 1.0, d0=1e-3)
    train(model, optimizer, range(3))
    assert step_size_estimate(optimizer) >= 1e-3
    assert step_size_estimate(build_optimizer("adamw", model.named_parameters(), 1e-3)) is None


def test_eval_mode_shows_other_weights_and_gives_the_bits_back():
    model = tiny()
    optimizer = build_optimizer("schedulefreeadamw", model.named_parameters(), 1e-2)
    train(model, optimizer, range(3))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with eval_mode(optimizer):
        assert not torch.equal(model[0].weight, before["0.weight"])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(group["train_mode"] for group in optimizer.param_groups)


def test_eval_mode_leaves_plain_optimizers_alone():
    model = tiny()
    optimizer = build_optimizer("adamw", model.named_parameters(), 1e-2)
    before = model[0].weight.detach().clone()
    with eval_mode(optimizer):
        assert torch.equal(model[0].weight, before)


def test_the_state_of_another_class_is_refused():
    """AdamW's running means would pass for Lion's by their names."""
    named = [("w", nn.Parameter(torch.ones(2, 2)))]
    saved = optimizer_state_by_name(build_optimizer("adamw", named, lr=1e-3), named)
    with pytest.raises(ValueError, match=r"is torch.AdamW and .* asks for pytorch_optimizer.Lion; .*--reset_opti"):
        load_optimizer_state_by_name(build_optimizer("lion", named, lr=1e-3), named, merge_optimizer_states([saved]))


@pytest.mark.parametrize("noted", ["torch.AdamW", "AdamW", None], ids=str)
@pytest.mark.parametrize(("saved_by", "read_by"), [("adamw", "adamw_optimi"), ("adamw_optimi", "adamw")])
def test_the_two_classes_of_the_name_adamw_are_told_apart(saved_by, read_by, noted):
    """One counts steps for each parameter and one for all: its moments would be corrected as if they were empty."""
    model = tiny()
    optimizer = build_optimizer(saved_by, model.named_parameters(), 1e-3)
    train(model, optimizer, range(3))
    saved = through_disk(optimizer_state_by_name(optimizer, model.named_parameters()))
    if noted != "torch.AdamW":  # as earlier versions wrote it
        saved["kind"] = noted
    other = build_optimizer(read_by, model.named_parameters(), 1e-3)
    with pytest.raises(ValueError, match=r"\.AdamW and \[optimizer\] type asks for .*\.AdamW; .*--reset_optimizer"):
        load_optimizer_state_by_name(other, model.named_parameters(), saved)
    assert load_optimizer_state_by_name(optimizer, model.named_parameters(), saved) == []


def test_settings_of_the_wrong_length_are_the_users_mistake():
    with pytest.raises(ValueError, match="refuses its settings"):
        build_optimizer("adamw", [("w", nn.Parameter(torch.ones(2, 2)))], lr=1e-3, betas=[0.9])
