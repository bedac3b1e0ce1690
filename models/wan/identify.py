"""What a weight file is, told by the names and shapes in it: for hints in errors and for people who ask."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from models.quantised import FILE_MARKER, METADATA_KEY, MODULE_MARKER, SCALE_ENDINGS
from models.wan import variants
from models.wan.keymaps import TRANSFORMER
from models.weights import Identify, strip_prefix

TRANSFORMER_KEY, VAE_KEY, TEXT_KEY, IMAGE_KEY = "transformer_path", "vae_path", "llm_path", "clip_path"
ADAPTER_KEY = "[adapter] init_from_existing"


class Kind(NamedTuple):
    """A kind of file, told by names that only it has."""

    title: str  # an article and a noun, or a plural
    key: str | None  # the setting that takes it; None: nothing here does
    signs: tuple[str, ...]  # regular expressions; each fits the beginning of some name, less ComfyUI's prefix


WAN_MODULE = r"(?<!transformer_)blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)[._]"
ADAPTER_PART = r"\.(lora_(A|B|down|up)|lora\.(down|up)|lokr_w\d|hada_w\d|oft_)"
WAN_TRANSFORMER = "a Wan transformer"

# the first kind that fits is it: what is a part of something larger stands below it
KINDS = (
    Kind("an adapter for Wan", ADAPTER_KEY, (rf".*{WAN_MODULE}.*{ADAPTER_PART}",)),
    Kind("an adapter for FLUX or HunyuanVideo", None, (rf".*(double|single)_blocks[._].*{ADAPTER_PART}",)),
    Kind("an adapter for Stable Diffusion", None, (rf".*(down|up|input|output)_blocks[._].*{ADAPTER_PART}",)),
    Kind("an adapter for another model", None, (rf".*{ADAPTER_PART}",)),
    Kind("weights that bitsandbytes quantised", None, (r".*\.weight\.(absmax|quant_map|quant_state)",)),
    # whole checkpoints in one file
    Kind("a Stable Diffusion XL checkpoint", None, (r"conditioner\.embedders\.",)),
    Kind("a Stable Diffusion checkpoint", None, (r"cond_stage_model\.", r"first_stage_model\.")),
    Kind(
        "an all-in-one file of transformer, VAE and text encoder, which cannot be read; take the single files",
        None,
        (r"model\.diffusion_model\.", r"(text_encoders?|vae|first_stage_model)\."),
    ),
    # transformers
    Kind(WAN_TRANSFORMER, TRANSFORMER_KEY, (r"patch_embedding\.weight", r"blocks\.\d+\.(self_attn|attn1)\.")),
    Kind("a VACE module without the Wan transformer it belongs to", None, (r"vace_blocks\.",)),
    Kind("a part of a Wan transformer", TRANSFORMER_KEY, (r"blocks\.\d+\.(self_attn\.q|attn1\.to_q)\.",)),
    Kind("a HunyuanVideo transformer", None, (r"(txt_in|context_embedder)\.(individual_)?token_refiner\.",)),
    Kind("a FLUX transformer", None, (r"(double_blocks\.\d+\.img_attn|single_transformer_blocks)\.",)),
    Kind("an LTX-Video transformer", None, (r"(patchify_proj|proj_in)\.", r"transformer_blocks\.\d+\.attn1\.")),
    Kind("a Qwen-Image transformer", None, (r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.",)),
    Kind("a Stable Diffusion 3 transformer", None, (r"joint_blocks\.",)),
    Kind("a Stable Diffusion UNet", None, (r"(input_blocks\.\d+\.|down_blocks\.\d+\.attentions\.)",)),
    # VAEs
    Kind("the VAE of Wan2.2's TI2V-5B (official names)", VAE_KEY, (r"encoder\.downsamples\.\d+\.downsamples\.",)),
    Kind("the VAE of Wan2.1 (official names)", VAE_KEY, (r"encoder\.downsamples\.\d+\.residual\.",)),
    Kind(
        "the VAE of Wan2.2's TI2V-5B (diffusers' names)",
        VAE_KEY,
        (r"encoder\.down_blocks\.\d+\.resnets\.\d+\.norm\d\.gamma",),
    ),
    Kind("the VAE of Wan2.1 (diffusers' names)", VAE_KEY, (r"encoder\.down_blocks\.\d+\.norm\d\.gamma",)),
    Kind(
        "a VAE of another model",
        None,
        (r"(first_stage_model\.)?encoder\.(down\.\d+\.block|down_blocks\.\d+\.resnets|conv_in)\.",),
    ),
    # text encoders
    Kind(
        "a T5 with its decoder, of which only the encoder is wanted",
        None,
        (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.", r"decoder\.block\.\d+\.layer\."),
    ),
    Kind(
        "UMT5 text encoder weights (transformers' names)",
        TEXT_KEY,
        (r"encoder\.block\.1\.layer\.0\.SelfAttention\.relative_attention_bias\.",),
    ),
    Kind(
        "T5 text encoder weights, of Stable Diffusion 3 or FLUX for instance, and not UMT5",
        None,
        (r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.",),
    ),
    Kind(
        "UMT5 text encoder weights (official names)",
        TEXT_KEY,
        (r"token_embedding\.weight", r"blocks\.\d+\.ffn\.gate\."),
    ),
    # image encoders
    Kind("CLIP weights (official names)", IMAGE_KEY, (r"visual\.transformer\.\d+\.attn\.to_qkv\.",)),
    Kind("SigLIP weights, and not CLIP", None, (r"vision_model\.head\.attention\.",)),
    Kind("CLIP weights (transformers' names)", IMAGE_KEY, (r"vision_model\.encoder\.layers\.",)),
    Kind("a CLIP text encoder, of Stable Diffusion or FLUX", None, (r"text_model\.encoder\.layers\.",)),
)

# kind of adapter -> the parts that only it has
ADAPTER_KINDS = {
    "LoKr": r"\.lokr_w",
    "LoHa": r"\.hada_w",
    "OFT": r"\.oft_",
    "DoRA": r"\.(dora_scale|lora_magnitude_vector)",
    "LoRA": r".",
}
# how its modules are named -> how a name begins
ADAPTER_NAMES = {
    "kohya's names": r"(lora_unet|lycoris)_",
    "ComfyUI's names": r"diffusion_model\.blocks\.\d+\.(self_attn|cross_attn|ffn)",
    "diffusers' names": r"(transformer\.|base_model\.model\.)?blocks\.\d+\.attn[12]",
    "official names": r"(base_model\.model\.)?blocks\.",
}
# module whose width is the model's, and the part of its adapter with a column for each
WIDTH_OF_ADAPTER = re.compile(r".*(self_attn[._]q|attn1[._]to_q)\.(lora_A|lora_down|lora\.down)\b.*")


def identify(names: Collection[str], shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
    """What a file is, an article and a noun with particulars; None for a file that no row of `KINDS` fits.

    Args:
        names: of all tensors, as the file spells them.
        shapes: by those names.
        metadata: of the header.
    """
    kind = _kind(names)
    if kind is None:
        return None
    if kind.key == ADAPTER_KEY:
        return _adapter(names, shapes)
    told = _transformer(names, shapes) if kind.title == WAN_TRANSFORMER else kind.title
    return told + _quantisation(names, metadata)


def hint_for(key: str) -> Identify:
    """For errors about the file that the setting `key` named: what it is, and where it belongs. None where it is of the
    right kind, so that something else is wrong with it."""

    def hint(shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> str | None:
        kind = _kind(shapes)
        if kind is None or kind.key == key:
            return None
        told = identify(shapes, shapes, metadata)
        return f"this looks like {told}" + (f"; set {kind.key} to it" if kind.key else "")

    return hint


def _kind(names: Collection[str]) -> Kind | None:
    lines = "\n".join({*names, *map(strip_prefix, names)})
    fits = (kind for kind in KINDS if all(re.search(f"^(?:{sign})", lines, re.MULTILINE) for sign in kind.signs))
    return next(fits, None)


def _transformer(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`a Wan2.1 I2V transformer (14B, official names, prefix model.diffusion_model.)`."""
    plain = {strip_prefix(name): shape for name, shape in shapes.items()}
    sizes = variants.sizes_from_shapes({TRANSFORMER.to_skeleton(name) or name: shape for name, shape in plain.items()})
    variant = variants.row_of((sizes.get("in_dim", 0), sizes.get("out_dim", 0)), plain)
    size = variants.SIZES.get(sizes.get("dim", 0), f"{sizes.get('dim')} wide")
    title = variant.title if variant else "Wan"
    if title == variants.VARIANTS[-1].title and size == "14B":
        title = f"{title} or {variants.T2V_A14B.title}"  # one cannot be told from the other
    naming = "diffusers' names" if any(".attn1." in name for name in names) else "official names"
    first = next(iter(names))
    prefix = first[: len(first) - len(strip_prefix(first))]
    particulars = [size, naming, *([f"prefix {prefix}"] if prefix else [])]
    return f"a {title} transformer ({', '.join(particulars)})"


def _adapter(names: Collection[str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`a LoRA for Wan 14B (kohya's names)`."""
    lines = "\n".join(names)
    kind = next(kind for kind, part in ADAPTER_KINDS.items() if re.search(part, lines))
    naming = next((title for title, start in ADAPTER_NAMES.items() if re.search(f"^{start}", lines, re.MULTILINE)), "")
    widths = {shapes[name][1] for name in names if WIDTH_OF_ADAPTER.fullmatch(name) and len(shapes[name]) == 2}
    size = variants.SIZES.get(widths.pop(), "") if len(widths) == 1 else ""
    told = f"a {kind} for Wan{f' {size}' if size else ''}"
    return f"{told} ({naming})" if naming else told


def _quantisation(names: Collection[str], metadata: Mapping[str, str]) -> str:
    old = any(name.endswith((FILE_MARKER, SCALE_ENDINGS[1])) for name in names)
    new = METADATA_KEY in metadata or any(name.endswith((MODULE_MARKER, SCALE_ENDINGS[0])) for name in names)
    if not (old or new):
        return ""
    return f", quantised by ComfyUI ({'old' if old else 'new'} keys)"
