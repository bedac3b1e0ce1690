import json
import pickle
import re
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from pydantic import ValidationError
from safetensors.torch import save_file

from models import family_class, flow_match
from models.base import Draw, MicroBatch, ModelFamily
from models.wan import variants
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

    @pytest.mark.parametrize("names", [("high_noise_model", "low_noise_model"), ("transformer", "transformer_2")])
    def test_two_experts_want_a_choice(self, tmp_path, names):
        folder = copy_checkpoint(tmp_path / "wan")
        for name in names:
            (folder / name).mkdir()
            shutil.copy(WAN_T2V / TRANSFORMER_FILE, folder / name)
            shutil.copy(WAN_T2V / "config.json", folder / name)
        message = refusal(folder)
        assert "two transformers (Wan2.2 A14B)" in message and str(folder / names[1]) in message
        assert same_weights(wan_family(folder, transformer_path=folder / names[1]))


class TestChecks:
    """Found in the constructor, so before anything slow starts."""

    def test_absent_shard(self, tmp_path):
        folder = copy_checkpoint(tmp_path / "wan")
        shard(folder, 6)[4].unlink()
        message = refusal(folder)
        assert re.search(r"16 tensors missing, first \S+; shard 5 of 6 absent or truncated \(diffusion_py", message)

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

    def test_image_to_video_is_named(self, tmp_path):
        tensors = native_tensors()
        tensors["patch_embedding.weight"] = torch.zeros(48, 36, 1, 2, 2)
        folder = copy_checkpoint(tmp_path / "wan", {**tensors, "img_emb.proj.0.weight": torch.zeros(1280)})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "in_dim": 36, "model_type": "i2v"}))
        message = refusal(folder)
        assert "this is Wan2.1 I2V (custom size, 36 channels in, 16 out), which cannot be trained yet" in message
        assert "supported: Wan2.1 T2V" in message


SMALL = variants.Architecture(1536, 8960, 12, 30, 256, 16, 16, 4096, 1e-6)


class TestVariants:
    @pytest.mark.parametrize(
        ("channels", "names", "title"),
        [
            ((36, 16), ["img_emb.proj.0.weight"], "Wan2.1 I2V"),
            ((36, 16), ["condition_embedder.image_embedder.norm1.weight"], "Wan2.1 I2V"),
            ((36, 16), ["img_emb.proj.0.weight", "img_emb.emb_pos"], "Wan2.1 FLF2V"),
            ((36, 16), ["head.head.weight"], "Wan2.2 I2V-A14B"),
            ((48, 48), ["head.head.weight"], "Wan2.2 TI2V-5B"),
            ((48, 16), ["head.head.weight"], "Fun-Control"),
            ((16, 16), ["vace_blocks.0.norm3.weight"], "VACE"),
            ((52, 20), ["head.head.weight"], "no known Wan"),
        ],
    )
    def test_what_cannot_be_trained_is_named(self, channels, names, title):
        sizes = SMALL._replace(in_dim=channels[0], out_dim=channels[1])
        with pytest.raises(ValueError, match=title):
            variants.detect(sizes, names)

    @pytest.mark.parametrize(
        ("sizes", "title", "parameters"),
        [
            (SMALL, "1.3B", 1_418_996_800),
            (SMALL._replace(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40), "14B", 14_288_491_584),
        ],
    )
    def test_released_sizes_from_shapes_alone(self, sizes, title, parameters):
        with torch.device("meta"):
            model = WanTransformer3DModel(**sizes.diffusers_arguments())
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert variants.architecture({}, shapes) == sizes
        assert variants.size_name(sizes) == title
        assert variants.detect(sizes, shapes).title == "Wan2.1 T2V"

    def test_heads_that_nothing_tells(self):
        told = {key: value for key, value in SMALL._replace(dim=48)._asdict().items() if key != "num_heads"}
        with pytest.raises(ValueError, match=r"tell num_heads; put the config\.json beside"):
            variants.architecture(told, {})


class TestFamily:
    def test_facts(self):
        family = wan_family()
        assert family.title == "Wan2.1 T2V custom size"
        assert family.media_spec() == (16, 16, 4, True)
        assert [encoder.kind for encoder in family.encoders()] == ["latents", "text"]

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
        (x_t, t, text), (v,) = batch
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
        (x_t, t, text), (v,) = wan_family().micro_batch(low, [Draw(0.3, 1), Draw(0.8, 2)])
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
