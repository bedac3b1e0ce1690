"""Every layout of every variant: the same weights, whatever the names; and one message for all that is missing."""

import json
import shutil

import pytest
import torch

from models.wan.family import WanFamily
from models.wan.keymaps import TRANSFORMER
from models.wan.layouts import named_expert
from tests.helpers.layouts import (
    LAYOUTS,
    PAIRS,
    WITH_CLIP,
    comfyui,
    diffusers_pair,
    official,
    official_components,
    official_pair,
    weights,
    write_transformer,
)
from tests.helpers.models import DATA, TRANSFORMER_FILE, WAN_T2V, materialise, shard, wan_family

TITLES = {
    "wan_t2v": "Wan2.1 T2V custom size",
    "wan_i2v": "Wan2.1 I2V custom size",
    "wan_flf2v": "Wan2.1 FLF2V custom size",
    "wan22_ti2v": "Wan2.2 TI2V-5B custom size",
}
A14B = {"wan22_t2v_low": "Wan2.2 T2V-A14B", "wan22_i2v_low": "Wan2.2 I2V-A14B"}


def family_of(settings, **more) -> WanFamily:
    return wan_family(**{"folder": settings.get("ckpt_path"), **settings, **more})


def holds(family, name, added=0.0):
    """Whether the filled skeleton has these weights, bit for bit."""
    expected = {TRANSFORMER.to_skeleton(key): tensor for key, tensor in weights(name, added).items()}
    loaded = dict(materialise(family.build_skeleton(), family).named_parameters())
    return loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)


def refusal(folder=None, **settings):
    with pytest.raises(ValueError) as error:
        wan_family(folder, **settings)
    return str(error.value)


class TestEveryLayout:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", TITLES)
    def test_one_transformer(self, tmp_path, name, layout):
        family = family_of(LAYOUTS[layout](tmp_path, name))
        assert family.title == TITLES[name] and family.expert_suffix == ""
        assert holds(family, name)
        files = family._files
        assert (files.clip is not None) == (name in WITH_CLIP)
        assert all(path.is_relative_to(tmp_path) for path in (files.vae, files.text, files.tokenizer))

    @pytest.mark.parametrize("expert", ["high", "low"])
    @pytest.mark.parametrize("layout", PAIRS)
    @pytest.mark.parametrize("name", A14B)
    def test_two_transformers(self, tmp_path, name, layout, expert):
        family = wan_family(PAIRS[layout](tmp_path, name), expert=expert)
        assert family.title == f"{A14B[name]} {expert} noise custom size"
        assert holds(family, name, added=expert == "high")

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("name", A14B)
    def test_single_files_of_experts(self, tmp_path, name, prefix):
        for expert, added in (("high", 1), ("low", 0)):
            settings = comfyui(tmp_path, name, prefix, f"wan2.2_{expert}_noise_14B_fp16.safetensors", added)
            family = family_of(settings)
            assert family.title == f"{A14B[name]} {expert} noise custom size"
            assert holds(family, name, added)

    def test_any_mix(self, tmp_path):
        """A diffusers transformer, an official UMT5, ComfyUI's VAE, CLIP from a transformers folder."""
        LAYOUTS["diffusers, sharded"](tmp_path / "diffusers", "wan_i2v")
        settings = comfyui(tmp_path / "comfyui", "wan_t2v")
        family = wan_family(
            WAN_T2V,
            transformer_path=tmp_path / "diffusers" / "transformer",
            vae_path=settings["vae_path"],
            clip_path=tmp_path / "diffusers" / "image_encoder",
        )
        assert holds(family, "wan_i2v") and family._files.text.is_relative_to(WAN_T2V)
        assert [encoder.kind for encoder in family.encoders()] == ["latents", "condition", "image", "text"]

    def test_clip_is_not_looked_for_without_need(self, tmp_path):
        official(tmp_path / "wan", "wan_t2v")
        (tmp_path / "wan" / "image_encoder").mkdir()
        assert wan_family(tmp_path / "wan")._files.clip is None


