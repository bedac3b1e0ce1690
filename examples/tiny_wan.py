"""Write a tiny random Wan2.1 T2V checkpoint, real in architecture and layout: `python examples/tiny_wan.py FOLDER`."""

import argparse
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a script, only this folder is on the path
    sys.path.append(str(ROOT))

from models.wan.encoder_keymaps import TEXT, VAE  # noqa: E402
from models.wan.keymaps import TRANSFORMER  # noqa: E402
from models.wan.vae import LATENTS_MEAN, LATENTS_STD  # noqa: E402
from models.weights import KeyMap  # noqa: E402

VERSION = 1  # raise when the same settings give another checkpoint
NOTE = "tiny_wan.json"  # what the folder was made with
CAPTIONS = ROOT / "examples" / "data"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # 0, 1 and 2, as in UMT5
TRANSFORMER_STEM = "diffusion_pytorch_model"
Z_DIM = 16

# Spread of a random weight in units of 1 / sqrt(fan in), by the end of its name; 1 for the rest. UMT5 does not divide
# attention scores by sqrt(head size), so its queries start that much smaller. The prediction starts small, since a
# random one adds its own variance to the loss; not at zero, where no gradient would pass it.
GAINS = {"SelfAttention.q.weight": 0.25, "relative_attention_bias.weight": 0.5, "proj_out.weight": 0.3}
BIAS_SPREAD = 0.02


class Sizes(NamedTuple):
    """The widths and depths that may be chosen; the rest is Wan2.1's."""

    dim: int = 96  # of the transformer
    heads: int = 4
    layers: int = 6
    ffn_dim: int = 256
    text_dim: int = 64
    text_heads: int = 4
    text_layers: int = 2
    text_ffn_dim: int = 128
    vae_dim: int = 4  # of the VAE's first level


class Modules(NamedTuple):
    """All that a checkpoint holds."""

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    text: UMT5EncoderModel
    tokenizer: Tokenizer


def write_checkpoint(
    folder: Path, layout: str = "official", seed: int = 0, shards: int = 1, sizes: Sizes | None = None
) -> bool:
    """Make the checkpoint in `folder`, which appears whole or not at all. Equal arguments give equal bytes.

    Args:
        layout: "official" (the folder that Wan-AI publishes) or "diffusers".
        shards: files that the transformer is split into.

    Returns:
        False if `folder` holds this very checkpoint already.

    Raises:
        ValueError: `folder` holds something else, or the sizes do not fit together.
    """
    sizes = sizes or Sizes()
    check_sizes(sizes)
    note = {"version": VERSION, "layout": layout, "seed": seed, "shards": shards, **sizes._asdict()}
    if folder.exists() and any(folder.iterdir()):
        written = folder / NOTE
        if written.is_file() and json.loads(written.read_text(encoding="utf-8")) == note:
            return False
        raise ValueError(f"{folder} holds something else already; remove it or name another folder")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        LAYOUTS[layout](partial, make_modules(sizes, seed), shards)
        write_json(partial / NOTE, note)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def check_sizes(sizes: Sizes) -> None:
    """`ValueError` where the architecture has no such model."""
    head_dim, rest = divmod(sizes.dim, sizes.heads)
    if rest or head_dim % 2 or head_dim < 12:
        raise ValueError(f"dim {sizes.dim} / heads {sizes.heads} must be even and 12 or more, for the rotary embedding")
    if sizes.text_dim % sizes.text_heads:
        raise ValueError(f"text_dim {sizes.text_dim} is not divisible by text_heads {sizes.text_heads}")
    if min(sizes) < 1 or sizes.vae_dim % 2:
        raise ValueError("sizes must be 1 or more, and vae_dim even: the VAE's decoder halves it")


# ---------------------------------------------- modules ----------------------------------------------


def make_modules(sizes: Sizes, seed: int) -> Modules:
    """Random weights, the same for every layout."""
    tokenizer = make_tokenizer([file.read_text(encoding="utf-8") for file in sorted(CAPTIONS.glob("*/*.txt"))])
    vae = AutoencoderKLWan(base_dim=sizes.vae_dim, latents_mean=list(LATENTS_MEAN), latents_std=list(LATENTS_STD))
    text = UMT5EncoderModel(umt5_config(sizes, tokenizer.get_vocab_size()))
    transformer = WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.dim // sizes.heads,
        in_channels=Z_DIM,
        out_channels=Z_DIM,
        text_dim=sizes.text_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
    )
    fill_randomly(transformer, seed)
    fill_randomly(vae, seed + 1)
    fill_randomly(text, seed + 2)
    calibrate_latents(vae, seed + 3)
    return Modules(transformer, vae, text.to(torch.bfloat16), tokenizer)


