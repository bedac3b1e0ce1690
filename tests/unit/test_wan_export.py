import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import is_adapter, plain_name
from models.wan import export
from models.wan.adapter_formats import official_name
from tests.helpers.adapters import plain_pipeline
from tests.helpers.models import (
    DATA,
    TRANSFORMER_FILE,
    VARIANTS,
    materialise,
    random_inputs,
    run_layers,
    wan_family,
    wan_variant,
)

METADATA = {"base_model": "Wan2.1 T2V", "rank": "4", "step": "12"}
NATIVE_MODULES = [f"self_attn.{p}" for p in "qkvo"] + [f"cross_attn.{p}" for p in "qkvo"] + ["ffn.0", "ffn.2"]


def trained(rank=4, alpha=4.0, exclude=()):
    """A family, its adapted skeleton with adapters that do something, and their tensors as a trainer gives them."""
    family = wan_family()
    skeleton = family.build_skeleton()
    add_adapter(skeleton, family.lora_targets(skeleton, exclude), "lora", AdapterShape(rank, alpha))
    materialise(skeleton, family)
    tensors = {}
    for name, parameter in skeleton.named_parameters():
        if is_adapter(name):
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(tensors)))
            tensors[plain_name(name)] = parameter.data
    return family, skeleton, tensors


def deltas(tensors, scale=1.0):
    modules = sorted({name.partition(".lora_")[0] for name in tensors})
    return {m: tensors[f"{m}.lora_B.weight"] @ tensors[f"{m}.lora_A.weight"] * scale for m in modules}


def test_lora_keys_are_comfyuis_and_nothing_else(tmp_path):
    family, _, tensors = trained()
    [file] = family.save_adapter(tensors, tmp_path, METADATA)
    assert file == tmp_path / "adapter_model.safetensors"
    expected = {
        f"diffusion_model.blocks.{n}.{module}.lora_{matrix}.weight"
        for n in range(3)
        for module in NATIVE_MODULES
        for matrix in "AB"
    }
    with safe_open(file, "pt") as saved:
        assert set(saved.keys()) == expected
        assert {"format": "pt", **METADATA}.items() <= saved.metadata().items()
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["adapter_config.json", "adapter_model.safetensors"]


def test_adapter_config_is_pefts(tmp_path):
    family, _, tensors = trained()
    family.save_adapter(tensors, tmp_path, {**METADATA, "alpha": "2.5"})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 2.5)
    assert config["base_model_name_or_path"] == "Wan2.1 T2V"
    assert set(config["target_modules"]) == set(NATIVE_MODULES)


@pytest.mark.parametrize(("alpha", "exclude"), [(4.0, ()), (1.0, ()), (10.0, ("self_attn", "ffn.0", "blocks.0"))])
def test_diffusers_loads_the_file_and_gives_our_output(tmp_path, alpha, exclude):
    family, skeleton, tensors = trained(alpha=alpha, exclude=exclude)
    [file] = family.save_adapter(tensors, tmp_path, {**METADATA, "alpha": str(alpha)})
    x_t, t, text = random_inputs()
    with torch.no_grad():
        ours = run_layers(family.pipeline_layers(skeleton), (x_t, t, text), torch.float32)
        pipeline = plain_pipeline(family)
        before = pipeline.transformer(x_t, t * 1000, text, return_dict=False)[0]
        pipeline.load_lora_weights(str(file))
        theirs = pipeline.transformer(x_t, t * 1000, text, return_dict=False)[0]
    assert (before - theirs).abs().max() > 1e-2, "the adapter should matter"
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


@pytest.mark.parametrize("alpha", [4.0, 1.0, 7.0])
def test_diffusers_gets_every_matrix_and_the_same_delta(tmp_path, alpha):
    family, _, tensors = trained(alpha=alpha)
    pipeline = plain_pipeline(family)
    pipeline.load_lora_weights(str(family.save_adapter(tensors, tmp_path, {**METADATA, "alpha": str(alpha)})[0]))
    loaded = {plain_name(n.replace("default_0", "default")): p for n, p in pipeline.transformer.named_parameters()}
    loaded = {name: p.data for name, p in loaded.items() if ".lora_" in name}
    assert loaded.keys() == tensors.keys()  # 0 missing, 0 unexpected
    scale = {m.scaling["default_0"] for m in pipeline.transformer.modules() if hasattr(m, "scaling")}
    for module, delta in deltas(loaded, *scale).items():
        torch.testing.assert_close(delta, deltas(tensors, alpha / 4)[module], rtol=0, atol=1e-6)


