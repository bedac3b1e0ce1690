"""NaN and infinity in a step: which tensor was the first, and what is told of it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import MicroBatch
from utils import dist

# What explains the rest comes first: a weight that is NaN makes a loss that is, and every gradient.
FROZEN, WEIGHT, DATA, LOSS, GRADIENT = range(5)
MAX_SAMPLES = 8  # in one message


class NonFiniteError(ValueError):
    """A loss, a gradient or a weight is NaN or infinite; what is on disk is not."""


class Origin(NamedTuple):
    """A tensor with NaN or infinity, as one rank found it."""

    cause: int
    stage: int
    data_rank: int
    what: str

    def words(self) -> str:
        return f"{self.what} (stage {self.stage}, data rank {self.data_rank})"


class Sample(NamedTuple):
    """One sample of a step, for people."""

    name: str
    t: float  # its timestep; 1 is noise

    def __str__(self) -> str:
        return f"{self.name} (t = {self.t:.4g})"


class Incident(NamedTuple):
    """A step that was left out."""

    step: int  # from 1
    loss: float
    grad_norm: float
    lr: float
    samples: Sequence[Sample]
    origins: Sequence[Origin]  # the first of each rank
    expert: str = ""
    files: Sequence[str] = ()  # of the cache, that are not finite themselves

    @property
    def first(self) -> Origin | None:
        """The one that explains the others; None where only the norm is too large for float32."""
        # a gradient goes through the stages from the last to the first
        return min(self.origins, key=lambda o: (o.cause, -o.stage if o.cause == GRADIENT else o.stage), default=None)

    @property
    def is_hopeless(self) -> bool:
        """Whether every further step would be the same."""
        return self.first is not None and self.first.cause in (FROZEN, WEIGHT)

    def words(self) -> str:
        """What happened, in several lines."""
        what = "gradient" if math.isfinite(self.loss) else "loss"
        where = f" of {self.expert}" if self.expert else ""
        first = self.first.words() if self.first else "none: the norm is beyond what float32 can hold"
        cached = f"\n  not finite in the cache: {shown(self.files)}" if self.files else ""
        return (
            f"the {what} of step {self.step}{where} is not finite (loss {self.loss:.4g}, gradient norm "
            f"{self.grad_norm:.4g}, learning rate {self.lr:.3g}); no weight was changed by it"
            f"\n  the first tensor that is not finite: {first}{cached}\n  samples: {shown(self.samples)}"
        )


def shown(samples: Sequence[object]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(samples) - MAX_SAMPLES} more" if len(samples) > MAX_SAMPLES else ""
    return ", ".join(map(str, samples[:MAX_SAMPLES])) + more


# --- tensors ----------------------------------------------------------------------------------------------------------


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity, in their order. One wait for the device where all is well."""
    held = {name: _wide(tensor.detach()) for name, tensor in tensors.items() if tensor.numel()}
    held = {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}
    if not held:
        return []
    # the largest magnitude of each: NaN goes through a maximum, and nothing can overflow as in a sum
    largest = torch._foreach_norm(list(held.values()), math.inf)
    good = torch.stack([value.float() for value in largest]).isfinite().tolist()
    return [name for name, is_good in zip(held, good, strict=True) if not is_good]


def _wide(tensor: Tensor) -> Tensor:
    """float8 knows no arithmetic."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def bad_weight(trained: Mapping[str, Mapping[str, Tensor]], stage: int) -> str | None:
    """The first trained tensor of any stage that is not finite, in words; the same on every rank, all of which call it.

    Args:
        trained: of this stage, by expert.
    """
    return _first_of_any([name for tensors in trained.values() for name in not_finite(tensors)], stage)


def bad_state(parts: Mapping[str, tuple[Mapping[str, Tensor], torch.optim.Optimizer]], stage: int) -> str | None:
    """The same for what optimizers remember. A running mean that was infinite once stays so, and then nothing moves the
    weight that it belongs to: the weight itself tells of nothing.

    Args:
        parts: of this stage, by expert: what is trained, and its optimizer.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for trained, optimizer in parts.values():
        for name, parameter in trained.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):  # counts of steps may lie on the host
                    by_device.setdefault(value.device, {})[f"{key} of {name}"] = value
    return _first_of_any([name for tensors in by_device.values() for name in not_finite(tensors)], stage)


def _first_of_any(found: Sequence[str], stage: int) -> str | None:
    told = [text for text in dist.gather_text(f"{found[0]} (stage {stage})" if found else "") if text]
    return told[0] if told else None


def refuse_bad_weights(name: str | None, what: str) -> None:
    """Raise where `bad_weight` found one: what is on disk stays."""
    if name is not None:
        raise NonFiniteError(
            f"{what} is not written: the trained weight {name} is not finite; go on from an earlier checkpoint with a "
            "lower lr"
        )


def batch_origins(batches: Sequence[MicroBatch], samples: Sequence[Sequence[str]], first_stage: bool) -> list[str]:
    """What is not finite of the micro-batches that a stage reads: the inputs on the first, else the targets.

    Args:
        samples: names of those in each micro-batch.
    """
    found = []
    for batch, names in zip(batches, samples, strict=False):
        tensors = {f"input {i}": t for i, t in enumerate(batch.inputs)} if first_stage else {}
        tensors |= {} if first_stage else {f"target {i}": t for i, t in enumerate(batch.target)}
        tensors |= {} if first_stage else {"the weights": batch.weights}
        for name, tensor in tensors.items():
            good = tensor.reshape(len(tensor), -1).isfinite().all(dim=1)
            found += [
                f"{name} of {sample}" for sample, is_good in zip(names, good.tolist(), strict=False) if not is_good
            ]
    return found


def gather_origins(mine: Origin | None) -> list[Origin]:
    """The first of each rank that has one, on every rank."""
    told = dist.gather_text(json.dumps(mine))
    return [Origin(*found) for text in told if (found := json.loads(text))]