class TestConfigFile:
    def test_absent(self, tmp_path):
        """Heads of a width that was released follow from it; of another they do not."""
        folder = official(tmp_path / "wan", "wan_i2v")["ckpt_path"]
        (folder / "config.json").unlink()
        assert "tell num_heads; put the config.json beside them" in refusal(folder)

    @pytest.mark.parametrize("lie", [{"in_dim": 16}, {"model_type": "t2v", "in_dim": 16}, {"num_layers": 2}])
    def test_that_lies(self, tmp_path, lie):
        folder = official(tmp_path / "wan", "wan22_ti2v")["ckpt_path"]
        told = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**told, **lie}))
        assert "config.json" in refusal(folder)

    def test_that_is_silent(self, tmp_path):
        folder = official(tmp_path / "wan", "wan_flf2v")["ckpt_path"]
        (folder / "config.json").write_text('{"num_heads": 2}')
        assert wan_family(folder).title == TITLES["wan_flf2v"] and holds(wan_family(folder), "wan_flf2v")

    def test_of_another_variant_of_the_same_size(self, tmp_path):
        """A file from elsewhere decides for itself; the config.json in ckpt_path tells the heads."""
        file = shutil.copy(DATA / "wan_flf2v" / TRANSFORMER_FILE, tmp_path / "wan2.1_flf2v.safetensors")
        clip = DATA / "wan_i2v" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        assert holds(wan_family(WAN_T2V, transformer_path=file, clip_path=clip), "wan_flf2v")

    @pytest.mark.parametrize("text", ["{", "[]"])
    def test_damaged(self, tmp_path, text):
        folder = official(tmp_path / "wan", "wan_t2v")["ckpt_path"]
        (folder / "config.json").write_text(text)
        assert f"{folder / 'config.json'}" in refusal(folder) and "download it again" in refusal(folder)

    def test_of_the_folder_of_experts(self, tmp_path):
        """A file from elsewhere takes the config.json that lies with the experts."""
        folder = official_pair(tmp_path / "wan", "wan22_i2v_low")
        file = shutil.copy(folder / "low_noise_model" / TRANSFORMER_FILE, tmp_path / "wan2.2_i2v_low_noise.safetensors")
        assert holds(wan_family(folder, transformer_path=file), "wan22_i2v_low")


class TestWhatIsMissing:
    """All of it in one message, found in the constructor, so before anything slow starts."""

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("wan_t2v", ["Wan2.1_VAE.pth", "models_t5_umt5", "google/umt5-xxl"]),
            ("wan_i2v", ["Wan2.1_VAE.pth", "models_t5_umt5", "google/umt5-xxl", "clip_vision_h.safetensors"]),
            ("wan_flf2v", ["Wan2.1_VAE.pth", "models_t5_umt5", "google/umt5-xxl", "image_encoder"]),
            ("wan22_ti2v", ["Wan2.2_VAE.pth", "models_t5_umt5", "google/umt5-xxl"]),
        ],
    )
    def test_by_variant(self, tmp_path, name, expected):
        write_transformer(tmp_path, name)
        lines = refusal(tmp_path).splitlines()
        assert len(lines) == len(expected)
        assert all(part in line for part, line in zip(expected, lines, strict=True))

    def test_with_what_is_wrong_with_the_transformer(self, tmp_path):
        write_transformer(tmp_path, "wan22_ti2v")
        shard(tmp_path, 6)[4].unlink()
        lines = refusal(tmp_path, i2v_fraction=0.5).splitlines()
        assert len(lines) == 4 and "Wan2.2_VAE.pth" in lines[0]
        assert "shard 5 of 6, diffusion_pytorch_model-00005-of-00006.safetensors: it does not exist" in lines[3]

    def test_with_a_transformer_that_is_no_wan(self, tmp_path):
        write_transformer(tmp_path, "wan_t2v")
        file = tmp_path / TRANSFORMER_FILE
        file.write_bytes(file.read_bytes()[:100])
        (tmp_path / "config.json").unlink()
        lines = refusal(tmp_path).splitlines()
        assert "truncated" in lines[0] and "Wan2.1_VAE.pth, vae" in lines[1] and "Wan2.2_VAE.pth" in lines[1]
        assert len(lines) == 4

    @pytest.mark.parametrize("layout", PAIRS)
    def test_shard_of_either_expert(self, tmp_path, layout):
        """With both to be trained, what is wrong with each is told at once, and what they share once."""
        folder = PAIRS[layout](tmp_path / "wan", "wan22_t2v_low")
        for part in ("high_noise_model", "low_noise_model", "transformer", "transformer_2"):
            for file in sorted((folder / part).glob("*.safetensors"))[:1]:
                file.write_bytes(file.read_bytes()[:-1])
        shutil.rmtree(folder / "google", ignore_errors=True)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        lines = refusal(folder, expert="both").splitlines()
        assert sum("truncated" in line for line in lines) == 2
        assert sum("google/umt5-xxl" in line for line in lines) == 1 and len(lines) == 3

    def test_settings_that_do_not_fit_the_variant(self, tmp_path):
        clip = DATA / "wan_i2v" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        lines = refusal(WAN_T2V, clip_path=clip, i2v_fraction=0.25).splitlines()
        assert lines == [
            "[model] i2v_fraction = 0.25 is for Wan2.2 TI2V-5B, and this is Wan2.1 T2V; remove i2v_fraction",
            f"[model] clip_path = '{clip}': Wan2.1 T2V takes no CLIP; remove clip_path",
        ]

    def test_wrong_kinds_of_path(self, tmp_path):
        (tmp_path / "wan.safetensors").touch()
        assert f"set transformer_path = '{tmp_path / 'wan.safetensors'}'" in refusal(tmp_path / "wan.safetensors")
        (tmp_path / "quantised").mkdir()
        (tmp_path / "quantised" / "wan.gguf").touch()
        assert "GGUF cannot be trained on" in refusal(WAN_T2V, transformer_path=tmp_path / "quantised")
        pair = official_pair(tmp_path / "pair", "wan22_t2v_low")
        message = refusal(WAN_T2V, transformer_path=pair)
        assert f"set it to '{pair / 'high_noise_model'}' or '{pair / 'low_noise_model'}'" in message

    def test_comfyui_folder(self, tmp_path):
        settings = comfyui(tmp_path, "wan_i2v", file="wan2.1_i2v_720p.safetensors")
        (tmp_path / "diffusion_models" / "flux.safetensors").touch()
        lines = refusal(tmp_path).splitlines()
        for key, line in zip(("transformer_path", "vae_path", "llm_path"), lines, strict=False):
            assert line.startswith(f"[model] ckpt_path = '{tmp_path}' is a ComfyUI folder")
            assert line.endswith(f"set {key} = '{settings[key]}'")
        assert holds(family_of({**settings, "ckpt_path": tmp_path}), "wan_i2v")

    def test_one_expert_downloaded(self, tmp_path):
        folder = official_pair(tmp_path / "wan", "wan22_i2v_low")
        shutil.rmtree(folder / "high_noise_model")
        assert wan_family(folder).title == "Wan2.2 I2V-A14B low noise custom size"
        assert "has low_noise_model only, and expert = 'high' is another" in refusal(folder, expert="high")
        assert "does not hold the two transformers that expert = 'both' needs" in refusal(folder, expert="both")
        (folder / "low_noise_model" / TRANSFORMER_FILE).unlink()
        assert "looked for low_noise_model/diffusion_pytorch_model*.safetensors" in refusal(folder, expert="low")


