"""One optimizer step's micro-batches at a time, read ahead; its whole state is the step number."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from models.base import MicroBatch
from utils.data.dataset import CachedDataset
from utils.data.plan import EpochPlan, Item


class StepLoader:
    """Micro-batches of consecutive steps for one data rank.

    Micro-batches are made one by one on a background thread, at most `ahead` before they are asked for, so host memory
    holds a few of them and never a whole step. Middle stages need no loader: the plan alone tells them step and epoch.
    """

    def __init__(
        self, dataset: CachedDataset, plan: EpochPlan, data_rank: int, first_step: int, ahead: int = 3
    ) -> None:
        self._dataset, self._plan, self._data_rank = dataset, plan, data_rank
        self._step = first_step
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._coming = self._all_items(first_step)
        self._pending: deque[Future[MicroBatch]] = deque()
        self._ahead = ahead

    def next_step(self) -> Iterator[MicroBatch]:
        """The micro-batches of the next step."""
        count = self._plan.step(self._step).shape.micro_batches
        self._step += 1
        return self._take(count)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, count: int) -> Iterator[MicroBatch]:
        for _ in range(count):
            while len(self._pending) <= self._ahead:
                self._pending.append(self._pool.submit(self._dataset.training_batch, next(self._coming)))
            yield self._pending.popleft().result()

    def _all_items(self, step: int) -> Iterator[list[Item]]:
        while True:
            yield from self._plan.step(step).micro_batches_of(self._data_rank)
            step += 1
