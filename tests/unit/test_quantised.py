"""Scales and markers of quantised files: which weight each belongs to, and what is refused rather than ignored."""

import json

import pytest
import torch
from safetensors.torch import save_file

from models.quantised import dequantise
from models.weights import KeyMap, WeightReader
from tests.helpers.quantised import FORMS, PREFIX, quantise, write_scaled

NAMES = KeyMap({"blocks.{}.q": "layers.{}.to_q"})
SIZES = {"blocks.0.q": (6, 8), "blocks.1.q": (4, 6), "head": (3, 4)}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def plain_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(size, generator=generator) for name, size in SIZES.items()}
    return tensors | {"blocks.0.q.bias": torch.randn(6, generator=generator)}


def stored_tensors(**changes):
    """A small file with old keys, spoilt by `changes` (`__` stands for a dot, None takes a tensor out)."""
    weight, scale = quantise(plain_tensors()["blocks.0.q.weight"], E4M3)
    tensors = {"blocks.0.q.weight": weight, "blocks.0.q.scale_weight": scale, "scaled_fp8": torch.zeros(2, dtype=E4M3)}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def refusal(tmp_path, tensors, metadata=None):
    save_file(tensors, tmp_path / "wan.safetensors", metadata)
    with pytest.raises(ValueError) as error:
        WeightReader([tmp_path / "wan.safetensors"], NAMES, "transformer")
    assert str(error.value).startswith(f"transformer {tmp_path / 'wan.safetensors'}: ")
    return str(error.value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("by_row", [False, True])
def test_every_form_reads_as_stored_or_dequantised(tmp_path, form, prefix, dtype, by_row):
    file, tensors = tmp_path / "wan.safetensors", plain_tensors()
    expected = write_scaled(
        file, tensors, form, dtype=dtype, prefix=prefix, by_row=by_row, chosen=lambda name, tensor: tensor.ndim == 2
    )
    read = WeightReader([file], NAMES)
    assert read.names() == {NAMES.to_skeleton(name) or name for name in tensors}
    for name, tensor in expected.items():
        found = read.read(NAMES.to_skeleton(name) or name)
        assert found.dtype == torch.float32 and torch.equal(found, tensor)

    kept = WeightReader([file], NAMES, keeps_scale=lambda name: name == "layers.1.to_q.weight")
    assert kept.names() - read.names() == {"layers.1.to_q.weight_scale"}
    assert kept.dtypes()["layers.1.to_q.weight"] == dtype and kept.dtypes()["head.weight"] == torch.float32
    weight, scale = kept.read("layers.1.to_q.weight"), kept.read("layers.1.to_q.weight_scale")
    assert weight.dtype == dtype and scale.shape == ((4, 1) if by_row else ())
    assert torch.equal(dequantise(weight, scale), expected["blocks.1.q.weight"])
    kept.check({name: kept.shapes()[name] for name in kept.names()})


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (6,), (6, 1)])
def test_shapes_of_a_scale(tmp_path, shape):
    scale = torch.rand(shape) + 0.1
    save_file(stored_tensors(blocks__0__q__scale_weight=scale), tmp_path / "wan.safetensors")
    reader = WeightReader([tmp_path / "wan.safetensors"], NAMES)
    weight = stored_tensors()["blocks.0.q.weight"].float()
    by_hand = torch.stack([row * scale.flatten()[i if scale.numel() > 1 else 0] for i, row in enumerate(weight)])
    assert torch.equal(reader.read("layers.0.to_q.weight"), by_hand)


def test_shards_may_each_have_the_marker(tmp_path):
    files = [tmp_path / f"model-{number}.safetensors" for number in range(2)]
    save_file(stored_tensors(), files[0])
    renamed = {name.replace(".0.", ".1."): tensor for name, tensor in stored_tensors().items()}
    save_file(renamed, files[1])
    assert WeightReader(files, NAMES).names() == {"layers.0.to_q.weight", "layers.1.to_q.weight"}


