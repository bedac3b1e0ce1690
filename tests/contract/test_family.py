"""What every registered family must do; a new one gets these tests by a line in FAMILIES below."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from models import adapters
from models.adapter_layers import AdapterShape, add_adapter
from models.base import Draw, ModelFamily
from models.flow_match import seeded_noise
from tests.helpers.launch import ROOT
from tests.helpers.models import materialise, wan_family, wan_variant
from tests.helpers.toy import ToyFamily

FAMILIES = {
    "toy": ToyFamily,
    "wan": wan_family,
    "wan_flf2v": partial(wan_variant, "wan_flf2v"),
    "wan22_ti2v": partial(wan_variant, "wan22_ti2v", i2v_fraction=0.5),
}
TEXT_WIDTH = {"toy": 3}  # others have 32
CHANNELS = {"wan22_ti2v": 48}  # others have 16


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture
def family(name) -> ModelFamily:
    return FAMILIES[name]()


def samples(name: str) -> list[dict[str, torch.Tensor]]:
    latents, text = (CHANNELS.get(name, 16), 2, 4, 6), (2, TEXT_WIDTH.get(name, 32))
    shapes = {"latents": latents, "text": text, "condition": latents, "image": (514, 1280)}
    return [{key: seeded_noise(shape, 9 * i + j) for j, (key, shape) in enumerate(shapes.items())} for i in range(2)]


DRAWS = [Draw(0.3, 5, 0.9), Draw(0.8, 6, 0.1)]


def forward(family: ModelFamily, skeleton: torch.nn.Module, name: str) -> torch.Tensor:
    batch = family.micro_batch(samples(name), DRAWS)
    x = batch.inputs
    for layer in family.pipeline_layers(skeleton):
        x = layer(x)
    return family.loss(x, batch.target)


def test_parameters_are_on_meta_and_each_belongs_to_one_layer(family):
    skeleton = family.build_skeleton()
    assert all(p.is_meta for p in skeleton.parameters())
    assert not any(b.is_meta for b in skeleton.buffers())
    layers = family.pipeline_layers(skeleton)
    held = [id(p) for layer in layers for p in layer.parameters()]
    assert sorted(held) == sorted(id(p) for p in skeleton.parameters()), "each parameter in exactly one layer"
    assert any(getattr(layer, "checkpointable", False) for layer in layers)


def test_weights_have_the_skeletons_names_and_shapes(family):
    weights, skeleton = family.open_weights(), family.build_skeleton()
    parameters = dict(skeleton.named_parameters())
    assert weights.names() >= set(parameters)
    assert all(weights.read(key).shape == p.shape for key, p in parameters.items())


def test_the_boundary_is_a_tuple_of_contiguous_tensors(family, name):
    skeleton = materialise(family.build_skeleton(), family)
    x = family.micro_batch(samples(name), DRAWS).inputs
    for layer in family.pipeline_layers(skeleton)[:-1]:
        x = layer(x)
        assert isinstance(x, tuple)
        assert all(isinstance(t, torch.Tensor) and t.is_contiguous() for t in x)


def test_losses_are_one_a_sample_whatever_the_batch(family, name):
    skeleton = materialise(family.build_skeleton(), family)
    with torch.no_grad():
        both = forward(family, skeleton, name)
        assert both.shape == (2,)
        assert both.dtype == torch.float32
        batches = [family.micro_batch([sample], [draw]) for sample, draw in zip(samples(name), DRAWS, strict=True)]
        for batch, expected in zip(batches, both, strict=True):
            x = batch.inputs
            for layer in family.pipeline_layers(skeleton):
                x = layer(x)
            assert torch.allclose(family.loss(x, batch.target)[0], expected, rtol=1e-5)


def test_what_a_mask_leaves_out_has_no_gradient(family, name):
    """And a mask changes neither what the model is given nor the loss of samples without one."""
    masked, plain = samples(name)
    masked["mask"] = torch.tensor([[[0, 255, 51]] * 4, [[255, 0, 0]] * 4], dtype=torch.uint8).repeat(1, 1, 2)
    batches = [family.micro_batch(pair, DRAWS) for pair in ([masked, plain], samples(name))]
    assert all(torch.equal(one, other) for one, other in zip(batches[0].inputs, batches[1].inputs, strict=True))
    wanted = batches[1].target[0]
    prediction = (wanted + seeded_noise(tuple(wanted.shape), 3)).requires_grad_()
    of_masked, of_plain = family.loss(prediction, batches[0].target)
    of_masked.backward()
    share = (masked["mask"] / 255)[None]
    assert ((prediction.grad[0] == 0) == (share == 0)).all() and not prediction.grad[1].any()
    error = (prediction - wanted).detach().square()
    assert of_masked.item() == pytest.approx((error[0] * share).mean().item(), rel=1e-5), "over all elements"
    assert of_plain.item() == pytest.approx(family.loss(prediction, batches[1].target)[1].item(), rel=1e-6)
    assert len(batches[0].target) > len(batches[1].target), "what nobody needs is not carried along"


def fingerprints() -> dict[str, list[str]]:
    """Sums over the micro-batch of each family, to the last bit."""
    batches = {name: family().micro_batch(samples(name), DRAWS) for name, family in FAMILIES.items()}
    return {key: [float(t.double().sum()).hex() for part in batch for t in part] for key, batch in batches.items()}


def test_equal_draws_give_equal_micro_batches_in_another_process():
    code = "from tests.contract.test_family import fingerprints; print(fingerprints())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told.strip() == str(fingerprints())


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_an_adapter_starts_without_effect_and_learns(family, name, kind):
    skeleton = family.build_skeleton()
    with torch.no_grad():
        before = forward(family, materialise(family.build_skeleton(), family), name)
    add_adapter(skeleton, family.lora_targets(skeleton), kind, AdapterShape(2, 2.0))
    skeleton = materialise(skeleton, family)
    trained = [p for p in skeleton.parameters() if p.requires_grad]
    assert torch.allclose(forward(family, skeleton, name), before, rtol=1e-5)
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        forward(family, skeleton, name).mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert forward(family, skeleton, name).mean() < before.mean()


def test_an_outline_counts_as_the_family_does(family):
    outline = family.outline(getattr(family, "_config", None))
    assert (outline.title, outline.media) == (family.title, family.media_spec())
    assert outline.tokens(64, 96, 9) == family.tokens(64, 96, 9)
    if outline.cache_bytes:
        assert set(outline.cache_bytes(64, 96, 9)) == {e.kind for e in family.encoders() if e.reads != "caption"}


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_a_saved_adapter_loads_back(family, tmp_path, kind):
    skeleton = family.build_skeleton()
    add_adapter(skeleton, family.lora_targets(skeleton), kind, AdapterShape(2, 2.0))
    names = [(adapters.plain_name(key), p.shape) for key, p in skeleton.named_parameters() if adapters.is_adapter(key)]
    tensors = {key: seeded_noise(tuple(shape), i) for i, (key, shape) in enumerate(names)}
    family.save_adapter(tensors, tmp_path, {"rank": "2", "alpha": "2"})
    loaded = family.load_adapter(tmp_path)
    assert set(loaded) == set(tensors)
    for key, tensor in tensors.items():  # a format may keep magnitudes as a ratio
        torch.testing.assert_close(loaded[key], tensor, rtol=1e-5 if key.endswith(adapters.MAGNITUDE) else 0, atol=0)
