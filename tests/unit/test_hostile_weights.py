"""Checkpoints that were made to hurt: refused with the file's name, soon, and in little memory."""

import json
import random
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.headers import open_header
from models.json_files import MAX_BYTES
from models.wan import tokenizer
from models.wan.adapter_reader import _checked_settings
from models.wan.image import WanImageEncoder
from models.wan.text import WanTextEncoder
from models.wan.vae import WanVAEEncoder
from models.weights import weight_files
from tests.helpers.models import DATA, TRANSFORMER_FILE, WAN_T2V, copy_checkpoint, native_tensors, wan_family

T5, VAE = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth"
CLIP = DATA / "wan_i2v" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
BITS = {torch.float32: ("F32", 32), torch.bfloat16: ("BF16", 16), torch.float16: ("F16", 16)}


def shapes_of(tensors) -> dict[str, tuple[list[int], str, int]]:
    return {name: (list(tensor.shape), *BITS[tensor.dtype]) for name, tensor in tensors.items()}


def write(file: Path, shapes) -> Path:
    """A safetensors file of such tensors that is right in itself; zeros that take no room on the disk."""
    header, reached = {}, 0
    for name, (shape, kind, bits) in shapes.items():
        size = bits // 8
        for length in shape:
            size *= length
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [reached, reached + size]}
        reached += size
    content = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + reached)
    return file


def spoil(shapes, draw: random.Random):
    """One to three tensors of odd shapes, or with names of another block."""
    spoilt = dict(shapes)
    for name in draw.sample(sorted(spoilt), draw.randint(1, 3)):
        shape, kind, bits = spoilt.pop(name)
        ways = [[], [0], [1], shape[:-1], [*shape, 1], [0, 1 << 62], [3, 5, 7], [0] * len(shape), [7] * len(shape)]
        other = draw.choice([name, name, name.replace(".0.", ".999999999."), name.replace(".0.", ".x."), f"{name}.z"])
        spoilt[other] = (draw.choice(ways), kind, bits)
    return spoilt


def telling(shapes):
    """The tensors that sizes are read off: what is spoilt there is found by more than a comparison of shapes."""
    marks = ("patch", "blocks.0", "block.0", "embed", "conv1", "head", "shared", "norm1", "layers.0", "resblocks.0")
    return {name: told for name, told in shapes.items() if any(mark in name for mark in marks)} or shapes


def refused(check, file: Path) -> str:
    started = time.monotonic()
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check()
    assert time.monotonic() - started < 5, "a hostile file should not hold up the start"
    assert file.name in str(caught.value) or file.parent.name in str(caught.value), str(caught.value)
    return str(caught.value)


ENCODERS = {
    "text": (WAN_T2V / T5, lambda file: WanTextEncoder(file, WAN_T2V / "google" / "umt5-xxl", torch.float32)),
    "vae": (WAN_T2V / VAE, lambda file: WanVAEEncoder(file, torch.float32)),
    "image": (CLIP, lambda file: WanImageEncoder(file, torch.float32, False)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_odd_tensors_of_encoders(tmp_path, kind):
    source, encoder = ENCODERS[kind]
    good = shapes_of(torch.load(source, weights_only=True, map_location="cpu"))
    whole = encoder(write(tmp_path / "good.safetensors", good))
    whole.check()
    draw, used = random.Random(kind), 0
    for number in range(12):
        odd = {**good, **(bad := spoil(telling(good), draw))}
        gone = telling(good).keys() - bad.keys()
        file = write(tmp_path / f"odd{number}.safetensors", {k: v for k, v in odd.items() if k not in gone})
        try:
            encoder(file).check()
        except ValueError:
            used += 1
            refused(encoder(file).check, file)
    assert used >= 3, "some of them are tensors that nobody needs, and not all"


def test_odd_tensors_of_transformers(tmp_path):
    good, draw = shapes_of(native_tensors()), random.Random(0)
    folder = copy_checkpoint(tmp_path / "wan")
    (folder / "config.json").unlink()
    file = folder / TRANSFORMER_FILE
    for _ in range(20):
        bad = spoil(telling(good), draw)
        gone = telling(good).keys() - bad.keys()
        write(file, {k: v for k, v in {**good, **bad}.items() if k not in gone})
        refused(lambda: wan_family(folder).open_weights(), file)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"num_layers": 10**9},
        {"num_layers": 10**30},
        {"dim": "48"},
        {"dim": -48},
        {"num_heads": 0},
        {"num_heads": 7},
        {"num_heads": 1000},
        {"freq_dim": [64]},
        {"eps": "1e-6"},
        {"ffn_dim": {"a": 1}},
        {"text_dim": True},
        {"attention_head_dim": 24},
        {"attention_head_dim": "24", "num_attention_heads": 2},
        {"attention_head_dim": 24, "num_attention_heads": None},
    ],
    ids=str,
)
def test_odd_sizes(tmp_path, spoilt):
    folder = copy_checkpoint(tmp_path / "wan")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **spoilt}))
    try:
        wan_family(folder).open_weights()  # diffusers' keys may be read as well, and tell the same
    except ValueError as error:
        assert str(folder) in str(error), error


