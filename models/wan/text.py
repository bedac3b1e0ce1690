"""Captions to UMT5 states, cut to each caption's true length."""

import html
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from models.base import Encoder, NotFiniteError
from models.wan.encoder_keymaps import TEXT
from models.wan.frozen import check_frozen, fill_frozen, free_memory, frozen_files, odd_shapes_told
from models.wan.identify import TEXT_KEY, hint_for
from models.wan.tokenizer import SPIECE_TENSOR, open_tokenizer, spiece_tokenizer, tokenizer_file
from models.weights import WeightReader

logger = logging.getLogger(__name__)

WHAT = "text encoder"
VERSION = 1  # of the arithmetic below; a change makes old cache entries stale
STEM = "model"  # of the files in a transformers folder
# In some files and of no use here: the embedding under its second name, and ComfyUI's copy of the tokenizer.
IGNORED = ("encoder.embed_tokens.weight", SPIECE_TENSOR)
MAX_TOKENS = 512  # of the official text encoder
XXL = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64, "num_layers": 24}


class WanTextEncoder(Encoder):
    """UMT5's encoder as Wan runs it: cleaned captions, the end token kept, at most `max_length` tokens.

    Each caption runs alone and at its own length. The official run pads to 512, masks the padding and cuts it off
    again: the same rows for more work. And run alone, no caption's rows can depend on what it is batched with.
    """

    kind: ClassVar[str] = "text"
    reads: ClassVar[Literal["pixels", "caption"]] = "caption"

    def __init__(self, weights: Path, tokenizer: Path | None, dtype: torch.dtype, max_length: int = MAX_TOKENS) -> None:
        """
        Args:
            weights: `models_t5_umt5-xxl-enc-bf16.pth`, a safetensors file, or a transformers folder. Scaled float8
                weights are expanded while they are read.
            tokenizer: a folder with tokenizer.json or spiece.model; None for the one that ComfyUI's files carry.
            dtype: what the network is held and run in, and what its states are stored in. Officially bfloat16.
            max_length: tokens a caption, the end token included; longer captions are cut and named in the log.
        """
        self.weights = weights
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.max_length = max_length
        self._device = torch.device("cpu")
        self._model: UMT5EncoderModel | None = None
        self._tokenize: Tokenizer | None = None

    def fingerprint(self) -> Mapping[str, Any]:
        files = frozen_files(self.weights, STEM, WHAT)  # without a folder the tokenizer is in them
        if self.tokenizer is not None:
            files = [*files, tokenizer_file(self.tokenizer)]
        return {
            "encoder": "umt5",
            "version": VERSION,
            "dtype": str(self.dtype),
            "max_length": self.max_length,
            "files": [str(file) for file in files],
        }

    def check(self) -> None:
        """Compare names and shapes of the tensors on disk with the network's, without loading them; read the tokenizer.

        Raises:
            FileNotFoundError: a path is wrong.
            ValueError: tensors are missing or mis-shaped, or the tokenizer belongs to another model.
        """
        self._open_tokenizer(*self._skeleton())

    def load(self, device: torch.device) -> None:
        model, reader = self._skeleton()
        self._tokenize = self._open_tokenizer(model, reader)
        fill_frozen(model, reader, device, self.dtype)
        self._model, self._device = model, device

    @torch.no_grad()
    def encode(self, items: Sequence[Any]) -> list[dict[str, Tensor]]:
        """`{"text": [S, D]}` a caption, S its number of tokens. The empty caption gives one row, its end token's.

        Raises:
            NotFiniteError: the network returned infinities or NaN, which float16 can do.
        """
        return [{"text": self._encode_one(caption)} for caption in items]

    def unload(self) -> None:
        self._model = self._tokenize = None
        free_memory(self._device)

    def _encode_one(self, caption: str) -> Tensor:
        assert self._model is not None and self._tokenize is not None, "encode before load"
        tokens = self._tokenize.encode(clean_caption(caption))
        if tokens.overflowing:
            logger.warning("caption cut to %d tokens: %.60s...", self.max_length, caption)
        ids = torch.tensor([tokens.ids], device=self._device)
        states = self._model(input_ids=ids).last_hidden_state[0].cpu()
        if not states.isfinite().all():
            mend = "use bfloat16 or float32"
            raise NotFiniteError(f"{WHAT} {self.weights}: states are not finite in {self.dtype}; {mend}")
        return states

    def _skeleton(self) -> tuple[UMT5EncoderModel, WeightReader]:
        """The network on `meta` and the reader that fits it."""
        reader = WeightReader(frozen_files(self.weights, STEM, WHAT), TEXT, WHAT, identify=hint_for(TEXT_KEY))
        with odd_shapes_told(WHAT, reader), torch.device("meta"):
            model = UMT5EncoderModel(umt5_config(reader))
        check_frozen(model, reader, IGNORED)
        return model, reader

    def _open_tokenizer(self, model: UMT5EncoderModel, reader: WeightReader) -> Tokenizer:
        if self.tokenizer is not None:
            tokenizer = open_tokenizer(self.tokenizer, self.max_length)
        elif SPIECE_TENSOR in reader.names():
            content = reader.read(SPIECE_TENSOR)
            tokenizer = spiece_tokenizer(content.numpy().tobytes(), str(self.weights), self.max_length)
        else:
            raise ValueError(
                f"{WHAT} {self.weights} carries no tokenizer; set tokenizer_path to that of google/umt5-xxl"
            )
        known, rows = tokenizer.get_vocab_size(), model.config.vocab_size
        if known > rows:
            raise ValueError(
                f"tokenizer {self.tokenizer or self.weights} knows {known} tokens and {WHAT} {self.weights} only "
                f"{rows}; they belong to different models"
            )
        return tokenizer


def clean_caption(caption: str) -> str:
    """`caption` as the official tokenizer cleans it: mojibake mended, HTML entities resolved (twice, for those escaped
    twice), runs of white space made one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return re.sub(r"\s+", " ", text).strip()


def umt5_config(reader: WeightReader) -> UMT5Config:
    """Sizes from tensor shapes; UMT5-XXL's where a tensor is absent, so that the check names it."""
    shapes = reader.shapes()
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    vocab_size, d_model = shapes.get("shared.weight", (XXL["vocab_size"], XXL["d_model"]))
    num_buckets, num_heads = shapes.get(f"{attention}.relative_attention_bias.weight", (32, XXL["num_heads"]))
    inner, _ = shapes.get(f"{attention}.q.weight", (num_heads * XXL["d_kv"], d_model))
    d_ff, _ = shapes.get(f"{feed_forward}.wi_0.weight", (XXL["d_ff"], d_model))
    numbers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.block.")}
    return UMT5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=inner // num_heads,
        d_ff=d_ff,
        num_layers=len(numbers) or XXL["num_layers"],
        num_heads=num_heads,
        relative_attention_num_buckets=num_buckets,
    )
