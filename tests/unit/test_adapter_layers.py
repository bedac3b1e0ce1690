import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.adapter_layers import (
    AdapterShape,
    LoKrLinear,
    add_adapter,
    initial_value,
    kronecker_linear,
    without_adapters,
)
from models.adapters import KINDS, MAGNITUDE, base_name, is_adapter, plain_name
from models.casting import CastLinear

RANK, ALPHA = 2, 3.0
# our settings, and peft's own for the same
CASES = {
    "lora": ({"kind": "lora"}, peft.LoraConfig(r=RANK, lora_alpha=ALPHA)),
    "dora": ({"kind": "dora"}, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True)),
    "lokr": ({"kind": "lokr"}, peft.LoKrConfig(r=RANK, alpha=ALPHA)),
    "lokr both": (
        {"kind": "lokr", "decompose_both": True},
        peft.LoKrConfig(r=RANK, alpha=ALPHA, decompose_both=True),
    ),
    "lokr whole": ({"kind": "lokr", "rank": 64}, peft.LoKrConfig(r=64, alpha=ALPHA)),
    "lokr factor": ({"kind": "lokr", "factor": 3}, peft.LoKrConfig(r=RANK, alpha=ALPHA, decompose_factor=3)),
}
# dtype of the frozen weights, and shape of their scale
STORAGES = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float8": (torch.float8_e4m3fn, None),
    "scaled": (torch.float8_e4m3fn, ()),
    "scaled rows": (torch.float8_e4m3fn, (48, 1)),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.inner = nn.ModuleDict({"first": nn.Linear(48, 24, bias=False)})

    def forward(self, x):
        return self.inner["first"](torch.tanh(self.first(x)))


def adapted(kind="lora", targets=("first", "inner.first"), net=None, **shape):
    if net is None:
        with torch.device("meta"):
            net = Net()
    add_adapter(net, list(targets), kind, AdapterShape(**{"rank": RANK, "alpha": ALPHA, **shape}))
    return net


