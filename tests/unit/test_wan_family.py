import json
import pickle
import re

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from models import family_class, flow_match
from models.base import Draw, MicroBatch, ModelFamily
from models.wan.config import WanModelConfig
from models.wan.family import WanFamily
from tests.helpers.models import (
    TRANSFORMER_FILE,
    WAN_T2V,
    copy_checkpoint,
    diffusers_checkpoint,
    materialise,
    native_tensors,
    run_layers,
    shard,
    wan_family,
    wan_variant,
)


def same_weights(family):
    ours, original = family.open_weights(), wan_family().open_weights()
    return ours.names() == original.names() and all(torch.equal(ours.read(n), original.read(n)) for n in ours.names())


def refusal(*args, **settings):
    with pytest.raises(ValueError) as error:
        wan_family(*args, **settings)
    return str(error.value)


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({}, "ckpt_path is missing"),
            ({"shift": 3.0, "flux_shift": True}, "shift and flux_shift exclude each other"),
            ({"min_t": 0.6, "max_t": 0.5}, "min_t = 0.6 must be below max_t = 0.5"),
            ({"dtype": "float8"}, "set transformer_dtype = 'float8' instead"),
            ({"cache_text_embeddings": False}, "text is always cached; remove the key"),
            ({"shift": 0.0}, "greater than 0"),
            ({"max_t": 1.5}, "less than or equal to 1"),
            ({"sigmoid_scale": "1"}, "valid number"),
            ({"text_max_length": 1024}, "less than or equal to 512"),
            ({"timestep_sample_method": "sigmoid"}, "'logit_normal' or 'uniform'"),
            ({"transformer_type": "wan"}, "Extra inputs are not permitted"),
            ({"expert": "middle"}, "'high', 'low' or 'both'"),
            ({"switch_every": 0, "expert": "both"}, "greater than or equal to 1"),
            ({"switch_every": 10}, "switch_every = 10 is for two experts in turns; set expert = 'both'"),
            ({"high_noise_share": 0.4, "expert": "low"}, "high_noise_share = 0.4 is for two experts in turns"),
            ({"high_noise_share": 1.0, "expert": "both"}, "less than 1"),
            (
                {"transformer_path": "y", "expert": "both"},
                "takes two transformers out of ckpt_path, and",
            ),
            ({"flux_shift": True, "expert": "both"}, "set high_noise_share, or use a static shift"),
            ({"i2v_fraction": 1.5}, "less than or equal to 1"),
        ],
    )
    def test_errors(self, settings, message):
        with pytest.raises(ValidationError, match=re.escape(message)):
            WanModelConfig(**({"ckpt_path": "x"} if settings else {}) | settings)

    def test_what_a_toml_file_gives(self):
        config = WanModelConfig.model_validate({"type": "wan", "ckpt_path": "models/wan", "shift": 3})
        assert (config.compute_dtype, config.linear_dtype, config.encoder_dtype) == (torch.bfloat16,) * 3
        low = WanModelConfig(ckpt_path="x", transformer_dtype="float8", vae_dtype="float32")
        assert (low.linear_dtype, low.encoder_dtype) == (torch.float8_e4m3fn, torch.float32)

    def test_every_key_is_described(self):
        assert all(field.description for field in WanModelConfig.model_fields.values())


