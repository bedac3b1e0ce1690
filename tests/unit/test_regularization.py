"""Which samples are held to the base model, and what becomes of their targets."""

import torch

from models.base import MicroBatch
from utils.data.plan import Item
from utils.train.regularization import held_samples, toward_base


class Engine:
    """A pipeline of one stage that predicts ten times its input, and remembers what it was asked for."""

    def __init__(self, last: bool = True) -> None:
        self.last, self.asked = last, []

    def is_last_stage(self) -> bool:
        return self.last

    def predict_base(self, batches, count):
        self.asked = list(batches) if batches is not None else []
        assert batches is None or len(self.asked) == count
        return [batch.inputs[0].double() * 10 for batch in self.asked] if self.last else []


def batches(count: int) -> list[MicroBatch]:
    made = [torch.full((2, 3), float(index + 1)) for index in range(count)]
    return [MicroBatch((x,), (-x, x + 100), torch.tensor([0.5, 2.0])) for x in made]


def test_held_samples_are_found_by_micro_batch():
    micro_batches = [[Item(0, 0), Item(5, 1)], [Item(1, 0), Item(2, 0)], [Item(7, 2), Item(6, 0)]]
    assert held_samples(micro_batches, lambda entry: entry >= 5) == {0: [1], 2: [0, 1]}
    assert held_samples(micro_batches, lambda entry: False) == {}


def test_only_rows_of_held_samples_get_the_prediction():
    engine, given = Engine(), batches(4)
    first = [batch.target[0].clone() for batch in given]
    read = iter(given)
    got = toward_base(engine, read, {0: [1], 2: [0, 1]})
    assert [batch.inputs[0][0, 0].item() for batch in engine.asked] == [1, 3], "no others go through the model"
    assert next(read) is given[3], "what comes after the last held sample waits"
    targets = [batch.target for batch in got]
    assert [target[0].tolist() for target in targets] == [[[-1] * 3, [10] * 3], [[-2] * 3] * 2, [[30] * 3] * 2]
    assert [target[1].equal(batch.target[1]) for target, batch in zip(targets, given, strict=False)] == [True] * 3
    assert targets[0][0].dtype == torch.float32
    assert all(batch.target[0].equal(before) for batch, before in zip(given, first, strict=True)), "copies were changed"


def test_a_data_rank_and_a_stage_without_them_pass_everything_on():
    given = batches(2)
    assert list(toward_base(Engine(), iter(given), {})) == given
    assert list(toward_base(Engine(last=False), iter(given), {1: [0]})) == given
    assert toward_base(Engine(last=False), None, {1: [0]}) is None
