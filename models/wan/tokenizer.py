"""UMT5's tokenizer, from tokenizer.json or from the sentencepiece model that ComfyUI's files carry."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from models.headers import open_header

TOKENIZER_FILE = "tokenizer.json"
SPIECE_FILE = "spiece.model"
SPIECE_TENSOR = "spiece_model"  # uint8 [bytes], in ComfyUI's text encoder files
UNIGRAM = 1  # TrainerSpec.ModelType of sentencepiece_model.proto
MOST_BYTES = 200_000_000  # UMT5's are of 17 and 5 MB; a vocabulary takes several times its file in memory
CONTROL, UNKNOWN = 3, 2  # ModelProto.SentencePiece.Type there
METASPACE = "▁"


def tokenizer_file(folder: Path) -> Path:
    """What decides the tokens in `folder`: tokenizer.json, which the official code reads too, before spiece.model.

    Raises:
        FileNotFoundError: there is neither.
    """
    for name in (TOKENIZER_FILE, SPIECE_FILE):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"tokenizer {folder} holds no {TOKENIZER_FILE} and no {SPIECE_FILE}; download google/umt5-xxl"
    )


def carries_tokenizer(weights: Path) -> bool:
    """Whether a text encoder's file has a tokenizer in it. One that cannot be read has none; its own check says why."""
    try:
        return weights.suffix == ".safetensors" and SPIECE_TENSOR in open_header(weights).tensors
    except (OSError, ValueError):
        return False


def open_tokenizer(folder: Path, max_length: int) -> Tokenizer:
    """The tokenizer in `folder`, cutting to `max_length` tokens and padding nothing.

    tokenizer.json is read as it stands: transformers 5 would replace parts of it by those of T5.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it does not end a caption with a token, which an encoder of the T5 kind must see.
    """
    file = tokenizer_file(folder)
    _refuse_large(file.stat().st_size, str(file))
    if file.name == SPIECE_FILE:
        return spiece_tokenizer(file.read_bytes(), str(file), max_length)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file}: not readable as a tokenizer ({error}); download it again") from error
    return _checked(tokenizer, str(file), max_length)


def spiece_tokenizer(content: bytes, place: str, max_length: int) -> Tokenizer:
    """The tokenizer of a sentencepiece model, with the steps of UMT5's tokenizer.json around its vocabulary.

    Its sentinels (`<extra_id_0>` and so on), which no caption has, are left out: the model does not list them.

    Args:
        content: of spiece.model.
        place: for messages.

    Raises:
        ValueError: it is no unigram model of sentencepiece.
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    _refuse_large(len(content), place)
    # the parsed form of sentencepiece_model.proto that transformers' own converters use
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ValueError(f"{place}: not readable as a sentencepiece model ({error}); download it again") from error
    trainer, pieces = model.trainer_spec, model.pieces
    if not pieces or trainer.model_type != UNIGRAM:
        raise ValueError(f"{place}: holds no unigram model, so it is not UMT5's; download google/umt5-xxl")
    vocabulary = [(piece.piece, piece.score) for piece in pieces]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    special = [piece.piece for piece in pieces if piece.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    if charsmap := model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    metaspace = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    end = trainer.eos_piece
    if trainer.eos_id >= 0 and tokenizer.token_to_id(end) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", end], special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return _checked(tokenizer, place, max_length)


def _refuse_large(size: int, place: str) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"{place}: {size:,} bytes are too many for a tokenizer; download google/umt5-xxl again")


def _checked(tokenizer: Tokenizer, place: str, max_length: int) -> Tokenizer:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    if len(tokenizer.encode("").ids) != 1:
        raise ValueError(
            f"{place}: adds no end token to a caption, so it is not UMT5's; download google/umt5-xxl again"
        )
    return tokenizer