class TestLayouts:
    def test_found_by_its_name_in_the_table(self):
        assert family_class("wan") is WanFamily and issubclass(WanFamily, ModelFamily)

    @pytest.mark.parametrize("index", [True, False])
    def test_shards(self, tmp_path, index):
        folder = copy_checkpoint(tmp_path / "wan")
        shard(folder, 4, index)
        assert same_weights(wan_family(folder))

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    def test_comfyui_single_file_beside_a_folder_without_transformer(self, tmp_path, prefix):
        folder = copy_checkpoint(tmp_path / "wan")
        (folder / TRANSFORMER_FILE).unlink()
        save_file({prefix + name: t for name, t in native_tensors().items()}, tmp_path / "wan2.1_t2v.safetensors")
        assert same_weights(wan_family(folder, transformer_path=tmp_path / "wan2.1_t2v.safetensors"))

    def test_pth(self, tmp_path):
        torch.save(native_tensors(), tmp_path / "wan.pth")
        assert same_weights(wan_family(transformer_path=tmp_path / "wan.pth"))

    def test_diffusers_transformer_folder_beside_an_official_one(self, tmp_path):
        transformer = diffusers_checkpoint(tmp_path / "wan") / "transformer"
        assert same_weights(wan_family(transformer_path=transformer))

    def test_no_ckpt_path_at_all(self, tmp_path):
        family = wan_family(
            None,
            transformer_path=WAN_T2V,
            vae_path=WAN_T2V / "Wan2.1_VAE.pth",
            llm_path=WAN_T2V / "models_t5_umt5-xxl-enc-bf16.pth",
        )
        assert same_weights(family)
        assert family._files.tokenizer == WAN_T2V / "google/umt5-xxl"

    def test_everything_missing_in_one_message(self, tmp_path):
        message = refusal(tmp_path).splitlines()
        assert len(message) == 4
        assert message[0] == (
            f"[model] ckpt_path = '{tmp_path}' has no transformer; looked for diffusion_pytorch_model*.safetensors or "
            "transformer/diffusion_pytorch_model*.safetensors. Download it there, or set transformer_path"
        )
        assert "has no VAE; looked for Wan2.1_VAE.pth, vae" in message[1] and "set vae_path" in message[1]
        assert "models_t5_umt5-xxl-enc-bf16.pth" in message[2] and "set llm_path" in message[2]
        assert "google/umt5-xxl" in message[3] and "set tokenizer_path" in message[3]

    def test_paths_that_lead_nowhere(self, tmp_path):
        assert refusal(tmp_path / "no") == f"[model] ckpt_path = '{tmp_path / 'no'}' is not a folder"
        (tmp_path / "wan.gguf").touch()
        assert "GGUF cannot be trained on" in refusal(transformer_path=tmp_path / "wan.gguf")
        for key in ("transformer_path", "vae_path", "llm_path"):
            assert f"[model] {key} = '{tmp_path / 'no'}' does not exist" in refusal(**{key: tmp_path / "no"})


class TestChecks:
    """Found in the constructor, so before anything slow starts."""

    def test_absent_shard(self, tmp_path):
        folder = copy_checkpoint(tmp_path / "wan")
        shard(folder, 6)[4].unlink()
        message = refusal(folder)
        assert re.search(r"shard 5 of 6, diffusion_py\S+: it does not exist; 16 tensors missing, first ", message)

    @pytest.mark.parametrize("config", [True, False])
    def test_truncated_file(self, tmp_path, config):
        folder = copy_checkpoint(tmp_path / "wan")
        file = folder / TRANSFORMER_FILE
        file.write_bytes(file.read_bytes()[:-1])
        if not config:
            (folder / "config.json").unlink()
        message = refusal(folder)
        assert "truncated, 473063 of 473064 bytes" in message and TRANSFORMER_FILE in message

    def test_config_of_another_model(self, tmp_path):
        folder = copy_checkpoint(tmp_path / "wan")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "ffn_dim": 128, "num_layers": 4}))
        message = refusal(folder)
        assert "27 tensors missing, first blocks.3." in message
        assert "9 tensors mis-shaped, first blocks.0.ffn.0.bias is [96] and should be [128]" in message

    def test_damaged_config(self, tmp_path):
        folder = copy_checkpoint(tmp_path / "wan")
        (folder / "config.json").write_text("{")
        assert f"{folder / 'config.json'} is not valid JSON" in refusal(folder)

    @pytest.mark.parametrize(
        ("mark", "title"), [("vace_blocks.0.norm3.weight", "VACE"), ("audio_injector.0.weight", "S2V")]
    )
    def test_what_cannot_be_trained_is_named(self, tmp_path, mark, title):
        folder = copy_checkpoint(tmp_path / "wan", {**native_tensors(), mark: torch.zeros(48)})
        message = refusal(folder)
        assert f"this is {title} (custom size, 16 channels in, 16 out), which cannot be trained yet" in message
        wan22 = "Wan2.2 I2V-A14B, Wan2.2 T2V-A14B, Wan2.2 TI2V-5B"
        assert f"supported: Wan2.1 FLF2V, Wan2.1 I2V, Wan2.1 T2V, {wan22}" in message


