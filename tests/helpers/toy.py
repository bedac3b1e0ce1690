"""A toy family of under 100 lines: proof that a new model is one subclass and one registry line."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import flow_match, masks
from models.base import Draw, Encoder, MediaSpec, MicroBatch, ModelFamily
from tests.helpers.toy_model import ToyModel


class ToyWeights:
    shapes = {name: p.shape for name, p in ToyModel().named_parameters()}  # noqa: RUF012

    def names(self) -> set[str]:
        return set(self.shapes)

    def read(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(self.shapes[name], generator=generator) / self.shapes[name][-1] ** 0.5


class ToyEncoder(Encoder):
    def fingerprint(self):
        return {"toy": self.kind}

    def load(self, device) -> None: ...
    def unload(self) -> None: ...


class ToyVAE(ToyEncoder):
    kind, reads = "latents", "pixels"

    def encode(self, items):
        frames = [torch.as_tensor(np.asarray(item))[::4, ::8, ::8].float() / 127.5 - 1 for item in items]
        return [{"latents": f.permute(3, 0, 1, 2).repeat(6, 1, 1, 1)[:16].contiguous()} for f in frames]


class ToyText(ToyEncoder):
    kind, reads = "text", "caption"

    def encode(self, items):
        return [{"text": torch.tensor([[len(caption) / 100, 1.0, 0.0]] * 2)} for caption in items]


class ToyFamily(ModelFamily):
    Config = type("ToyConfig", (BaseModel,), {"__annotations__": {"type": str}})
    title, compute_dtype = "toy", torch.float32

    def __init__(self, config=None, **_) -> None: ...
    def media_spec(self):
        return MediaSpec(Fraction(16), 16, 4, True)

    def tokens(self, width: int, height: int, frames: int) -> int:
        return width * height * frames

    def encoders(self):
        return [ToyVAE(), ToyText()]

    def micro_batch(self, samples: Sequence[Mapping[str, Tensor]], draws: Sequence[Draw]) -> MicroBatch:
        latents, text = (torch.stack([s[key] for s in samples]) for key in ("latents", "text"))
        noise = torch.stack([flow_match.seeded_noise(tuple(latents.shape[1:]), draw.seed) for draw in draws])
        t = flow_match.timestep(torch.tensor([draw.quantile for draw in draws]), "uniform")
        noisy, target = flow_match.noisy_and_target(latents, noise, t)
        return MicroBatch((noisy, t, text), (target, *masks.loss_mask(samples, *latents.shape[2:])))

    def build_skeleton(self):
        with torch.device("meta"):
            return ToyModel()

    def pipeline_layers(self, skeleton):
        return [skeleton.embed, *skeleton.blocks, skeleton.head]

    def open_weights(self):
        return ToyWeights()

    def storage_dtype(self, name: str):
        return torch.float32

    def lora_targets(self, skeleton, exclude=()):
        return [n for n, m in skeleton.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]

    def loss(self, prediction, target):
        return flow_match.flow_loss(prediction, target[0], mask=target[1] if target[1:] else None)

    def save_full(self, tensors, folder: Path, metadata):
        save_file(dict(tensors), folder / "toy.safetensors", dict(metadata))
        return folder / "toy.safetensors"

    def save_adapter(self, tensors, folder: Path, metadata, formats=(), weights=None):
        return [self.save_full(tensors, folder, metadata)]

    def load_adapter(self, path: Path, weights=None):
        return load_file(path / "toy.safetensors" if path.is_dir() else path)
