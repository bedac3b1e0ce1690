"""Every kind of adapter in every format: other programs get our change of weight, and so do we."""

import json

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.adapters import MAGNITUDE
from models.wan.adapter_formats import FORMATS, check_formats, official_name, skeleton_module, split_key
from models.wan.keymaps import TRANSFORMER_NAMES
from tests.helpers.adapters import (
    KINDS,
    adapted_weights,
    comfyui_weight,
    metadata_of,
    musubi_weight,
    plain_pipeline,
    random_adapter,
)
from tests.helpers.models import DATA, TRANSFORMER_FILE, wan_variant

FAMILIES = ("wan_t2v", "wan_i2v")
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return wan_variant(request.param)


@pytest.fixture(scope="module")
def t2v():
    return wan_variant("wan_t2v")


def native_linears(name):
    """What ComfyUI knows of the model: the official names of its weights, as the official file spells them."""
    with safe_open(DATA / name / TRANSFORMER_FILE, "pt") as file:
        return {key.removesuffix(".weight") for key in file.keys() if key.endswith(".weight")}  # noqa: SIM118


def saved(family, tmp_path, name, formats):
    """Files of a random adapter, its tensors, and alpha / rank."""
    kind, shape = KINDS[name]
    tensors = random_adapter(family, kind, shape)
    files = family.save_adapter(tensors, tmp_path, metadata_of(shape), formats)
    return files, tensors, shape.alpha / shape.rank


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_comfyui_gets_our_weights(tmp_path, family, name, form):
    [file], tensors, scale = saved(family, tmp_path, name, (form,))
    stored, weights = load_file(file), family.open_weights()
    expected = adapted_weights(family, tensors, scale)
    for module, weight in expected.items():
        base = weights.read(f"{module}.weight")
        key = FORMATS[form].spell(module)
        torch.testing.assert_close(comfyui_weight(stored, key, base), weight, **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_every_key_is_one_that_comfyui_looks_for(tmp_path, family, name):
    """comfy/lora.py: `diffusion_model.` and a weight's official name, or `lora_unet_` and that with underscores."""
    files, *_ = saved(family, tmp_path, name, ("comfyui", "kohya"))
    official = native_linears("wan_i2v" if "I2V" in family.title else "wan_t2v")
    endings = {".alpha", ".dora_scale", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"}
    endings |= {f".lokr_w{n}{half}" for n in "12" for half in ("", "_a", "_b")}
    known = {f"diffusion_model.{key}" for key in official} | {f"lora_unet_{key.replace('.', '_')}" for key in official}
    for file in files:
        for key in load_file(file):
            assert any(key.endswith(ending) and key.removesuffix(ending) in known for ending in endings), key


@pytest.mark.parametrize("name", ["lora", "lora, alpha is rank"])
def test_musubi_gets_our_weights(tmp_path, family, name):
    [file], tensors, scale = saved(family, tmp_path, name, ("kohya",))
    stored, weights = load_file(file), family.open_weights()
    assert {key.partition(".")[2] for key in stored} == {"lora_down.weight", "lora_up.weight", "alpha"}
    for module, weight in adapted_weights(family, tensors, scale).items():
        key = f"lora_unet_{official_name(module).replace('.', '_')}"
        torch.testing.assert_close(musubi_weight(stored, key, weights.read(f"{module}.weight")), weight, **CLOSE)


@pytest.mark.parametrize("name", ["lora", "lora, alpha is rank", "dora"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_diffusers_own_loader_gets_our_weights(tmp_path, family, name, as_folder):
    [file], tensors, scale = saved(family, tmp_path, name, ("diffusers",))
    pipeline = plain_pipeline(family)
    pipeline.load_lora_weights(str(tmp_path if as_folder else file))
    layers = {n: m for n, m in pipeline.transformer.named_modules() if isinstance(m, LoraLayer)}
    expected = adapted_weights(family, tensors, scale)
    assert layers.keys() == expected.keys()
    for module, layer in layers.items():
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight.data, expected[module], **CLOSE)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_diffusers_loads_the_other_formats_too(tmp_path, family, form):
    [file], tensors, scale = saved(family, tmp_path, "lora", (form,))
    pipeline = plain_pipeline(family)
    pipeline.load_lora_weights(str(file))
    for module, weight in adapted_weights(family, tensors, scale).items():
        layer = pipeline.transformer.get_submodule(module)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight.data, weight, **CLOSE)


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in KINDS for form in FORMATS if form != "diffusers" or not name.startswith("lokr")],
)
def test_we_read_what_we_write(tmp_path, family, name, form):
    [file], tensors, scale = saved(family, tmp_path, name, (form,))
    for path in (file, tmp_path):
        loaded = family.load_adapter(path)
        assert loaded.keys() == tensors.keys()
        expected = adapted_weights(family, tensors, scale)
        for module, weight in adapted_weights(family, loaded).items():
            torch.testing.assert_close(weight, expected[module], **CLOSE)


