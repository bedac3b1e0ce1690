"""What is said when memory runs out: how much, where, and which settings of this run would help."""

import pytest
import torch

from tests.helpers.configs import RUN, folder, load, top  # noqa: F401
from utils.train.activity import Activity, Batch
from utils.train.memory import is_out_of_memory, out_of_memory_words, settings_that_help

pytestmark = pytest.mark.usefixtures("folder")


def advice(*lines, samples=1, phase="step 1", frames=9):
    activity = Activity()
    activity.stage = 0
    activity.begin(phase, lambda _: Batch(f"64x64x{frames}", ["clip.mp4"] * samples))
    activity.note_next("forward")
    return list(settings_that_help(load(run=top(*lines)), activity))


def keys(told):
    return [line.partition(" = ")[0] for line in told]


def test_the_host_says_it_in_words_of_its_own():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    said = out_of_memory_words(caught.value, Activity(), load())
    assert said.startswith("the host memory ran out in the start: 4194304.00 GiB more were asked for. What helps")
    assert said.count("\n  - ") == 3


def test_other_errors_are_none_of_it():
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))
    assert not is_out_of_memory(MemoryError())


def test_advice_goes_by_what_is_set():
    told = advice("activation_checkpointing = false")
    assert keys(told)[:2] == ["activation_checkpointing", "[model] transformer_dtype"]
    told = advice("activation_checkpointing = true", "micro_batch_size_per_gpu = 4", samples=4)
    assert keys(told)[:3] == ["[model] transformer_dtype", "micro_batch_size_per_gpu", "activation_checkpointing"]
    assert "gradient_accumulation_steps = 2 for the same batch" in told[1]
    told = advice("activation_checkpointing = true", "max_tokens_per_gpu = 4096", samples=4)
    assert told[1].startswith("max_tokens_per_gpu = 2048 (now 4096, 4 samples here), with gradient_accumulation_steps")
    assert "'offload'" in told[2]
    told = advice("activation_checkpointing = 'offload'", "pipeline_stages = 2", frames=1)
    assert keys(told)[:2] == ["[model] transformer_dtype", "pipeline_stages"]
    assert not any("frame_buckets" in line for line in told), "an image has one frame"
    assert len(told) >= 3


def test_an_evaluation_has_batches_of_its_own():
    assert keys(advice(samples=6, phase="the evaluation of held_out"))[0] == "eval_micro_batch_size_per_gpu"
