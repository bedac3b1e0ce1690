"""The UMT5 text encoder: parity with the official module, layouts, stored form, and what it says of wrong files."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.wan.encoder_keymaps import TEXT
from models.wan.text import WanTextEncoder, clean_caption
from models.wan.tokenizer import open_tokenizer
from tests.helpers.quantised import FORMS, write_scaled

DATA = Path(__file__).parents[1] / "data" / "wan_t2v"
PTH = DATA / "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER = DATA / "google" / "umt5-xxl"
CAPTIONS = json.loads((DATA / "captions.json").read_text())
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def golden():
    return load_file(DATA / "encoders_golden.safetensors")


@pytest.fixture(scope="module")
def official():
    return torch.load(PTH, weights_only=True)


@pytest.fixture(scope="module")
def encoder():
    loaded = WanTextEncoder(PTH, TOKENIZER, torch.float32)
    loaded.load(CPU)
    return loaded


def transformers_weights(official):
    return {TEXT.to_skeleton(name): tensor for name, tensor in official.items()}


def test_states_equal_the_official_module(encoder, golden):
    entries = encoder.encode(CAPTIONS)
    for number, entry in enumerate(entries):
        torch.testing.assert_close(entry["text"], golden[f"t5.emb{number}"], rtol=0, atol=1e-5)


def test_tokens_equal_the_official_tokenizer(golden):
    tokenizer = open_tokenizer(TOKENIZER, 512)
    for caption, ids, mask in zip(CAPTIONS, golden["t5.ids"], golden["t5.mask"], strict=True):
        assert tokenizer.encode(clean_caption(caption)).ids == ids[mask.bool()].tolist()


def test_rows_do_not_depend_on_the_batch(encoder):
    together = encoder.encode([*CAPTIONS, "", "x"])
    alone = [encoder.encode([caption])[0] for caption in [*CAPTIONS, "", "x"]]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one["text"], other["text"])


def test_the_empty_caption_is_its_end_token(encoder):
    (entry,) = encoder.encode([""])
    assert entry["text"].shape == (1, 32) and entry["text"].abs().sum() > 0


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("  a\tb \n\n c ", "a b c"),
        ("the rabbit &amp; bikes", "the rabbit & bikes"),
        ("&amp;lt;b&amp;gt;", "<b>"),  # escaped twice
        ("schÃ¶n", "schön"),  # UTF-8 read as Latin-1
        ("", ""),
    ],
)
def test_captions_are_cleaned(caption, clean):
    assert clean_caption(caption) == clean


def test_states_are_stored_in_the_dtype_they_were_computed_in(encoder):
    half = WanTextEncoder(PTH, TOKENIZER, torch.bfloat16)
    half.load(CPU)
    states = half.encode(CAPTIONS[:1])[0]["text"]
    reference = encoder.encode(CAPTIONS[:1])[0]["text"]
    assert states.dtype == torch.bfloat16 and states.is_contiguous()
    assert states.untyped_storage().nbytes() == states.nbytes
    assert 0 < (states.float() - reference).abs().max() < 0.2
    assert half.fingerprint() != encoder.fingerprint()


def test_long_captions_are_cut_and_named(caplog):
    short = WanTextEncoder(PTH, TOKENIZER, torch.float32, max_length=6)
    short.load(CPU)
    with caplog.at_level(logging.WARNING):
        (entry,) = short.encode(CAPTIONS[:1])
    assert entry["text"].shape == (6, 32)
    assert "cut to 6 tokens" in caplog.text and "a woman" in caplog.text
    assert open_tokenizer(TOKENIZER, 6).encode(CAPTIONS[0]).ids[-1] == 1, "the end token stays"


def test_key_table_covers_the_encoder_both_ways(official):
    for name in official:
        assert TEXT.from_skeleton(TEXT.to_skeleton(name)) == name
    assert len({TEXT.to_skeleton(name) for name in official}) == len(official)


def test_every_layout_gives_the_same_states(tmp_path, encoder, official):
    weights = transformers_weights(official)
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    # ComfyUI's file: transformers' names, the embedding twice, the tokenizer as a tensor
    extra = {"encoder.embed_tokens.weight": weights["shared.weight"].clone(), "spiece_model": torch.zeros(9).byte()}
    save_file(weights | extra, tmp_path / "umt5_xxl.safetensors")
    save_file(official, tmp_path / "official.safetensors")
    reference = encoder.encode(CAPTIONS)
    for path in (folder, tmp_path / "umt5_xxl.safetensors", tmp_path / "official.safetensors"):
        other = WanTextEncoder(path, TOKENIZER, torch.float32)
        other.check()
        other.load(CPU)
        for one, expected in zip(other.encode(CAPTIONS), reference, strict=True):
            assert torch.equal(one["text"], expected["text"]), path


def spiece_tensor():
    return {"spiece_model": torch.tensor(list((TOKENIZER / "spiece.model").read_bytes()), dtype=torch.uint8)}


def test_shards_of_a_transformers_folder(tmp_path, encoder, official):
    weights = list(transformers_weights(official).items())
    files = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    for number, file in enumerate(files):
        save_file(dict(weights[number::3]), tmp_path / file)
    index = {name: files[number % 3] for number, (name, _) in enumerate(weights)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    sharded = WanTextEncoder(tmp_path, TOKENIZER, torch.float32)
    sharded.load(CPU)
    assert torch.equal(sharded.encode(CAPTIONS[:1])[0]["text"], encoder.encode(CAPTIONS[:1])[0]["text"])
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match=r"shard 2 of 3, model-00002-of-00003\S+: it does not exist"):
        sharded.check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", ["transformers", "official"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_float8_is_expanded(tmp_path, official, form, names, dtype):
    """ComfyUI's files have the Linears in float8; embeddings and norms in 16 bits."""
    weights = official if names == "official" else transformers_weights(official)
    file, plain = tmp_path / "umt5_scaled.safetensors", tmp_path / "umt5.safetensors"
    expanded = write_scaled(
        file, weights, form, dtype=dtype, chosen=lambda name, tensor: tensor.ndim == 2 and "embedding" not in name
    )
    assert any(not torch.equal(expanded[name], tensor) for name, tensor in weights.items())
    save_file(expanded, plain)
    states = []
    for path in (file, plain):
        encoder = WanTextEncoder(path, TOKENIZER, torch.float32)
        encoder.check()
        encoder.load(CPU)
        states.append(encoder.encode(CAPTIONS[:1])[0]["text"])
    assert torch.equal(*states)