def test_all_formats_at_once(tmp_path, t2v):
    files, *_ = saved(t2v, tmp_path, "lora", ("comfyui", "diffusers", "kohya"))
    assert [file.name for file in files] == [
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "adapter_model_kohya.safetensors",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["adapter_config.json", *(f.name for f in files)])


def test_equal_runs_write_equal_files(tmp_path, t2v):
    first, *_ = saved(t2v, tmp_path / "a", "dora", ("comfyui", "diffusers", "kohya"))
    second, *_ = saved(t2v, tmp_path / "b", "dora", ("comfyui", "diffusers", "kohya"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_two_experts_in_one_folder(tmp_path):
    """Each finds its own file, and takes no other's."""
    kind, shape = KINDS["lora"]
    low, tensors = wan_variant("wan22_t2v_low"), {}
    high = wan_variant("wan22_t2v_low", expert="high")
    for family in (low, high):
        tensors[family] = random_adapter(family, kind, shape, seed=len(tensors))
        family.save_adapter(tensors[family], tmp_path, metadata_of(shape), ("comfyui", "kohya"))
    stems = ("adapter_model", "adapter_model_kohya")
    expected = {f"{stem}_{expert}_noise.safetensors" for stem in stems for expert in ("high", "low")}
    expected |= {f"adapter_config_{expert}_noise.json" for expert in ("high", "low")}
    assert {path.name for path in tmp_path.iterdir()} == expected
    name = "blocks.0.attn1.to_q.lora_A.weight"
    for family in (low, high):
        assert torch.equal(family.load_adapter(tmp_path)[name], tensors[family][name])
    with pytest.raises(ValueError, match="name the file that is meant"):
        wan_variant("wan_t2v").load_adapter(tmp_path)
    for file in tmp_path.glob("*_high_noise.safetensors"):
        file.unlink()
    (tmp_path / "adapter_model_kohya_low_noise.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds adapter_model_low_noise\.safetensors: name the file"):
        high.load_adapter(tmp_path)


def test_lokr_and_diffusers_do_not_go_together(tmp_path, t2v):
    with pytest.raises(ValueError, match=r"save_format = 'diffusers' cannot hold a LoKr.*use 'comfyui' or 'kohya'"):
        saved(t2v, tmp_path, "lokr", ("comfyui", "diffusers"))
    assert not list(tmp_path.iterdir()), "asked before anything is written"
    with pytest.raises(ValueError, match="'webui' is not known; choose from comfyui, diffusers, kohya"):
        t2v.check_formats("lora", ["webui"])
    check_formats("lokr", ["comfyui", "kohya"])


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_dora_over_a_row_of_zeros_is_no_nan(tmp_path, t2v, form):
    kind, shape = KINDS["dora"]
    module, row = "blocks.0.attn1.to_q", 3
    tensors = {n: t.clone() for n, t in random_adapter(t2v, kind, shape).items() if n.startswith(module)}
    tensors[f"{module}.lora_B.weight"][row] = tensors[f"{module}{MAGNITUDE}"][row] = 0

    class Pruned:
        names = staticmethod(t2v.open_weights().names)

        def read(self, name):
            weight = t2v.open_weights().read(name).clone()
            weight[row] = 0
            return weight

    [file] = t2v.save_adapter(tensors, tmp_path, metadata_of(shape), (form,), Pruned())
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())
    loaded = t2v.load_adapter(file, Pruned())[f"{module}{MAGNITUDE}"]
    torch.testing.assert_close(loaded, tensors[f"{module}{MAGNITUDE}"])


def test_norms_of_a_dora_stay_float32(tmp_path, t2v):
    """In bfloat16 the length of a whole row would be off by more than what was trained."""
    kind, shape = KINDS["dora"]
    tensors = random_adapter(t2v, kind, shape)
    half = {name: tensor if name.endswith(MAGNITUDE) else tensor.bfloat16() for name, tensor in tensors.items()}
    [file] = t2v.save_adapter(half, tmp_path, metadata_of(shape))
    dtypes = {key.rpartition(".")[2]: tensor.dtype for key, tensor in load_file(file).items()}
    assert dtypes == {"weight": torch.bfloat16, "alpha": torch.float32, "dora_scale": torch.float32}


def test_headers(tmp_path):
    family = wan_variant("wan22_t2v_low")
    kind, shape = KINDS["lora"]
    given = {**metadata_of(shape), "step": "12", "epoch": "3", "base_model": "Wan2.2 T2V-A14B low noise"}
    files = family.save_adapter(random_adapter(family, kind, shape), tmp_path, given, ("comfyui", "diffusers", "kohya"))
    for file in files:
        assert file.stem.endswith("_low_noise")
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        if "lora_adapter_metadata" in told:  # alpha is folded in, and the header says what is left of it
            assert told["alpha"] == told["rank"]
            told["alpha"] = told["reelpipe.alpha"]
        assert given.items() <= told.items()
        assert (told["expert"], told["boundary"], told["modelspec.timestep_range"]) == ("low", "0.875", "0,875")
        assert told["modelspec.sai_model_spec"] == "1.0.0"
        assert told["modelspec.architecture"] == "wan2.2-t2v-a14b/lora"
        assert told["modelspec.title"] == "Wan2.2 T2V-A14B low noise LoRA"
        assert not any("date" in key for key in told)
    kohya = {key: value for key, value in told.items() if key.startswith("ss_")}
    assert kohya == {
        "ss_network_module": "networks.lora_wan",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.5",
        "ss_base_model_version": "wan",
        "ss_steps": "12",
        "ss_epoch": "3",
        "ss_sd_model_name": "Wan2.2 T2V-A14B low noise",
    }
    assert {"ss_network_dim"}.isdisjoint(json.loads((tmp_path / "adapter_config_low_noise.json").read_text()))


@pytest.mark.parametrize("row", TRANSFORMER_NAMES.items(), ids=lambda row: row[0])
def test_flat_names_lead_back_to_one_module(row):
    official, skeleton = (name.format(17) for name in row)
    for flat in (f"lora_unet_{official}", f"lycoris_{official}", f"lycoris_{skeleton}"):
        assert skeleton_module(flat.replace(".", "_")) == skeleton


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("lora_unet_blocks_3_cross_attn_k_img.lora_up.weight", ("blocks.3.attn2.add_k_proj", ".lora_B.weight")),
        ("lora_unet_blocks_3_cross_attn_k.alpha", ("blocks.3.attn2.to_k", ".alpha")),
        ("blocks.3.self_attn.o.lora_A.default.weight", ("blocks.3.attn1.to_out.0", ".lora_A.weight")),
        ("pipe.dit.blocks.3.ffn.0.lora_B.default.weight", ("blocks.3.ffn.net.0.proj", ".lora_B.weight")),
        ("diffusion_model.blocks.3.ffn.2.lokr_w1_a", ("blocks.3.ffn.net.2", ".lokr_w1_a")),
        ("lycoris_blocks_3_attn1_to_q.lokr_w2", ("blocks.3.attn1.to_q", ".lokr_w2")),
        ("transformer.blocks.3.attn1.to_q.lora_magnitude_vector", ("blocks.3.attn1.to_q", ".lora_magnitude_vector")),
        ("base_model.model.blocks.3.attn1.to_q.lora_A.weight", ("blocks.3.attn1.to_q", ".lora_A.weight")),
        ("model.diffusion_model.blocks.3.self_attn.q.lora_down.weight", ("blocks.3.attn1.to_q", ".lora_A.weight")),
        ("lora_unet_blocks_3_self_attn_x.lora_up.weight", None),
        ("diffusion_model.blocks.3.self_attn.q.diff", None),
    ],
)
def test_spellings(key, meaning):
    assert split_key(key) == meaning


