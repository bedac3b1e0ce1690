"""Write a tiny random Wan checkpoint, real in architecture and layout: `python examples/tiny_wan.py FOLDER`."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, only this folder is on the path
    sys.path.append(str(ROOT))

from examples.tiny_modules import SPECIAL_TOKENS, VARIANTS, Modules, Sizes, check_sizes, make_modules  # noqa: E402
from models.wan.encoder_keymaps import IMAGE, TEXT, VAE, VAE22  # noqa: E402
from models.wan.keymaps import TRANSFORMER  # noqa: E402
from models.weights import KeyMap  # noqa: E402

VERSION = 1  # raise when the same settings give another checkpoint
NOTE = "tiny_wan.json"  # what the folder was made with
TRANSFORMER_STEM = "diffusion_pytorch_model"
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
BOUNDARIES = {"t2v": 0.875, "i2v": 0.9}  # of the two experts, by model type


def write_checkpoint(
    folder: Path,
    layout: str = "official",
    seed: int = 0,
    shards: int = 1,
    sizes: Sizes | None = None,
    variant: str = "t2v",
) -> bool:
    """Make the checkpoint in `folder`, which appears whole or not at all. Equal arguments give equal bytes.

    Args:
        layout: "official" (the folder that Wan-AI publishes) or "diffusers".
        shards: files that a transformer is split into.
        variant: a name in `VARIANTS`.

    Returns:
        False if `folder` holds this very checkpoint already.

    Raises:
        ValueError: `folder` holds something else, or the sizes do not fit together.
    """
    sizes = sizes or Sizes()
    check_sizes(sizes)
    note = {"version": VERSION, "layout": layout, "variant": variant, "seed": seed, "shards": shards, **sizes._asdict()}
    if folder.exists() and any(folder.iterdir()):
        written = folder / NOTE
        if written.is_file() and json.loads(written.read_text(encoding="utf-8")) == note:
            return False
        raise ValueError(f"{folder} holds something else already; remove it or name another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        LAYOUTS[layout](partial, make_modules(VARIANTS[variant], sizes, seed), shards)
        write_json(partial / NOTE, note)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


# ---------------------------------------------- layouts ----------------------------------------------


def write_official(folder: Path, modules: Modules, shards: int) -> None:
    """The layout of Wan-AI's own repositories."""
    places = [folder / name for name in EXPERT_FOLDERS] if modules.variant.experts else [folder]
    for place, transformer in zip(places, modules.transformers, strict=True):
        place.mkdir(exist_ok=True)
        write_json(place / "config.json", official_config(modules))
        write_shards(place, renamed(transformer, TRANSFORMER), shards)
    vae_file, vae_names = (
        ("Wan2.2_VAE.pth", VAE22) if modules.variant.latent_channels == 48 else ("Wan2.1_VAE.pth", VAE)
    )
    torch.save(renamed(modules.vae, vae_names), folder / vae_file)
    torch.save(renamed(modules.text, TEXT), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    if modules.clip is not None:
        file = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
        torch.save(official_clip(renamed(modules.clip)), folder / file)
    write_tokenizer(folder / "google" / "umt5-xxl", modules.tokenizer)


def write_diffusers(folder: Path, modules: Modules, shards: int) -> None:
    """The layout of the repositories whose names end in `-Diffusers`."""
    for name in ("vae", "text_encoder", "scheduler"):
        (folder / name).mkdir()
    places = [folder / name for name in ("transformer", "transformer_2")[: len(modules.transformers)]]
    for place, transformer in zip(places, modules.transformers, strict=True):
        place.mkdir()
        transformer.save_config(place)
        write_shards(place, renamed(transformer), shards)
    modules.vae.save_config(folder / "vae")
    write_shards(folder / "vae", renamed(modules.vae), 1)
    modules.text.config.architectures = ["UMT5EncoderModel"]
    modules.text.config.save_pretrained(folder / "text_encoder")
    save_file(renamed(modules.text), folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    if modules.clip is not None:
        modules.clip.save_pretrained(folder / "image_encoder")
    write_tokenizer(folder / "tokenizer", modules.tokenizer)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", model_index(modules))


def model_index(modules: Modules) -> dict[str, object]:
    """What diffusers reads first: the pipeline, and the class of each folder."""
    variant = modules.variant
    index: dict[str, object] = {
        "_class_name": "WanImageToVideoPipeline" if variant.in_channels == 36 else "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    if variant.experts:
        index |= {
            "transformer_2": ["diffusers", "WanTransformer3DModel"],
            "boundary_ratio": BOUNDARIES[variant.model_type],
        }
    if modules.clip is not None:
        index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    if variant.model_type == "ti2v":
        index["expand_timesteps"] = True
    return index


LAYOUTS = {"official": write_official, "diffusers": write_diffusers}


def official_config(modules: Modules) -> dict[str, object]:
    """The transformer's config.json under the official names."""
    config = modules.transformers[0].config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": modules.variant.model_type,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": 512,
    }


def official_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's tower under the names of the official file, which has q, k and v in one tensor."""
    fused: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = name.removeprefix("vision_model.")
        if ".self_attn.q_proj." in plain:
            parts = [weights[name.replace(".q_proj.", f".{part}.")] for part in ("q_proj", "k_proj", "v_proj")]
            plain, tensor = plain.replace(".q_proj.", ".qkv_proj."), torch.cat(parts)
        elif ".k_proj." in plain or ".v_proj." in plain:
            continue
        stored = IMAGE.from_skeleton(plain)
        assert stored is not None, f"the key table lacks {plain}"
        fused[stored] = tensor
    # the official embeddings have leading axes of length 1
    for name in ("visual.cls_embedding", "visual.pos_embedding"):
        while fused[name].ndim < 3:
            fused[name] = fused[name][None]
    return fused


def renamed(module: nn.Module, key_map: KeyMap | None = None) -> dict[str, Tensor]:
    """The module's parameters, each once, under the names of `key_map`."""
    weights = {}
    for name, parameter in module.named_parameters():
        stored = key_map.from_skeleton(name) if key_map else name
        assert stored is not None, f"the key table lacks {name}"
        weights[stored] = parameter.detach().contiguous()
    return weights


def write_shards(folder: Path, weights: Mapping[str, Tensor], shards: int) -> None:
    """One safetensors file, or several of about equal tensor counts with their index."""
    if shards == 1:
        save_file(dict(weights), folder / f"{TRANSFORMER_STEM}.safetensors", {"format": "pt"})
        return
    names = sorted(weights)
    numbers = {name: i * shards // len(names) + 1 for i, name in enumerate(names)}
    place = {name: f"{TRANSFORMER_STEM}-{number:05d}-of-{shards:05d}" for name, number in numbers.items()}
    for stem in sorted(set(place.values())):
        part = {name: weights[name] for name in names if place[name] == stem}
        save_file(part, folder / f"{stem}.safetensors", {"format": "pt"})
    total_size = sum(tensor.nbytes for tensor in weights.values())
    weight_map = {name: f"{stem}.safetensors" for name, stem in place.items()}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / f"{TRANSFORMER_STEM}.safetensors.index.json", index)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, and what transformers' AutoTokenizer wants beside it."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, eos, unk = SPECIAL_TOKENS
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad, "eos_token": eos, "unk_token": unk}
    write_json(folder / "tokenizer_config.json", config)


def write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="official")
    parser.add_argument("--variant", choices=list(VARIANTS), default="t2v")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="files that a transformer is split into")
    for name, default in Sizes._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    given = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(given, name) for name in Sizes._fields})
    try:
        new = write_checkpoint(given.folder, given.layout, given.seed, given.shards, sizes, given.variant)
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.folder}: {'written' if new else 'already there'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
