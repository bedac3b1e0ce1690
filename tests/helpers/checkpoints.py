"""Small trained tensors with an optimizer, and checkpoints of them."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.helpers.disks import CountedDisk
from utils.train import checkpoint_read, checkpoint_write
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


class Training:
    """A model that is stepped, with a checkpoint now and then; and what it held at each step."""

    def __init__(self, run_dir, **more) -> None:
        self.parameters = trained()
        self.optimizer = optimizer_of(self.parameters)
        self.writer = checkpointer(run_dir, **more)
        self.held: dict[int, dict[str, torch.Tensor]] = {}
        self.now = 0

    def step(self) -> None:
        step(self.parameters, self.optimizer)
        self.now += 1
        self.held[self.now] = {name: p.detach().clone() for name, p in self.parameters.items()}

    def begin(self, *, wait: bool = False) -> bool:
        parts = {"": Part(self.parameters, self.optimizer)}
        return self.writer.begin(TrainState(self.now), TOLD, parts, wait=wait)

    def save(self) -> checkpoint_write.Ended | None:
        self.step()
        self.begin()
        return self.writer.settle()


def check(folder, held) -> None:
    """The checkpoint is sound, and holds what there was at its step."""
    assert checkpoint_read.verify(folder) == []
    fresh = trained(seed=9)
    optimizer = optimizer_of(fresh)
    loaded = checkpoint_read.load(folder, {"": Part(fresh, optimizer)})
    number = loaded.state.step
    assert folder.name == f"global_step{number}"
    assert all(torch.equal(fresh[name], held[number][name]) for name in fresh)
    assert [int(state["step"]) for state in optimizer.state.values()] == [number] * len(fresh)


def held_up() -> tuple[CountedDisk, threading.Event]:
    """A disk that takes nothing until the event."""
    event = threading.Event()

    def wait(_: int, call: str) -> None:
        if call == "write":
            assert event.wait(20)

    return CountedDisk(wait), event
