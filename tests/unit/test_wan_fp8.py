"""A frozen base in float8 with scales: the bytes of the file are kept, and it computes what their product would."""

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import is_adapter
from models.casting import CastLinear
from models.quantised import FLOAT8, SCALE
from tests.helpers.models import DATA, TRANSFORMER_FILE, materialise, random_inputs, run_layers, wan_variant
from tests.helpers.quantised import FORMS, PREFIX, is_linear, quantise, write_scaled
from utils.train.build import AdapterSettings, prepare_skeleton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = ["wan_t2v", "wan_i2v"]


def tensors_of(kind):
    return load_file(DATA / kind / TRANSFORMER_FILE)


def family_of(kind, folder, **settings):
    return wan_variant(kind, folder / "wan.safetensors", **settings)


def scaled_family(kind, folder, form="old", *, compute="float32", transformer_dtype=None, **how):
    """A family on the kind's weights as fp8_scaled, and one on the float32 tensors that they stand for."""
    (folder / "expanded").mkdir(exist_ok=True)
    expanded = write_scaled(folder / "wan.safetensors", tensors_of(kind), form, **how)
    save_file(expanded, folder / "expanded" / "wan.safetensors")
    given = family_of(kind, folder, dtype=compute, transformer_dtype=transformer_dtype)
    return given, family_of(kind, folder / "expanded", dtype=compute)


def block_linears(skeleton):
    return {name: m for name, m in skeleton.blocks.named_modules() if isinstance(m, nn.Linear) and "lora" not in name}


def prediction_and_gradient(family, skeleton, kind, dtype, seed=1):
    """Of the squared prediction by what goes into the first block."""
    embed, *rest = family.pipeline_layers(skeleton)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        boundary = embed(random_inputs(seed=seed, name=kind))
    x = boundary[0].detach().requires_grad_()
    prediction = run_layers(rest, (x, *boundary[1:]), dtype)
    (gradient,) = torch.autograd.grad(prediction.float().square().mean(), x)
    return prediction.detach(), gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_bytes_of_the_file_are_what_is_held(tmp_path, kind, form, prefix):
    family, other = scaled_family(kind, tmp_path, form, prefix=prefix)
    skeleton = materialise(family.build_skeleton(), family)
    expanded = materialise(other.build_skeleton(), other)
    linears, plain = block_linears(skeleton), block_linears(expanded)
    assert len(linears) == (30 if kind == "wan_t2v" else 36) and linears.keys() == plain.keys()
    for name, linear in linears.items():
        assert isinstance(linear, CastLinear) and linear.weight.dtype == E4M3
        assert torch.equal(linear.weight.float() * linear.weight_scale, plain[name].weight)
    held = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears.values())
    assert held == sum(linear.weight.numel() for linear in plain.values()), "a byte a number"
    stored = load_file(tmp_path / "wan.safetensors")
    official = stored[f"{prefix}blocks.2.cross_attn.o.weight"]
    assert torch.equal(skeleton.blocks[2].attn2.to_out[0].weight.view(torch.uint8), official.view(torch.uint8))
    others = {n: p for n, p in skeleton.named_parameters() if p.dtype not in FLOAT8 and not n.endswith(SCALE)}
    reference = dict(expanded.named_parameters())
    assert all(torch.equal(parameter, reference[name]) for name, parameter in others.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("dtype", "by_row"), [(E4M3, False), (E4M3, True), (E5M2, False)])
def test_prediction_and_gradient_equal_those_of_the_expanded_weights(tmp_path, kind, compute, dtype, by_row):
    families = scaled_family(kind, tmp_path, compute=compute, dtype=dtype, by_row=by_row)
    found, expected = (
        prediction_and_gradient(family, materialise(family.build_skeleton(), family), kind, getattr(torch, compute))
        for family in families
    )
    for one, reference in zip(found, expected, strict=True):
        assert reference.abs().max() > 0 and torch.equal(one, reference)


