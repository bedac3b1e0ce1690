"""Every sample is used equally, and a step depends on the global batch alone."""

from collections import Counter
from itertools import islice

import pytest

from utils.data.plan import BatchShape, EpochPlan, Item, counter_uniform
from utils.data.records import Bucket, Entry

SMALL, LARGE = Bucket(64, 64, 1), Bucket(128, 64, 9)

# (frames of the bucket, (entry, turn) of each sample) of the first steps, as the first release took them
ORDER = [
    (1, [(2, 0), (13, 0), (6, 0), (0, 0)]),
    (1, [(4, 0), (1, 0), (5, 0), (3, 0)]),
    (9, [(10, 0), (7, 0), (8, 0), (11, 0)]),
]


def entries(counts: dict[tuple[Bucket, int], int]) -> list[Entry]:
    return [
        Entry(f"{bucket}-{group}-{i}", f"{i}", bucket, group, ("latents",), ("k",), ("t",))
        for (bucket, group), count in counts.items()
        for i in range(count)
    ]


FOUR = BatchShape(2, 2, 1)


def plan(counts, repeats=(1.0, 1.0), shape=FOUR, seed=1) -> EpochPlan:
    return EpochPlan(entries(counts), repeats, lambda _: shape, seed)


def used(p: EpochPlan, steps: int) -> Counter:
    return Counter(item.entry for s in range(steps) for item in p.step(s).items)


@pytest.mark.parametrize("repeats", [(1.0, 1.0), (3.0, 1.0), (1.5, 0.5)])
@pytest.mark.parametrize("epochs", [1, 2, 5, 12])
def test_every_sample_is_used_equally_but_for_the_part_of_a_batch_left_at_the_end(repeats, epochs):
    counts = {(SMALL, 0): 7, (LARGE, 0): 5, (SMALL, 1): 3}
    p = plan(counts, repeats)
    counter = used(p, p.first_step(epochs + 1))
    for (bucket, group), clips in counts.items():
        uses = [counter[i] for i, e in enumerate(entries(counts)) if (e.bucket, e.group) == (bucket, group)]
        assert len(uses) == clips
        # one turn of difference while a turn is under way, one more for what is carried over
        assert max(uses) <= -(-epochs * repeats[group] // 1)
        assert min(uses) >= epochs * repeats[group] // 1 - 1
    total = sum(counter.values())
    drawn = sum(int(epochs * repeats[g] * n) for (_, g), n in counts.items())
    assert drawn - 2 * 3 <= total <= drawn


def test_a_part_of_very_few_clips_is_none_in_some_epochs():
    p = plan({(SMALL, 0): 2, (SMALL, 1): 40}, repeats=(0.3, 1.0), shape=BatchShape(1, 4, 1))
    counter = used(p, p.first_step(11))
    assert counter[0] + counter[1] == 6, "ten times 0.3 of two clips"


def test_nothing_is_left_over_once_epochs_fill_whole_batches():
    p = plan({(SMALL, 0): 6}, shape=BatchShape(1, 4, 1))
    assert [p.first_step(e) for e in (1, 2, 3, 4, 5)] == [0, 1, 3, 4, 6]
    assert set(used(p, 3).values()) == {2}, "two epochs of six are three batches of four"
    assert [row.left_over for row in p.counts()] == [2]


def test_a_sample_comes_at_most_once_a_turn_and_turns_are_numbered():
    p = plan({(SMALL, 0): 5})
    items = [item for s in range(20) for item in p.step(s).items]
    assert len(set(items)) == len(items)
    assert {item.turn for item in items if item.entry == 0} == set(range(16))


def test_the_order_is_what_it_was():
    p = plan({(SMALL, 0): 7, (LARGE, 0): 5, (SMALL, 1): 3}, repeats=(1.5, 0.5))
    told = [(s.bucket.frames, [tuple(item) for item in s.items]) for s in map(p.step, range(3))]
    assert told == ORDER, "else runs go on in another order than they began in"


def test_the_cut_does_not_change_what_is_in_a_step():
    counts = {(SMALL, 0): 9, (LARGE, 0): 7}
    whole = plan(counts, shape=BatchShape(4, 1, 1))
    for shape in (BatchShape(1, 4, 1), BatchShape(2, 1, 2), BatchShape(1, 2, 2)):
        cut = plan(counts, shape=shape)
        for s in range(12):
            parts = [i for d in range(shape.data_ranks) for m in cut.step(s).micro_batches_of(d) for i in m]
            assert sorted(parts) == sorted(whole.step(s).items)
            assert len(parts) == 4
        assert cut.digest() == whole.digest()


def test_a_step_has_one_bucket_and_orders_differ_by_epoch_and_seed():
    counts = {(SMALL, 0): 12, (LARGE, 0): 12}
    p, other = plan(counts), plan(counts, seed=2)
    members = entries(counts)
    for s in range(12):
        assert {members[item.entry].bucket for item in p.step(s).items} == {p.step(s).bucket}
    first, second = ([i.entry for s in r for i in p.step(s).items] for r in (range(6), range(6, 12)))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != [i.entry for s in range(6) for i in other.step(s).items]
    assert p.digest() != other.digest()


def test_steps_can_be_asked_for_in_any_order():
    counts = {(SMALL, 0): 7, (LARGE, 0): 5}
    forwards = [plan(counts).step(s) for s in range(15)]
    p = plan(counts)
    assert [p.step(s) for s in reversed(range(15))] == forwards[::-1]


def test_epochs_without_a_full_batch_are_passed_over():
    p = plan({(SMALL, 0): 1}, shape=BatchShape(1, 4, 1))
    assert p.epoch_of(0) == 4
    assert p.step(0).items == [Item(0, turn) for turn in range(4)]
    assert p.never_used(3) == [SMALL]
    assert p.never_used(4) == []


def test_samples_before_a_step():
    p = plan({(SMALL, 0): 7, (LARGE, 0): 5})
    assert [p.samples_before(s) for s in range(8)] == [4 * s for s in range(8)]


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match=r"no samples; see skipped.jsonl"):
        EpochPlan([], [1.0], lambda _: BatchShape(1, 1, 1), 0)


def test_counter_numbers_are_uniform_and_open():
    values = [counter_uniform("x", i) for i in range(4000)]
    assert 0 < min(values) < 0.01
    assert 0.99 < max(values) < 1
    assert abs(sum(values) / 4000 - 0.5) < 0.02
    assert len(set(islice(values, 4000))) == 4000
