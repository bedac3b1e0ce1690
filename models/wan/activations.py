"""What a block of Wan keeps for its backward pass, as a formula over tokens, widths and what is trained."""

import math
from typing import NamedTuple

from models.base import Activations
from models.wan.variants import TEXT_LENGTH, Architecture

FLOAT32 = 4  # bytes; autocast or not, norms, modulation and residuals are taken in it


class Row(NamedTuple):
    """How many tensors of a shape a block keeps; those that are not float32 have the compute dtype."""

    wide: int  # [L, D] float32: the residual, and what goes into and comes out of norms and modulation
    narrow: int  # [L, D]: q, k, v and what comes of both attentions, and the inputs of the Linears
    ffn: int  # [L, F]: before and after the feed-forward part's GELU
    wide_text: int  # [S, D] float32: of the norm of cross attention's keys
    narrow_text: int  # [S, D]: caption and image states as they come, keys and values


# What is trained -> what is kept. Counted with `torch.autograd.graph.saved_tensors_hooks` in torch 2.13 and diffusers
# 0.42, each storage once and weights left out; the tests count again. A frozen block keeps no input of a Linear and no
# factor of a modulation, and an adapter brings back the inputs. A DoRA keeps the outputs of its Linears too.
ROWS: dict[str | None, Row] = {
    None: Row(12, 10, 2, 2, 3),
    "lora": Row(6, 9, 2, 1, 3),
    "dora": Row(6, 16, 3, 1, 5),
    "lokr": Row(6, 17, 2, 1, 5),
}
IMAGE_NARROW = 2  # [L, D] more, where attention to image states has results of its own
NUMBERS_A_TOKEN = 9  # float32: means and deviations of norms
ADAPTED = 8, 2  # adapted Linears of a block that run over tokens, and over text; each keeps [rows, rank]
LOKR_INNER = 14  # [L, sqrt(D), rank] of a LoKr whose second matrix is a product of two; else it is as in `ROWS`


def activations(
    sizes: Architecture, tokens: int, bytes_a_number: int, image_states: int, adapter: str | None, rank: int
) -> Activations:
    """Bytes of one sample with a caption of 512 rows.

    Tensors that `ROWS` counts, with L tokens, D and F the widths of the model and of its feed-forward part, S the rows
    of text and image states, and c bytes a number of the compute dtype:

        block = L D (4 wide + c narrow) + L F c ffn + S D (4 wide_text + c narrow_text) + what ranks and norms add
        boundary = L D c, head = 4 L D, or for a trained one (8 + c) L D

    Flash attention is taken for granted: it keeps one number a token and head, and no matrix of L x L. Dropout of an
    adapter is not counted: it adds about one `narrow` a Linear.

    Args:
        tokens: L.
        bytes_a_number: c.
        image_states: rows of CLIP states that cross attention sees besides.
    """
    width = sizes.dim
    is_product = adapter == "lokr" and rank < math.sqrt(width) / 2  # peft's rule, for factors of about sqrt(D)
    row = ROWS["lora" if is_product else adapter]
    narrow = row.narrow + (IMAGE_NARROW if image_states else 0)
    text = TEXT_LENGTH + image_states
    block = tokens * width * (FLOAT32 * row.wide + bytes_a_number * narrow)
    block += tokens * sizes.ffn_dim * bytes_a_number * row.ffn
    block += text * width * (FLOAT32 * row.wide_text + bytes_a_number * row.narrow_text)
    attentions = 3 if image_states else 2
    block += FLOAT32 * tokens * (NUMBERS_A_TOKEN + attentions * sizes.num_heads)
    if adapter in ("lora", "dora"):
        over_tokens, over_text = ADAPTED
        block += bytes_a_number * rank * (over_tokens * tokens + over_text * text)
    if is_product:
        block += round(bytes_a_number * LOKR_INNER * tokens * math.sqrt(width) * rank)
    head = tokens * width * (FLOAT32 if adapter else 2 * FLOAT32 + bytes_a_number)
    return Activations(tokens * width * bytes_a_number, block, head)