def test_linears_outside_the_blocks_are_expanded(tmp_path):
    """Some files have the embedders in float8 too."""
    family, other = scaled_family("wan_i2v", tmp_path, compute="bfloat16", chosen=is_linear)
    skeleton, expanded = (materialise(one.build_skeleton(), one) for one in (family, other))
    reference = dict(expanded.named_parameters())
    outside = {name: p for name, p in skeleton.named_parameters() if not name.startswith("blocks.")}
    assert outside.keys() == {name for name in reference if not name.startswith("blocks.")}
    assert all(p.dtype not in FLOAT8 and torch.equal(p, reference[name]) for name, p in outside.items())


def test_blocks_that_the_file_has_in_more_bits_keep_them(tmp_path):
    def chosen(name, tensor):
        return name.startswith("blocks.1.") and tensor.ndim == 2

    family, _ = scaled_family("wan_t2v", tmp_path, compute="bfloat16", chosen=chosen)
    linears = block_linears(family.build_skeleton())
    assert {name for name, linear in linears.items() if linear.weight.dtype == E4M3} == {
        name for name in linears if name.startswith("1.")
    }
    assert {linear.weight.dtype for name, linear in linears.items() if name[0] != "1"} == {torch.bfloat16}


class TestTransformerDtype:
    @pytest.mark.parametrize("asked", [None, "float8", "float8_e5m2"])
    def test_float8_leaves_scaled_weights_as_they_are(self, tmp_path, asked):
        family, _ = scaled_family("wan_t2v", tmp_path, transformer_dtype=asked, dtype=E5M2)
        assert {linear.weight.dtype for linear in block_linears(family.build_skeleton()).values()} == {E5M2}

    def test_another_float8_than_that_of_the_scales_is_refused(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"transformer_dtype = 'float8_e4m3fn'.*in float8_e5m2 with a scale; remove"
        ):
            scaled_family("wan_t2v", tmp_path, transformer_dtype="float8_e4m3fn", dtype=E5M2)

    @pytest.mark.parametrize("asked", ["float32", "bfloat16"])
    def test_other_dtypes_expand_while_reading(self, tmp_path, asked):
        family, other = scaled_family("wan_t2v", tmp_path, transformer_dtype=asked)
        skeleton = materialise(family.build_skeleton(), family)
        assert not any(name.endswith(SCALE) for name, _ in skeleton.named_parameters())
        plain = block_linears(materialise(other.build_skeleton(), other))
        for name, linear in block_linears(skeleton).items():
            assert torch.equal(linear.weight, plain[name].weight.to(getattr(torch, asked)))

    @pytest.mark.parametrize(
        ("asked", "kept"),
        [(None, torch.float32), ("bfloat16", torch.bfloat16), ("float8", E5M2), ("float8_e4m3fn", E4M3)],
    )
    def test_plain_float8_stays_where_float8_is_asked_for(self, tmp_path, asked, kept):
        """Such files often have their norms in float8 too; those are cast up as ever."""
        low = {name: tensor.to(E5M2) for name, tensor in tensors_of("wan_t2v").items()}
        save_file(low, tmp_path / "wan.safetensors")
        family = family_of("wan_t2v", tmp_path, transformer_dtype=asked)
        skeleton = materialise(family.build_skeleton(), family)
        assert {linear.weight.dtype for linear in block_linears(skeleton).values()} == {kept}
        stored = low["blocks.0.self_attn.q.weight"]
        assert torch.equal(skeleton.blocks[0].attn1.to_q.weight, stored.to(kept))
        assert skeleton.blocks[0].norm2.weight.dtype == torch.float32
        assert torch.equal(skeleton.blocks[0].norm2.weight, low["blocks.0.norm3.weight"].float())


