"""What a file is: every kind against every setting that could name it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.headers import read_header
from models.wan import identify
from models.wan.encoder_keymaps import IMAGE_TOWER, TEXT, VAE, VAE22
from models.wan.identify import ADAPTER_KEY, IMAGE_KEY, TEXT_KEY, TRANSFORMER_KEY, VAE_KEY, hint_for
from models.wan.image import WanImageEncoder
from models.wan.keymaps import TRANSFORMER
from models.wan.text import WanTextEncoder
from models.wan.vae import WanVAEEncoder
from tests.helpers.models import CLIP, DATA, TRANSFORMER_FILE, WAN_T2V, wan_family
from tests.helpers.quantised import PREFIX, scaled_tensors

SLOTS = (TRANSFORMER_KEY, VAE_KEY, TEXT_KEY, IMAGE_KEY)


def official(kind):
    return load_file(DATA / kind / TRANSFORMER_FILE)


def pth(path):
    return torch.load(path, weights_only=True)


def named(*names, shape=(4, 4)):
    return {name: torch.zeros(shape) for name in names}


def lora(module, a=".lora_A.weight", b=".lora_B.weight", width=5120):
    return {module + a: torch.zeros(16, width), module + b: torch.zeros(width, 16)}


def released(dim, channels):
    """The few tensors that tell which Wan of a released size this is."""
    told = {
        "patch_embedding.weight": (dim, channels, 1, 2, 2),
        "head.head.weight": (64, 2),
        "blocks.0.self_attn.q.x": (1,),
    }
    return {name: torch.empty(shape) for name, shape in told.items()}


def renamed(tensors, key_map):
    return {key_map.to_skeleton(name) or name: tensor for name, tensor in tensors.items()}


def prefixed(tensors, prefix=PREFIX):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def vae():
    return pth(WAN_T2V / "Wan2.1_VAE.pth")


def vae22():
    return pth(DATA / "wan22_ti2v" / "Wan2.2_VAE.pth")


def umt5():
    return pth(WAN_T2V / "models_t5_umt5-xxl-enc-bf16.pth")


def vision_tower():
    """The names are transformers', the shapes are left as they are."""
    found = {f"vision_model.encoder.layers.{n}.self_attn.q_proj.weight": torch.zeros(160, 160) for n in range(3)}
    return found | {"vision_model.embeddings.class_embedding": torch.zeros(160)}


