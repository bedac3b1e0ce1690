"""What the official transformers compute from the weights in tests/data, as our layers take it."""

from functools import lru_cache

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.base import MicroBatch
from models.wan.keymaps import TRANSFORMER
from tests.helpers.models import DATA


@lru_cache
def golden(name: str) -> dict[str, Tensor]:
    """The golden tensors of a kind in `models.VARIANTS`, by the keys that tests/data/README.md lists."""
    return load_file(DATA / name / "transformer_golden.safetensors")


def golden_batch(name: str) -> MicroBatch:
    """Inputs and target of the two golden samples."""
    told = golden(name)
    x = torch.cat([told["dit.x"], told["dit.y"]], dim=1) if "dit.y" in told else told["dit.x"]
    t = told["dit.t"]
    if "dit.t_tokens" in told:  # the tokens of a latent frame have one t
        t = told["dit.t_tokens"].unflatten(1, (x.shape[2], -1))
        assert (t == t[..., :1]).all()
        t = t[..., 0]
    contexts = [told["dit.context0"], told["dit.context1"]]
    text = torch.zeros(2, max(map(len, contexts)) + 1, 32)  # a row of zeros stands for all up to 512
    for row, context in zip(text, contexts, strict=True):
        row[: len(context)] = context
    image = (told["dit.clip_fea"].reshape(2, -1, 1280),) if "dit.clip_fea" in told else ()
    return MicroBatch((x, t.double() / 1000, text, *image), (told["dit.target"],))


def golden_gradients(name: str) -> dict[str, Tensor]:
    """Of the golden loss, by the skeleton's names."""
    prefix = "dit.grad."
    return {TRANSFORMER.to_skeleton(k.removeprefix(prefix)): v for k, v in golden(name).items() if k.startswith(prefix)}


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest element."""
    return ((found - expected).abs().max() / expected.abs().max()).item()