def test_a_family_on_scaled_weights_pickles(tmp_path):
    """It goes to the workers that load data, which must not need the files that were read to make it."""
    family, _ = scaled_family("wan_t2v", tmp_path, "comfy_quant")
    again = pickle.loads(pickle.dumps(family))
    dtypes = [{n: (p.dtype, p.shape) for n, p in one.build_skeleton().named_parameters()} for one in (family, again)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("form", ["old", "comfy_quant"])
def test_training_all_weights_is_refused_before_they_are_read(tmp_path, form):
    family, _ = scaled_family("wan_t2v", tmp_path, form)
    with pytest.raises(
        ValueError, match=r"30 weights in float8.*set transformer_dtype = 'bfloat16' to expand them, or"
    ):
        prepare_skeleton(family, None)
    expanded = family_of("wan_t2v", tmp_path, transformer_dtype="float32")
    assert all(parameter.requires_grad for parameter in prepare_skeleton(expanded, None).parameters())


class TestLora:
    def adapted(self, family):
        skeleton = family.build_skeleton()
        add_adapter(skeleton, family.lora_targets(skeleton), "lora", AdapterShape(rank=4, alpha=2.0))
        skeleton = materialise(skeleton, family)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in skeleton.named_parameters():
            if ".lora_B." in name:  # zeros hide half of the gradients
                nn.init.normal_(parameter.data, std=0.1, generator=generator)
        return skeleton

    def gradients(self, family, skeleton, checkpointing):
        embed, *rest = family.pipeline_layers(skeleton)
        boundary = embed(random_inputs())
        for layer in rest[:-1]:
            boundary = (
                checkpoint(lambda *x, layer=layer: layer(x), *boundary, use_reentrant=False)
                if checkpointing
                else layer(boundary)
            )
        rest[-1](boundary).square().mean().backward()
        return {name: p.grad for name, p in skeleton.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_gradients_equal_those_over_the_expanded_weights(self, tmp_path, checkpointing):
        found, expected = (
            self.gradients(family, self.adapted(family), checkpointing)
            for family in scaled_family("wan_t2v", tmp_path, by_row=True)
        )
        assert len(found) == 60 and found.keys() == expected.keys() and all(map(is_adapter, found))
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())

    def test_the_trainers_own_skeleton_has_scales_of_the_right_dtype(self, tmp_path):
        family, _ = scaled_family("wan_t2v", tmp_path, compute="bfloat16", by_row=True)
        skeleton = prepare_skeleton(family, AdapterSettings(rank=4, alpha=4.0))
        scales = {name: p for name, p in skeleton.named_parameters() if name.endswith(SCALE)}
        assert len(scales) == 30 and all(".base_layer." in name for name in scales)
        assert {scale.dtype for scale in scales.values()} == {torch.float32}
        assert scales["blocks.0.ffn.net.0.proj.base_layer.weight_scale"].shape == (96, 1)
        assert not any(scale.requires_grad for scale in scales.values())


class TestCastLinear:
    def test_a_scale_is_not_rounded_to_the_dtype_it_is_used_in(self):
        linear = CastLinear(nn.Linear(8, 6), E4M3, torch.bfloat16, ()).to_empty(device="cpu").requires_grad_(False)
        weight, _ = quantise(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), E4M3)
        linear.weight.data, linear.weight_scale.data = weight, torch.tensor(1.00390625)  # bfloat16 makes it 1
        linear.bias.data.zero_()
        by_hand = (weight.float() * 1.00390625).bfloat16()
        assert not torch.equal(by_hand, weight.bfloat16())
        assert torch.equal(linear(torch.eye(8).bfloat16()), by_hand.T)

    def test_neither_the_cast_nor_the_product_is_kept_for_the_backward_pass(self):
        linear = CastLinear(nn.Linear(8, 6), E4M3, torch.float32, (6, 1)).to_empty(device="cpu").requires_grad_(False)
        linear.weight.data, linear.weight_scale.data = quantise(torch.randn(6, 8), E4M3, by_row=True)
        linear.bias.data.zero_()
        kept = []
        x = torch.randn(2, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear(x).sum().backward()
        assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(E4M3, 48), (torch.float32, 6)]
        whole = linear.weight.float() * linear.weight_scale
        torch.testing.assert_close(x.grad, whole.sum(0).expand(2, 8))

    def test_it_compiles_whole(self):
        linear = CastLinear(nn.Linear(8, 6), E4M3, torch.bfloat16, ()).to_empty(device="cpu").requires_grad_(False)
        linear.weight.data, linear.weight_scale.data = quantise(torch.randn(6, 8), E4M3)
        linear.bias.data.zero_()
        x = torch.randn(2, 8, requires_grad=True)
        compiled = torch.compile(linear, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), linear(x))