def test_column_wise_dora_is_refused(tmp_path, t2v):
    [file], *_ = saved(t2v, tmp_path, "lora", ("kohya",))
    spoilt = load_file(file)
    spoilt["lora_unet_blocks_0_self_attn_q.dora_scale"] = torch.ones(1, 48)
    save_file(spoilt, file)
    with pytest.raises(ValueError, match=r"DoRA over columns \(dora_scale is \[1, 48\]\)"):
        t2v.load_adapter(file)


def test_dora_scale_of_other_trainers_is_the_magnitude(tmp_path, t2v):
    """LyCORIS and others divide by the norm of the adapted weight: only our own files are for ComfyUI's division."""
    kind, shape = KINDS["dora"]
    tensors = random_adapter(t2v, kind, shape)
    foreign = {
        name.replace(MAGNITUDE, ".dora_scale"): tensor[:, None] if tensor.ndim == 1 else tensor
        for name, tensor in tensors.items()
    }
    save_file(foreign, tmp_path / "dora.safetensors")
    loaded = t2v.load_adapter(tmp_path / "dora.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_alpha_in_diffusers_metadata_counts_as_it_does_for_diffusers(tmp_path, t2v):
    """Ranks, alphas and patterns as other trainers store them through `save_lora_weights`."""
    kind, shape = KINDS["lora"]
    tensors = random_adapter(t2v, kind, shape)
    settings = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"blocks.0.attn1.to_q": 12, "ffn.net.2": 1}}
    settings |= {"target_modules": sorted({name.partition(".lora_")[0] for name in tensors})}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file({f"transformer.{name}": tensor for name, tensor in tensors.items()}, file, metadata=header)
    pipeline = plain_pipeline(t2v)
    pipeline.load_lora_weights(str(file))
    for module, weight in adapted_weights(t2v, t2v.load_adapter(file)).items():
        layer = pipeline.transformer.get_submodule(module)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight.data, weight, **CLOSE)


