"""Which Wan a checkpoint is, and its sizes: a table of released variants, read off the config and tensor shapes."""

import math
import re
from collections.abc import Collection, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

from models.base import MediaSpec
from models.json_files import read_table

PATCH = (1, 2, 2)  # latent frames, rows and columns that make a token
TEXT_LENGTH = 512  # rows that cross attention sees; shorter captions are followed by zeros, as Wan was trained
HEAD_DIM = 128  # of every released Wan
SIZES = {1536: "1.3B", 3072: "5B", 5120: "14B"}


class Variant(NamedTuple):
    """A kind of Wan, told by tensors that only it has, and by its channels."""

    title: str
    model_type: str  # as the official config.json calls it
    marks: tuple[str, ...]  # one of these is part of a tensor's name, in official or diffusers naming
    channels: tuple[int, int] | None  # in and out of the transformer; None where marks say enough
    media: MediaSpec | None  # None: not supported
    vae: Literal["2.1", "2.2"] = "2.1"
    frames_given: Literal["none", "first", "first and last"] = "none"  # joined as mask and condition channels
    image_states: int = 0  # CLIP states of the given frames that cross attention sees; 0: no CLIP
    first_frame_clean: bool = False  # can train image to video by leaving the first latent frame without noise
    boundary: float | None = None  # lowest t of the high-noise expert; None: one model for all t


_MEDIA = MediaSpec(fps=Fraction(16), pixel_multiple=16, frame_stride=4, images=True)
_I2V_MEDIA = _MEDIA._replace(images=False)
_TI2V_MEDIA = MediaSpec(fps=Fraction(24), pixel_multiple=32, frame_stride=4, images=True, latent_stride=16)
_FIRST, _BOTH = {"frames_given": "first"}, {"frames_given": "first and last"}

# the first row that fits is it, so rows with marks stand first
VARIANTS = (
    Variant("VACE", "vace", ("vace_blocks.",), None, None),
    Variant("S2V", "s2v", ("audio_injector.", "casual_audio_encoder."), None, None),
    Variant("Animate", "animate", ("pose_patch_embedding.",), None, None),
    Variant("Fun-Control", "fun_control", ("ref_conv.", "control_adapter."), None, None),
    Variant(
        "Wan2.1 FLF2V",
        "flf2v",
        ("img_emb.emb_pos", "image_embedder.pos_embed"),
        (36, 16),
        _I2V_MEDIA,
        **_BOTH,
        image_states=514,
    ),
    Variant("Wan2.1 I2V", "i2v", ("img_emb.", "image_embedder."), (36, 16), _I2V_MEDIA, **_FIRST, image_states=257),
    Variant("Wan2.2 I2V-A14B", "i2v", (), (36, 16), _I2V_MEDIA, **_FIRST, boundary=0.9),
    Variant("Wan2.2 TI2V-5B", "ti2v", (), (48, 48), _TI2V_MEDIA, vae="2.2", first_frame_clean=True),
    Variant("Fun-Control", "fun_control", (), (48, 16), None),
    Variant("Wan2.2 Fun-Control", "fun_control", (), (52, 16), None),
    Variant("Wan2.2 Fun 5B InP", "fun_inp", (), (100, 48), None),
    Variant("Wan2.2 Fun 5B Control", "fun_control", (), (148, 48), None),
    Variant("Wan2.1 T2V", "t2v", (), (16, 16), _MEDIA),
)
# the same tensors as Wan2.1 T2V: it takes a folder, a file's name or `expert` to tell
T2V_A14B = VARIANTS[-1]._replace(title="Wan2.2 T2V-A14B", boundary=0.875)


class Architecture(NamedTuple):
    """Sizes of the transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int  # of the sinusoid that embeds the timestep
    in_dim: int  # latent channels in
    out_dim: int  # latent channels out
    text_dim: int
    eps: float
    image_dim: int = 0  # of CLIP states; 0: no image embedder
    pos_embed_seq_len: int = 0  # CLIP states that have a position embedding (FLF2V: both frames'); 0: it has none

    def diffusers_arguments(self) -> dict[str, Any]:
        """What `WanTransformer3DModel` is built with."""
        return {
            "patch_size": PATCH,
            "num_attention_heads": self.num_heads,
            "attention_head_dim": self.dim // self.num_heads,
            "in_channels": self.in_dim,
            "out_channels": self.out_dim,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.num_layers,
            "eps": self.eps,
            "image_dim": self.image_dim or None,
            "added_kv_proj_dim": self.dim if self.image_dim else None,
            "pos_embed_seq_len": self.pos_embed_seq_len or None,
        }

    def official_config(self, model_type: str) -> dict[str, Any]:
        """The config.json that the official code reads."""
        own = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": model_type}
        told = {size: value for size, value in self._asdict().items() if size not in IMAGE_SIZES}
        return {**own, "text_len": TEXT_LENGTH, **told}


def smallest(sizes: Architecture) -> Architecture:
    """One block of two heads of the same width; what comes in and goes out has the same widths."""
    heads = min(2, sizes.num_heads)
    dim = heads * (sizes.dim // sizes.num_heads)
    return sizes._replace(dim=dim, num_heads=heads, ffn_dim=min(2 * dim, sizes.ffn_dim), num_layers=1)


# a size -> tensor that shows it, and how
SHAPE_OF: dict[str, tuple[str, int]] = {
    "dim": ("patch_embedding.weight", 0),
    "in_dim": ("patch_embedding.weight", 1),
    "ffn_dim": ("blocks.0.ffn.net.0.proj.weight", 0),
    "freq_dim": ("condition_embedder.time_embedder.linear_1.weight", 1),
    "text_dim": ("condition_embedder.text_embedder.linear_1.weight", 1),
    "image_dim": ("condition_embedder.image_embedder.norm1.weight", 0),
    "pos_embed_seq_len": ("condition_embedder.image_embedder.pos_embed", 1),
}
# of the image embedder: the official code has them as constants, so its config.json does not tell them
IMAGE_SIZES = ("image_dim", "pos_embed_seq_len")
MOST_BLOCKS, MOST_WIDTH = 1000, 1 << 20  # the largest Wan has 40 blocks of width 5120
DIFFUSERS_KEYS = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}


def read_config(file: Path) -> dict[str, Any]:
    """Sizes that a config.json of either naming tells, under `Architecture`'s names; other keys are left out."""
    try:
        raw = read_table(file)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from error
    keys = {ours: ours for ours in Architecture._fields if ours not in IMAGE_SIZES}
    if "attention_head_dim" in raw:
        keys = {**DIFFUSERS_KEYS, "attention_head_dim": "head_dim"}
    sizes = {ours: _size(file, theirs, raw[theirs]) for theirs, ours in keys.items() if raw.get(theirs) is not None}
    if (head_dim := sizes.pop("head_dim", None)) and "num_heads" in sizes:
        sizes["dim"] = head_dim * sizes["num_heads"]
    return sizes