ONE = torch.ones(())
FAULTS = {
    "a scale without its weight": ({"blocks__0__q__weight": None}, "blocks.0.q.scale_weight has no weight"),
    "a scale of another module": ({"blocks__1__q__scale_weight": ONE}, "blocks.1.q.scale_weight has no weight"),
    "an input scale alone": ({"blocks__1__q__scale_input": ONE}, "blocks.1.q.scale_input has no weight"),
    "a weight without its scale": ({"blocks__0__q__scale_weight": None}, "blocks.0.q.weight has lost its scale"),
    "one of two without": (
        {"blocks__1__q__weight": torch.zeros(2, 2).to(E4M3), "scaled_fp8": None},
        "blocks.1.q.weight has lost its scale",
    ),
    "two scales": ({"blocks__0__q__weight_scale": ONE}, "blocks.0.q has two scales"),
    "NaN": ({"blocks__0__q__scale_weight": torch.tensor(torch.nan)}, "blocks.0.q.scale_weight is not finite"),
    "infinite": ({"blocks__0__q__scale_weight": torch.tensor(torch.inf)}, "is not finite"),
    "zero": ({"blocks__0__q__scale_weight": torch.tensor(0.0)}, "is not above 0"),
    "one row zero": ({"blocks__0__q__scale_weight": torch.tensor([1.0, 1, 1, 0, 1, 1])}, "is not above 0"),
    "a scale a block": (
        {"blocks__0__q__scale_weight": torch.ones(6, 2)},
        "blocks.0.q.scale_weight is [6, 2], and only one scale or one a row of [6, 8] can be read",
    ),
    "a weight in bfloat16": (
        {"blocks__0__q__weight": torch.zeros(6, 8).bfloat16()},
        "blocks.0.q.weight has a scale and is stored as torch.bfloat16",
    ),
    "int8": ({"blocks__0__q__weight": torch.zeros(6, 8).char()}, "blocks.0.q is quantised as int8"),
    "nvfp4": ({"blocks__0__q__weight": torch.zeros(6, 4).byte()}, "quantised as nvfp4 or another format of 4 bits"),
    "nvfp4's second scale": ({"blocks__0__q__weight_scale_2": ONE}, "belongs to weights quantised as nvfp4"),
    "mxfp8": (
        {"blocks__0__q__scale_weight": torch.ones(6, 1).to(torch.float8_e8m0fnu)},
        "blocks.0.q has scales of torch.float8_e8m0fnu, as mxfp8",
    ),
    "bitsandbytes": ({"blocks__0__q__weight__absmax": torch.ones(3)}, "quantised as bitsandbytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_ignored(tmp_path, fault):
    changes, message = FAULTS[fault]
    assert message in refusal(tmp_path, stored_tensors(**changes))


def marked(marker, name="blocks.0.q"):
    """A file whose new-style marker says `marker`, and which has a scale."""
    weight, scale = quantise(plain_tensors()["blocks.0.q.weight"], E4M3)
    content = marker if isinstance(marker, bytes) else json.dumps(marker).encode()
    tensors = {"blocks.0.q.weight": weight, "blocks.0.q.weight_scale": scale}
    return tensors | {f"{name}.comfy_quant": torch.tensor(list(content), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ({"format": "nvfp4"}, "blocks.0.q is quantised as nvfp4, which cannot be trained on; use the bf16"),
        ({"format": "int8_tensorwise", "convrot": True}, "blocks.0.q is quantised as int8_tensorwise"),
        ({"format": "mxfp8"}, "quantised as mxfp8"),
        ({"format": "float8_e5m2"}, "blocks.0.q is marked as float8_e5m2 and stored as torch.float8_e4m3fn"),
        ({"scale": 1}, "blocks.0.q is marked as quantised without a format"),
        ({"format": 8}, "marked as quantised without a format"),
        ([], "marked as quantised without a format"),
        (b"{", "blocks.0.q.comfy_quant cannot be read"),
        (b"\xff", "blocks.0.q.comfy_quant cannot be read"),
    ],
)
def test_markers_that_cannot_be_followed(tmp_path, marker, message):
    assert message in refusal(tmp_path, marked(marker))


def test_a_marker_without_its_weight(tmp_path):
    tensors = marked({"format": "float8_e4m3fn"}, "blocks.1.q")
    assert "blocks.1.q is marked as float8_e4m3fn and has no weight" in refusal(tmp_path, tensors)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"layers": {"blocks.0.q": {"format": "asym_w4a8_int8"}}}, "blocks.0.q is quantised as asym_w4a8_int8"),
        ({"layers": {"blocks.7.q": {"format": "float8_e4m3fn"}}}, "blocks.7.q is marked as float8_e4m3fn and has n"),
        ({"layers": {"head": {"format": "float8_e4m3fn"}}}, "head is marked as float8_e4m3fn and stored as torch"),
        ({"layers": []}, "the header's _quantization_metadata cannot be read"),
        ([], "the header's _quantization_metadata cannot be read"),
        ({}, "the header's _quantization_metadata cannot be read ('layers')"),
    ],
)  # fmt: skip
def test_header_metadata_that_cannot_be_followed(tmp_path, header, message):
    tensors = {name: tensor for name, tensor in marked({}).items() if not name.endswith("comfy_quant")}
    tensors["head.weight"] = torch.zeros(3, 4)
    assert message in refusal(tmp_path, tensors, {"_quantization_metadata": json.dumps(header)})


def test_header_metadata_without_the_prefix_or_with_bare_formats(tmp_path):
    tensors = {PREFIX + name: tensor for name, tensor in marked({}).items() if not name.endswith("comfy_quant")}
    file = tmp_path / "wan.safetensors"
    save_file(tensors, file, {"_quantization_metadata": json.dumps({"layers": {"blocks.0.q": "float8_e4m3fn"}})})
    assert WeightReader([file], NAMES).names() == {"layers.0.to_q.weight"}
    del tensors[f"{PREFIX}blocks.0.q.weight_scale"]
    message = refusal(tmp_path, tensors, {"_quantization_metadata": '{"layers": {"blocks.0.q": "float8_e4m3fn"}}'})
    assert "blocks.0.q.weight has lost its scale" in message


def test_float8_that_the_markers_do_not_list_was_stored_without_a_scale(tmp_path):
    tensors = {**marked({"format": "float8_e4m3fn"}), "blocks.1.q.weight": torch.ones(4, 6).to(E4M3)}
    save_file(tensors, tmp_path / "wan.safetensors")
    weights = WeightReader([tmp_path / "wan.safetensors"], NAMES)
    assert weights.read("layers.1.to_q.weight").dtype == E4M3


def test_plain_float8_has_no_scales_to_miss(tmp_path):
    save_file({"blocks.0.q.weight": torch.ones(4, 6).to(E4M3)}, tmp_path / "wan.safetensors")
    assert WeightReader([tmp_path / "wan.safetensors"], NAMES).read("layers.0.to_q.weight").dtype == E4M3


def test_an_absent_shard_is_named_and_not_the_scales_it_took_along(tmp_path):
    save_file(stored_tensors(blocks__0__q__weight=None), tmp_path / "model-00001-of-00002.safetensors")
    files = [tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    with pytest.raises(ValueError, match=r"shard 2 of 2, \S+: it does not exist.*Download the named files again"):
        WeightReader(files, NAMES).check({"layers.0.to_q.weight": (6, 8)})