@pytest.mark.parametrize(("settings", "scale"), [({}, 0.5), ({"use_rslora": True}, 1.0)])
def test_alpha_of_pefts_own_folder_is_in_its_config(tmp_path, t2v, settings, scale):
    kind, shape = KINDS["lora"]
    tensors = random_adapter(t2v, kind, shape)
    save_file({f"base_model.model.{n}": t for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, **settings}))
    loaded, name = t2v.load_adapter(tmp_path), "blocks.0.attn1.to_q.lora_B.weight"
    assert torch.equal(loaded[name], tensors[name] * scale)


LOKR = "diffusion_model.blocks.0.self_attn.q"
LOKR_FILES = {  # what a module of 48 x 48 has besides -> its scale, by the rule of who wrote it
    "LyCORIS: alpha means nothing for whole matrices": ({".lokr_w1": (6, 6), ".lokr_w2": (8, 8)}, {}, 1.0),
    "musubi-tuner: the longer side": (
        {".lokr_w1": (6, 6), ".lokr_w2": (8, 8)},
        {"ss_network_module": "networks.lokr"},
        2 / 8,
    ),
    "the second matrix's rank": ({".lokr_w1": (6, 6), ".lokr_w2_a": (8, 5), ".lokr_w2_b": (5, 8)}, {}, 2 / 5),
    "the first one's where that is all": ({".lokr_w1_a": (6, 3), ".lokr_w1_b": (3, 6), ".lokr_w2": (8, 8)}, {}, 2 / 3),
    "the second before the first": (
        {".lokr_w1_a": (6, 3), ".lokr_w1_b": (3, 6), ".lokr_w2_a": (8, 5), ".lokr_w2_b": (5, 8)},
        {},
        2 / 5,
    ),
}


@pytest.mark.parametrize("rule", LOKR_FILES)
def test_scale_of_other_trainers_lokr(tmp_path, t2v, rule):
    shapes, header, scale = LOKR_FILES[rule]
    generator = torch.Generator().manual_seed(0)
    parts = {LOKR + part: torch.randn(shape, generator=generator) for part, shape in shapes.items()}
    file = tmp_path / "lokr.safetensors"
    save_file({**parts, f"{LOKR}.alpha": torch.tensor(2.0)}, file, metadata=header or None)
    loaded = t2v.load_adapter(file)
    plain = {name.replace(LOKR, "blocks.0.attn1.to_q"): tensor for name, tensor in parts.items()}
    expected = adapted_weights(t2v, plain, scale)["blocks.0.attn1.to_q"]
    torch.testing.assert_close(adapted_weights(t2v, loaded)["blocks.0.attn1.to_q"], expected, **CLOSE)
    if not header:
        weight = t2v.open_weights().read("blocks.0.attn1.to_q.weight")
        torch.testing.assert_close(comfyui_weight(load_file(file), LOKR, weight), expected, **CLOSE)
