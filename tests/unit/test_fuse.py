from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.adapters import KINDS, LORA_A, LORA_B, MAGNITUDE, delta_weight
from models.fused import FusedWeights
from tests.helpers.models import wan_family
from tests.helpers.toy import ToyFamily, ToyWeights
from utils.train.build import (
    AdapterSettings,
    EngineSettings,
    OptimizerSettings,
    check_settings,
    parameter_filler,
    prepare_skeleton,
)
from utils.train.fuse import Fusion, check_expert_names, load_fusions

UP, DOWN = "blocks.1.up", "blocks.2.down"  # [16, 8] and [8, 16]


class Float8Family(ToyFamily):
    """Keeps the weights of its blocks in float8, with no scale."""

    def storage_dtype(self, name):
        return torch.float8_e4m3fn if name.startswith("blocks.") and name.endswith(".weight") else torch.float32


class ScaledFamily(ToyFamily):
    """Has a scale beside one weight."""

    def build_skeleton(self):
        skeleton = super().build_skeleton()
        skeleton.get_submodule(UP).weight_scale = nn.Parameter(torch.empty(1, device="meta"))
        return skeleton


def lora(module, out, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}{LORA_A}": torch.randn(2, columns, generator=draw),
        f"{module}{LORA_B}": torch.randn(out, 2, generator=draw),
    }


def dora(module, out, columns):
    return {**lora(module, out, columns, seed=5), f"{module}{MAGNITUDE}": torch.linspace(0.1, 2, out)}


def lokr(module):
    draw = torch.Generator().manual_seed(6)
    return {
        f"{module}.lokr_w1": torch.randn(4, 2, generator=draw),
        f"{module}.lokr_w2": torch.randn(4, 4, generator=draw),
    }


def saved(folder: Path, name: str, tensors) -> Path:
    save_file(tensors, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


def fused(*fusions: Fusion) -> FusedWeights:
    return FusedWeights(ToyWeights(), load_fusions(ToyFamily(), fusions))


def settings(fusions, adapter=None) -> EngineSettings:
    return EngineSettings(1, 1, OptimizerSettings("sgd", 0.1), adapter, tuple(fusions))


def test_the_base_gets_weight_times_b_a_and_nothing_else_changes(tmp_path):
    tensors = {**lora(UP, 16, 8), **lora(DOWN, 8, 16)}
    weights, base = fused(Fusion(saved(tmp_path, "a", tensors), 0.7)), ToyWeights()
    assert weights.names() == base.names()
    for name in weights.names():
        expected = base.read(name)
        module = name.removesuffix(".weight")
        if module in (UP, DOWN) and name != module:
            expected = expected + 0.7 * (tensors[module + LORA_B] @ tensors[module + LORA_A])
        assert torch.equal(weights.read(name), expected), name


def test_several_stack_in_order_whatever_their_kind(tmp_path):
    """A DoRA changes what it finds, so the order counts."""
    files = [
        saved(tmp_path, "lora", lora(UP, 16, 8)),
        saved(tmp_path, "dora", dora(UP, 16, 8)),
        saved(tmp_path, "lokr", lokr(UP)),
    ]
    found = fused(Fusion(files[0], 0.5), Fusion(files[1], 2.0), Fusion(files[2], -1.0)).read(f"{UP}.weight")
    weight = ToyWeights().read(f"{UP}.weight")
    parts = lora(UP, 16, 8)
    weight = weight + 0.5 * parts[UP + LORA_B] @ parts[UP + LORA_A]
    direction = weight + dora(UP, 16, 8)[UP + LORA_B] @ dora(UP, 16, 8)[UP + LORA_A]
    long = direction / direction.norm(dim=1, keepdim=True) * torch.linspace(0.1, 2, 16)[:, None]
    weight = weight + 2.0 * (long - weight)
    weight = weight - torch.kron(lokr(UP)[f"{UP}.lokr_w1"], lokr(UP)[f"{UP}.lokr_w2"])
    torch.testing.assert_close(found, weight)
    swapped = fused(Fusion(files[1], 2.0), Fusion(files[0], 0.5), Fusion(files[2], -1.0)).read(f"{UP}.weight")
    assert not torch.allclose(swapped, weight, atol=0.01)


@pytest.mark.parametrize("adapter", [None, AdapterSettings(2, 2.0)])
def test_the_sum_is_rounded_to_what_is_stored_and_no_sooner(tmp_path, adapter):
    family = Float8Family() if adapter else ToyFamily()
    fusions = [Fusion(saved(tmp_path, "a", lora(UP, 16, 8)), 0.01)]
    check_settings(family, settings(fusions, adapter))
    skeleton = prepare_skeleton(family, adapter)
    weights = FusedWeights(family.open_weights(), load_fusions(family, fusions))
    fill = parameter_filler(skeleton, weights, None, 0, torch.device("cpu"))
    name = f"{UP}.base_layer.weight" if adapter else f"{UP}.weight"
    parts = lora(UP, 16, 8)
    exact = ToyWeights().read(f"{UP}.weight") + 0.01 * (parts[UP + LORA_B] @ parts[UP + LORA_A])
    found = fill(name, skeleton.get_parameter(name))
    assert found.dtype == family.storage_dtype(f"{UP}.weight")
    assert torch.equal(found.detach().float(), exact.to(found.dtype).float())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lora("blocks.9.up", 16, 8), r"are for blocks\.9\.up, which is no module of this model"),
        (lora(UP, 8, 16), r"the adapter's \[8, 16\] are for blocks\.1\.up, which has weights of \[16, 8\]"),
        ({f"{UP}{LORA_A}": torch.zeros(2, 8)}, r"blocks\.1\.up has lora_A\.weight, which is no whole LoRA"),
    ],
)
def test_an_adapter_of_another_model(tmp_path, tensors, message):
    good = Fusion(saved(tmp_path, "good", lora(UP, 16, 8)))
    with pytest.raises(ValueError, match=rf"^fuse_adapters\[1\].*{message}"):
        check_settings(ToyFamily(), settings([good, Fusion(saved(tmp_path, "a", tensors))]))


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"^fuse_adapters\[0\]: .*gone"):
        check_settings(ToyFamily(), settings([Fusion(tmp_path / "gone.safetensors")]))