def umt5_config(sizes: Sizes, vocab_size: int) -> UMT5Config:
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=sizes.text_dim,
        d_kv=sizes.text_dim // sizes.text_heads,
        d_ff=sizes.text_ffn_dim,
        num_layers=sizes.text_layers,
        num_heads=sizes.text_heads,
        is_encoder_decoder=False,
    )


def fill_randomly(module: nn.Module, seed: int) -> None:
    """Every parameter from (seed, its name), so that no other parameter and no global state has a say."""
    module.requires_grad_(False).eval()
    for name, parameter in module.named_parameters():
        parameter.copy_(random_weight(name, parameter.shape, seed))


def random_weight(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Norms near one, biases small, tables of modulation 1 / sqrt(width), the rest so that variance is kept."""
    # torch reads the low 32 bits of a seed only, so both are mixed into these
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias") or "norm" in name:
        centre = 1.0 if name.endswith(("gamma", "weight")) else 0.0
        return centre + BIAS_SPREAD * noise
    if name == "shared.weight":
        return noise
    if name.endswith("scale_shift_table"):
        return noise / math.sqrt(shape[-1])
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
    return gain * noise / math.sqrt(math.prod(shape[1:]))


@torch.no_grad()
def calibrate_latents(vae: AutoencoderKLWan, seed: int) -> None:
    """Scale and shift the convolution that puts out the posterior so that its mean has, over soft random clips, Wan's
    statistics per channel: normalised latents then have zero mean and unit variance, as training expects."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((4, 3, 3, 4, 6), generator=generator)
    fine = torch.rand((4, 3, 9, 64, 96), generator=generator)
    soft = nn.functional.interpolate(coarse, fine.shape[2:], mode="trilinear")
    mean = vae.encode(1.8 * soft + 0.2 * fine - 1).latent_dist.mean
    gain = torch.tensor(LATENTS_STD) / mean.std(dim=(0, 2, 3, 4))
    vae.quant_conv.weight[:Z_DIM] *= gain[:, None, None, None, None]
    shift = torch.tensor(LATENTS_MEAN) - gain * (mean.mean(dim=(0, 2, 3, 4)) - vae.quant_conv.bias[:Z_DIM])
    vae.quant_conv.bias[:Z_DIM] = shift


def make_tokenizer(captions: Sequence[str]) -> Tokenizer:
    """A Unigram tokenizer of UMT5's kind that knows the captions' words, and letter by letter all of ASCII.

    Not by the library's trainer, whose result differs from run to run.
    """
    text = " ".join(captions)
    words = Counter(f"▁{word}" for word in re.findall(r"\w+", text))
    letters = {"▁", *map(chr, range(33, 127)), *(letter for letter in text if not letter.isspace())}
    rare = math.log(0.1 / sum(words.values()))
    pieces = [(token, 0.0) for token in SPECIAL_TOKENS]
    pieces += [(word, math.log(count / sum(words.values()))) for word, count in sorted(words.items())]
    pieces += [(letter, rare) for letter in sorted(letters - set(words))]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=SPECIAL_TOKENS.index("<unk>")))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    return tokenizer


# ---------------------------------------------- layouts ----------------------------------------------


def write_official(folder: Path, modules: Modules, shards: int) -> None:
    """The layout of Wan-AI's own repositories."""
    write_json(folder / "config.json", official_config(modules))
    write_shards(folder, renamed(modules.transformer, TRANSFORMER), shards)
    torch.save(renamed(modules.vae, VAE), folder / "Wan2.1_VAE.pth")
    torch.save(renamed(modules.text, TEXT), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl", modules.tokenizer)


def write_diffusers(folder: Path, modules: Modules, shards: int) -> None:
    """The layout of the repositories whose names end in `-Diffusers`."""
    for name in ("transformer", "vae", "text_encoder", "scheduler"):
        (folder / name).mkdir()
    modules.transformer.save_config(folder / "transformer")
    write_shards(folder / "transformer", renamed(modules.transformer), shards)
    modules.vae.save_config(folder / "vae")
    write_shards(folder / "vae", renamed(modules.vae), 1)
    modules.text.config.architectures = ["UMT5EncoderModel"]
    modules.text.config.save_pretrained(folder / "text_encoder")
    save_file(renamed(modules.text), folder / "text_encoder" / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder / "tokenizer", modules.tokenizer)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index)


LAYOUTS = {"official": write_official, "diffusers": write_diffusers}


def official_config(modules: Modules) -> dict[str, object]:
    """The transformer's config.json under the official names."""
    config = modules.transformer.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_dim": config.text_dim,
        "text_len": 512,
    }


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=1, help="files that the transformer is split into")
    for name, default in Sizes._field_defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    given = parser.parse_args(arguments)
    sizes = Sizes(**{name: getattr(given, name) for name in Sizes._fields})
    try:
        new = write_checkpoint(given.folder, given.layout, given.seed, given.shards, sizes)
    except ValueError as error:
        parser.error(str(error))
    print(f"{given.folder}: {'written' if new else 'already there'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