# kind -> tensors of such a file, what is said of it, the setting that takes it
KINDS = {
    "T2V": (lambda: official("wan_t2v"), "a Wan2.1 T2V transformer (48 wide, official names)", TRANSFORMER_KEY),
    "I2V": (lambda: official("wan_i2v"), "a Wan2.1 I2V transformer (48 wide, official names)", TRANSFORMER_KEY),
    "FLF2V": (lambda: official("wan_flf2v"), "a Wan2.1 FLF2V transformer (48 wide, official names)", TRANSFORMER_KEY),
    "I2V-A14B": (
        lambda: official("wan22_i2v_low"),
        "a Wan2.2 I2V-A14B transformer (48 wide, official names)",
        TRANSFORMER_KEY,
    ),
    "TI2V-5B": (
        lambda: official("wan22_ti2v"),
        "a Wan2.2 TI2V-5B transformer (48 wide, official names)",
        TRANSFORMER_KEY,
    ),
    "T2V in diffusers' names": (
        lambda: renamed(official("wan_t2v"), TRANSFORMER),
        "a Wan2.1 T2V transformer (48 wide, diffusers' names)",
        TRANSFORMER_KEY,
    ),
    "ComfyUI's T2V": (
        lambda: prefixed(official("wan_t2v")),
        "a Wan2.1 T2V transformer (48 wide, official names, prefix model.diffusion_model.)",
        TRANSFORMER_KEY,
    ),
    "fp8_scaled, old": (
        lambda: scaled_tensors(official("wan_t2v"), "old")[0],
        "a Wan2.1 T2V transformer (48 wide, official names), quantised by ComfyUI (old keys)",
        TRANSFORMER_KEY,
    ),
    "fp8_scaled, new": (
        lambda: scaled_tensors(official("wan_t2v"), "comfy_quant")[0],
        "a Wan2.1 T2V transformer (48 wide, official names), quantised by ComfyUI (new keys)",
        TRANSFORMER_KEY,
    ),
    "1.3B": (lambda: released(1536, 16), "a Wan2.1 T2V transformer (1.3B, official names)", TRANSFORMER_KEY),
    "14B": (
        lambda: released(5120, 16),
        "a Wan2.1 T2V or Wan2.2 T2V-A14B transformer (14B, official names)",
        TRANSFORMER_KEY,
    ),
    "VACE": (
        lambda: released(1536, 16) | named("vace_blocks.0.norm3.weight"),
        "a VACE transformer (1.3B, official names)",
        TRANSFORMER_KEY,
    ),
    "a shard": (
        lambda: {name: t for name, t in official("wan_t2v").items() if name.startswith("blocks.1.")},
        "a part of a Wan transformer",
        TRANSFORMER_KEY,
    ),
    "VACE module": (
        lambda: named("vace_blocks.0.self_attn.q.weight"),
        "a VACE module without the Wan transformer it belongs to",
        None,
    ),
    "VAE 2.1": (vae, "the VAE of Wan2.1 (official names)", VAE_KEY),
    "VAE 2.1 in diffusers' names": (lambda: renamed(vae(), VAE), "the VAE of Wan2.1 (diffusers' names)", VAE_KEY),
    "VAE 2.2": (vae22, "the VAE of Wan2.2's TI2V-5B (official names)", VAE_KEY),
    "VAE 2.2 in diffusers' names": (
        lambda: renamed(vae22(), VAE22),
        "the VAE of Wan2.2's TI2V-5B (diffusers' names)",
        VAE_KEY,
    ),
    "an image VAE": (
        lambda: named("encoder.down_blocks.0.resnets.0.norm1.weight", "decoder.conv_in.weight"),
        "a VAE of another model",
        None,
    ),
    "UMT5": (umt5, "UMT5 text encoder weights (official names)", TEXT_KEY),
    "UMT5 in transformers' names": (
        lambda: renamed(umt5(), TEXT) | named("spiece_model"),
        "UMT5 text encoder weights (transformers' names)",
        TEXT_KEY,
    ),
    "UMT5 scaled": (
        lambda: scaled_tensors(renamed(umt5(), TEXT), "old", chosen=lambda name, _: ".SelfAttention.q." in name)[0],
        "UMT5 text encoder weights (transformers' names), quantised by ComfyUI (old keys)",
        TEXT_KEY,
    ),
    "T5 with decoder": (
        lambda: renamed(umt5(), TEXT) | named("decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"),
        "a T5 with its decoder, of which only the encoder is wanted",
        None,
    ),
    "T5": (
        lambda: named(
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.1.layer.0.SelfAttention.q.weight",
        ),
        "T5 text encoder weights, of Stable Diffusion 3 or FLUX for instance, and not UMT5",
        None,
    ),
    "CLIP": (lambda: pth(CLIP["clip_path"]), "CLIP weights (official names)", IMAGE_KEY),
    "CLIP in transformers' names": (vision_tower, "CLIP weights (transformers' names)", IMAGE_KEY),
    "CLIP-L": (
        lambda: named("text_model.encoder.layers.0.self_attn.q_proj.weight"),
        "a CLIP text encoder, of Stable Diffusion or FLUX",
        None,
    ),
    "SigLIP": (
        lambda: vision_tower() | named("vision_model.head.attention.in_proj_weight"),
        "SigLIP weights, and not CLIP",
        None,
    ),
    "LoRA of ComfyUI": (
        lambda: lora("diffusion_model.blocks.0.self_attn.q"),
        "a LoRA for Wan 14B (ComfyUI's names)",
        ADAPTER_KEY,
    ),
    "LoRA of diffusers": (
        lambda: lora("transformer.blocks.0.attn1.to_q", width=1536),
        "a LoRA for Wan 1.3B (diffusers' names)",
        ADAPTER_KEY,
    ),
    "LoRA of kohya": (
        lambda: lora("lora_unet_blocks_0_self_attn_q", ".lora_down.weight", ".lora_up.weight"),
        "a LoRA for Wan 14B (kohya's names)",
        ADAPTER_KEY,
    ),
    "LoRA of DiffSynth": (
        lambda: lora("blocks.0.self_attn.q", ".lora_A.default.weight", ".lora_B.default.weight"),
        "a LoRA for Wan 14B (official names)",
        ADAPTER_KEY,
    ),
    "LoKr": (
        lambda: named("diffusion_model.blocks.0.ffn.0.lokr_w1", "diffusion_model.blocks.0.ffn.0.lokr_w2"),
        "a LoKr for Wan (ComfyUI's names)",
        ADAPTER_KEY,
    ),
    "DoRA": (
        lambda: lora("diffusion_model.blocks.0.self_attn.q") | named("diffusion_model.blocks.0.self_attn.q.dora_scale"),
        "a DoRA for Wan 14B (ComfyUI's names)",
        ADAPTER_KEY,
    ),
    "LoRA for FLUX": (
        lambda: lora("lora_unet_double_blocks_0_img_attn_qkv", ".lora_down.weight", ".lora_up.weight"),
        "an adapter for FLUX or HunyuanVideo",
        None,
    ),
    "LoRA for SDXL": (
        lambda: lora(
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ".lora_down.weight", ".lora_up.weight"
        ),
        "an adapter for Stable Diffusion",
        None,
    ),
    "LoRA for LTX": (
        lambda: lora("transformer.transformer_blocks.0.attn1.to_q"),
        "an adapter for another model",
        None,
    ),
    "SDXL": (
        lambda: named(
            "conditioner.embedders.0.transformer.x",
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.x",
        ),
        "a Stable Diffusion XL checkpoint",
        None,
    ),
    "all in one": (
        lambda: prefixed(official("wan_t2v")) | prefixed(umt5(), "text_encoders.umt5xxl.transformer."),
        "an all-in-one file of transformer, VAE and text encoder, which cannot be read; take the single files",
        None,
    ),
    "FLUX": (lambda: named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "a FLUX tr", None),
    "HunyuanVideo": (
        lambda: named("double_blocks.0.img_attn.qkv.weight", "txt_in.individual_token_refiner.blocks.0.norm1.weight"),
        "a HunyuanVideo transformer",
        None,
    ),
    "LTX": (
        lambda: prefixed(named("patchify_proj.weight", "transformer_blocks.0.attn1.to_q.weight")),
        "an LTX-Video transformer",
        None,
    ),
    "Qwen-Image": (lambda: named("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"), "a Qwen-Image tr", None),
    "bitsandbytes": (
        lambda: released(1536, 16) | named("blocks.0.self_attn.q.weight.absmax"),
        "weights that bitsandbytes quantised",
        None,
    ),
}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told(kind):
    make, told, _ = KINDS[kind]
    shapes = shapes_of(make())
    found = identify.identify(shapes, shapes, {})
    assert found == told or (len(told) < 20 and found.startswith(told))


