import pytest
import torch
from diffusers import WanTransformer3DModel

from models.wan.keymaps import TRANSFORMER, TRANSFORMER_NAMES
from models.weights import KeyMap
from tests.helpers.models import native_tensors

# the two kinds with the fewest and the most tensors; sizes do not matter to names
KINDS = {"t2v": {}, "flf2v": {"image_dim": 1280, "added_kv_proj_dim": 48, "pos_embed_seq_len": 514}}


def diffusers_names(num_layers=12, **extra):
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=num_layers, **extra
        )
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_of_diffusers_survives_the_round_trip(kind):
    names = diffusers_names(**KINDS[kind])
    official = {TRANSFORMER.from_skeleton(name) for name in names}
    assert None not in official and len(official) == len(names)
    assert {TRANSFORMER.to_skeleton(name) for name in official} == names


def test_every_row_is_used():
    rows, names = set(TRANSFORMER_NAMES.values()), diffusers_names(**KINDS["flf2v"])
    used = {row for row in rows for name in names if KeyMap({row: row}).to_skeleton(name)}
    assert rows == used


def test_official_names_become_the_skeletons():
    assert {TRANSFORMER.to_skeleton(name) for name in native_tensors()} == diffusers_names(num_layers=3)


def test_the_norms_that_swap_places():
    assert TRANSFORMER.to_skeleton("blocks.7.norm3.weight") == "blocks.7.norm2.weight"
    assert TRANSFORMER.from_skeleton("blocks.7.norm2.bias") == "blocks.7.norm3.bias"
    assert TRANSFORMER.to_skeleton("blocks.7.norm2.weight") is None


def test_a_row_serves_whatever_hangs_on_its_module():
    name = "blocks.31.cross_attn.o.lora_A.weight"
    assert TRANSFORMER.to_skeleton(name) == "blocks.31.attn2.to_out.0.lora_A.weight"
    assert TRANSFORMER.from_skeleton("blocks.31.attn2.to_out.0.lora_A.weight") == name
    assert TRANSFORMER.to_skeleton("blocks.31.cross_attn.k_img") == "blocks.31.attn2.add_k_proj"


@pytest.mark.parametrize("name", ["blocks.0.self_attn.qq.weight", "blocks.x.norm3.weight", "xhead.head.weight", "head"])
def test_unknown_names(name):
    assert TRANSFORMER.to_skeleton(name) is None


def test_several_numbers_keep_their_order():
    table = KeyMap({"a.{}.b.{}": "{}.c.d{}"})
    assert table.to_skeleton("a.1.b.22.weight") == "1.c.d22.weight"
    assert table.from_skeleton("1.c.d22") == "a.1.b.22"
