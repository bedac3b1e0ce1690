from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.adapters import KINDS, LORA_A, LORA_B, MAGNITUDE, delta_weight
from models.fused import FusedWeights
from models.wan.keymaps import TRANSFORMER
from models.wan.merge_reader import parameter_of
from tests.helpers.models import VARIANTS, wan_family, wan_variant
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


OFFICIAL = {"q": "blocks.0.self_attn.q", "head": "head.head", "time": "time_projection.1", "patch": "patch_embedding"}
SKELETON = {"q": "blocks.0.attn1.to_q", "head": "proj_out", "time": "condition_embedder.time_proj"}
WHOLE = {  # differences as distilled models have them -> the parameter
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.1.ffn.2.diff": "blocks.1.ffn.net.2.weight",
    "blocks.1.norm3.diff": "blocks.1.norm2.weight",
    "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
    "blocks.0.cross_attn.norm_k.diff": "blocks.0.attn2.norm_k.weight",
    "blocks.0.diff_m": "blocks.0.scale_shift_table",
    "head.modulation.diff": "scale_shift_table",
    "patch_embedding.diff_b": "patch_embedding.bias",
}


def distilled(family, folder: Path, **more) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as lightx2v's, and what it adds by parameter: LoRAs of rank 2 with alpha 4 inside and outside the
    blocks, one of them on a convolution, and whole differences."""
    draw, weights = torch.Generator().manual_seed(3), family.open_weights()
    tensors, added = {}, {}
    for short, module in {**SKELETON, "patch": "patch_embedding"}.items():
        shape, key = weights.read(f"{module}.weight").shape, f"diffusion_model.{OFFICIAL[short]}"
        down = torch.randn(2, *shape[1:], generator=draw)
        up = torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=draw)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(4.0)}
        added[f"{module}.weight"] = 2 * torch.einsum("or,r...->o...", up.flatten(1), down)
    for key, name in WHOLE.items():
        added[name] = tensors[f"diffusion_model.{key}"] = torch.randn(weights.read(name).shape, generator=draw)
    return saved(folder, "distilled", {**tensors, **more}), added


def test_a_distilled_model_as_a_lora_is_merged_whole(tmp_path):
    family = wan_family()
    file, added = distilled(family, tmp_path)
    fusions = [Fusion(file, 0.5)]
    check_settings(family, settings(fusions, AdapterSettings(2, 2.0)))
    weights, base = FusedWeights(family.open_weights(), load_fusions(family, fusions)), family.open_weights()
    assert added.keys() <= weights.names() and len(added) == 12
    for name in weights.names():
        expected = base.read(name)
        if name in added:
            expected = expected.float() + 0.5 * added[name]
            torch.testing.assert_close(weights.read(name), expected, msg=name)
        else:
            assert torch.equal(weights.read(name), expected), name


def test_differences_alone_and_on_top_of_an_earlier_one(tmp_path):
    family, name = wan_family(), "blocks.0.attn1.to_q.bias"
    base = family.open_weights().read(name)
    file = saved(tmp_path, "whole", {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.ones_like(base)})
    merged = FusedWeights(family.open_weights(), load_fusions(family, [Fusion(file, 0.5), Fusion(file, -2.0)]))
    torch.testing.assert_close(merged.read(name), base.float() - 1.5)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("blocks.0.cross_attn.k_img.diff_b", (1,), r"1 differences are of nothing that this model has.*k_img\.diff_b"),
        ("blocks.77.diff_m", (1,), r"differences are of nothing that this model has"),
        ("blocks.0.norm3.diff_m", (1,), r"differences are of nothing that this model has"),
        ("blocks.1.norm3.diff", (7,), r"adapter's \[7\] are for blocks\.1\.norm2\.weight, which is of \[\d+\]; it is"),
        ("transformer_blocks.0.lora_down.weight", (1,), r"1 keys belong to no module"),
    ],
)
def test_a_distilled_model_of_another_kind(tmp_path, key, shape, message):
    file, _ = distilled(wan_family(), tmp_path, **{f"diffusion_model.{key}": torch.zeros(shape)})
    with pytest.raises(ValueError, match=rf"^fuse_adapters\[0\].*{message}"):
        check_settings(wan_family(), settings([Fusion(file)], AdapterSettings(2, 2.0)))


def test_one_parameter_has_one_difference(tmp_path):
    twice = {"blocks.0.attn1.to_q.diff_b": torch.zeros(1)}
    file, _ = distilled(wan_family(), tmp_path, **twice)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q\.bias has its difference twice"):
        load_fusions(wan_family(), [Fusion(file)])


def test_a_distilled_model_is_no_start_for_training(tmp_path):
    file, _ = distilled(wan_family(), tmp_path)
    adapter = AdapterSettings(2, 2.0, init_from_existing=file)
    with pytest.raises(ValueError, match=r"init_from_existing: .*keys belong to no module"):
        check_settings(wan_family(), settings([], adapter))
    only = saved(tmp_path, "only", {"diffusion_model.blocks.0.self_attn.q.diff_b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"whole differences of weights \(\.diff\), which fuse_adapters merges"):
        wan_family().load_adapter(only)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_difference_of_any_parameter_is_led_to_it(variant):
    shapes = {name: tuple(p.shape) for name, p in wan_variant(variant).build_skeleton().named_parameters()}
    endings = {"weight": ".diff", "bias": ".diff_b", "modulation": ".diff_m"}
    for name in shapes:
        official = TRANSFORMER.from_skeleton(name)
        owner, _, leaf = official.rpartition(".")
        key = f"{owner}{endings[leaf]}" if leaf in endings else f"{official}.diff"
        assert parameter_of(f"diffusion_model.{key}", shapes) == name
