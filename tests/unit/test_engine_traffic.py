"""What stages send each other: no deadlock where a send waits for its receiver, and no pile-up in evaluation."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.pipe import schedule

from utils.train.activity import Activity
from utils.train.engine import ReelEngine
from utils.train.forward_pass import ForwardPass

TENSORS = {"Activation": 5, "Grad": 2}  # headers among them


def transfers(kind: type, stage: int, stages: int, micro_batches: int) -> list[tuple[str, int, int]]:
    """("Send" or "Recv", sender, receiver) in the order in which a stage's engine issues them."""
    found = []
    more = {"activity": Activity()} if kind is ForwardPass else {}
    for commands in kind(micro_batches=micro_batches, stages=stages, stage_id=stage, **more):
        for command in commands:
            for what, count in TENSORS.items():
                towards = 1 if what == "Activation" else -1
                if command.name == f"Send{what}":
                    found += [("Send", stage, stage + towards)] * count
                if command.name == f"Recv{what}":
                    found += [("Recv", stage - towards, stage)] * count
    return found


@pytest.mark.parametrize("kind", [schedule.TrainSchedule, ForwardPass])
@pytest.mark.parametrize("stages", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 8, 17])
def test_the_order_holds_where_both_ends_must_meet(kind, stages, micro_batches):
    """NCCL has one stream a rank: a transfer starts when both ends have done all that they issued before it."""
    queues = [transfers(kind, stage, stages, micro_batches)[::-1] for stage in range(stages)]
    assert all(queues)
    moved = True
    while moved:
        moved = False
        for queue in queues:
            if queue and queue[-1][0] == "Send":
                _, sender, receiver = queue[-1]
                if queues[receiver] and queues[receiver][-1] == ("Recv", sender, receiver):
                    queue.pop()
                    queues[receiver].pop()
                    moved = True
    assert not any(queues), "deadlock"


class Work:
    waited = False

    def wait(self) -> None:
        self.waited = True


class Sender(ReelEngine):
    """The sending part of an engine, with a receiver that takes nothing until it is waited for."""

    def __init__(self, training: bool) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__["module"] = SimpleNamespace(training=training)
        self.pipe_buffers = {"outputs": [None]}
        self.next_stage, self._sends, self.activity = 1, [], Activity()

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        self._sends.append((Work(), tensor))


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_runs_at_most_two_micro_batches_ahead(training):
    sender = Sender(training)
    for number in range(6):
        sender.pipe_buffers["outputs"][0] = (torch.zeros(2), torch.zeros(3))
        sender._exec_send_activations(0)
        micro_batches = len(sender._sends) / 3  # a header and two tensors each
        assert micro_batches == (number + 1 if training else min(number + 1, 2))
    works = [work for work, _ in sender._sends]
    sender._finish_sends()
    assert sender._sends == [] and all(work.waited for work in works)
