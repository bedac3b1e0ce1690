"""How an adapter starts, and what is refused before any weight is read."""

import pytest
import torch
from safetensors.torch import save_file

from models.adapters import KINDS, MAGNITUDE, fold_scale, is_adapter, plain_name
from models.targets import without_excluded
from tests.helpers.toy import ToyFamily, ToyWeights
from utils.train.build import (
    AdapterSettings,
    EngineSettings,
    OptimizerSettings,
    check_settings,
    parameter_filler,
    prepare_skeleton,
    starting_adapter,
)

RANK, ALPHA = 2, 3.0


class NarrowFamily(ToyFamily):
    """Gives an adapter to the first Linears only."""

    def lora_targets(self, skeleton, exclude=()):
        return super().lora_targets(skeleton)[:2]


class ExcludingFamily(ToyFamily):
    """Heeds exclude_modules."""

    def lora_targets(self, skeleton, exclude=()):
        return without_excluded(super().lora_targets(skeleton), exclude, {})


def settings(**adapter) -> EngineSettings:
    chosen = AdapterSettings(**{"rank": RANK, "alpha": ALPHA, **adapter})
    return EngineSettings(1, 1, OptimizerSettings("sgd", 0.1), chosen)


def saved(folder, **adapter):
    """An adapter as a family saves it: alpha folded in, random."""
    skeleton = prepare_skeleton(ToyFamily(), settings(**adapter).adapter)
    draw = torch.Generator().manual_seed(0)
    tensors = {
        plain_name(name): torch.randn(p.shape, generator=draw)
        for name, p in skeleton.named_parameters()
        if is_adapter(name)
    }
    save_file(tensors, folder / "toy.safetensors")
    return tensors


def filled(adapter: AdapterSettings) -> dict[str, torch.Tensor]:
    """Every parameter's first values, put in place one after another as a stage does."""
    family, skeleton = ToyFamily(), prepare_skeleton(ToyFamily(), adapter)
    weights = family.open_weights()
    start = starting_adapter(family, adapter, weights)
    fill = parameter_filler(skeleton, weights, start, 0, torch.device("cpu"))
    for name, parameter in list(skeleton.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(skeleton.get_submodule(owner), leaf, fill(name, parameter))
    return {name: p.detach() for name, p in skeleton.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_earlier_adapter_is_what_training_starts_from(tmp_path, kind):
    tensors = saved(tmp_path, kind=kind)
    adapter = settings(kind=kind, init_from_existing=tmp_path).adapter
    check_settings(ToyFamily(), settings(kind=kind, init_from_existing=tmp_path))
    found = {plain_name(name): value for name, value in filled(adapter).items() if is_adapter(name)}
    assert found.keys() == tensors.keys()
    folded = fold_scale(found, ALPHA / RANK)  # what the run makes of its parameters
    for name, tensor in tensors.items():
        torch.testing.assert_close(folded[name], tensor)


@pytest.mark.parametrize("made", KINDS)
@pytest.mark.parametrize("trained", KINDS)
def test_an_adapter_of_another_kind(tmp_path, made, trained):
    saved(tmp_path, kind=made)
    if made == trained:
        return
    message = (
        rf"init_from_existing: .* is of type '{made}', and this run trains type = '{trained}'; set type = '{made}'"
    )
    with pytest.raises(ValueError, match=message):
        check_settings(ToyFamily(), settings(kind=trained, init_from_existing=tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_rank(tmp_path, kind):
    saved(tmp_path, kind=kind, rank=1)
    message = r"this run needs \[.*use what the adapter was made with: rank = 1, exclude_modules"
    if kind != "lokr":
        message = message.replace(",", " and")
    with pytest.raises(ValueError, match=message):
        check_settings(ToyFamily(), settings(kind=kind, init_from_existing=tmp_path))


def test_an_adapter_of_other_modules(tmp_path):
    whole = settings(init_from_existing=tmp_path)
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"12 of its tensors would be dropped, first blocks\.1\.down\.lora_A\.weight"):
        check_settings(NarrowFamily(), whole)
    narrow = {n: t for n, t in saved(tmp_path).items() if n.startswith("blocks.0.")}
    save_file(narrow, tmp_path / "toy.safetensors")
    check_settings(NarrowFamily(), whole)
    told = (
        rf"'{tmp_path}' has nothing for \d+ modules of this run, first blocks\.1\.up; use what .* rank = 2 and exclude"
    )
    with pytest.raises(ValueError, match=told):
        check_settings(ToyFamily(), whole)


def test_an_adapter_without_some_kinds_of_modules_names_the_key_that_leaves_them_out(tmp_path):
    """As with one of text to video, which has none of the modules for the image."""
    ups = {n: t for n, t in saved(tmp_path).items() if ".down." not in n}
    assert ups
    save_file(ups, tmp_path / "toy.safetensors")
    start = settings(init_from_existing=tmp_path, exclude_modules=())
    with pytest.raises(ValueError, match=rf"'{tmp_path}' has nothing for .*; set exclude_modules = \['down'\]"):
        check_settings(ExcludingFamily(), start)
    check_settings(ExcludingFamily(), settings(init_from_existing=tmp_path, exclude_modules=("down",)))


def test_magnitudes_stay_in_float32_and_are_those_of_the_base():
    adapter = settings(kind="dora", dtype=torch.bfloat16).adapter
    found = filled(adapter)
    for name, value in found.items():
        if plain_name(name).endswith(MAGNITUDE):
            module = plain_name(name).removesuffix(MAGNITUDE)
            assert torch.equal(value, torch.linalg.vector_norm(ToyWeights().read(f"{module}.weight"), dim=1))
        elif is_adapter(name):
            assert value.dtype == torch.bfloat16
