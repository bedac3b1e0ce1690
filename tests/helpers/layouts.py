"""The tiny transformers of tests/data in every layout that people have, beside components that are only named."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from models.wan.keymaps import TRANSFORMER
from tests.helpers.models import DATA, TRANSFORMER_FILE, native_tensors, shard

# what the constructor looks for and does not open
OFFICIAL = ("models_t5_umt5-xxl-enc-bf16.pth", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
OFFICIAL_VAE = {"wan22_ti2v": "Wan2.2_VAE.pth"}  # others have Wan2.1's
DIFFUSERS = ("vae", "text_encoder", "tokenizer", "image_encoder")
COMFYUI = {
    "vae_path": "vae/wan_2.1_vae.safetensors",
    "llm_path": "text_encoders/umt5_xxl_fp16.safetensors",
    "clip_path": "clip_vision/clip_vision_h.safetensors",
}
WITH_CLIP = ("wan_i2v", "wan_flf2v")


def weights(name: str, added: float = 0.0) -> dict[str, Tensor]:
    """The tiny transformer under official names, every weight moved by `added`."""
    return {key: tensor + added for key, tensor in native_tensors(name).items()}


def official_components(folder: Path, name: str) -> None:
    """Empty files under official names."""
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    for file in (*OFFICIAL[: 1 + (name in WITH_CLIP)], OFFICIAL_VAE.get(name, "Wan2.1_VAE.pth")):
        (folder / file).touch()


def diffusers_components(folder: Path, name: str) -> None:
    """Empty folders under diffusers' names."""
    for part in DIFFUSERS[: 3 + (name in WITH_CLIP)]:
        (folder / part).mkdir(parents=True)


def write_transformer(folder: Path, name: str, shards: int = 1, diffusers: bool = False, added: float = 0.0) -> None:
    """A folder with config.json and one file, or shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(name, added)
    config = json.loads((DATA / name / "config.json").read_text())
    if diffusers:
        tensors = {TRANSFORMER.to_skeleton(key) or key: tensor for key, tensor in tensors.items()}
        heads, dim = config.pop("num_heads"), config.pop("dim")
        config |= {"num_attention_heads": heads, "attention_head_dim": dim // heads}
        config |= {"in_channels": config.pop("in_dim"), "out_channels": config.pop("out_dim")}
    save_file(tensors, folder / TRANSFORMER_FILE)
    (folder / "config.json").write_text(json.dumps(config))
    if shards > 1:
        shard(folder, shards)


def official(folder: Path, name: str, shards: int = 1) -> dict[str, object]:
    """The settings that name what was written."""
    official_components(folder, name)
    write_transformer(folder, name, shards)
    return {"ckpt_path": folder}


def diffusers(folder: Path, name: str, shards: int = 1) -> dict[str, object]:
    diffusers_components(folder, name)
    write_transformer(folder / "transformer", name, shards, diffusers=True)
    return {"ckpt_path": folder}


def comfyui(folder: Path, name: str, prefix: str = "", file: str = "wan.safetensors", added: float = 0.0) -> dict:
    """Single files in ComfyUI's folders, each given by its key; the heads of a size that nobody released need the
    config.json that ComfyUI's folders do not have."""
    paths = {key: folder / path for key, path in COMFYUI.items() if key != "clip_path" or name in WITH_CLIP}
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    transformer = folder / "diffusion_models" / file
    transformer.parent.mkdir(exist_ok=True)
    save_file({prefix + key: tensor for key, tensor in weights(name, added).items()}, transformer)
    shutil.copy(DATA / name / "config.json", transformer.parent)
    (folder / "tokenizer").mkdir(exist_ok=True)
    tokenizer = {"tokenizer_path": folder / "tokenizer"}
    return {"ckpt_path": None, "transformer_path": transformer, **paths, **tokenizer}


LAYOUTS: Mapping[str, Callable[[Path, str], dict[str, object]]] = {
    "official": official,
    "official, sharded": lambda folder, name: official(folder, name, 4),
    "diffusers": diffusers,
    "diffusers, sharded": lambda folder, name: diffusers(folder, name, 4),
    "ComfyUI": comfyui,
    "ComfyUI, prefixed": lambda folder, name: comfyui(folder, name, "model.diffusion_model."),
}


def official_pair(folder: Path, name: str, shards: int = 1) -> Path:
    """Both experts of Wan2.2 A14B: `name` as low noise, and the same moved by 1 as high noise."""
    official_components(folder, name)
    write_transformer(folder / "high_noise_model", name, shards, added=1)
    write_transformer(folder / "low_noise_model", name, shards)
    return folder


def diffusers_pair(folder: Path, name: str, shards: int = 1, boundary: float | None = None) -> Path:
    """The same as diffusers has it."""
    diffusers_components(folder, name)
    write_transformer(folder / "transformer", name, shards, diffusers=True, added=1)
    write_transformer(folder / "transformer_2", name, shards, diffusers=True)
    index = {"_class_name": "WanPipeline", "boundary_ratio": boundary}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


PAIRS: Mapping[str, Callable[[Path, str], Path]] = {
    "official": official_pair,
    "official, sharded": lambda folder, name: official_pair(folder, name, 4),
    "diffusers": diffusers_pair,
    "diffusers, sharded": lambda folder, name: diffusers_pair(folder, name, 4),
}
