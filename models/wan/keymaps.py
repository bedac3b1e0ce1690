"""The names of Wan's transformer: official and ComfyUI files on one side, diffusers' module on the other."""

from models.weights import KeyMap

ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
PROJECTIONS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}

# official -> diffusers. Both number a block's norms by place, but official counts norm1 and norm2 as the two without
# weights, so its norm3 (before cross attention) is diffusers' norm2.
TRANSFORMER_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    **{
        f"blocks.{{}}.{attention}.{projection}": f"blocks.{{}}.{attn}.{to}"
        for attention, attn in ATTENTIONS.items()
        for projection, to in PROJECTIONS.items()
    },
    # image to video of Wan2.1
    "blocks.{}.cross_attn.k_img": "blocks.{}.attn2.add_k_proj",
    "blocks.{}.cross_attn.v_img": "blocks.{}.attn2.add_v_proj",
    "blocks.{}.cross_attn.norm_k_img": "blocks.{}.attn2.norm_added_k",
    "blocks.{}.norm3": "blocks.{}.norm2",
    "blocks.{}.ffn.0": "blocks.{}.ffn.net.0.proj",
    "blocks.{}.ffn.2": "blocks.{}.ffn.net.2",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

TRANSFORMER = KeyMap(TRANSFORMER_NAMES)
