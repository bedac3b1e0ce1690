"""A toy family of two experts, early and late, that differ in weights, range of timesteps and file name."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from models.base import MicroBatch
from tests.helpers.toy import ToyFamily, ToyWeights

SHARES = {"early": 0.75, "late": 0.25}  # of the timesteps, and of the steps
RANGES = {"early": (0.25, 1.0), "late": (0.0, 0.25)}


class ToyExpertsConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    type: str = "toy_experts"
    switch_every: int = 1


class ExpertWeights(ToyWeights):
    def __init__(self, name: str) -> None:
        self._scale = 1.0 if name == "early" else 0.5

    def read(self, name: str) -> Tensor:
        return super().read(name) * self._scale


class ToyExpert(ToyFamily):
    """One of the two."""

    def __init__(self, name: str) -> None:
        self.name, self.title = name, f"toy {name}"

    def micro_batch(self, samples, draws) -> MicroBatch:
        low, high = RANGES[self.name]
        within = [draw._replace(quantile=low + draw.quantile * (high - low)) for draw in draws]
        return super().micro_batch(samples, within)

    def open_weights(self) -> ExpertWeights:
        return ExpertWeights(self.name)

    def save_full(self, tensors, folder: Path, metadata):
        save_file(dict(tensors), folder / f"toy_{self.name}.safetensors", dict(metadata))
        return folder / f"toy_{self.name}.safetensors"

    def load_adapter(self, path: Path, weights=None):
        return super().load_adapter(path / f"toy_{self.name}.safetensors" if path.is_dir() else path)


class ToyExperts(ToyFamily):
    """Both in one run: three turns in four are the early one's."""

    Config: ClassVar[type] = ToyExpertsConfig
    title = "two toys"

    def __init__(self, config: ToyExpertsConfig | None = None, **_) -> None:
        self.switch_every = (config or ToyExpertsConfig()).switch_every

    def experts(self) -> dict[str, ToyExpert]:
        return {name: ToyExpert(name) for name in SHARES}

    def expert_at(self, step: int) -> str:
        return "late" if step // self.switch_every % 4 == 1 else "early"

    def expert_shares(self) -> dict[str, float]:
        return SHARES