@pytest.mark.parametrize(
    ("path", "expert"),
    [
        ("Wan2.2-T2V-A14B/high_noise_model/diffusion_pytorch_model.safetensors", "high"),
        ("Wan2.2-I2V-A14B/low_noise_model/diffusion_pytorch_model.safetensors", "low"),
        ("wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", "high"),
        ("LowNoise/Wan2.2-T2V-A14B.safetensors", "low"),
        ("Wan2.2-I2V-A14B-HighNoise.safetensors", "high"),
        ("wan22-low-noise.safetensors", "low"),
        ("Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors", "high"),
        ("Wan2_2-I2V-A14B-LOW_bf16.safetensors", "low"),
        ("high_noise/wan_low_noise.safetensors", "low"),  # the nearest name counts
        ("high_noise/Wan2.2-T2V-A14B-Lowlands.safetensors", "high"),
        ("flow_noise.safetensors", None),
        ("high_noise_and_low_noise_merged.safetensors", None),
        ("low_noise_tests/Wan2.1/wan.safetensors", None),  # only the file and its folder
        ("wan2.1_t2v_14B.safetensors", None),
    ],
)
def test_names_of_experts(tmp_path, path, expert):
    assert named_expert(tmp_path / path, is_file=True) == expert


def test_diffusers_folders_of_experts(tmp_path):
    """`transformer` is high noise where `transformer_2` lies beside it, and nothing of the kind elsewhere."""
    folder = diffusers_pair(tmp_path / "pair", "wan22_t2v_low")
    assert named_expert(folder / "transformer", is_file=False) == "high"
    assert named_expert(folder / "transformer_2" / TRANSFORMER_FILE, is_file=True) == "low"
    shutil.rmtree(folder / "transformer_2")
    assert named_expert(folder / "transformer", is_file=False) is None


def test_official_components_of_the_5b(tmp_path):
    """Wan2.1's VAE beside it is not taken."""
    official_components(tmp_path, "wan22_ti2v")
    (tmp_path / "Wan2.1_VAE.pth").touch()
    write_transformer(tmp_path, "wan22_ti2v")
    family = wan_family(tmp_path)
    assert family._files.vae.name == "Wan2.2_VAE.pth" and family.encoders()[0].version == "2.2"
