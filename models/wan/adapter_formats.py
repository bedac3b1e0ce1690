"""How ComfyUI, diffusers and kohya's trainers name an adapter's tensors, and which of our names each stands for."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from models.adapters import (
    LOKR_W1,
    LOKR_W1_A,
    LOKR_W1_B,
    LOKR_W2,
    LOKR_W2_A,
    LOKR_W2_B,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    TITLES,
)
from models.wan.keymaps import TRANSFORMER, TRANSFORMER_NAMES
from models.weights import KeyMap

ALPHA = ".alpha"
# DoRA's magnitude as LyCORIS and ComfyUI call it, [out, 1]
DORA_SCALE = ".dora_scale"

_LOKR = {part: part for part in (LOKR_W1, LOKR_W1_A, LOKR_W1_B, LOKR_W2, LOKR_W2_A, LOKR_W2_B)}


class Format(NamedTuple):
    """One way to write an adapter."""

    stem: str  # of the file
    spell: Callable[[str], str]  # module of the skeleton -> module in the file
    parts: dict[str, str]  # our part -> ending in the file; a part that is absent cannot be written
    alpha: str  # "where needed": absent means a scale of 1; "always"; "folded": multiplied into the matrices


def official_name(name: str) -> str:
    """A module or parameter of the skeleton under its official name."""
    found = TRANSFORMER.from_skeleton(name)
    assert found is not None, f"{name} is not in the key table"
    return found


# What each program reads (names and rules, no code):
# - comfyui: comfy/lora.py `model_lora_keys_unet` takes "diffusion_model." + an official name, or "lora_unet_" + the
#   same with underscores; comfy/weight_adapter/{lora,lokr,base}.py the endings. Scale: alpha / rank, 1 without alpha.
#   LoKr: alpha / columns of w2_a (or of w1_a), and 1 where both matrices are whole, whatever alpha says.
# - diffusers: `WanPipeline.load_lora_weights(folder)` looks for this stem. A key without "lora" in it is refused, so
#   there is neither alpha nor LoKr; the scale is lora_alpha / r of the header's "lora_adapter_metadata", or 1.
# - kohya: musubi-tuner's networks/lora.py; a module is its official name with underscores. Scale: alpha / rank.
FORMATS = {
    "comfyui": Format(
        "adapter_model",
        lambda module: f"diffusion_model.{official_name(module)}",
        {LORA_A: LORA_A, LORA_B: LORA_B, DORA_SCALE: DORA_SCALE, **_LOKR},
        "where needed",
    ),
    "diffusers": Format(
        "pytorch_lora_weights",
        lambda module: f"transformer.{module}",
        {LORA_A: LORA_A, LORA_B: LORA_B, MAGNITUDE: MAGNITUDE},
        "folded",
    ),
    "kohya": Format(
        "adapter_model_kohya",
        lambda module: f"lora_unet_{official_name(module).replace('.', '_')}",
        {LORA_A: ".lora_down.weight", LORA_B: ".lora_up.weight", DORA_SCALE: DORA_SCALE, **_LOKR},
        "always",
    ),
}
DEFAULT_FORMAT = "comfyui"

# endings found in the wild -> ours. peft puts its adapter's name (`default`) in, DiffSynth-Studio leaves it there.
ENDINGS = {
    LORA_A: LORA_A,
    LORA_B: LORA_B,
    ".lora_A.default.weight": LORA_A,
    ".lora_B.default.weight": LORA_B,
    ".lora_down.weight": LORA_A,
    ".lora_up.weight": LORA_B,
    ".lora.down.weight": LORA_A,
    ".lora.up.weight": LORA_B,
    MAGNITUDE: MAGNITUDE,
    f"{MAGNITUDE}.weight": MAGNITUDE,
    f"{MAGNITUDE}.default": MAGNITUDE,
    f"{MAGNITUDE}.default.weight": MAGNITUDE,
    DORA_SCALE: DORA_SCALE,
    **_LOKR,
    **{f"{part}.default": part for part in _LOKR},
    ALPHA: ALPHA,
}

PEFT_PREFIX = "base_model.model."  # of files that peft itself wrote: their alpha is in adapter_config.json
# before a dotted name: peft, DiffSynth-Studio, ComfyUI, diffusers
PREFIXES = (PEFT_PREFIX, "pipe.dit.", "model.", "diffusion_model.", "transformer.")
# before a name with underscores: kohya's trainers, LyCORIS
FLAT_PREFIXES = ("lora_unet_", "lycoris_")
# "blocks_0_cross_attn_k_img" cannot be split without knowing the modules: the tables do. SimpleTuner's LyCORIS files
# have diffusers' names in them.
_FLAT = (
    KeyMap({official.replace(".", "_"): skeleton for official, skeleton in TRANSFORMER_NAMES.items()}),
    KeyMap({skeleton.replace(".", "_"): skeleton for skeleton in TRANSFORMER_NAMES.values()}),
)

# part of a key that belongs to no module -> what the file may be
GUESSES = (
    (re.compile(r"^(?!.*(lora|lokr|hada|oft)).*\.(weight|bias)$"), "this looks like a model, not like an adapter"),
    (
        re.compile(r"\.diff(_[bm])?$"),
        "it holds whole differences of weights (.diff), which fuse_adapters merges, and which cannot be trained on",
    ),
    (re.compile(r"\.hada_"), "this is a LoHa, which is not read; LoRA, DoRA and LoKr are"),
    (re.compile(r"lokr_t2|oft_|boft_|\.lora_mid\."), "this kind of LyCORIS is not read; LoRA, DoRA and LoKr are"),
    (re.compile(r"lora_te\d?_|text_encoder|text_model"), "it adapts a text encoder, so it was made for another model"),
    (re.compile(r"double_blocks|single_blocks"), "it was made for FLUX or HunyuanVideo"),
    (re.compile(r"(down|up|input|output|middle|mid)_blocks?[._]"), "it was made for Stable Diffusion"),
    (re.compile(r"transformer_blocks[._]"), "it was made for FLUX, LTX-Video, Qwen-Image or the like"),
    (re.compile(r"vace_blocks|audio_|face_|pose_|control_"), "it was made for a Wan that is not supported"),
    (re.compile(r"(k_img|v_img|add_[kv]_proj)"), "it was made for Wan2.1 image to video, and this model has no CLIP"),
    (re.compile(r"embed|time_proj|head|proj_out"), "it adapts modules outside the blocks, which are not trained here"),
    (re.compile(r"blocks[._]\d+[._]"), "it was made for a model with more blocks"),
)


def check_formats(kind: str, formats: Sequence[str]) -> None:
    """Raise `ValueError` where an adapter of `kind` cannot be written in one of `formats`."""
    for name in formats:
        if name not in FORMATS:
            raise ValueError(f"[adapter] save_format = '{name}' is not known; choose from {', '.join(FORMATS)}")
        if kind == "lokr" and LOKR_W1 not in FORMATS[name].parts:
            able = " or ".join(f"'{other}'" for other, form in FORMATS.items() if LOKR_W1 in form.parts)
            raise ValueError(
                f"[adapter] save_format = '{name}' cannot hold a {TITLES[kind]}, which diffusers does not load into "
                f"Wan; use {able}, or type = 'lora'"
            )


def split_key(key: str) -> tuple[str, str] | None:
    """Module by its skeleton name and part (one of `ENDINGS`' values) of a key in any spelling; None for others."""
    for ending, part in ENDINGS.items():
        if key.endswith(ending):
            module = skeleton_module(key.removesuffix(ending))
            return (module, part) if module else None
    return None


def skeleton_module(name: str) -> str | None:
    """`lora_unet_blocks_0_self_attn_q`, `diffusion_model.blocks.0.self_attn.q` ... -> `blocks.0.attn1.to_q`."""
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            return next((found for table in _FLAT if (found := table.to_skeleton(flat))), None)
    plain = name
    for prefix in PREFIXES:
        plain = plain.removeprefix(prefix)
    return TRANSFORMER.to_skeleton(plain) or (plain if TRANSFORMER.from_skeleton(plain) else None)


def format_of(keys: Collection[str]) -> str:
    """Which of `FORMATS` a file's keys come closest to."""
    if any(key.startswith(FLAT_PREFIXES) for key in keys):
        return "kohya"
    return "diffusers" if any(".attn1." in key or ".attn2." in key for key in keys) else "comfyui"


def guess(key: str) -> str:
    """What a file may be in which `key` belongs to no module."""
    found = next((meaning for pattern, meaning in GUESSES if pattern.search(key)), None)
    return found or "it may be made for another model"