def test_the_tokenizer_that_a_file_carries(tmp_path, encoder, official):
    weights = transformers_weights(official)
    save_file(weights | spiece_tensor(), tmp_path / "umt5_xxl.safetensors")
    carried = WanTextEncoder(tmp_path / "umt5_xxl.safetensors", None, torch.float32)
    carried.check()
    carried.load(CPU)
    for one, expected in zip(carried.encode([*CAPTIONS, ""]), encoder.encode([*CAPTIONS, ""]), strict=True):
        assert torch.equal(one["text"], expected["text"])
    # what decides the tokens is among the files whose content makes the cache's key
    assert carried.fingerprint()["files"] == [str(tmp_path / "umt5_xxl.safetensors")]

    (tmp_path / "spiece.model").write_bytes((TOKENIZER / "spiece.model").read_bytes())
    beside = WanTextEncoder(PTH, tmp_path, torch.float32)
    assert beside.fingerprint()["files"] == [str(PTH), str(tmp_path / "spiece.model")]

    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"bare\.safetensors carries no tokenizer; set tokenizer_path"):
        WanTextEncoder(tmp_path / "bare.safetensors", None, torch.float32).check()
    save_file(weights | {"spiece_model": torch.zeros(9).byte()}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors: not readable as a sentencepiece model"):
        WanTextEncoder(tmp_path / "bad.safetensors", None, torch.float32).check()


def test_fingerprint_is_json_and_names_the_files(encoder):
    fingerprint = encoder.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert fingerprint["files"] == [str(PTH), str(TOKENIZER / "tokenizer.json")]


def test_unload_drops_the_weights():
    once = WanTextEncoder(PTH, TOKENIZER, torch.float32)
    once.load(CPU)
    once.unload()
    with pytest.raises(AssertionError, match="before load"):
        once.encode(["a"])


def test_missing_and_misshapen_tensors_come_in_one_message(tmp_path, official):
    broken = dict(official)
    del broken["blocks.1.ffn.fc1.weight"]
    broken["norm.weight"] = torch.ones(5)
    path = tmp_path / "broken.pth"
    torch.save(broken, path)
    with pytest.raises(ValueError) as error:
        WanTextEncoder(path, TOKENIZER, torch.float32).check()
    message = str(error.value)
    assert "1 tensor missing, first blocks.1.ffn.fc1.weight" in message
    assert "1 tensor mis-shaped" in message and "norm.weight" in message and str(path) in message


def test_a_foreign_file_is_refused(tmp_path):
    path = tmp_path / "t5.safetensors"
    save_file({"lora_up": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=r"tensors missing.*1 tensor unexpected"):
        WanTextEncoder(path, TOKENIZER, torch.float32).check()


def test_tokenizer_faults_are_named(tmp_path, official):
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json and no spiece\.model"):
        WanTextEncoder(PTH, tmp_path, torch.float32).check()

    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not readable as a tokenizer"):
        WanTextEncoder(PTH, tmp_path, torch.float32).check()

    tokenizer = json.loads((TOKENIZER / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(ValueError, match="adds no end token"):
        WanTextEncoder(PTH, tmp_path, torch.float32).check()

    small = official | {"token_embedding.weight": official["token_embedding.weight"][:40].clone()}
    torch.save(small, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"76 tokens.*only 40"):
        WanTextEncoder(tmp_path / "small.pth", TOKENIZER, torch.float32).check()
