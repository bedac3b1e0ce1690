"""Plain ways to fill and run a family's layers with no engine, and tiny Wan checkpoints cut from golden data."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.adapter_layers import initial_value
from models.adapters import base_name, is_adapter
from models.base import ModelFamily
from models.wan.config import WanModelConfig
from models.wan.family import WanFamily
from models.wan.keymaps import TRANSFORMER

DATA = Path(__file__).parents[1] / "data"
WAN_T2V = DATA / "wan_t2v"  # official layout: config, transformer, VAE, T5, tokenizer
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
CLIP = {"clip_path": DATA / "wan_i2v" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"}

# folder in tests/data with a transformer of that kind -> what `[model]` has besides; VAE and UMT5 are wan_t2v's
VARIANTS: dict[str, dict[str, object]] = {
    "wan_t2v": {},
    "wan_i2v": CLIP,
    "wan_flf2v": CLIP,
    "wan22_t2v_low": {"expert": "low"},
    "wan22_i2v_low": {"expert": "low"},
    "wan22_ti2v": {"vae_path": DATA / "wan22_ti2v" / "Wan2.2_VAE.pth"},
}
IN_CHANNELS = {"wan_i2v": 36, "wan_flf2v": 36, "wan22_i2v_low": 36, "wan22_ti2v": 48}  # others have 16
IMAGE_STATES = {"wan_i2v": 257, "wan_flf2v": 514}


def wan_family(folder: Path = WAN_T2V, **settings: object) -> WanFamily:
    """A family on `folder`, in float32 unless told otherwise."""
    return WanFamily(WanModelConfig(**{"ckpt_path": folder, "dtype": "float32", **settings}))


def wan_variant(name: str, transformer: Path | None = None, **settings: object) -> WanFamily:
    """A family of the kind `name` in `VARIANTS`, with its golden transformer unless another folder is given."""
    return wan_family(WAN_T2V, transformer_path=transformer or DATA / name, **{**VARIANTS[name], **settings})


def materialise(skeleton: nn.Module, family: ModelFamily, seed: int = 0) -> nn.Module:
    """Give every parameter of a meta skeleton its values, as a stage does with its own."""
    weights = family.open_weights()
    for name, parameter in list(skeleton.named_parameters()):
        if is_adapter(name):
            values = initial_value(skeleton, name, parameter.shape, seed)
        else:
            values = weights.read(base_name(name)).to(family.storage_dtype(base_name(name)))
        owner, _, leaf = name.rpartition(".")
        filled = nn.Parameter(values.clone(), requires_grad=parameter.requires_grad)
        setattr(skeleton.get_submodule(owner), leaf, filled)
    return skeleton


def run_layers(layers: list[nn.Module], inputs: tuple[Tensor, ...], compute_dtype: torch.dtype) -> Tensor:
    """What the engine does with one micro-batch, in a row."""
    passed = inputs
    with nullcontext() if compute_dtype == torch.float32 else torch.autocast("cpu", compute_dtype):
        for layer in layers:
            passed = layer(passed)
    return passed


def random_inputs(
    batch: int = 2,
    grid: tuple[int, int, int] = (3, 4, 6),
    seed: int = 1,
    name: str = "wan_t2v",
    t_a_frame: bool = False,
) -> tuple[Tensor, ...]:
    """What the tiny Wan of a kind in `VARIANTS` takes: x_t, t, text (32 wide) and, where it has them, image states."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, IN_CHANNELS.get(name, 16), *grid, generator=generator)
    t = torch.rand(batch, *grid[:1] * t_a_frame, generator=generator)
    text = torch.randn(batch, 512, 32, generator=generator)
    states = IMAGE_STATES.get(name)
    return x_t, t, text, *([torch.randn(batch, states, 1280, generator=generator)] if states else [])


def copy_checkpoint(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """The tiny checkpoint in `folder` for a test to spoil; `tensors` replace the transformer's."""
    shutil.copytree(WAN_T2V, folder)
    if tensors is not None:
        save_file(tensors, folder / TRANSFORMER_FILE)
    return folder


def native_tensors(name: str = "wan_t2v") -> dict[str, Tensor]:
    """The tiny transformer of a kind in `VARIANTS` under official names."""
    return load_file(DATA / name / TRANSFORMER_FILE)


def diffusers_tensors(name: str = "wan_t2v") -> dict[str, Tensor]:
    """The same under diffusers' names."""
    return {TRANSFORMER.to_skeleton(key): tensor for key, tensor in native_tensors(name).items()}


def diffusers_transformer(folder: Path, name: str = "wan_t2v") -> Path:
    """Write the tiny transformer of a kind in `VARIANTS` in diffusers' layout."""
    folder.mkdir(parents=True)
    tensors = diffusers_tensors(name)
    save_file(tensors, folder / TRANSFORMER_FILE)
    config = {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 24,
        "num_attention_heads": 2,
        "in_channels": tensors["patch_embedding.weight"].shape[1],
        "out_channels": len(tensors["proj_out.weight"]) // 4,
        "ffn_dim": 96,
        "freq_dim": 64,
        "text_dim": 32,
        "num_layers": 3,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
    }
    if "condition_embedder.image_embedder.norm1.weight" in tensors:
        config |= {"image_dim": 1280, "added_kv_proj_dim": 48}
    if "condition_embedder.image_embedder.pos_embed" in tensors:
        config["pos_embed_seq_len"] = 514
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def diffusers_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint with the transformer in diffusers' layout."""
    diffusers_transformer(folder / "transformer")
    for part in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        shutil.copy(WAN_T2V / part, folder)
    shutil.copytree(WAN_T2V / "google", folder / "google")
    return folder


def shard(folder: Path, count: int, with_index: bool = True) -> list[Path]:
    """Cut the official transformer file in `folder` into `count` shards."""
    whole = folder / TRANSFORMER_FILE
    tensors = list(load_file(whole).items())
    whole.unlink()
    files, weight_map = [], {}
    for number in range(count):
        file = folder / f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = dict(tensors[number::count])
        save_file(part, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    if with_index:
        index = folder / f"{TRANSFORMER_FILE}.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files
