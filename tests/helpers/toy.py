"""A toy family of under 100 lines: proof that a new model is one subclass, and the engine tests' small model."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from models import flow_match
from models.base import Draw, Encoder, MediaSpec, MicroBatch, ModelFamily


class ToyBlock(nn.Module):
    checkpointable = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, boundary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, context, grid = boundary
        return x + self.down(torch.tanh(self.up(x) + context.float().mean((1, 2))[:, None, None])), context, grid


class ToyEmbed(nn.Linear):
    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, t, text = inputs
        grid = torch.tensor(x.shape[2:])  # integers cross the boundary too
        return super().forward(x.flatten(2).transpose(1, 2)) + t[:, None, None], text.to(torch.float64), grid


class ToyHead(nn.Linear):
    def forward(self, boundary: tuple[Tensor, ...]) -> Tensor:
        x, _, grid = boundary
        return super().forward(x).transpose(1, 2).unflatten(2, tuple(grid.tolist()))


class ToyModel(nn.Module):
    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.embed = ToyEmbed(16, width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(blocks))
        self.head = ToyHead(width, 16)


class ToyWeights:
    def names(self) -> set[str]:
        return {name for name, _ in ToyModel().named_parameters()}

    def read(self, name: str) -> Tensor:
        shape = dict(ToyModel().named_parameters())[name].shape
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5


class ToyConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    type: str = "toy"


class ToyFamily(ModelFamily):
    Config = ToyConfig
    title, compute_dtype = "toy", torch.float32

    def __init__(self, config: ToyConfig | None = None, **_: object) -> None: ...

    def media_spec(self) -> MediaSpec:
        return MediaSpec(Fraction(16), 16, 4, True)

    def tokens(self, width: int, height: int, frames: int) -> int:
        return width * height * frames

    def encoders(self) -> Sequence[Encoder]:
        return []

    def micro_batch(self, samples: Sequence[Mapping[str, Tensor]], draws: Sequence[Draw]) -> MicroBatch:
        latents = torch.stack([sample["latents"] for sample in samples])
        noise = torch.stack(
            [flow_match.seeded_noise(tuple(s["latents"].shape), d.seed) for s, d in zip(samples, draws)]
        )
        t = flow_match.timestep(torch.tensor([draw.quantile for draw in draws]), "uniform")
        noisy, target = flow_match.noisy_and_target(latents, noise, t)
        return MicroBatch((noisy, t, torch.stack([sample["text"][:1] for sample in samples])), (target,))

    def build_skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return ToyModel()

    def pipeline_layers(self, skeleton: nn.Module) -> list[nn.Module]:
        return [skeleton.embed, *skeleton.blocks, skeleton.head]

    def open_weights(self) -> ToyWeights:
        return ToyWeights()

    def storage_dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def lora_targets(self, skeleton: nn.Module, exclude: Sequence[str] = ()) -> list[str]:
        return [n for n, m in skeleton.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)]

    def loss(self, prediction: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        return flow_match.flow_loss(prediction, target[0])

    def save_lora(self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
        return self.save_full(tensors, folder, metadata)

    def load_lora(self, path: Path) -> dict[str, Tensor]:
        return torch.load(path, weights_only=True)

    def save_full(self, tensors: Mapping[str, Tensor], folder: Path, metadata: Mapping[str, str]) -> Path:
        torch.save(dict(tensors), folder / "toy.pt")
        return folder / "toy.pt"