@pytest.mark.parametrize(
    "content",
    [b"[" * 500_000, b'{"a":' * 300_000, b" " * (MAX_BYTES + 1), b"\xff\xfe{}", b"[1]", b"null", b"NaN", b'"x"'],
    ids=lambda content: f"{content[:6]!r}x{len(content)}",
)
def test_files_that_are_no_config(tmp_path, content):
    folder = copy_checkpoint(tmp_path / "wan")
    (folder / "config.json").write_bytes(content)
    assert f"{folder / 'config.json'} is not valid JSON" in refused(lambda: wan_family(folder), folder / "config.json")
    vae = tmp_path / "vae"
    vae.mkdir()
    save_file(torch.load(WAN_T2V / VAE, weights_only=True), vae / "diffusion_pytorch_model.safetensors")
    (vae / "config.json").write_bytes(content)
    refused(WanVAEEncoder(vae, torch.float32).check, vae / "config.json")
    index = tmp_path / f"{TRANSFORMER_FILE}.index.json"
    index.write_bytes(content if content[:1] != b" " else b"7")
    assert "not a readable shard index" in refused(lambda: weight_files(tmp_path, "diffusion"), index)


@pytest.mark.parametrize(
    "spoilt",
    [{"base_dim": "x"}, {"num_res_blocks": 10**9}, {"dim_mult": [1] * 100_000}, {"z_dim": [[]]}, {"dim_mult": {}}],
    ids=lambda spoilt: next(iter(spoilt)),
)
def test_odd_settings_of_a_vae(tmp_path, spoilt):
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(torch.load(WAN_T2V / VAE, weights_only=True), file)
    (tmp_path / "config.json").write_text(json.dumps(spoilt))
    refused(WanVAEEncoder(tmp_path, torch.float32).check, file)


@pytest.mark.parametrize(
    "names", [["../other.safetensors"], ["/etc/passwd"], ["a\0b"], ["sub/x.safetensors"], [".."], [7], [None], [""]]
)
def test_an_index_that_leads_elsewhere(tmp_path, names):
    index = tmp_path / f"{TRANSFORMER_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))
    assert "not a readable shard index" in refused(lambda: weight_files(tmp_path, "diffusion"), index)


def test_a_header_that_would_fill_the_memory(tmp_path):
    content = b"[" + b"{}," * 7_000_000 + b"{}]"
    file = tmp_path / "bomb.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    tracemalloc.start()
    try:
        assert "too large for weights" in refused(lambda: open_header(file), file)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_a_tokenizer_without_end(tmp_path, name):
    with (tmp_path / name).open("wb") as stream:
        stream.truncate(tokenizer.MOST_BYTES + 1)
    refused(lambda: tokenizer.open_tokenizer(tmp_path, 512), tmp_path / name)


@pytest.mark.parametrize(
    "settings",
    [
        {"alpha_pattern": {"(a+)+(b+)+$": 1}},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"x" * 5000: 1}},
        {"alpha_pattern": ["x"]},
        {"alpha_pattern": {"x": "1"}},
        {"lora_alpha": "16"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": [1]},
    ],
    ids=str,
)
def test_settings_of_a_lora_that_are_none(settings):
    with pytest.raises(ValueError, match="alpha"):
        _checked_settings(settings)
    plain = {"lora_alpha": 8, "alpha_pattern": {"blocks.0": 4, r"blocks\.\d+\.attn1": 2.0}}
    assert _checked_settings(plain) == plain
