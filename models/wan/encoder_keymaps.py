"""The names of Wan's VAEs, text and image encoder: official files on one side, the libraries' modules on the other."""

from models.weights import KeyMap

NUM_LEVELS = 4  # resolutions; between two of them lies one resampling block
RESNETS_PER_DOWN_LEVEL = 2
RESNETS_PER_UP_LEVEL = 3

# Parts of a residual block. The official one is a list of layers: norm, SiLU, convolution, norm, SiLU, dropout,
# convolution. The layers without weights keep their place in the count.
RESNET_PARTS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
SIDE_PARTS = {
    "conv1": "conv_in",
    "middle.1": "mid_block.attentions.0",
    "head.0": "norm_out",
    "head.2": "conv_out",
}


def _decoder_blocks() -> dict[str, str]:
    """The official decoder counts its blocks in one row; diffusers counts levels, and resnets within a level."""
    rows = {}
    for level in range(NUM_LEVELS):
        first = level * (RESNETS_PER_UP_LEVEL + 1)
        for resnet in range(RESNETS_PER_UP_LEVEL):
            rows[f"upsamples.{first + resnet}"] = f"up_blocks.{level}.resnets.{resnet}"
        rows[f"upsamples.{first + RESNETS_PER_UP_LEVEL}"] = f"up_blocks.{level}.upsamplers.0"
    return rows


def _grouped_blocks(official: str, diffusers: str, resnets: int, resampler: str) -> dict[str, str]:
    """Wan2.2's VAE has a block a level on both sides. The official one is a list that the resampling block ends."""
    rows = {f"{official}.{{}}.{official}.{number}": f"{diffusers}.{{}}.resnets.{number}" for number in range(resnets)}
    return rows | {f"{official}.{{}}.{official}.{resnets}": f"{diffusers}.{{}}.{resampler}"}


def _resnets(blocks: dict[str, str]) -> dict[str, str]:
    """Rows for the parts of residual blocks, from rows for the blocks."""
    return {
        f"{official}.{part}": f"{diffusers}.{name}"
        for official, diffusers in blocks.items()
        for part, name in RESNET_PARTS.items()
    }


def _vae_names(encoder_blocks: dict[str, str], decoder_blocks: dict[str, str]) -> dict[str, str]:
    """official -> diffusers. Rows for the parts of a block come before the row for the block itself, which is left to
    the resampling blocks: their parts have one name on both sides."""
    sides = {"encoder": encoder_blocks, "decoder": decoder_blocks}
    return {
        "conv1": "quant_conv",
        "conv2": "post_quant_conv",
        **{
            f"{side}.{official}": f"{side}.{diffusers}"
            for side, blocks in sides.items()
            for official, diffusers in (SIDE_PARTS | _resnets(MIDDLE_RESNETS | blocks) | blocks).items()
        },
    }


MIDDLE_RESNETS = {"middle.0": "mid_block.resnets.0", "middle.2": "mid_block.resnets.1"}

VAE_NAMES = _vae_names({"downsamples.{}": "down_blocks.{}"}, _decoder_blocks())
VAE22_NAMES = _vae_names(
    _grouped_blocks("downsamples", "down_blocks", RESNETS_PER_DOWN_LEVEL, "downsampler"),
    _grouped_blocks("upsamples", "up_blocks", RESNETS_PER_UP_LEVEL, "upsampler"),
)
VAE = KeyMap(VAE_NAMES)
VAE22 = KeyMap(VAE22_NAMES)

# official -> transformers
TEXT_NAMES = {
    "token_embedding": "shared",
    "blocks.{}.norm1": "encoder.block.{}.layer.0.layer_norm",
    "blocks.{}.attn.q": "encoder.block.{}.layer.0.SelfAttention.q",
    "blocks.{}.attn.k": "encoder.block.{}.layer.0.SelfAttention.k",
    "blocks.{}.attn.v": "encoder.block.{}.layer.0.SelfAttention.v",
    "blocks.{}.attn.o": "encoder.block.{}.layer.0.SelfAttention.o",
    # UMT5 has a table of position biases in every block, where T5 shares the first block's
    "blocks.{}.pos_embedding.embedding": "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias",
    "blocks.{}.norm2": "encoder.block.{}.layer.1.layer_norm",
    "blocks.{}.ffn.gate.0": "encoder.block.{}.layer.1.DenseReluDense.wi_0",
    "blocks.{}.ffn.fc1": "encoder.block.{}.layer.1.DenseReluDense.wi_1",
    "blocks.{}.ffn.fc2": "encoder.block.{}.layer.1.DenseReluDense.wo",
    "norm": "encoder.final_layer_norm",
}
TEXT = KeyMap(TEXT_NAMES)

# official -> transformers' vision tower
IMAGE_NAMES = {
    "visual.cls_embedding": "embeddings.class_embedding",
    "visual.pos_embedding": "embeddings.position_embedding.weight",
    "visual.patch_embedding": "embeddings.patch_embedding",
    "visual.pre_norm": "pre_layrnorm",  # their spelling
    "visual.transformer.{}.norm1": "encoder.layers.{}.layer_norm1",
    # q, k and v below each other; transformers has three modules instead (models.wan.image takes them apart)
    "visual.transformer.{}.attn.to_qkv": "encoder.layers.{}.self_attn.qkv_proj",
    "visual.transformer.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "visual.transformer.{}.norm2": "encoder.layers.{}.layer_norm2",
    "visual.transformer.{}.mlp.0": "encoder.layers.{}.mlp.fc1",
    "visual.transformer.{}.mlp.2": "encoder.layers.{}.mlp.fc2",
    "visual.post_norm": "post_layernorm",
}
IMAGE = KeyMap(IMAGE_NAMES)
# transformers' files name the tower inside a larger model: ComfyUI's clip_vision_h.safetensors, diffusers' folders
IMAGE_TOWER = KeyMap(
    {f"vision_model.{part}": part for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")}
)
