"""A pass without gradients over many micro-batches, which all ranks leave at the same one when any is asked to."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from deepspeed.runtime.pipe import schedule

from utils import dist
from utils.train.activity import Activity

SLACK = 1  # micro-batches by which ranks of one stage may be apart, beside the stages' own distance


class Question(NamedTuple):
    """What ranks ask each other while a pass goes on.

    Attributes:
        ask: bits of this rank, at the beginning of a micro-batch.
        hear: takes the bits that any rank has set some micro-batches before, and says whether to leave. Called at the
            same micro-batch on all ranks and with the same bits, so that it may agree on more.
    """

    ask: Callable[[], int]
    hear: Callable[[int], bool]


def delay(stages: int) -> int:
    """Micro-batches from a question to its answer: so long until the last stage is where the first one was. An answer
    that was waited for at once would empty the pipeline every time."""
    return stages + SLACK


class ForwardPass(schedule.PipeSchedule):
    """Each stage takes a micro-batch, computes it, and passes it on.

    Args:
        micro_batches: of this data rank.
        common: micro-batches that every data rank has; at these `question` is asked.

    Attributes:
        was_left: before its end; on all ranks alike.
    """

    def __init__(
        self,
        micro_batches: int,
        stages: int,
        stage_id: int,
        activity: Activity,
        question: Question | None = None,
        common: int = 0,
    ) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.was_left = False
        self._activity, self._question, self._common = activity, question, common
        self._answers: deque[Callable[[], int]] = deque()

    def num_pipe_buffers(self) -> int:
        return 1  # what is sent is held by the sender, see `ReelEngine._send`

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        instructions: list[schedule.PipeInstruction] = []
        if self.is_first_stage or self.is_last_stage:
            instructions.append(schedule.LoadMicroBatch(0))
        if not self.is_first_stage:
            instructions.append(schedule.RecvActivation(0))
        instructions.append(schedule.ForwardPass(0))
        if not self.is_last_stage:
            instructions.append(schedule.SendActivation(0))
        for index in range(self.micro_batches):
            if self._question is not None and index < self._common and self._leaves(self._question):
                self.was_left = True
                break
            yield instructions
        while self._answers:  # asked by all, so to be taken by all
            self._answer()

    def _leaves(self, question: Question) -> bool:
        """All that this rank has for others of earlier micro-batches is on its way, so it may wait for them."""
        self._answers.append(dist.join_flags_later(question.ask()))
        return len(self._answers) > delay(self.stages) and question.hear(self._answer())

    def _answer(self) -> int:
        self._activity.note("the word of all on going on", None)
        return self._answers.popleft()()