def test_alpha_is_stored_where_it_is_not_the_rank(tmp_path):
    family, _, tensors = trained(alpha=1.0)
    saved = load_file(family.save_adapter(tensors, tmp_path, {**METADATA, "alpha": "1.0"})[0])
    alphas = {key: value.item() for key, value in saved.items() if key.endswith(".alpha")}
    assert alphas.keys() == {
        f"diffusion_model.blocks.{n}.{module}.alpha" for n in range(3) for module in NATIVE_MODULES
    }
    assert set(alphas.values()) == {1.0}


@pytest.mark.parametrize("alpha", [4.0, 6.0])
@pytest.mark.parametrize("as_folder", [True, False])
def test_load_adapter_is_the_inverse(tmp_path, alpha, as_folder):
    family, _, tensors = trained(alpha=alpha)
    [file] = family.save_adapter(tensors, tmp_path, {**METADATA, "alpha": str(alpha)})
    loaded = family.load_adapter(tmp_path if as_folder else file)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        scale = alpha / 4 if ".lora_B." in name else 1.0
        assert torch.equal(loaded[name], tensor * scale)


FOREIGN = {  # how other programs name the same matrices
    "official, no prefix": lambda native, skeleton: native,
    "DiffSynth": lambda native, skeleton: native.replace(".weight", ".default.weight"),
    "diffusers": lambda native, skeleton: f"transformer.{skeleton}",
    "down and up": lambda native, skeleton: f"diffusion_model.{native}".replace("lora_A", "lora_down").replace(
        "lora_B", "lora_up"
    ),
}


