"""What a config makes of the order of the data, and whether a checkpoint is one that a run may go on from."""

from pathlib import Path

import pytest

from tests.helpers.configs import folder, load, top  # noqa: F401 (a fixture)
from tests.unit.test_plan import LARGE, SMALL, entries
from utils.data.manifest import Group, Manifest
from utils.train.checkpoint import STATE, CheckpointError, put_in_place, write_json
from utils.train.disk import Disk
from utils.train.order import (
    course_of,
    make_plan,
    never_used,
    over_budget,
    plan_of,
    refuse_other_model,
    refuse_other_order,
)

TOKENS = {SMALL: 16, LARGE: 96}


def checkpoint_of(run_dir, course):
    staged, place = run_dir / "staged", run_dir / "global_step1"
    staged.mkdir()
    told = write_json(Disk(), staged / STATE, {"course": course})
    put_in_place(Disk(), staged, place, {STATE: told})
    return place


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """The two experts of A14B have tensors of the same names and shapes."""
    place = checkpoint_of(tmp_path, {"model": "Wan2.2 T2V-A14B high noise"})
    refuse_other_model(place, "Wan2.2 T2V-A14B high noise")
    with pytest.raises(CheckpointError, match=r"of Wan2.2 T2V-A14B high noise, and this run trains .* low noise; set"):
        refuse_other_model(place, "Wan2.2 T2V-A14B low noise")


def test_one_that_does_not_tell_its_model_passes(tmp_path):
    refuse_other_model(checkpoint_of(tmp_path, {"order": "x"}), "Wan2.1 T2V 1.3B")


# --- a budget of tokens -----------------------------------------------------------------------------------------------


def tokens(width, height, frames):
    return TOKENS[width, height, frames]


def training_set(small=40, large=6):
    return Manifest(entries({(SMALL, 0): small, (LARGE, 0): large}), [Group(Path("clips"), 1.0)], [], {}, {}, "")


def config(*lines, epochs=3):
    return load(top(*lines), overrides=[f"epochs={epochs}"]).run


@pytest.mark.usefixtures("folder")
def test_an_image_and_a_clip_cost_alike():
    run = config("max_tokens_per_gpu = 200", "gradient_accumulation_steps = 2")
    plan = plan_of(run, training_set(), 1, tokens)
    batches = {row.bucket: row.batch for row in plan.counts()}
    assert {bucket: batch.micro_batch for bucket, batch in batches.items()} == {SMALL: 12, LARGE: 2}
    assert all(row.batch.micro_batches == 2 for row in plan.counts())
    steps = [plan.step(step) for step in range(plan.first_step(4))]
    assert {len(step.items) for step in steps if step.bucket == SMALL} == {24}
    loads = [len(items) * tokens(*step.bucket) for step in steps for items in step.micro_batches_of(0)]
    assert max(loads) <= 200 and min(loads) > 200 / 2


@pytest.mark.usefixtures("folder")
def test_a_sample_over_the_budget_goes_alone_and_is_named():
    run = config("max_tokens_per_gpu = 50")
    plan = plan_of(run, training_set(), 1, tokens)
    assert {row.bucket: row.batch.micro_batch for row in plan.counts()} == {SMALL: 3, LARGE: 1}
    (said,) = over_budget(run, plan, tokens)
    assert said.startswith("bucket 128x64x9: one sample has 96 tokens, more than max_tokens_per_gpu = 50; ")
    assert over_budget(run, None, tokens, [LARGE, LARGE, SMALL]) == [said], "held out, once"
    alone = config("max_tokens_per_gpu = 50", "eval_micro_batch_size_per_gpu = 2")
    assert over_budget(alone, None, tokens, [LARGE]) == [], "the evaluation has a size of its own"
    assert over_budget(config(), plan, tokens, [LARGE]) == []


@pytest.mark.usefixtures("folder")
def test_what_never_fills_a_batch_names_the_key_to_lower():
    run = config("max_tokens_per_gpu = 200")
    train = training_set(small=3)
    plan = make_plan(run, train, 1, tokens)
    assert never_used(run, plan, 4) == []
    assert never_used(run, plan, 3) == [
        "bucket 64x64x1 does not fill one batch of 12 in this run, its 3 clips are never used; "
        "lower max_tokens_per_gpu or gradient_accumulation_steps, or raise epochs or num_repeats"
    ]
    with pytest.raises(ValueError, match=r"^1 epoch does not fill a single batch \(64x64x1: 3 clips, batch 62, 128"):
        make_plan(config("max_tokens_per_gpu = 1000", epochs=1), train, 1, tokens)
    with pytest.raises(ValueError, match=r"^3 epochs do not fill .* 1 clip, batch 64\); lower micro_batch_"):
        make_plan(config("micro_batch_size_per_gpu = 64"), training_set(1, 1), 1, tokens)


@pytest.mark.usefixtures("folder")
def test_a_budget_that_makes_the_same_batches_may_change(tmp_path):
    def course(*lines):
        run = config(*lines)
        return course_of(run, plan_of(run, training_set(), 1, tokens), training_set())

    saved = course("max_tokens_per_gpu = 200")
    refuse_other_order(tmp_path, saved, course("max_tokens_per_gpu = 207"))
    by_hand = course("micro_batch_size_per_gpu = 2", "image_micro_batch_size_per_gpu = 12")
    refuse_other_order(tmp_path, saved, by_hand)
    with pytest.raises(CheckpointError, match="max_tokens_per_gpu 200 -> 208 changed, and with it the order"):
        refuse_other_order(tmp_path, saved, course("max_tokens_per_gpu = 208"))
    with pytest.raises(CheckpointError, match="micro_batch_size_per_gpu None -> 1, max_tokens_per_gpu 200 -> None"):
        refuse_other_order(tmp_path, saved, course())
