"""Plain ways to fill and run a family's layers with no engine, and tiny Wan checkpoints cut from golden data."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.base import ModelFamily
from models.lora import base_name, init_lora, is_lora
from models.wan.config import WanModelConfig
from models.wan.family import WanFamily
from models.wan.keymaps import TRANSFORMER

WAN_T2V = Path(__file__).parents[1] / "data" / "wan_t2v"  # official layout: config, transformer, VAE, T5, tokenizer
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"


def wan_family(folder: Path = WAN_T2V, **settings: object) -> WanFamily:
    """A family on `folder`, in float32 unless told otherwise."""
    return WanFamily(WanModelConfig(**{"ckpt_path": folder, "dtype": "float32", **settings}))


def materialise(skeleton: nn.Module, family: ModelFamily, seed: int = 0) -> nn.Module:
    """Give every parameter of a meta skeleton its values, as a stage does with its own."""
    weights = family.open_weights()
    for name, parameter in list(skeleton.named_parameters()):
        if is_lora(name):
            values = init_lora(name, parameter.shape, seed)
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


def random_inputs(batch: int = 2, grid: tuple[int, int, int] = (3, 4, 6), seed: int = 1) -> tuple[Tensor, ...]:
    """x_t, t and text for the tiny Wan, whose captions are 32 wide."""
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, 16, *grid, generator=generator)
    t = torch.rand(batch, generator=generator)
    return x_t, t, torch.randn(batch, 512, 32, generator=generator)


def copy_checkpoint(folder: Path, tensors: dict[str, Tensor] | None = None) -> Path:
    """The tiny checkpoint in `folder` for a test to spoil; `tensors` replace the transformer's."""
    shutil.copytree(WAN_T2V, folder)
    if tensors is not None:
        save_file(tensors, folder / TRANSFORMER_FILE)
    return folder


def native_tensors() -> dict[str, Tensor]:
    """The tiny transformer under official names."""
    return load_file(WAN_T2V / TRANSFORMER_FILE)


def diffusers_checkpoint(folder: Path) -> Path:
    """The tiny checkpoint with the transformer in diffusers' layout."""
    (folder / "transformer").mkdir(parents=True)
    for part in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        shutil.copy(WAN_T2V / part, folder)
    shutil.copytree(WAN_T2V / "google", folder / "google")
    tensors = {TRANSFORMER.to_skeleton(name): tensor for name, tensor in native_tensors().items()}
    save_file(tensors, folder / "transformer" / TRANSFORMER_FILE)
    config = {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 24,
        "num_attention_heads": 2,
        "in_channels": 16,
        "out_channels": 16,
        "ffn_dim": 96,
        "freq_dim": 64,
        "text_dim": 32,
        "num_layers": 3,
        "eps": 1e-6,
        "patch_size": [1, 2, 2],
    }
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
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
