"""Remembers how large the loss usually is, and how many steps were left out: spikes, and runs that get nowhere."""

from collections.abc import Mapping
from typing import Any

MEMORY = 0.98  # weight of what was in the running mean, which so spans about 50 steps
WARM_UP = 20  # steps before the mean says anything
WINDOW = 100  # steps in which those that were left out are counted


class LossWatch:
    """The running mean of the loss, of each model that is trained, and the steps that were left out. A resumed run goes
    on with both."""

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, int]] = {}  # by expert: the mean, and how many steps are in it
        self._left_out: list[int] = []  # in the last WINDOW steps
        self.total_left_out = 0

    def spike(self, loss: float, factor: float, expert: str = "") -> float | None:
        """Take in the loss of a step, which is finite; the mean before it where the loss is above `factor` times that.

        Args:
            factor: 0 never finds one.
        """
        mean, count = self._means.get(expert, (0.0, 0))
        limit = mean * factor
        is_spike = bool(factor) and count >= WARM_UP and loss > limit
        # a single spike must not hide the next, while a loss that stays up becomes the usual one
        heard = limit if is_spike else loss
        memory = min(MEMORY, count / (count + 1))
        self._means[expert] = (memory * mean + (1 - memory) * heard, count + 1)
        return mean if is_spike else None

    def lately_left_out(self, step: int) -> int:
        """How many of the WINDOW steps that end with `step` were left out."""
        return sum(earlier > step - WINDOW for earlier in self._left_out)

    def leave_out(self, step: int) -> None:
        """Note that `step` was."""
        self._left_out = [earlier for earlier in self._left_out if earlier > step - WINDOW] + [step]
        self.total_left_out += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values, exact."""
        means = {name: list(value) for name, value in self._means.items()}
        return {"loss_means": means, "left_out": list(self._left_out), "total_left_out": self.total_left_out}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What an older version did not write stays as it is at the start."""
        self._means = {name: (float(mean), int(n)) for name, (mean, n) in state.get("loss_means", {}).items()}
        self._left_out = [int(step) for step in state.get("left_out", [])]
        self.total_left_out = int(state.get("total_left_out", 0))
