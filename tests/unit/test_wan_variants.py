"""Every row of the table of variants is told from tensor names and channels, and every released size from shapes."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from models.wan import variants
from models.wan.keymaps import TRANSFORMER

SMALL = variants.Architecture(1536, 8960, 12, 30, 256, 16, 16, 4096, 1e-6)
BIG = SMALL._replace(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
FIVE = SMALL._replace(dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48)
IMAGE = BIG._replace(in_dim=36, image_dim=1280)


def shapes_of(sizes):
    with torch.device("meta"):
        model = WanTransformer3DModel(**sizes.diffusers_arguments())
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("sizes", "title", "size", "parameters"),
    [
        (SMALL, "Wan2.1 T2V", "1.3B", 1_418_996_800),
        (BIG, "Wan2.1 T2V", "14B", 14_288_491_584),
        (IMAGE, "Wan2.1 I2V", "14B", 16_394_878_784),
        (IMAGE._replace(pos_embed_seq_len=514), "Wan2.1 FLF2V", "14B", 16_395_536_704),
        (SMALL._replace(in_dim=36, image_dim=1280), "Wan2.1 I2V", "1.3B", 1_564_428_608),  # Fun InP
        (BIG._replace(in_dim=36), "Wan2.2 I2V-A14B", "14B", 14_288_901_184),
        (FIVE, "Wan2.2 TI2V-5B", "5B", 4_999_787_712),
    ],
)
@pytest.mark.parametrize("naming", ["official", "diffusers"])
def test_released_models_from_shapes_alone(sizes, title, size, parameters, naming):
    """Also with nothing else: no config.json, and names as either side spells them."""
    shapes = shapes_of(sizes)
    names = list(shapes) if naming == "diffusers" else [TRANSFORMER.from_skeleton(name) for name in shapes]
    assert variants.architecture({}, shapes) == sizes
    assert variants.detect(sizes, names).title == title and variants.size_name(sizes) == size
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters


@pytest.mark.parametrize(
    ("channels", "mark", "title"),
    [
        ((16, 16), "vace_blocks.0.norm3.weight", "VACE"),
        ((16, 16), "audio_injector.injector.0.q.weight", "S2V"),
        ((16, 16), "casual_audio_encoder.weights", "S2V"),
        ((36, 16), "pose_patch_embedding.weight", "Animate"),
        ((36, 16), "control_adapter.conv.weight", "Fun-Control"),
        ((48, 16), "ref_conv.weight", "Fun-Control"),
        ((48, 16), "head.head.weight", "Fun-Control"),
        ((52, 16), "head.head.weight", "Wan2.2 Fun-Control"),
        ((100, 48), "head.head.weight", "Wan2.2 Fun 5B InP"),
        ((148, 48), "head.head.weight", "Wan2.2 Fun 5B Control"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_what_cannot_be_trained_is_named(channels, mark, title, prefix):
    sizes = BIG._replace(in_dim=channels[0], out_dim=channels[1])
    with pytest.raises(ValueError, match=rf"this is {title} \(14B, {channels[0]} channels in, {channels[1]} out\)"):
        variants.detect(sizes, [prefix + mark, prefix + "img_emb.proj.0.weight"])


def test_no_wan():
    with pytest.raises(ValueError, match="52 channels in and 20 out is no known Wan"):
        variants.detect(SMALL._replace(in_dim=52, out_dim=20), ["head.head.weight"])


def test_heads_that_nothing_tells():
    told = {key: value for key, value in SMALL._replace(dim=48)._asdict().items() if key != "num_heads"}
    with pytest.raises(ValueError, match=r"tell num_heads; put the config\.json beside"):
        variants.architecture(told, {})


def test_the_official_config_tells_no_sizes_of_the_image_embedder():
    """They are constants of the official code, which would stumble over keys it does not know."""
    config = IMAGE.official_config("i2v")
    assert config["in_dim"] == 36 and not {"image_dim", "pos_embed_seq_len"} & config.keys()


@pytest.mark.parametrize(
    ("sizes", "part", "title"),
    [
        (SMALL, "", "Wan2.1 T2V 1.3B"),
        (FIVE, "", "Wan2.2 TI2V-5B"),
        (BIG._replace(in_dim=36), "high noise", "Wan2.2 I2V-A14B high noise 14B"),
        (BIG._replace(in_dim=36), "both experts", "Wan2.2 I2V-A14B both experts 14B"),
        (IMAGE, "", "Wan2.1 I2V 14B"),
    ],
)
def test_titles(sizes, part, title):
    names = ["img_emb.proj.0.weight"] if sizes.image_dim else []
    assert variants.full_title(variants.detect(sizes, names), sizes, part) == title
