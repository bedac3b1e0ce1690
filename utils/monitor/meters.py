"""Meters: times of a step, throughput, peak memory, the mean loss of an epoch and the time left."""

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from utils.monitor.loss_watch import LossWatch

T = TypeVar("T")

ETA_WINDOW = 50  # steps; long enough to see all buckets, short enough to follow a change


class StepTimes(NamedTuple):
    """One optimizer step in numbers."""

    step_s: float  # s, all of it
    data_wait_s: float  # s of it spent waiting for micro-batches
    samples_per_s: float  # over all ranks
    frames_per_s: float  # pixel frames, over all ranks


class Meters:
    """Timing around a step, and the epoch's mean loss. One object a process; only the loss is worth saving.

    Use: `begin_step()`, train on `waiting(micro_batches)`, `end_step(...)`. What happens between steps (evaluation,
    saving) is not counted.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began = self._waited = 0.0
        self._recent: deque[float] = deque(maxlen=ETA_WINDOW)
        self._loss_sum = 0.0
        self._loss_samples = 0
        self.watch = LossWatch()

    def begin_step(self) -> None:
        self._began, self._waited = self._clock(), 0.0

    def waiting(self, micro_batches: Iterable[T]) -> Iterator[T]:
        """The same items; the time that each takes to come counts as waiting for data."""
        items = iter(micro_batches)
        while True:
            asked = self._clock()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - asked
            yield item

    def end_step(self, loss: float, samples: int, frames: int) -> StepTimes:
        """Close the step.

        Args:
            loss: mean over the step's samples. One that is not finite is left out of the epoch's mean.
            samples: in the global batch.
            frames: pixel frames in the global batch.
        """
        step_s = self._clock() - self._began
        self._recent.append(step_s)
        if math.isfinite(loss):
            self._loss_sum += loss * samples
            self._loss_samples += samples
        rate = 1.0 / step_s if step_s > 0 else math.inf
        return StepTimes(step_s, self._waited, samples * rate, frames * rate)

    def end_epoch(self) -> float:
        """Mean loss over the samples since the last call, and start again. nan where there was no finite loss."""
        mean = self._loss_sum / self._loss_samples if self._loss_samples else math.nan
        self._loss_sum, self._loss_samples = 0.0, 0
        return mean

    def eta_s(self, steps_left: int) -> float | None:
        """Seconds that `steps_left` will take at the median of the last steps; None before the first step.

        The median, because the first step (compilation, allocation) may take a hundred times as long as the others.
        """
        return statistics.median(self._recent) * steps_left if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact: the epoch's mean is the same after a resume in the middle of it."""
        sums = {"epoch_loss_sum": self._loss_sum, "epoch_loss_samples": self._loss_samples}
        return {**sums, **self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loss_sum = float(state["epoch_loss_sum"])
        self._loss_samples = int(state["epoch_loss_samples"])
        self.watch.load_state_dict(state)


def peak_memory_gib() -> float:
    return peak_memory_bytes() / 2**30


def peak_memory_bytes() -> int:
    """Most memory this process has held so far: of its CUDA device where it uses one, else of the host."""
    torch = sys.modules.get("torch")  # a process that has not imported torch holds nothing on a device
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB on Linux
