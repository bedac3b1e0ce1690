"""A pass is left by all stages and data ranks at the same micro-batch, and nothing is left unanswered."""

from collections.abc import Callable

import pytest
from deepspeed.runtime.pipe import schedule

from utils import dist
from utils.train.activity import Activity
from utils.train.forward_pass import ForwardPass, Question, delay


class Word:
    """What ranks say to each other, one after another in this process: an answer is the bits of all that have asked,
    which the test sees to by running the ranks in lockstep."""

    def __init__(self, monkeypatch):
        self.asked: dict[int, int] = {}  # question -> the bits of all
        self.rank, self.counts, self.taken = 0, {}, {}
        monkeypatch.setattr(dist, "join_flags_later", self.join)

    def join(self, value: int) -> Callable[[], int]:
        rank = self.rank
        number = self.counts[rank] = self.counts.get(rank, -1) + 1
        self.asked[number] = self.asked.get(number, 0) | value

        def answer() -> int:
            self.taken.setdefault(rank, []).append(number)
            return self.asked[number]

        return answer


def passed(monkeypatch, stages: int, counts: list[int], asks_at: dict[int, int]) -> tuple[list[list[int]], Word]:
    """Micro-batches that each stage of each data rank has computed, each rank one step after another.

    Args:
        counts: micro-batches by data rank.
        asks_at: rank -> the micro-batch from which on it wants to leave.
    """
    word = Word(monkeypatch)
    done: list[list[int]] = [[0] * stages for _ in counts]
    ranks = []
    for data_rank, count in enumerate(counts):
        for stage in range(stages):
            rank = data_rank * stages + stage

            def ask(rank=rank, data_rank=data_rank, stage=stage) -> int:
                return int(done[data_rank][stage] >= asks_at.get(rank, 1000))

            each = ForwardPass(count, stages, stage, Activity(), Question(ask, bool), min(counts))
            ranks.append((rank, data_rank, stage, iter(each)))
    while ranks:
        # the last stages first: a stage is ahead of the next by one micro-batch, as in a full pipeline
        for item in sorted(ranks, key=lambda item: -item[2]):
            word.rank, data_rank, stage, steps = item
            starved = stage and done[data_rank][stage] == done[data_rank][stage - 1]
            if starved and any(other[1:3] == (data_rank, stage - 1) for other in ranks):
                continue  # nothing to receive yet
            if next(steps, None) is None:
                ranks.remove(item)
            else:
                done[data_rank][stage] += 1
    return done, word


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("counts", [[30], [30, 29], [30, 30, 29]])
@pytest.mark.parametrize("when", [0, 7, 20])
def test_all_leave_at_the_same_micro_batch(monkeypatch, stages, counts, when):
    ranks = len(counts) * stages
    done, word = passed(monkeypatch, stages, counts, {ranks - 1: when})
    assert done == [[when + delay(stages)] * stages] * len(counts)
    assert len(set(map(tuple, word.taken.values()))) == 1, "all answers were waited for, by all alike"
    assert word.taken[0] == sorted(word.asked)


def test_who_asks_too_late_is_not_heard_and_nobody_leaves(monkeypatch):
    done, word = passed(monkeypatch, 2, [30, 29], {1: 29 - delay(2)})
    assert done == [[30, 30], [29, 29]]
    assert {len(taken) for taken in word.taken.values()} == {29}


def test_without_a_question_none_is_asked():
    each = ForwardPass(3, 1, 0, Activity())
    steps = [[type(command) for command in commands] for commands in each]
    assert steps == [[schedule.LoadMicroBatch, schedule.ForwardPass]] * 3
    assert not each.was_left
