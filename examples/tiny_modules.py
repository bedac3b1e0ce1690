"""The modules of a tiny random Wan of any variant, real in architecture; `tiny_wan.py` writes them as a checkpoint."""

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from models.wan.vae import VERSIONS

CAPTIONS = Path(__file__).resolve().parent / "data"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # 0, 1 and 2, as in UMT5
CLIP_HEAD_DIM, CLIP_TOKENS = 80, 257  # of ViT-H/14 at 224 px

# Spread of a random weight in units of 1 / sqrt(fan in), by the end of its name; 1 for the rest. UMT5 does not divide
# attention scores by sqrt(head size), so its queries start that much smaller. The prediction starts small, since a
# random one adds its own variance to the loss; not at zero, where no gradient would pass it.
GAINS = {"SelfAttention.q.weight": 0.25, "relative_attention_bias.weight": 0.5, "proj_out.weight": 0.3}
BIAS_SPREAD = 0.02


class Variant(NamedTuple):
    """What sets one Wan apart from the others."""

    model_type: str  # in the official config.json
    in_channels: int
    latent_channels: int = 16
    images: int = 0  # frames that CLIP sees
    experts: bool = False  # two transformers


VARIANTS = {
    "t2v": Variant("t2v", 16),
    "i2v": Variant("i2v", 36, images=1),
    "flf2v": Variant("flf2v", 36, images=2),
    "t2v-a14b": Variant("t2v", 16, experts=True),
    "i2v-a14b": Variant("i2v", 36, experts=True),
    "ti2v": Variant("ti2v", 48, 48),
}


class Sizes(NamedTuple):
    """The widths and depths that may be chosen; the rest is Wan's."""

    dim: int = 96  # of the transformer
    heads: int = 4
    layers: int = 6
    ffn_dim: int = 256
    text_dim: int = 64
    text_heads: int = 4
    text_layers: int = 2
    text_ffn_dim: int = 128
    vae_dim: int = 4  # of the VAE's first level
    clip_layers: int = 2


class Modules(NamedTuple):
    """All that a checkpoint holds."""

    variant: Variant
    transformers: tuple[WanTransformer3DModel, ...]  # of two experts high noise comes first
    vae: AutoencoderKLWan
    text: UMT5EncoderModel
    tokenizer: Tokenizer
    clip: CLIPVisionModel | None


def check_sizes(sizes: Sizes) -> None:
    """`ValueError` where the architecture has no such model."""
    head_dim, rest = divmod(sizes.dim, sizes.heads)
    if rest or head_dim % 2 or head_dim < 12:
        raise ValueError(f"dim {sizes.dim} / heads {sizes.heads} must be even and 12 or more, for the rotary embedding")
    if sizes.text_dim % sizes.text_heads:
        raise ValueError(f"text_dim {sizes.text_dim} is not divisible by text_heads {sizes.text_heads}")
    if min(sizes) < 1 or sizes.vae_dim % 2:
        raise ValueError("sizes must be 1 or more, and vae_dim even: the VAE's decoder halves it")


@torch.no_grad()
def make_modules(variant: Variant, sizes: Sizes, seed: int) -> Modules:
    """Random weights, the same for every layout. Variants share what they have in common."""
    tokenizer = make_tokenizer([file.read_text(encoding="utf-8") for file in sorted(CAPTIONS.glob("*/*.txt"))])
    vae = make_vae(variant, sizes)
    text = UMT5EncoderModel(umt5_config(sizes, tokenizer.get_vocab_size()))
    fill_randomly(vae, seed + 1)
    fill_randomly(text, seed + 2)
    calibrate_latents(vae, seed + 3)
    clip = None
    if variant.images:
        clip = CLIPVisionModel(clip_config(sizes))
        fill_randomly(clip, seed + 4)
    transformers = []
    for expert in range(2 if variant.experts else 1):
        transformers.append(make_transformer(variant, sizes))
        fill_randomly(transformers[-1], seed + 100 * expert)
    return Modules(variant, tuple(transformers), vae, text.to(torch.bfloat16), tokenizer, clip)


def make_transformer(variant: Variant, sizes: Sizes) -> WanTransformer3DModel:
    given: dict[str, object] = {}
    if variant.images:
        given = {"image_dim": CLIP_HEAD_DIM, "added_kv_proj_dim": sizes.dim}
    if variant.images == 2:
        given["pos_embed_seq_len"] = 2 * CLIP_TOKENS
    return WanTransformer3DModel(
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.dim // sizes.heads,
        in_channels=variant.in_channels,
        out_channels=variant.latent_channels,
        text_dim=sizes.text_dim,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
        **given,
    )


def make_vae(variant: Variant, sizes: Sizes) -> AutoencoderKLWan:
    version = VERSIONS["2.2" if variant.latent_channels == 48 else "2.1"]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in version.arguments.items()}
    return AutoencoderKLWan(base_dim=sizes.vae_dim, decoder_base_dim=sizes.vae_dim, **plain)


def clip_config(sizes: Sizes) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=CLIP_HEAD_DIM,
        intermediate_size=2 * CLIP_HEAD_DIM,
        num_hidden_layers=sizes.clip_layers,
        num_attention_heads=1,
        image_size=224,
        patch_size=14,
        hidden_act="gelu",
    )


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
    channels = mean.shape[1]
    wanted_mean, wanted_std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    gain = wanted_std / mean.std(dim=(0, 2, 3, 4))
    vae.quant_conv.weight[:channels] *= gain[:, None, None, None, None]
    shift = wanted_mean - gain * (mean.mean(dim=(0, 2, 3, 4)) - vae.quant_conv.bias[:channels])
    vae.quant_conv.bias[:channels] = shift


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
