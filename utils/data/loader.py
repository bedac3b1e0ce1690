"""One optimizer step's micro-batches at a time, read ahead; its whole state is the step number."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from models.base import MicroBatch
from utils.data.dataset import CachedDataset
from utils.data.plan import EpochPlan, Item


class StepLoader:
    """Micro-batches of consecutive steps for one data rank.

    Micro-batches are made one by one on a background thread, at most `ahead` before they are asked for, so host memory
    holds a few of them and never a whole step. Middle stages need no loader: the plan alone tells them step and epoch.

    Args:
        dataset_at: who makes the micro-batches of a step of the plan; asked ahead of time, so the step must decide it.
    """

    def __init__(
        self,
        dataset_at: Callable[[int], CachedDataset],
        plan: EpochPlan,
        data_rank: int,
        first_step: int,
        ahead: int = 3,
    ) -> None:
        self._dataset_at, self._plan, self._data_rank = dataset_at, plan, data_rank
        self._step = first_step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._coming = self._all_work(first_step)
        self._pending: deque[Future[MicroBatch]] = deque()
        self._ahead = ahead

    def next_step(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step."""
        count = self._plan.step(self._step).shape.micro_batches
        self._step += 1
        return self._take(count)

    def again(self, step: int) -> list[MicroBatch]:
        """All micro-batches of a step that was taken before, made anew."""
        make = self._dataset_at(step).training_batch
        return [make(items) for items in self._plan.step(step).micro_batches_of(self._data_rank)]

    def not_finite(self, step: int) -> list[Path]:
        """Files of the cache that hold NaN or infinity, of those that a step was made from; errors as of
        `CachedDataset.not_finite`."""
        read = [item for items in self._plan.step(step).micro_batches_of(self._data_rank) for item in items]
        return self._dataset_at(step).not_finite(read)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, count: int) -> Iterator[MicroBatch]:
        for _ in range(count):
            while len(self._pending) <= self._ahead:
                make, items = next(self._coming)
                self._pending.append(self._pool.submit(make, items))
            yield self._pending.popleft().result()

    def _all_work(self, step: int) -> Iterator[tuple[Callable[[Sequence[Item]], MicroBatch], list[Item]]]:
        while True:
            make = self._dataset_at(step).training_batch
            yield from ((make, items) for items in self._plan.step(step).micro_batches_of(self._data_rank))
            step += 1
