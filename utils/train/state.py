"""Where training stands: a handful of integers from which everything else follows."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from utils.data.plan import EpochPlan


class Milestones(NamedTuple):
    """What cadences count; all three are complete."""

    step: int
    epochs_done: int
    examples: int


@dataclass(frozen=True)
class TrainState:
    """`step` counts optimizer steps over the run's whole life. The plan's own step is `step - data_start`, which
    differs only after `--reset_dataloader`."""

    step: int = 0
    examples: int = 0  # samples trained on
    data_start: int = 0  # the step at which the present pass through the data began
    epoch_start: int = 0  # epochs finished before that

    @property
    def plan_step(self) -> int:
        return self.step - self.data_start

    def advanced(self, samples: int) -> "TrainState":
        return replace(self, step=self.step + 1, examples=self.examples + samples)

    def epochs_done(self, plan: EpochPlan) -> int:
        """Epochs that are finished, over the run's whole life."""
        return self.epoch_start + plan.epoch_of(self.plan_step) - 1

    def milestones(self, plan: EpochPlan) -> Milestones:
        return Milestones(self.step, self.epochs_done(plan), self.examples)

    def restarted(self, epochs_done: int) -> "TrainState":
        """The same step, but the data from its beginning."""
        return replace(self, data_start=self.step, epoch_start=epochs_done)

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def course_mark(state: TrainState, course: Mapping[str, Any], meters: Mapping[str, Any]) -> str:
    """Sixteen digits for a step of a course: all that a checkpoint says of it beside its tensors."""
    facts = json.dumps([state.to_dict(), course, meters], sort_keys=True)
    return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()
