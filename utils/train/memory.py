"""Memory that ran out: what was asked for, where, and which settings of this run would help."""

import re
from collections.abc import Iterator

import torch

from utils.config.load import LoadedConfig
from utils.train.activity import Activity

ADVICE = 3  # settings in one message
# of torch.OutOfMemoryError, and of the allocator of host memory
ASKED = (re.compile(r"Tried to allocate ([\d.]+ \w+)"), re.compile(r"you tried to allocate (\d+) bytes"))
FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
HOST = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and HOST in str(error))


def out_of_memory_words(error: BaseException, activity: Activity, loaded: LoadedConfig) -> str:
    """The message in place of torch's: bytes asked for, place, and what to change in this run's files."""
    text = str(error)
    kind = "host memory" if HOST in text else "GPU memory"
    asked = next((found.group(1) for pattern in ASKED if (found := pattern.search(text))), None)
    wanted = "" if asked is None else f": {_size(asked)} more were asked for"
    free = FREE.search(text)
    left = "" if free is None else f", {free.group(2)} of {free.group(1)} were free"
    stage = "" if activity.stage is None else f" of stage {activity.stage}"
    return f"the {kind}{stage} ran out {activity.place()}{wanted}{left}{advice(loaded, activity)}"


def advice(loaded: LoadedConfig, activity: Activity) -> str:
    """The end of a message about too little memory: what to change in this run's files, a line each."""
    lines = list(dict.fromkeys(settings_that_help(loaded, activity)))[:ADVICE]
    return ". What helps, the cheapest first:" + "".join(f"\n  - {line}" for line in lines)


def _size(asked: str) -> str:
    return f"{int(asked) / 2**30:.2f} GiB" if asked.isdigit() else asked


def settings_that_help(loaded: LoadedConfig, activity: Activity) -> Iterator[str]:
    """Changes that make this run smaller, the cheapest first; at least three."""
    run, model = loaded.run, loaded.model
    if activity.stage is None and run.caching_batch_size > 1:
        yield f"caching_batch_size = {run.caching_batch_size // 2} (now {run.caching_batch_size})"
    batch = activity.batch()
    size = len(batch.samples) if batch and activity.doing.micro_batch is not None else 1
    if activity.phase.startswith("the evaluation") and size > 1:
        yield f"eval_micro_batch_size_per_gpu = {size // 2} (now {size} here): the losses stay what they are"
    if run.activation_checkpointing is False:
        yield "activation_checkpointing = true (now false): recomputes each block in the backward pass"
    if getattr(model, "transformer_dtype", "") is None and run.adapter is not None:
        yield "[model] transformer_dtype = 'float8' (now as dtype): halves the frozen weights"
    if size > 1 and not activity.phase.startswith("the evaluation"):
        more = f"with gradient_accumulation_steps = {run.gradient_accumulation_steps * 2} for the same batch"
        most = run.max_tokens_per_gpu
        if most is None:
            yield f"micro_batch_size_per_gpu = {size // 2} (now {size} here), {more}"
        else:
            yield f"max_tokens_per_gpu = {most // 2} (now {most}, {size} samples here), {more}"
    if run.activation_checkpointing is True:
        yield "activation_checkpointing = 'offload' (now true): keeps blocks' inputs in host memory"
    yield f"pipeline_stages = {run.pipeline_stages + 1} or more, with as many devices (now {run.pipeline_stages})"
    if batch and not batch.bucket.endswith("x1"):
        yield f"in the dataset, fewer frame_buckets or frames than in {batch.bucket}"
    yield "in the dataset, smaller resolutions"
    yield "[adapter] of a lower rank" if run.adapter else "[adapter], or an optimizer with a smaller state: adamw8bit"