def filled(net, trained=None, seed=0):
    """Base weights from their names; adapters as a run starts them, or random with the generator `trained`."""
    for name, parameter in list(net.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if is_adapter(name):
            values = initial_value(net, name, parameter.shape, seed)
            if trained is not None:
                values = values + 0.3 * torch.randn(values.shape, generator=trained)
        elif leaf == "weight_scale":
            values = torch.linspace(0.5, 1.5, parameter.numel()).view(parameter.shape)
        else:
            generator = torch.Generator().manual_seed(sum(map(ord, base_name(name))))
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
        setattr(net.get_submodule(owner), leaf, nn.Parameter(values.to(parameter.dtype), parameter.requires_grad))
    return net


def inputs(dtype=torch.float32):
    return torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def generator():
    return torch.Generator().manual_seed(2)


def gradients(net, forward, x):
    net.zero_grad()
    forward(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_float32_on_meta_and_alone_trainable(kind):
    net = adapted(kind)
    parameters = dict(net.named_parameters())
    for module in ("first", "inner.first"):
        found = {plain_name(n).removeprefix(module) for n in parameters if is_adapter(n) and n.startswith(f"{module}.")}
        assert found in KINDS[kind]
    for name, parameter in parameters.items():
        assert parameter.is_meta
        assert parameter.requires_grad == is_adapter(name)
        assert parameter.dtype == torch.float32
    assert {base_name(name) for name in parameters if not is_adapter(name)} == {n for n, _ in Net().named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_whole_names_not_endings(kind):
    found = {plain_name(name) for name, _ in adapted(kind, targets=["first"]).named_parameters() if is_adapter(name)}
    assert found in [{f"first{part}" for part in form} for form in KINDS[kind]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_targets(kind):
    with pytest.raises(ValueError, match="exclude_modules leaves no module to train"):
        adapted(kind, targets=[])


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_peft(case):
    settings, config = CASES[case]
    ours = filled(adapted(**settings), generator())
    config.target_modules = ["first", "inner.first"]
    theirs = peft.inject_adapter_in_model(config, Net())
    assert theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-5, atol=1e-5)
    found, expected = gradients(ours, ours, inputs()), gradients(theirs, theirs, inputs())
    assert found.keys() == expected.keys() == {name for name, _ in ours.named_parameters() if is_adapter(name)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout_is_that_of_peft(kind):
    ours = filled(adapted(kind, dropout=0.4), generator())
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.4, use_dora=kind == "dora")
    config.target_modules = ["first", "inner.first"]
    theirs = peft.inject_adapter_in_model(config, Net())
    theirs.load_state_dict(ours.state_dict())
    outputs = []
    for net in (ours, theirs):
        torch.manual_seed(4)
        outputs.append(net.train()(inputs()))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], ours.eval()(inputs()), atol=0.01)


def stored(net, storage):
    """Linears as the family makes them where weights are kept in another dtype."""
    dtype, scale = STORAGES[storage]
    compute = torch.float32 if storage == "float32" else torch.bfloat16
    shapes = {"first": scale, "inner.first": scale and (24, 1)}
    for name in ("first", "inner.first"):
        owner, _, leaf = name.rpartition(".")
        linear = net.get_submodule(name)
        if storage.startswith(("float8", "scaled")):
            linear = CastLinear(linear, dtype, compute, shapes[name])
        setattr(net.get_submodule(owner), leaf, linear.to(dtype) if dtype.itemsize > 1 else linear)
    return net, compute


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_no_bit(kind, storage):
    nets = []
    for with_adapter in (True, False):
        with torch.device("meta"):
            net, compute = stored(Net(), storage)
        nets.append(filled(adapted(kind, net=net) if with_adapter else net))
    with torch.autocast("cpu", torch.bfloat16, enabled=compute != torch.float32):
        found, expected = (net(inputs(compute)) for net in nets)
    assert found.dtype == compute
    assert torch.equal(found, expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_on_a_base_of_fewer_bits_under_autocast(kind, storage):
    """Against the same net in float32 throughout, with the base as it was stored."""
    with torch.device("meta"):
        net, compute = stored(Net(), storage)
    net = filled(adapted(kind, net=net), generator())
    exact = filled(adapted(kind))
    state = {name: p.detach().float() for name, p in net.named_parameters()}
    for name in [name for name in state if name.endswith("weight_scale")]:
        state[name.replace("weight_scale", "weight")] *= state.pop(name).reshape(-1, 1)
    exact.load_state_dict(state)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute != torch.float32):
        found = gradients(net, net, inputs(compute))
    expected = gradients(exact, exact, inputs())
    tolerance = 1e-5 if compute == torch.float32 else 0.05
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert (gradient - expected[name]).norm() < tolerance * expected[name].norm(), name


@pytest.mark.parametrize("case", CASES)
def test_recomputation_gives_the_same_gradients(case):
    net = filled(adapted(**CASES[case][0]), generator())

    def recomputed(x):
        return checkpoint(net, x, use_reentrant=False, preserve_rng_state=False)

    plain, again = gradients(net, net, inputs()), gradients(net, recomputed, inputs())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("case", CASES)
def test_compiling_breaks_no_graph(case):
    net = filled(adapted(**CASES[case][0]), generator())
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(inputs()), net(inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_no_random_number_is_drawn(kind):
    net = filled(adapted(kind)).train()
    before = torch.get_rng_state()
    net(inputs())
    assert torch.equal(torch.get_rng_state(), before)


def test_lokr_keeps_no_whole_matrix_for_the_backward_pass():
    net = filled(adapted("lokr"), generator())
    base = {net.first.base_layer.weight.data_ptr(), net.inner["first"].base_layer.weight.data_ptr()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(inputs())
    assert isinstance(net.first, LoKrLinear)
    assert kept and not [t for t in kept if sorted(t.shape[-2:]) == [24, 48] and t.data_ptr() not in base]


@pytest.mark.parametrize("second", [[(6, 4)], [(4, 6)], [(6, 2), (2, 4)]])
@pytest.mark.parametrize("first", [(3, 5), (5, 3), (1, 1)])
def test_kronecker_products_one_after_another(first, second):
    draw = generator()
    a, matrices = torch.randn(first, generator=draw), [torch.randn(shape, generator=draw) for shape in second]
    b = matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
    x = torch.randn(2, 7, first[1] * second[-1][1], generator=draw)
    torch.testing.assert_close(kronecker_linear(x, a, matrices), x @ torch.kron(a, b).T)


def test_magnitudes_are_the_lengths_of_the_frozen_rows_as_stored():
    with torch.device("meta"):
        net, _ = stored(Net(), "scaled rows")
    net = filled(adapted("dora", net=net))
    layer = net.first.base_layer
    rows = layer.weight.float() * layer.weight_scale
    found = {plain_name(name): p for name, p in net.named_parameters()}[f"first{MAGNITUDE}"]
    torch.testing.assert_close(found.detach(), rows.norm(dim=1))


@pytest.mark.parametrize("kind", CASES)
def test_without_its_adapters_the_model_is_what_it_was(kind):
    """To the last bit, and with them again afterwards, dropout and gradients included."""
    shape = {**CASES[kind][0], **({"dropout": 0.5} if "lokr" not in kind else {})}
    net, plain = filled(adapted(**shape), generator()), filled(Net())
    with torch.no_grad():
        after = net.eval()(inputs())
        with without_adapters(net.train()):
            assert net(inputs()).equal(plain(inputs())), "no dropout either: it is the adapter's"
        assert net.eval()(inputs()).equal(after) and not after.equal(plain(inputs()))
    with pytest.raises(RuntimeError, match="stop"), without_adapters(net):
        raise RuntimeError("stop")
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        n for n, _ in net.named_parameters() if is_adapter(n)
    ]
    with torch.no_grad():
        assert net(inputs()).equal(after)


def test_a_compiled_model_heeds_the_switch():
    net, plain = filled(adapted("lokr"), generator()), filled(Net())
    net.compile(backend="eager", dynamic=False)
    for _ in range(2):
        with torch.no_grad():
            after = net(inputs())
            with without_adapters(net):
                assert net(inputs()).equal(plain(inputs())) and not plain(inputs()).equal(after)
        assert gradients(net, net, inputs()).keys() == {n for n, _ in net.named_parameters() if is_adapter(n)}
