"""UMT5's tokenizer out of its sentencepiece model: the ids that tokenizer.json gives, or a message."""

import json
import random

import pytest
import torch
from safetensors.torch import save_file
from transformers.convert_slow_tokenizer import import_protobuf

from models.wan.encoder_keymaps import TEXT
from models.wan.tokenizer import carries_tokenizer, open_tokenizer, spiece_tokenizer, tokenizer_file
from tests.helpers.models import TRANSFORMER_FILE, WAN_T2V, wan_family

UMT5 = WAN_T2V / "models_t5_umt5-xxl-enc-bf16.pth"
FOLDER = WAN_T2V / "google" / "umt5-xxl"
CAPTIONS = json.loads((WAN_T2V / "captions.json").read_text())
SPIECE = (FOLDER / "spiece.model").read_bytes()


def odd_strings(count):
    """Captions, words and characters of many scripts at random; what normalising changes is among them."""
    numbers = random.Random(0)
    characters = [chr(code) for code in (*range(32, 127), *range(0xA0, 0x250), *range(0x3040, 0x3100))]
    characters += [chr(code) for code in (*range(0xFF00, 0xFF60), 0x1F600, 0x200B, 0x3000, 9, 10, 0xFB01, 0x301)]
    parts = [*characters, *("</s>", "<pad>", "<unk>", "\u2581", "the ", "woman", "  ") * 20, *CAPTIONS]
    return ["".join(numbers.choices(parts, k=numbers.randint(0, 30))) for _ in range(count)]


def test_ids_equal_those_of_tokenizer_json():
    reference, found = open_tokenizer(FOLDER, 512), spiece_tokenizer(SPIECE, "x", 512)
    assert found.get_vocab() == reference.get_vocab()
    strings = [*CAPTIONS, "", *odd_strings(3000)]
    assert len({len(reference.encode(text).ids) for text in strings}) > 20, "no test if all are alike"
    for text in strings:
        assert found.encode(text).ids == reference.encode(text).ids, text


def test_it_cuts_and_keeps_the_end_token():
    tokens = spiece_tokenizer(SPIECE, "x", 6).encode(CAPTIONS[0])
    assert len(tokens.ids) == 6 and tokens.ids[-1] == 1 and tokens.overflowing


def test_a_folder_with_spiece_model_alone(tmp_path):
    (tmp_path / "spiece.model").write_bytes(SPIECE)
    assert tokenizer_file(tmp_path) == tmp_path / "spiece.model"
    assert tokenizer_file(FOLDER) == FOLDER / "tokenizer.json", "what the official code reads comes first"
    assert open_tokenizer(tmp_path, 512).encode(CAPTIONS[0]).ids == open_tokenizer(FOLDER, 512).encode(CAPTIONS[0]).ids


def spoilt(change):
    model = import_protobuf().ModelProto()
    model.ParseFromString(SPIECE)
    change(model)
    return model.SerializeToString()


def test_bytes_stand_for_unknown_characters_where_the_model_says_so():
    def with_bytes(model):
        model.trainer_spec.byte_fallback = True
        for byte in range(256):
            model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=6)

    tokens = spiece_tokenizer(spoilt(with_bytes), "x", 512).encode("\u5555").tokens
    assert tokens[-4:] == ["<0xE5>", "<0x95>", "<0x95>", "</s>"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a protobuf", "x: not readable as a sentencepiece model"),
        (SPIECE[:1000], "x: not readable as a sentencepiece model"),
        (b"", "x: holds no unigram model"),
        (spoilt(lambda model: setattr(model.trainer_spec, "model_type", 2)), "x: holds no unigram model"),
        (spoilt(lambda model: setattr(model.trainer_spec, "eos_id", -1)), "x: adds no end token"),
    ],
)
def test_other_models_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        spiece_tokenizer(content, "x", 512)


def test_whether_a_file_carries_one(tmp_path):
    save_file({"spiece_model": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "with.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "without.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"123")
    assert carries_tokenizer(tmp_path / "with.safetensors")
    for name in ("without.safetensors", "broken.safetensors", "absent.safetensors"):
        assert not carries_tokenizer(tmp_path / name)
    assert not carries_tokenizer(UMT5)


def family_without_a_tokenizer(folder, **files):
    """Single files only, none of them in a checkpoint's folder; `files` beside the text encoder's."""
    weights = {TEXT.to_skeleton(name): tensor for name, tensor in torch.load(UMT5, weights_only=True).items()}
    save_file(weights | files, folder / "umt5_xxl.safetensors")
    return wan_family(
        None,
        transformer_path=WAN_T2V / TRANSFORMER_FILE,
        vae_path=WAN_T2V / "Wan2.1_VAE.pth",
        llm_path=folder / "umt5_xxl.safetensors",
    )


def test_a_run_that_has_only_what_comfyui_has(tmp_path):
    content = torch.tensor(list(SPIECE), dtype=torch.uint8)
    text = family_without_a_tokenizer(tmp_path, spiece_model=content).encoders()[-1]
    assert text.tokenizer is None
    text.check()


def test_a_file_that_carries_none_needs_one(tmp_path):
    with pytest.raises(ValueError, match=r"no UMT5 tokenizer .*set tokenizer_path"):
        family_without_a_tokenizer(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(SPIECE)
    text = family_without_a_tokenizer(tmp_path).encoders()[-1]
    assert text.tokenizer == tmp_path / "tokenizer"
    text.check()
