"""What a `[model]` table tells of a Wan whose weights may not be there yet."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from models.base import MediaSpec, Outline
from models.wan import variants
from models.wan.checkpoint import look_up
from models.wan.config import WanModelConfig
from models.wan.layouts import TOKENIZER_PLACES
from models.wan.tokenizer import open_tokenizer
from models.wan.variants import T2V_A14B, VARIANTS, Variant

LATENT_BYTES = 4  # latents and conditions are stored in float32
TIME_STRIDE = 4  # frames a latent frame, after the first
IMAGE_DIM, TEXT_DIM = 1280, 4096  # of CLIP ViT-H and UMT5-XXL, where no tensor tells
NO_LIMIT = 2**20  # tokens of a caption

BY_TITLE = {variant.title: variant for variant in (*VARIANTS, T2V_A14B)}
DEFAULT = "Wan2.1 T2V"
# what the paths of a checkpoint are called, in small letters -> the title of its variant; the first that fits is it
NAMES = (
    (r"flf2v", "Wan2.1 FLF2V"),
    (r"ti2v|[-_. ]5b", "Wan2.2 TI2V-5B"),
    (r"i2v[-_. ]?a14b|wan[-_. ]?2[-_. ]?2.*i2v|i2v.*(high|low)[-_. ]?noise", "Wan2.2 I2V-A14B"),
    (r"t2v[-_. ]?a14b|wan[-_. ]?2[-_. ]?2|(high|low)[-_. ]?noise", "Wan2.2 T2V-A14B"),
    (r"i2v|[-_. ]inp", "Wan2.1 I2V"),
    (r"t2v", "Wan2.1 T2V"),
)


def outline(config: WanModelConfig) -> Outline:
    """From the files as far as they are there, else from what they are called."""
    text_dim, image_dim = TEXT_DIM, IMAGE_DIM
    try:
        found = look_up(config)
    except (ValueError, OSError) as error:
        variant, how = guess(config)
        there = any(path and path.exists() for path in (config.ckpt_path, config.transformer_path))
        title, notes = variant.title, [how, *(asked(str(error).splitlines()) if there else ())]
    else:
        variant, notes = found.variant, asked(found.problems)
        title = variants.full_title(variant, found.sizes, f"{found.expert} noise" if found.expert else "")
        text_dim, image_dim = found.sizes.text_dim, found.sizes.image_dim
    assert variant.media is not None, "neither detection nor the names give variants without"
    return Outline(
        title=title,
        media=variant.media,
        tokens=partial(num_tokens, variant.media),
        cache_bytes=partial(cache_bytes, config, variant, image_dim),
        caption_token_bytes=text_dim * config.compute_dtype.itemsize,
        max_caption_tokens=config.text_max_length,
        count_caption_tokens=token_counter(config),
        notes=notes,
    )


def asked(problems: Sequence[str]) -> list[str]:
    return [f"the start will stop at this: {problem}" for problem in problems]


def guess(config: WanModelConfig) -> tuple[Variant, str]:
    """The variant that the names in a `[model]` table speak of, and a sentence on how it was told."""
    for key in ("transformer_path", "ckpt_path"):
        path = getattr(config, key)
        name = "/".join(path.parts[-2:]).lower() if path else ""
        title = next((title for sign, title in NAMES if re.search(sign, name)), None)
        if title:
            how = f"taken for {title} by the name of [model] {key} = '{path}', whose weights are absent"
            return BY_TITLE[title], how
    keys = {"clip_path": "Wan2.1 I2V", "expert": "Wan2.2 T2V-A14B"}
    for key, title in keys.items():
        if getattr(config, key):
            return BY_TITLE[title], f"taken for {title}, since [model] {key} is set and the weights are absent"
    key = "transformer_path" if config.transformer_path else "ckpt_path"
    where = f"no weights are at [model] {key} = '{getattr(config, key)}'"
    return BY_TITLE[DEFAULT], f"taken for {DEFAULT}: {where}, and no name tells which Wan they will be"


def num_tokens(media: MediaSpec, width: int, height: int, frames: int) -> int:
    """T * H/2 * W/2: the VAE takes 4 x 8 x 8 pixels to one latent, Wan2.2's 4 x 16 x 16, and a patch 1 x 2 x 2 latents
    to one token."""
    token_px = media.pixel_multiple
    return ((frames - 1) // TIME_STRIDE + 1) * (height // token_px) * (width // token_px)


def cache_bytes(
    config: WanModelConfig, variant: Variant, image_dim: int, width: int, height: int, frames: int
) -> Mapping[str, int]:
    """Bytes of the tensors that the encoders make of one clip, as `WanFamily.encoders` lists them."""
    from models.wan.vae import VERSIONS  # brings diffusers

    stride = VERSIONS[variant.vae].space_stride
    channels = variant.channels[1] if variant.channels else 16
    latents = channels * ((frames - 1) // TIME_STRIDE + 1) * (height // stride) * (width // stride) * LATENT_BYTES
    sizes = {"latents": latents}
    if variant.frames_given != "none":
        sizes["condition"] = latents
    if variant.image_states:
        sizes["image"] = variant.image_states * image_dim * config.clip_dtype.itemsize
    return sizes


def token_counter(config: WanModelConfig) -> Callable[[str], int] | None:
    """How many tokens UMT5 makes of a caption; None where there is no tokenizer to ask."""
    places = [config.ckpt_path / place for place in TOKENIZER_PLACES] if config.ckpt_path else []
    for folder in filter(None, (config.tokenizer_path, *places)):
        try:
            tokenizer = open_tokenizer(folder, NO_LIMIT)
        except (ValueError, OSError):
            continue  # the start will say so
        from models.wan.text import clean_caption  # brings transformers

        return lambda caption: len(tokenizer.encode(clean_caption(caption)).ids)
    return None
