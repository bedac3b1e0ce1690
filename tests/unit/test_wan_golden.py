"""The official transformer's outputs and gradients, reproduced through our loader and our pipeline layers."""

import pytest
import torch
from safetensors.torch import load_file

from models.wan.keymaps import TRANSFORMER
from tests.helpers.models import WAN_T2V, diffusers_checkpoint, materialise, run_layers, wan_family

GOLDEN = load_file(WAN_T2V / "transformer_golden.safetensors")


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def golden_inputs():
    text = torch.zeros(2, 512, 32)
    for row, key in zip(text, ("dit.context0", "dit.context1"), strict=True):
        row[: len(GOLDEN[key])] = GOLDEN[key]
    return GOLDEN["dit.x"], GOLDEN["dit.t"].double() / 1000, text


@pytest.fixture(scope="module", params=["official", "diffusers"])
def run(request, tmp_path_factory):
    folder = WAN_T2V if request.param == "official" else diffusers_checkpoint(tmp_path_factory.mktemp("d") / "wan")
    family = wan_family(folder)
    skeleton = materialise(family.build_skeleton(), family)
    prediction = run_layers(family.pipeline_layers(skeleton), golden_inputs(), torch.float32)
    loss = family.loss(prediction, (GOLDEN["dit.target"],)).mean()
    loss.backward()
    return prediction.detach(), loss.item(), {name: p.grad for name, p in skeleton.named_parameters()}


def test_output(run):
    assert relative_error(run[0], GOLDEN["dit.out"]) < 1e-5


def test_loss(run):
    assert run[1] == pytest.approx(GOLDEN["dit.loss"].item(), rel=1e-5)


@pytest.mark.parametrize("key", [key for key in GOLDEN if key.startswith("dit.grad.")])
def test_gradient(run, key):
    name = TRANSFORMER.to_skeleton(key.removeprefix("dit.grad."))
    assert relative_error(run[2][name], GOLDEN[key]) < 1e-4


def test_every_parameter_has_a_gradient(run):
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in run[2].values())


def test_layouts_give_the_same_bits(tmp_path):
    official, diffusers = wan_family(), wan_family(diffusers_checkpoint(tmp_path / "wan"))
    ours, theirs = official.open_weights(), diffusers.open_weights()
    assert ours.names() == theirs.names() and len(ours.names()) == 96
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.names())
    assert diffusers.title == official.title
