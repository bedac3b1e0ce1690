"""Small trained tensors with an optimizer, and checkpoints of them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.disks import CountedDisk
from utils.train import checkpoint_write
from utils.train.checkpoint import Part
from utils.train.checkpoint_write import Checkpointer
from utils.train.optimizers import build_optimizer
from utils.train.state import TrainState

TOLD: dict[str, Any] = {"epochs_done": 2, "course": {"order": "x"}, "meters": {"epoch_loss_sum": 1.5}}


def trained(names="abcd", seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 2, generator=generator)) for name in names}


def optimizer_of(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return build_optimizer("adamw", list(parameters.items()), lr=0.1)


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    for parameter in parameters.values():
        parameter.grad = parameter.detach().sin()
    optimizer.step()


def stepped(parameters: dict[str, nn.Parameter], steps: int = 2) -> torch.optim.Optimizer:
    optimizer = optimizer_of(parameters)
    for _ in range(steps):
        step(parameters, optimizer)
    return optimizer


def save(run_dir: Path, number: int = 7, parameters=None, keep_last=None, **more) -> Path | None:
    """One checkpoint of step `number`, waited for."""
    parameters = trained() if parameters is None else parameters
    parts = {"": Part(parameters, stepped(parameters))}
    place = {"stage": 0, "data_rank": 0, "keep_last": keep_last, "disk": CountedDisk(), **more}
    return checkpoint_write.save(run_dir, TrainState(number, 10 * number), **TOLD, parts=parts, **place)


def checkpointer(run_dir: Path, **more) -> Checkpointer:
    return Checkpointer(run_dir, **{"stage": 0, "data_rank": 0, "keep_last": None, "disk": CountedDisk(), **more})
