"""The official transformers' outputs and gradients, reproduced through our loader and our pipeline layers."""

import pytest
import torch

from tests.helpers.golden import golden, golden_batch, golden_gradients, largest_error
from tests.helpers.models import (
    DATA,
    VARIANTS,
    diffusers_checkpoint,
    diffusers_transformer,
    materialise,
    run_layers,
    wan_family,
    wan_variant,
)


@pytest.fixture(scope="module", params=[(name, layout) for name in VARIANTS for layout in ("official", "diffusers")])
def run(request, tmp_path_factory):
    name, layout = request.param
    folder = DATA / name if layout == "official" else diffusers_transformer(tmp_path_factory.mktemp("d") / "t", name)
    family = wan_variant(name, folder)
    skeleton = materialise(family.build_skeleton(), family)
    batch = golden_batch(name)
    prediction = run_layers(family.pipeline_layers(skeleton), batch.inputs, torch.float32)
    loss = family.loss(prediction, batch.target).mean()
    loss.backward()
    return name, prediction.detach(), loss.item(), {key: p.grad for key, p in skeleton.named_parameters()}


def test_output(run):
    name, prediction, _, _ = run
    assert largest_error(prediction, golden(name)["dit.out"]) < 1e-5


def test_loss(run):
    name, _, loss, _ = run
    assert loss == pytest.approx(golden(name)["dit.loss"].item(), rel=1e-5)


def test_gradients(run):
    name, _, _, gradients = run
    expected = golden_gradients(name)
    assert len(expected) == 8
    errors = {key: largest_error(gradients[key], gradient) for key, gradient in expected.items()}
    assert max(errors.values()) < 1e-4, errors


def test_every_parameter_has_a_gradient(run):
    """The image embedder's position embedding too, and the keys and values of image states."""
    gradients = run[-1]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert [key for key, gradient in gradients.items() if not gradient.any()] == []


def test_layouts_give_the_same_bits(tmp_path):
    official, diffusers = wan_family(), wan_family(diffusers_checkpoint(tmp_path / "wan"))
    ours, theirs = official.open_weights(), diffusers.open_weights()
    assert ours.names() == theirs.names() and len(ours.names()) == 96
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())
    assert diffusers.title == official.title
