"""What a rank says it is doing."""

import pytest

from utils.data.workers import Silent
from utils.train.activity import LONG, Activity, Batch, Watched


def test_the_k_th_of_a_kind_is_micro_batch_k():
    activity = Activity()
    for step in ("step 1", "step 2"):
        activity.begin(step)
        seen = []
        for what in ("forward", "forward", "backward", "forward", "backward"):
            activity.note_next(what)
            seen.append((activity.doing.what, activity.doing.micro_batch))
        assert seen == [("forward", 0), ("forward", 1), ("backward", 0), ("forward", 2), ("backward", 1)]


def test_the_place_names_bucket_and_samples_of_the_micro_batch():
    activity = Activity()
    names = [["a.mp4", "b.mp4"], ["c.mp4"]]
    activity.begin("step 2", lambda m: Batch("64x64x5", [*names[0], *names[1]] if m is None else names[m]))
    assert activity.place() == "in step 2 (bucket 64x64x5, samples a.mp4, b.mp4, c.mp4)"
    activity.note_next("forward")
    assert activity.place() == "in step 2, forward of micro-batch 0 (bucket 64x64x5, samples a.mp4, b.mp4)"
    activity.note_next("gradients", (1,))
    activity.note_next("gradients", (1,))
    place = "in step 2, waiting for gradients of micro-batch 1 (bucket 64x64x5, sample c.mp4)"
    assert activity.place() == place


def test_many_samples_are_counted():
    activity = Activity()
    activity.begin("step 2", lambda _: Batch("64x64x5", [f"{i}.mp4" for i in range(11)]))
    assert activity.place().endswith("6.mp4, 7.mp4 and 3 more)")


def test_a_place_that_cannot_be_told_hides_no_error():
    activity = Activity()
    activity.begin("step 2", lambda _: [][1])
    assert activity.place() == "in step 2"


@pytest.mark.parametrize("total", [0, 3])
def test_every_item_counts_as_progress(total):
    activity = Activity()
    progress = Watched(Silent(), activity)
    progress.start(total, "encoding latents")
    assert (activity.phase, activity.doing.patience) == ("encoding latents", LONG), "weights are read first"
    for name in ("a.mp4", "b.mp4", "c.mp4")[:total]:
        before = activity.doing
        progress.advance(1, name)
        assert activity.doing.since > before.since
        assert (activity.doing.what, activity.doing.patience) == (f"the item after {name}", 1)
    progress.done()
    assert activity.doing.patience == LONG, "then weights are hashed, and entries looked up one by one"
