import pytest
import torch
from torch import nn

from models.lora import (
    add_lora,
    base_name,
    fold_scale,
    init_lora,
    is_lora,
    plain_lora_name,
    skeleton_lora_name,
    without_excluded,
)

TARGETS = [f"blocks.{i}.{name}" for i in (1, 2, 12) for name in ("attn1.to_q", "attn2.to_q", "ffn.net.2")]
ALIASES = {name: name.replace("attn1.to_q", "self_attn.q").replace("attn2.to_q", "cross_attn.q") for name in TARGETS}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 6)
        self.inner = nn.ModuleDict({"first": nn.Linear(6, 4)})

    def forward(self, x):
        return self.inner["first"](self.first(x))


def filled(net, seed=0):
    for name, parameter in list(net.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        shape = parameter.shape
        values = init_lora(name, shape, seed) if is_lora(name) else torch.linspace(-1, 1, shape.numel()).view(shape)
        setattr(net.get_submodule(owner), leaf, nn.Parameter(values, parameter.requires_grad))
    return net


def adapted(**settings):
    with torch.device("meta"):
        net = Net()
    add_lora(net, **{"targets": ["first", "inner.first"], "rank": 2, "alpha": 2, "dropout": 0.0, **settings})
    return net


def test_adapters_are_float32_on_meta_and_alone_trainable():
    net = adapted()
    parameters = dict(net.named_parameters())
    assert {name for name in parameters if is_lora(name)} == {
        f"{module}.lora_{matrix}.default.weight" for module in ("first", "inner.first") for matrix in "AB"
    }
    for name, parameter in parameters.items():
        assert parameter.is_meta
        assert parameter.requires_grad == is_lora(name)
        assert parameter.dtype == torch.float32
    assert {base_name(name) for name in parameters if not is_lora(name)} == {n for n, _ in Net().named_parameters()}


def test_targets_are_whole_names_not_endings():
    assert sorted(n for n, _ in adapted(targets=["first"]).named_parameters() if is_lora(n)) == [
        "first.lora_A.default.weight",
        "first.lora_B.default.weight",
    ]


def test_output_is_base_plus_scaled_product():
    net = filled(adapted(alpha=3.0, targets=["first"]))
    with torch.no_grad():
        net.first.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.ones(1, 8)
    delta = net.first.lora_B["default"].weight @ net.first.lora_A["default"].weight * 3.0 / 2
    weight, bias = net.first.base_layer.weight, net.first.base_layer.bias
    torch.testing.assert_close(net.first(x), x @ (weight + delta).T + bias)


def test_a_fresh_adapter_changes_nothing():
    x = torch.ones(1, 8)
    assert torch.equal(filled(adapted())(x), filled(Net())(x))


def test_float32_adapters_on_a_bfloat16_base_under_autocast():
    net = filled(adapted())
    for name, parameter in net.named_parameters():
        if is_lora(name):
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        else:
            parameter.data = parameter.data.bfloat16()
    x = torch.linspace(-1, 1, 8)[None]
    exact = x
    for layer in (net.first, net.inner["first"]):
        weight = layer.base_layer.weight.float() + layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        exact = exact @ weight.T + layer.base_layer.bias.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(x.bfloat16())
    found.sum().backward()
    assert found.dtype == torch.bfloat16
    assert net.first.lora_A["default"].weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)


def test_no_targets():
    with pytest.raises(ValueError, match="exclude_modules leaves no module to train"):
        adapted(targets=[])


def test_names_go_both_ways():
    full = "blocks.0.attn1.to_q.lora_A.default.weight"
    assert plain_lora_name(full) == "blocks.0.attn1.to_q.lora_A.weight"
    assert skeleton_lora_name(plain_lora_name(full)) == full
    assert base_name("blocks.0.attn1.to_q.base_layer.bias") == "blocks.0.attn1.to_q.bias"


def test_first_values_depend_on_seed_and_name_only():
    name = "blocks.0.attn1.to_q.lora_A.default.weight"
    torch.manual_seed(1)
    first = init_lora(name, (4, 64), seed=7)
    torch.manual_seed(2)
    assert torch.equal(first, init_lora(plain_lora_name(name), (4, 64), seed=7))
    assert not torch.equal(first, init_lora(name, (4, 64), seed=8))
    assert not torch.equal(first, init_lora(name.replace("0", "1"), (4, 64), seed=7))
    assert first.dtype == torch.float32
    assert torch.count_nonzero(init_lora(name.replace("_A", "_B"), (64, 4), seed=7)) == 0


def test_first_values_are_distributed_as_peft_draws_them():
    ours = init_lora("x.lora_A.weight", (64, 256), seed=0)
    theirs = torch.empty(64, 256)
    nn.init.kaiming_uniform_(theirs, a=5**0.5)
    bound = 1 / 16
    assert ours.abs().max() <= bound and theirs.abs().max() <= bound
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    assert ours.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_fold_scale_touches_b_alone():
    folded = fold_scale({"m.lora_A.weight": torch.ones(2), "m.lora_B.weight": torch.ones(2)}, 0.5)
    assert folded["m.lora_A.weight"].tolist() == [1, 1]
    assert folded["m.lora_B.weight"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("attn2", 6),  # skeleton names
        ("cross_attn", 6),  # official names
        ("blocks.1", 6),  # a whole number: block 12 stays
        ("blocks.1.attn1.to_q", 8),
        (r"blocks\.(1|2)\..*to_q", 5),
        ("ffn", 6),
    ],
)
def test_exclude_modules(entry, left):
    kept = without_excluded(TARGETS, [entry], ALIASES)
    assert len(kept) == left
    assert kept == [name for name in TARGETS if name in kept]


def test_an_entry_that_matches_nothing():
    with pytest.raises(ValueError, match=r"'crossattn' matches no module; they are named like blocks\.1\.self_attn\.q"):
        without_excluded(TARGETS, ["ffn", "crossattn"], ALIASES)


def test_an_entry_that_is_no_expression():
    with pytest.raises(ValueError, match=r"'\*ffn' is no regular expression"):
        without_excluded(TARGETS, ["*ffn"], ALIASES)
