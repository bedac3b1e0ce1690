"""A toy family whose last block goes wrong when the environment says so: where, when and how."""

import os
import signal
import threading
from typing import ClassVar

import torch
from torch import nn

from tests.helpers.toy import ToyFamily
from tests.helpers.toy_model import ToyBlock, ToyModel

FAULT, RANK, CALL, EVALUATING = "TOY_FAULT", "TOY_FAULT_RANK", "TOY_FAULT_CALL", "TOY_FAULT_EVALUATING"


def hang() -> None:
    threading.Event().wait()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    """As a scheduler does; all ranks then leave after the step."""
    os.kill(os.getpid(), signal.SIGTERM)


def doom() -> None:
    """As a launcher does: SIGTERM, and as the last of these passes SIGKILL, which is too soon for an evaluation."""
    terminate()
    FaultyBlock.doomed_at = FaultyBlock.calls + GRACE


def refuse() -> None:
    raise ValueError("a clip that nobody likes; use another")


def run_out() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.20 GiB is "
        "free. Including non-PyTorch memory, this process has 77.9 GiB memory in use."
    )


FAULTS = {f.__name__: f for f in (hang, die, terminate, doom, refuse, run_out)}
GRACE = 10


class FaultyBlock(ToyBlock):
    """Counts its passes of the wanted kind (training or evaluation) on the wanted rank."""

    calls = 0
    doomed_at = -1

    def forward(self, boundary):
        evaluating = os.environ.get(EVALUATING) == "1"
        if os.environ.get(RANK) == os.environ.get("RANK") and torch.is_grad_enabled() != evaluating:
            if FaultyBlock.calls == FaultyBlock.doomed_at:
                die()
            if FaultyBlock.calls == int(os.environ[CALL]):
                FAULTS[os.environ[FAULT]]()
            FaultyBlock.calls += 1
        return super().forward(boundary)


class FaultyToy(ToyFamily):
    Config: ClassVar[type] = type("FaultyConfig", (ToyFamily.Config,), {})

    def build_skeleton(self):
        with torch.device("meta"):
            model = ToyModel()
            blocks = list(model.blocks)
            model.blocks = nn.ModuleList([*blocks[:-1], FaultyBlock(8)])
            return model