class TestFamily:
    @pytest.mark.parametrize(
        ("name", "title", "spec", "kinds", "tokens"),
        [
            ("wan_t2v", "Wan2.1 T2V custom size", (16, 16, 4, True, 8), ["latents", "text"], 32760),
            (
                "wan_i2v",
                "Wan2.1 I2V custom size",
                (16, 16, 4, False, 8),
                ["latents", "condition", "image", "text"],
                32760,
            ),
            (
                "wan_flf2v",
                "Wan2.1 FLF2V custom size",
                (16, 16, 4, False, 8),
                ["latents", "condition", "image", "text"],
                32760,
            ),
            (
                "wan22_t2v_low",
                "Wan2.2 T2V-A14B low noise custom size",
                (16, 16, 4, True, 8),
                ["latents", "text"],
                32760,
            ),
            (
                "wan22_i2v_low",
                "Wan2.2 I2V-A14B low noise custom size",
                (16, 16, 4, False, 8),
                ["latents", "condition", "text"],
                32760,
            ),
            ("wan22_ti2v", "Wan2.2 TI2V-5B custom size", (24, 32, 4, True, 16), ["latents", "text"], 8190),
        ],
    )
    def test_facts(self, name, title, spec, kinds, tokens):
        family = wan_variant(name)
        assert family.title == title and family.media_spec() == spec
        encoders = family.encoders()
        assert [encoder.kind for encoder in encoders] == kinds
        assert {encoder.both_ends for encoder in encoders[1:-1]} <= {name == "wan_flf2v"}
        assert encoders[0].version == ("2.2" if name == "wan22_ti2v" else "2.1")
        assert family.tokens(832, 480, 81) == tokens  # of the 5B, 21 * 15 * 26

    def test_it_pickles(self):
        family = pickle.loads(pickle.dumps(wan_family()))
        assert len(family.pipeline_layers(family.build_skeleton())) == 5

    def test_skeleton_is_on_meta_with_real_buffers(self):
        skeleton = wan_family(dtype="bfloat16").build_skeleton()
        assert all(parameter.is_meta for parameter in skeleton.parameters())
        assert not any(buffer.is_meta for buffer in skeleton.buffers()) and len(list(skeleton.buffers())) == 2

    @pytest.mark.parametrize("storage", [None, "float8", "bfloat16"])
    def test_skeleton_shows_the_storage_dtypes(self, storage):
        family = wan_family(transformer_dtype=storage)
        parameters = dict(family.build_skeleton().named_parameters())
        assert {name: p.dtype for name, p in parameters.items()} == {n: family.storage_dtype(n) for n in parameters}
        assert parameters.keys() == family.open_weights().names()

    def test_targets(self):
        family = wan_family()
        skeleton = family.build_skeleton()
        targets = family.lora_targets(skeleton)
        assert len(targets) == 3 * 10 and all(name.startswith("blocks.") for name in targets)
        assert len(family.lora_targets(skeleton, exclude=["cross_attn", "ffn.net"])) == 3 * 4
        with pytest.raises(ValueError, match=r"named like blocks\.0\.self_attn\.q or blocks\.0\.attn1\.to_q"):
            family.lora_targets(skeleton, exclude=["text_embedding"])

    def test_losses(self):
        prediction, target = torch.zeros(2, 3), torch.tensor([[1.0, 1, 1], [2, 2, 2]])
        assert wan_family().loss(prediction, (target,)).tolist() == [1, 4]
        huber = WanFamily(WanModelConfig(ckpt_path=WAN_T2V), pseudo_huber_c=0.1)
        torch.testing.assert_close(huber.loss(prediction, (target,)), flow_match.flow_loss(prediction, target, 0.1))