def _size(place: str | Path, key: str, value: Any) -> Any:
    """`value`, which a skeleton can be built with: one of a billion blocks would take days."""
    if key == "eps":
        is_size = isinstance(value, float) and 0 < value < 1
    else:
        is_size = type(value) is int and 0 < value <= (MOST_BLOCKS if key == "num_layers" else MOST_WIDTH)
    if not is_size:
        raise ValueError(f"{place}: {key} = {str(value)[:40]} is no size of such a model; download it again")
    return value


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the tensors show, by skeleton names; sizes whose tensor is absent are left out."""
    sizes: dict[str, Any] = {
        size: shapes[name][axis] for size, (name, axis) in SHAPE_OF.items() if shapes.get(name, ())[axis:]
    }
    if shapes.get("proj_out.weight"):
        sizes["out_dim"] = shapes["proj_out.weight"][0] // math.prod(PATCH)
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    if blocks:
        sizes["num_layers"] = max(blocks) + 1
    return sizes


def architecture(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
    """Sizes from the config, and from tensor shapes where it is silent.

    Raises:
        ValueError: a size that neither tells, or that no model has.
    """
    shown = {size: _size("the tensors", size, value) for size, value in sizes_from_shapes(shapes).items()}
    sizes = {"eps": 1e-6, **shown, **config}
    if "num_heads" not in sizes and sizes.get("dim", 1) % HEAD_DIM == 0:
        sizes["num_heads"] = sizes["dim"] // HEAD_DIM
    missing = [size for size in Architecture._fields if size not in {**Architecture._field_defaults, **sizes}]
    if missing:
        raise ValueError(
            f"neither a config.json nor the tensors tell {', '.join(missing)}; put the config.json beside them"
        )
    if sizes["dim"] % (2 * sizes["num_heads"]):
        raise ValueError(
            f"dim = {sizes['dim']} does not divide into num_heads = {sizes['num_heads']} of an even width; download it "
            "again"
        )
    return Architecture(**sizes)


def detect(sizes: Architecture, names: Collection[str]) -> Variant:
    """The first row of `VARIANTS` that fits.

    Args:
        names: of all tensors in the files, as they are spelt there.

    Raises:
        ValueError: no row fits, or the row is not supported yet.
    """
    channels = (sizes.in_dim, sizes.out_dim)
    variant = row_of(channels, names)
    if variant is None:
        raise ValueError(f"a transformer with {channels[0]} channels in and {channels[1]} out is no known Wan")
    if variant.media is None:
        supported = ", ".join(sorted(row.title for row in (*VARIANTS, T2V_A14B) if row.media))
        raise ValueError(
            f"this is {variant.title} ({size_name(sizes)}, {channels[0]} channels in, {channels[1]} out), which cannot "
            f"be trained yet; supported: {supported}"
        )
    return variant


def row_of(channels: tuple[int, int], names: Collection[str]) -> Variant | None:
    """The first row of `VARIANTS` that fits `channels` in and out and the names, supported or not."""
    for variant in VARIANTS:
        marked = not variant.marks or any(mark in name for mark in variant.marks for name in names)
        if marked and variant.channels in (None, channels):
            return variant
    return None


def size_name(sizes: Architecture) -> str:
    """What people call the size: `1.3B`, `14B`; `custom size` for others."""
    return SIZES.get(sizes.dim, "custom size")


def full_title(variant: Variant, sizes: Architecture, part: str = "") -> str:
    """`Wan2.1 T2V 1.3B`, `Wan2.2 I2V-A14B high noise 14B`; a size that the title tells is not said again."""
    size = size_name(sizes)
    return " ".join(word for word in (variant.title, part, "" if variant.title.endswith(f"-{size}") else size) if word)