@pytest.mark.parametrize("style", FOREIGN)
def test_load_adapter_reads_other_names(tmp_path, style):
    family, _, tensors = trained()
    renamed = {FOREIGN[style](official_name(name), name): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "lora.safetensors")
    loaded = family.load_adapter(tmp_path / "lora.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def spoilt(tmp_path, change):
    family, _, tensors = trained()
    saved = load_file(family.save_adapter(tensors, tmp_path, METADATA)[0])
    change(saved)
    save_file(saved, tmp_path / "lora.safetensors")
    return family, tmp_path / "lora.safetensors"


KEY = "diffusion_model.blocks.0.self_attn.q.lora_A.weight"
ALPHA_OF_Q = {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(4.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({KEY.replace("q.", "k_img."): torch.zeros(4, 48)}), "1 keys belong to no module.*k_img"),
        (lambda s: s.update({KEY.replace("blocks.0", "blocks.30"): torch.zeros(4, 48)}), "belong to no module"),
        (
            lambda s: s.update({"lora_unet_blocks_0_ffn_0.lora_down.weight": torch.zeros(4, 48)}),
            "has its lora_A.* twice",
        ),
        (lambda s: s.update({"diffusion_model.head.head.lora_A.weight": torch.zeros(4, 48)}), "outside the blocks"),
        (
            lambda s: s.pop(KEY),
            r"1 modules are not whole, first blocks\.0\.attn1\.to_q has lora_B\.weight, which is no",
        ),
        (lambda s: s.update({KEY: torch.zeros(4, 64)}), r"1 modules do not fit.*\[48, 64\] and should give \[48, 48\]"),
        (lambda s: s.update({KEY: torch.zeros(3, 48)}), r"lora_A\.weight \[3, 48\], lora_B\.weight \[48, 4\]"),
        (lambda s: s.clear(), "holds no LoRA"),
        (lambda s: s.update({KEY.replace("lora_A.weight", "alpha"): torch.zeros(2)}), r"1 keys belong.*q\.alpha"),
        (lambda s: [s.pop(KEY), s.pop(KEY.replace("_A", "_B")), s.update(ALPHA_OF_Q)], "to_q has nothing, which is no"),
        (
            lambda s: s.update({KEY.replace("lora_A.weight", "diff"): torch.zeros(48, 48)}),
            "whole differences of weights",
        ),
        (lambda s: s.update({KEY.replace("lora_A.weight", "hada_w1_a"): torch.zeros(4, 4)}), "this is a LoHa"),
        (lambda s: s.update({"lora_te1_text_model_x.lora_up.weight": torch.zeros(4, 4)}), "a text encoder"),
        (lambda s: s.update({"lora_unet_double_blocks_0_img_attn.lora_up.weight": torch.zeros(4, 4)}), "FLUX"),
    ],
)
def test_load_adapter_is_strict(tmp_path, change, message):
    family, file = spoilt(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        family.load_adapter(file)


def test_load_adapter_from_nowhere_and_from_half_a_file(tmp_path):
    family, file = spoilt(tmp_path, lambda saved: None)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        family.load_adapter(file)
    with pytest.raises(FileNotFoundError, match="no LoRA at"):
        family.load_adapter(tmp_path / "nowhere")


def test_load_adapter_from_a_run_folder(tmp_path):
    """The folders of a run are named; its checkpoints, whose tensors lack their alpha, are refused."""
    family, file = spoilt(tmp_path, lambda saved: None)
    for name in ("epoch1", "global_step2"):
        (tmp_path / "run" / name).mkdir(parents=True)
    file.rename(tmp_path / "run" / "epoch1" / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no LoRA at .*; it has folders with one, name one of them: epoch1$"):
        family.load_adapter(tmp_path / "run")
    checkpoint = tmp_path / "run" / "global_step2"
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "weights_00.safetensors").touch()
    for place in (checkpoint, checkpoint / "weights_00.safetensors"):
        with pytest.raises(ValueError, match=r"is a checkpoint, for --resume_from_checkpoint alone; .* such as epoch1"):
            family.load_adapter(place)
    assert family.load_adapter(tmp_path / "run" / "epoch1")


def full_tensors(family):
    weights = family.open_weights()
    return {name: weights.read(name) + 1 for name in sorted(weights.names())}


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("shard_bytes", [export.SHARD_BYTES, 200_000])
def test_save_full_is_read_by_our_own_loader(tmp_path, shard_bytes, layout):
    family = wan_family()
    tensors = full_tensors(family)
    config = export.config_of(family._sizes, family._variant, layout)
    export.save_full(tensors, tmp_path, config, METADATA, shard_bytes, layout)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == (
        ["diffusion_pytorch_model.safetensors"]
        if shard_bytes > 1e6
        else [f"diffusion_pytorch_model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    )
    again = wan_family(transformer_path=tmp_path)
    weights = again.open_weights()
    assert again.title == family.title and weights.names() == tensors.keys()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in tensors.items())
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_full_has_official_names_and_config(tmp_path, variant):
    family = wan_variant(variant)
    file = family.save_full(full_tensors(family), tmp_path, METADATA)
    place = tmp_path / "low_noise_model" if variant.endswith("_low") else tmp_path
    assert file.parent == place
    with safe_open(file, "pt") as saved, safe_open(DATA / variant / TRANSFORMER_FILE, "pt") as official:
        assert set(saved.keys()) == set(official.keys())
        assert {"format": "pt", **METADATA}.items() <= saved.metadata().items()
    official = json.loads((DATA / variant / "config.json").read_text())
    assert json.loads((place / "config.json").read_text()) == official


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shard_bytes", [export.SHARD_BYTES, 200_000])
def test_diffusers_loads_a_full_save(tmp_path, variant, shard_bytes):
    """`from_pretrained` of the folder, every tensor in its place: the model is built from our config.json alone."""
    family = wan_variant(variant)
    tensors = full_tensors(family)
    config = export.config_of(family._sizes, family._variant, "diffusers")
    place = export.model_folder(tmp_path, "diffusers", family.expert_suffix)
    assert place.name == ("transformer_2" if variant.endswith("_low") else tmp_path.name)
    export.save_full(tensors, place, config, METADATA, shard_bytes, "diffusers")
    loaded, told = WanTransformer3DModel.from_pretrained(place, output_loading_info=True)
    assert not any(told.values()), told
    state = loaded.state_dict()
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_folders_of_experts(tmp_path):
    """diffusers runs `transformer` above the boundary."""
    table = {
        ("official", "_high_noise"): "high_noise_model",
        ("official", "_low_noise"): "low_noise_model",
        ("diffusers", "_high_noise"): "transformer",
        ("diffusers", "_low_noise"): "transformer_2",
    }
    for (layout, suffix), name in table.items():
        assert export.model_folder(tmp_path, layout, suffix) == tmp_path / name
        assert export.model_folder(tmp_path, layout, "") == tmp_path


def test_save_layout_chooses_the_names(tmp_path):
    family = wan_family(save_layout="diffusers")
    file = family.save_full(full_tensors(family), tmp_path, METADATA)
    assert "blocks.0.attn1.to_q.weight" in load_file(file)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "WanTransformer3DModel"


def test_dtype_is_kept(tmp_path):
    family, _, tensors = trained()
    [file] = family.save_adapter({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path, METADATA)
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