def samples(count=2, grid=(3, 4, 6)):
    generator = torch.Generator().manual_seed(5)
    lengths = (3, 9, 512)
    return [
        {
            "latents": torch.randn(16, *grid, generator=generator),
            "text": torch.randn(lengths[i], 32, generator=generator),
        }
        for i in range(count)
    ]


class TestMicroBatch:
    def test_what_is_in_it(self):
        batch = wan_family(shift=3.0).micro_batch(samples(3), [Draw(0.3, 1), Draw(0.5, 2), Draw(0.99, 3)])
        assert isinstance(batch, MicroBatch)
        (x_t, t, text), (v,), _ = batch
        assert x_t.shape == v.shape == (3, 16, 3, 4, 6) and text.shape == (3, 512, 32)
        assert {tensor.dtype for tensor in (x_t, t, text, v)} == {torch.float32}
        assert t[1].item() == pytest.approx(0.75)  # the median of a logit-normal, shifted by 3
        for i, sample in enumerate(samples(3)):
            noise = flow_match.seeded_noise((16, 3, 4, 6), i + 1)
            torch.testing.assert_close(v[i], noise - sample["latents"])
            torch.testing.assert_close(x_t[i], (1 - t[i]) * sample["latents"] + t[i] * noise)
            assert torch.equal(text[i, : len(sample["text"])], sample["text"])
            assert torch.count_nonzero(text[i, len(sample["text"]) :]) == 0

    def test_a_sample_does_not_depend_on_its_neighbours_or_on_process_state(self):
        family, draws = wan_family(), [Draw(0.3, 1), Draw(0.8, 2)]
        both = family.micro_batch(samples(), draws)
        torch.manual_seed(99)
        for i, (sample, draw) in enumerate(zip(samples(), draws, strict=True)):
            alone = family.micro_batch([sample], [draw])
            for many, one in zip((*both.inputs, *both.target), (*alone.inputs, *alone.target), strict=True):
                if one is alone.inputs[2]:  # padded to the longest caption of the batch
                    assert not many[i, one.shape[1] :].any()
                    many = many[:, : one.shape[1]]
                assert torch.equal(many[i], one[0])

    def test_one_row_of_padding_stands_for_all(self):
        """A short caption's prediction equals that of the same caption padded to 512 by hand."""
        family = wan_family()
        layers = family.pipeline_layers(materialise(family.build_skeleton(), family))
        x_t, t, text = family.micro_batch(samples(), [Draw(0.3, 1), Draw(0.8, 2)]).inputs
        assert text.shape == (2, 10, 32)
        whole = torch.zeros(2, 512, 32)
        whole[:, :10] = text
        with torch.no_grad():
            torch.testing.assert_close(*(run_layers(layers, (x_t, t, rows), torch.float32) for rows in (text, whole)))

    def test_stored_dtypes(self):
        """Latents are brought to float32 before noise is mixed in; captions stay as small as they were stored."""
        low = [{name: tensor.bfloat16() for name, tensor in sample.items()} for sample in samples()]
        (x_t, t, text), (v,), _ = wan_family().micro_batch(low, [Draw(0.3, 1), Draw(0.8, 2)])
        assert x_t.dtype == t.dtype == v.dtype == torch.float32 and text.dtype == torch.bfloat16

    def test_settings_of_the_timestep(self):
        def median(grid=(3, 4, 6), **settings):
            return wan_family(**settings).micro_batch(samples(1, grid), [Draw(0.5, 1)]).inputs[1].item()

        assert median() == pytest.approx(0.5)
        shift = flow_match.flux_shift(2 * 3)
        assert median(flux_shift=True) == pytest.approx(shift / (1 + shift))
        assert median(flux_shift=True, grid=(9, 4, 6)) == median(flux_shift=True)  # frames do not count
        assert median(timestep_sample_method="uniform", min_t=0.8) == pytest.approx(0.9)
        assert median(min_t=0.875, max_t=1.0) > 0.875
