import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import is_adapter
from models.casting import CastLinear, CastRMSNorm
from models.wan.layers import BlockLayer, RotaryTables, timestep_sinusoid
from tests.helpers.models import VARIANTS, materialise, random_inputs, run_layers, wan_family, wan_variant


def built(adapter=False, name="wan_t2v", **settings):
    family = wan_variant(name, **settings)
    skeleton = family.build_skeleton()
    if adapter:
        add_adapter(skeleton, family.lora_targets(skeleton), "lora", AdapterShape(4, 4))
    return family, materialise(skeleton, family)


def diffusers_forward(skeleton, x_t, t, text, *image):
    """diffusers' own forward on the same weights: t is one a sample or one a token, image states are one a frame."""
    tokens = x_t[0, 0, 0].numel() // 4
    t = t.repeat_interleave(tokens, dim=1) if t.ndim == 2 else t
    states = image[0].reshape(-1, 257, 1280) if image else None
    return skeleton(x_t, t * 1000, text, states, return_dict=False)[0]


def gradients_of(output, skeleton):
    skeleton.zero_grad()
    output.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in skeleton.named_parameters()}


@pytest.mark.parametrize("grid", [(1, 4, 6), (3, 8, 4)])
@pytest.mark.parametrize(("name", "t_a_frame"), [*((name, False) for name in VARIANTS), ("wan22_ti2v", True)])
def test_layers_in_a_row_are_diffusers_forward(name, t_a_frame, grid):
    family, skeleton = built(name=name)
    inputs = random_inputs(grid=grid, name=name, t_a_frame=t_a_frame)
    ours = run_layers(family.pipeline_layers(skeleton), inputs, torch.float32)
    theirs = diffusers_forward(skeleton, *inputs)
    assert ours.shape == theirs.shape == (2, 48 if name == "wan22_ti2v" else 16, *grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found, expected = gradients_of(ours, skeleton), gradients_of(theirs, skeleton)
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key


class TestBlock:
    """Against `WanTransformerBlock.forward`, whose arithmetic the layer spells out anew."""

    def run(self, dtype, t_a_frame, theirs):
        """Output, and gradients of the inputs and of the block's parameters."""
        family, skeleton = built(name="wan_i2v", dtype=dtype)
        embed, layer = family.pipeline_layers(skeleton)[:2]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            boundary = embed(random_inputs(name="wan_i2v", t_a_frame=t_a_frame))
            x, text, time6, time = (tensor.detach().requires_grad_() for tensor in boundary)
            if theirs:
                tokens = x[0, 0, ..., 0].numel()
                widened = time6.repeat_interleave(tokens, dim=1) if t_a_frame else time6.squeeze(1)
                output = layer.block(x.flatten(1, 3), text, widened, layer._rotary(x)).view_as(x)
            else:
                output = layer((x, text, time6, time))[0]
        output.float().square().mean().backward()
        return [output, x.grad, text.grad, time6.grad, *(parameter.grad for parameter in layer.block.parameters())]

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("t_a_frame", [False, True])
    def test_output_and_gradients(self, dtype, t_a_frame):
        ours, theirs = (self.run(dtype, t_a_frame, side) for side in (False, True))
        assert torch.equal(ours[0], theirs[0])
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            if t_a_frame:  # sums over the tokens of a frame come in another order
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
            else:
                assert torch.equal(mine, other)

    def test_modulation_is_never_one_a_token(self):
        """What is kept for the backward pass may grow by some time6, not by six numbers a token and channel."""
        kept = []
        for t_a_frame in (False, True):
            family, skeleton = built(name="wan22_ti2v")
            embed, layer = family.pipeline_layers(skeleton)[:2]
            boundary = embed(random_inputs(grid=(3, 16, 16), name="wan22_ti2v", t_a_frame=t_a_frame))
            sizes = {}

            def keep(tensor, sizes=sizes):
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                layer(boundary)
            kept.append(list(sizes.values()))
        one_a_token = 2 * 3 * 64 * 6 * 48 * 4
        assert max(kept[0] + kept[1]) < one_a_token
        assert sum(kept[1]) - sum(kept[0]) < one_a_token / 10


@pytest.mark.parametrize("name", ["wan_t2v", "wan_flf2v", "wan22_ti2v"])
def test_each_layer_needs_only_the_boundary(name):
    """Every layer is built anew and fed what came over a wire."""
    family, skeleton = built(name=name)
    inputs = random_inputs(name=name, t_a_frame=name == "wan22_ti2v")
    expected = run_layers(family.pipeline_layers(skeleton), inputs, torch.float32)
    passed = inputs
    for index in range(len(family.pipeline_layers(skeleton))):
        passed = family.pipeline_layers(skeleton)[index](passed)
        if isinstance(passed, tuple):
            assert all(tensor.is_floating_point() and tensor.is_contiguous() for tensor in passed)
            passed = pickle.loads(pickle.dumps(tuple(tensor.detach() for tensor in passed)))
    assert torch.equal(passed, expected.detach())


@pytest.mark.parametrize("name", ["wan_t2v", "wan_flf2v"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_boundary(dtype, name):
    family, skeleton = built(name=name, dtype=dtype)
    layers = family.pipeline_layers(skeleton)
    exact_family, exact = built(name=name)
    inputs = random_inputs(name=name)
    embedded = exact_family.pipeline_layers(exact)[0](inputs)
    passed = inputs
    with torch.autocast("cpu", family.compute_dtype), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where a norm cannot use its fused kernel
        for layer in layers[:-1]:
            passed = layer(passed)
            kinds = [tensor.dtype for tensor in passed]
            assert kinds == [family.compute_dtype, family.compute_dtype, torch.float32, torch.float32]
            assert torch.equal(passed[2], embedded[2]) and torch.equal(passed[3], embedded[3])  # time loses nothing
        prediction = layers[-1](passed)
    assert prediction.dtype == torch.float32
    exact_prediction = run_layers(exact_family.pipeline_layers(exact), inputs, torch.float32)
    assert (prediction - exact_prediction).norm() / exact_prediction.norm() < 0.02


def test_image_states_are_normed_in_float32_however_they_are_kept():
    family, skeleton = built(name="wan_i2v")
    *inputs, image = random_inputs(name="wan_i2v")
    low = image.bfloat16()
    embed = family.pipeline_layers(skeleton)[0]
    assert torch.equal(embed((*inputs, low))[1], embed((*inputs, low.float()))[1])
    low_family = wan_variant("wan_flf2v", dtype="bfloat16")
    embedder = low_family.build_skeleton().condition_embedder.image_embedder
    kinds = {name: parameter.dtype for name, parameter in embedder.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {
        "pos_embed",
        *(f"norm{number}.{part}" for number in (1, 2) for part in ("weight", "bias")),
    }


def test_sinusoid_is_exact_at_high_timesteps():
    t = torch.tensor([0.0, 1.0, 999.9375, 1000.0])
    found = timestep_sinusoid(t, 64)
    for row, value in zip(found, t.tolist(), strict=True):
        angles = [value / 10000 ** (i / 32) for i in range(32)]
        exact = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(row, exact, rtol=0, atol=1e-7)


def test_the_time_of_each_sample_is_its_own():
    family, skeleton = built()
    x_t, t, text = random_inputs()
    layers = family.pipeline_layers(skeleton)
    both = run_layers(layers, (x_t, t, text), torch.float32)
    second = run_layers(layers, (x_t[1:], t[1:], text[1:]), torch.float32)
    torch.testing.assert_close(both[1:], second, rtol=1e-5, atol=1e-5)
    other = run_layers(layers, (x_t[1:], t[1:] + 0.1, text[1:]), torch.float32)
    assert (other - second).abs().max() > 1e-3


def test_gradients_are_the_same_with_recomputation():
    family, skeleton = built()
    layers = family.pipeline_layers(skeleton)
    gradients = []
    for recompute in (False, True):
        skeleton.zero_grad()
        passed = random_inputs()
        for layer in layers:
            again = recompute and getattr(layer, "checkpointable", False)
            passed = checkpoint(layer, passed, use_reentrant=False) if again else layer(passed)
        passed.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in skeleton.parameters()])
    assert sum(getattr(layer, "checkpointable", False) for layer in layers) == 3
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_block_layers_can_be_compiled():
    family, skeleton = built()
    expected = run_layers(family.pipeline_layers(skeleton), random_inputs(), torch.float32)
    layers = family.pipeline_layers(skeleton)
    for layer in layers:
        if isinstance(layer, BlockLayer):
            layer.compile(backend="eager", dynamic=False)
    torch.testing.assert_close(run_layers(layers, random_inputs(), torch.float32), expected)


def test_the_root_parameter_is_one_on_both_sides():
    """A stage may fill through the skeleton or through its layer: the other side has to see it."""
    family = wan_family()
    skeleton = family.build_skeleton()
    head = family.pipeline_layers(skeleton)[-1]
    assert {name for name, _ in head.named_parameters()} == {"scale_shift_table", "proj_out.weight", "proj_out.bias"}
    skeleton.scale_shift_table = nn.Parameter(torch.ones(1, 2, 48))
    assert head.scale_shift_table is skeleton.scale_shift_table
    head.scale_shift_table = nn.Parameter(torch.zeros(1, 2, 48))
    assert head.scale_shift_table is skeleton.scale_shift_table


def test_every_parameter_is_in_one_layer():
    family = wan_family()
    skeleton = family.build_skeleton()
    held = [id(p) for layer in family.pipeline_layers(skeleton) for p in layer.parameters()]
    assert sorted(held) == sorted(id(p) for p in skeleton.parameters())


def test_rotary_tables_are_made_once_a_grid():
    _, skeleton = built()
    rotary = RotaryTables(skeleton.rope)
    first = rotary(torch.empty(1, 3, 4, 5, 8))
    assert rotary(torch.empty(2, 3, 4, 5, 8))[0] is first[0]
    assert first[0].shape == (1, 60, 1, 24)
    expected = skeleton.rope(torch.empty(1, 1, 3, 8, 10))
    assert torch.equal(first[0], expected[0]) and torch.equal(first[1], expected[1])
    for frames in range(4, 12):
        rotary(torch.empty(1, frames, 4, 5, 8))
    assert len(rotary._tables) == 4
    assert rotary(torch.empty(1, 3, 4, 5, 8))[0] is not first[0]


class TestFloat8:
    def test_only_block_linears_are_stored_so(self):
        _, skeleton = built(dtype="bfloat16", transformer_dtype="float8")
        kinds = {name: parameter.dtype for name, parameter in skeleton.named_parameters()}
        low = {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn}
        linears = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
        assert low == {
            n for n in kinds if n.startswith("blocks.") and n.endswith(tuple(f"{x}.weight" for x in linears))
        }
        assert len(low) == 3 * 10
        assert kinds["blocks.0.attn1.norm_q.weight"] == kinds["blocks.0.norm2.bias"] == torch.float32
        assert kinds["blocks.0.scale_shift_table"] == kinds["scale_shift_table"] == torch.float32
        assert kinds["condition_embedder.time_proj.weight"] == torch.float32
        assert kinds["blocks.0.attn1.to_q.bias"] == kinds["patch_embedding.weight"] == torch.bfloat16
        assert kinds["proj_out.weight"] == kinds["condition_embedder.text_embedder.linear_1.weight"] == torch.bfloat16

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_result_is_that_of_the_rounded_weights(self, dtype):
        family, low = built(dtype=dtype, transformer_dtype="float8_e5m2")
        plain_family, plain = built(dtype=dtype)
        for name, parameter in plain.named_parameters():
            parameter.data = dict(low.named_parameters())[name].data.to(parameter.dtype)
        low.requires_grad_(False)
        found = run_layers(family.pipeline_layers(low), random_inputs(), family.compute_dtype)
        expected = run_layers(plain_family.pipeline_layers(plain), random_inputs(), family.compute_dtype)
        assert torch.equal(found, expected)

    def test_adapters_train_on_it(self):
        gradients = {}
        for storage in ("float8", None):
            family, skeleton = built(adapter=True, dtype="bfloat16", transformer_dtype=storage)
            assert isinstance(skeleton.blocks[0].attn1.to_q.base_layer, CastLinear) == (storage is not None)
            prediction = run_layers(family.pipeline_layers(skeleton), random_inputs(), torch.bfloat16)
            prediction.square().mean().backward()
            grads = {name: p.grad for name, p in skeleton.named_parameters() if p.grad is not None}
            assert grads.keys() == {name for name, _ in skeleton.named_parameters() if is_adapter(name)}
            gradients[storage] = torch.cat([gradient.flatten() for gradient in grads.values()])
        similarity = torch.cosine_similarity(gradients["float8"], gradients[None], dim=0)
        assert similarity > 0.95

    def test_no_cast_copy_of_a_weight_is_kept_for_the_backward_pass(self):
        linear = CastLinear(nn.Linear(8, 6), torch.float8_e4m3fn, torch.float32).to_empty(device="cpu")
        linear.weight.data = torch.randn(6, 8).to(torch.float8_e4m3fn)
        linear.bias.data.zero_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            linear.requires_grad_(False)
            x = torch.randn(2, 8, requires_grad=True)
            linear(x).sum().backward()
        assert [tensor.dtype for tensor in kept] == [torch.float8_e4m3fn]
        torch.testing.assert_close(x.grad, linear.weight.float().sum(0).expand(2, 8))


def test_a_norm_keeps_its_dtype_under_autocast_on_a_gpu():
    """On CUDA autocast runs rms_norm in float32, on the CPU it does not; fake tensors show it without a GPU."""
    norm = CastRMSNorm(16, 1e-6, device="meta", dtype=torch.float32)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)  # the context manager refuses where there is no GPU
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.no_grad():
            norm.weight = nn.Parameter(torch.empty(16, device="cuda:0"))
            x = torch.empty(2, 16, device="cuda:0", dtype=torch.bfloat16)
            assert F.rms_norm(x, (16,), norm.weight.bfloat16()).dtype == torch.float32, "this test is no longer needed"
            assert norm(x).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def test_captions_of_any_length_share_one_compiled_block():
    family, skeleton = built()
    embed, *blocks, _ = family.pipeline_layers(skeleton)
    counter = CompileCounter()
    for block in blocks:
        block.compile(backend=counter, dynamic=False)
    x_t, t, text = random_inputs()
    for rows in (2, 3, 512):
        passed = embed((x_t, t, text[:, :rows]))
        for block in blocks:
            passed = block(passed)
    assert counter.frame_count == 1


def test_a_t_for_each_frame_is_a_second_version_of_the_compiled_block():
    family, skeleton = built(name="wan22_ti2v")
    counter, found = CompileCounter(), {}
    for compiled in (False, True):
        layers = family.pipeline_layers(skeleton)
        for layer in layers[1:-1] if compiled else []:
            layer.compile(backend=counter, dynamic=False)
        for t_a_frame in (False, True, False):
            inputs = random_inputs(name="wan22_ti2v", t_a_frame=t_a_frame)
            found[compiled, t_a_frame] = run_layers(layers, inputs, torch.float32)
    assert counter.frame_count == 2
    for t_a_frame in (False, True):
        torch.testing.assert_close(found[True, t_a_frame], found[False, t_a_frame])