def test_scaled_fp8_cannot_take_the_sum(tmp_path):
    other, scaled = (Fusion(saved(tmp_path, m, lora(m, *shape))) for m, shape in ((DOWN, (8, 16)), (UP, (16, 8))))
    check_settings(ScaledFamily(), settings([other], AdapterSettings(2, 2.0)))
    with pytest.raises(ValueError, match=r"fuse_adapters\[1\]: blocks\.1\.up is kept in scaled fp8.*transformer_dtype"):
        check_settings(ScaledFamily(), settings([other, scaled], AdapterSettings(2, 2.0)))


def test_a_saved_dora_counts_from_the_merged_weights(tmp_path):
    """ComfyUI's files hold magnitudes against |W|, and W has the earlier adapter in it here."""
    family, module = wan_family(), "blocks.0.attn1.to_q"
    out, columns = family.open_weights().read(f"{module}.weight").shape
    family.save_adapter(lora(module, out, columns), tmp_path / "lora", {})
    made = {**dora(module, out, columns), f"{module}{MAGNITUDE}": torch.linspace(0.1, 2, out)}
    first = Fusion(tmp_path / "lora")
    merged = FusedWeights(family.open_weights(), load_fusions(family, [first]))
    family.save_adapter(made, tmp_path / "dora", {}, (), merged)
    loaded = load_fusions(family, [first, Fusion(tmp_path / "dora")])
    found, name = loaded[1].modules[module][MAGNITUDE], f"{module}{MAGNITUDE}"
    torch.testing.assert_close(found, made[name])
    assert not torch.allclose(family.load_adapter(tmp_path / "dora")[name], made[name], rtol=0.01)


def test_entries_name_an_expert_where_there_are_two():
    plain, high = Fusion(Path("a")), Fusion(Path("b"), expert="high_noise")
    check_expert_names([plain], [""])
    check_expert_names([high], ["high_noise", "low_noise"])
    with pytest.raises(ValueError, match=r"fuse_adapters\[1\] names expert = 'high_noise', and this run trains one"):
        check_expert_names([plain, high], [""])
    with pytest.raises(ValueError, match=r"\[0\] has expert = ''.*set expert = 'high_noise' or 'low_noise'"):
        check_expert_names([plain, high], ["high_noise", "low_noise"])


def test_an_entry_of_one_of_two_experts_keeps_its_number_in_messages(tmp_path):
    with pytest.raises(ValueError, match=r"^fuse_adapters\[1\]: .*gone"):
        load_fusions(ToyFamily(), [Fusion(tmp_path / "gone.safetensors", expert="low_noise", index=1)])


def test_every_kind_can_be_merged():
    made = {"lora": lora(UP, 16, 8), "dora": dora(UP, 16, 8), "lokr": lokr(UP)}
    assert set(made) == set(KINDS)
    for tensors in made.values():
        parts = {name.removeprefix(UP): tensor for name, tensor in tensors.items()}
        assert delta_weight(parts, ToyWeights().read(f"{UP}.weight")).shape == (16, 8)