@pytest.mark.parametrize("slot", SLOTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_place(kind, slot):
    make, told, key = KINDS[kind]
    hint = hint_for(slot)(shapes_of(make()), {})
    if key == slot:
        assert hint is None, "it is of the right kind, so something else is wrong"
    else:
        assert hint.startswith(f"this looks like {told}")
        assert hint.endswith(f"; set {key} to it") == (key is not None)


def test_the_header_tells_of_new_scales():
    shapes = shapes_of(official("wan_t2v"))
    told = identify.identify(shapes, shapes, {"_quantization_metadata": json.dumps({"layers": {}})})
    assert told.endswith(", quantised by ComfyUI (new keys)")


def test_other_files_are_nothing_in_particular():
    assert identify.identify(["a.weight"], {"a.weight": (1,)}, {}) is None
    assert hint_for(VAE_KEY)({"a.weight": (1,)}, {}) is None
    assert identify.identify([], {}, {}) is None


# kinds with files that are small and of which a component makes its own sense before it checks them
WRONG = [
    "I2V",
    "VAE 2.1",
    "VAE 2.2 in diffusers' names",
    "UMT5",
    "UMT5 in transformers' names",
    "CLIP",
    "LoRA of kohya",
    "T5",
]
ENCODERS = {
    VAE_KEY: lambda path: WanVAEEncoder(path, torch.float32),
    TEXT_KEY: lambda path: WanTextEncoder(path, WAN_T2V / "google" / "umt5-xxl", torch.float32),
    IMAGE_KEY: lambda path: WanImageEncoder(path, torch.float32, both_ends=False),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("slot", SLOTS)
def test_the_components_say_it(tmp_path, kind, slot):
    make, told, key = KINDS[kind]
    if key == slot:
        return
    file = tmp_path / "file.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in make().items()}, file)
    assert read_header(file)
    with pytest.raises(ValueError) as error:
        if slot == TRANSFORMER_KEY:
            wan_family(transformer_path=file)
        else:
            ENCODERS[slot](file).check()
    assert f"this looks like {told}" in str(error.value) and str(file) in str(error.value)
    assert key is None or f"; set {key} to it" in str(error.value)


def test_the_tower_of_this_test_has_the_names_that_the_encoder_reads():
    assert {IMAGE_TOWER.to_skeleton(name) for name in vision_tower()} >= {"embeddings.class_embedding"}
