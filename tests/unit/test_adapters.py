import peft
import pytest
import torch
from torch import nn

from models.adapters import (
    KINDS,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    SKELETON_PARTS,
    base_name,
    by_module,
    delta_shape,
    delta_weight,
    first_value,
    fold_scale,
    is_adapter,
    kind_of,
    kinds_in,
    plain_name,
    rank_of,
    row_norms,
    skeleton_name,
    split_name,
)

ALPHA, RANK = 3.0, 2
# peft's settings -> the parts that come of them, for a Linear from 48 to 96
CONFIGS = {
    "lora": (peft.LoraConfig(r=RANK, lora_alpha=ALPHA), KINDS["lora"][0]),
    "dora": (peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True), KINDS["dora"][0]),
    "lokr": (peft.LoKrConfig(r=RANK, alpha=ALPHA), KINDS["lokr"][1]),
    "lokr, both cut": (peft.LoKrConfig(r=RANK, alpha=ALPHA, decompose_both=True), KINDS["lokr"][3]),
    "lokr, whole": (peft.LoKrConfig(r=64, alpha=ALPHA), KINDS["lokr"][0]),
    "lokr, factor 4": (peft.LoKrConfig(r=RANK, alpha=ALPHA, decompose_factor=4), KINDS["lokr"][1]),
}


def peft_layer(config) -> nn.Module:
    """A Linear from 48 to 96 with peft's own layer, every parameter random."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"m": nn.Linear(48, 96)})
    config.target_modules = ["m"]
    layer = peft.inject_adapter_in_model(config, net)["m"]
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name:
            parameter.data.normal_().mul_(0.3)
    return layer


def parts_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {plain_name(f"m.{name}"): p.detach() for name, p in layer.named_parameters() if is_adapter(f"m.{name}")}
    return by_module(tensors)["m"]


@pytest.mark.parametrize("case", CONFIGS)
def test_the_change_of_weight_is_what_peft_merges(case):
    config, expected_parts = CONFIGS[case]
    layer = peft_layer(config)
    parts, base = parts_of(layer), layer.get_base_layer().weight.detach().clone()
    assert set(parts) == expected_parts
    assert kind_of(parts) == case[:4]
    rank = config.r
    folded = by_module(fold_scale({f"m{part}": tensor for part, tensor in parts.items()}, ALPHA / rank))["m"]
    layer.merge()
    change = layer.get_base_layer().weight.detach() - base
    torch.testing.assert_close(delta_weight(folded, base), change, rtol=1e-5, atol=1e-6)
    assert delta_shape(folded) == (96, 48)
    assert rank_of(folded) == (None if case == "lokr, whole" else rank)
    assert delta_weight({part: tensor.bfloat16() for part, tensor in folded.items()}, base).dtype == torch.float32


def test_a_magnitude_of_the_weight_itself_changes_nothing():
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    base[2] = 0  # a dead row stays dead
    parts = {LORA_A: torch.ones(1, 4), LORA_B: torch.zeros(6, 1), MAGNITUDE: row_norms(base)}
    torch.testing.assert_close(delta_weight(parts, base), torch.zeros(6, 4))


@pytest.mark.parametrize(
    "parts",
    [{LORA_A}, {LORA_A, MAGNITUDE}, {".lokr_w1"}, {".lokr_w1", ".lokr_w2_a"}, {LORA_A, LORA_B, ".lokr_w1"}, set()],
)
def test_parts_that_make_no_adapter(parts):
    with pytest.raises(ValueError, match="which is no whole LoRA, DoRA or LoKr"):
        kind_of(parts)


@pytest.mark.parametrize(
    "shapes",
    [
        {LORA_A: (2, 48), LORA_B: (96, 3)},
        {LORA_A: (2, 48), LORA_B: (96, 2), MAGNITUDE: (48,)},
        {LORA_A: (2,), LORA_B: (96, 2)},
        {".lokr_w1": (4, 4), ".lokr_w2_a": (8, 2), ".lokr_w2_b": (3, 8)},
        {".lokr_w1": (4, 4, 1), ".lokr_w2": (8, 2, 1)},
    ],
)
def test_parts_that_do_not_fit_each_other(shapes):
    with pytest.raises(ValueError, match=r"do not fit each other: lo.*\[\d+"):
        delta_shape({part: torch.zeros(shape) for part, shape in shapes.items()})


def test_kinds_of_a_file():
    lora, dora = ([f"m{part}" for part in KINDS[kind][0]] for kind in ("lora", "dora"))
    assert kinds_in(lora) == {"lora"}
    assert kinds_in(lora + [name.replace("m.", "n.", 1) for name in dora]) == {"lora", "dora"}
    with pytest.raises(ValueError, match=r"^blocks\.0\.q has lora_A\.weight, which is no whole"):
        kinds_in(["blocks.0.q.lora_A.weight"])


@pytest.mark.parametrize("part", SKELETON_PARTS)
def test_names_go_both_ways(part):
    plain = f"blocks.0.attn1.to_q{part}"
    full = skeleton_name(plain)
    assert full in (
        f"blocks.0.attn1.to_q{part}.default",
        f"blocks.0.attn1.to_q{part.removesuffix('.weight')}.default.weight",
    )
    assert plain_name(full) == plain_name(plain) == plain
    assert is_adapter(full)
    assert split_name(plain) == ("blocks.0.attn1.to_q", part)


def test_names_of_the_base():
    assert base_name("blocks.0.attn1.to_q.base_layer.bias") == "blocks.0.attn1.to_q.bias"
    assert not is_adapter("blocks.0.attn1.to_q.base_layer.weight")
    assert split_name("blocks.0.attn1.to_q.weight") is None


def test_first_values_depend_on_seed_and_name_only():
    name = "blocks.0.attn1.to_q.lora_A.default.weight"
    torch.manual_seed(1)
    first = first_value(name, (4, 64), seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, first_value(plain_name(name), (4, 64), seed=7))
    assert not torch.equal(first, first_value(name, (4, 64), seed=8))
    assert not torch.equal(first, first_value(name.replace("0", "1"), (4, 64), seed=7))
    assert first.dtype == torch.float32
    assert torch.count_nonzero(first_value(name.replace("_A", "_B"), (64, 4), seed=7)) == 0


@pytest.mark.parametrize("case", CONFIGS)
def test_first_values_are_distributed_as_peft_draws_them(case):
    config, _ = CONFIGS[case]
    torch.manual_seed(3)
    net = nn.ModuleDict({"m": nn.Linear(480, 960)})
    config.target_modules = ["m"]
    for name, theirs in peft.inject_adapter_in_model(config, net).named_parameters():
        if is_adapter(name) and MAGNITUDE not in name:
            ours = first_value(name, theirs.shape, seed=0)
            bound = 1 / theirs.shape[-1] ** 0.5
            assert ours.abs().max() <= bound and theirs.abs().max() <= bound
            assert ours.count_nonzero() == theirs.count_nonzero()
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=3 / theirs.numel() ** 0.5)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_scale_is_folded_in_once(case):
    layer = peft_layer(CONFIGS[case][0])
    tensors = {f"m{part}": tensor for part, tensor in parts_of(layer).items() if part != MAGNITUDE}
    whole, half = (delta_weight(by_module(t)["m"]) for t in (tensors, fold_scale(tensors, 0.5)))
    torch.testing.assert_close(half, whole / 2)
