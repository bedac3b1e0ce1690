"""`--preflight`: steps of the real model on made-up samples of the largest bucket, for their memory and time."""

import json
import time
from typing import NamedTuple

import torch

from models.base import Draw
from utils import dist
from utils.monitor import console as show
from utils.monitor.logs import captured_output
from utils.monitor.meters import peak_memory_bytes
from utils.train.activity import LONG
from utils.train.estimate import Load, estimate, largest_load
from utils.train.experts import build_experts
from utils.train.memory import is_out_of_memory, out_of_memory_words
from utils.train.preflight import Check, preflight
from utils.train.setup import Job, engine_settings

STEPS = 2  # the first one warms up, the last one is timed


class Rehearsed(NamedTuple):
    """What the steps took."""

    load: Load
    seconds: float  # of the last step
    peak_bytes: dict[int, int]  # by stage, the largest of its ranks


def rehearse(job: Job) -> int:
    """All checks, told as a table; then, where all is well, steps. Every rank calls this. Returns the exit status."""
    checks = preflight(job)
    fine = not any(check.wrong for check in checks)
    rehearsed: Rehearsed | None = None
    if fine:
        check, rehearsed = _stepped(job)
        checks = [*checks, check]
    if dist.is_main():
        for check in checks:
            show.show(job.console, f"{'FAILED' if check.wrong else 'doubt' if check.doubts else 'ok':<8}{check.name}")
            for message in (*check.wrong, *check.doubts):
                show.show(job.console, f"        {message}")
        load = largest_load(job.loaded, job.family)
        for stage, held in enumerate(estimate(job.family, engine_settings(job.config), load)):
            show.show(job.console, f"stage {stage}, by estimate: {held.words()}")
        if rehearsed:
            show.show(job.console, told(rehearsed))
    dist.barrier()
    return int(any(check.wrong for check in checks))


def told(rehearsed: Rehearsed) -> str:
    """`a step of 2 clips of 832x480x81 took 12.3 s; peak memory: stage 0 31.2 GB, stage 1 29.0 GB`."""
    peaks = [f"stage {stage} {show.short_bytes(peak)}" for stage, peak in sorted(rehearsed.peak_bytes.items())]
    return f"a step with {rehearsed.load} takes {rehearsed.seconds:.2f} s here; peak memory: {', '.join(peaks)}"


def _stepped(job: Job) -> tuple[Check, Rehearsed | None]:
    name = "a step at the largest bucket"
    load = largest_load(job.loaded, job.family)
    sample = job.family.blank_sample(*load.bucket)
    if sample is None:
        return Check(f"{name}: left out, {job.family.title} knows no shapes of samples without clips", ()), None
    try:
        return Check(name, ()), _steps(job, load, sample)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # the others wait for this rank in the middle of a step: the launcher has to end them
        raise ValueError(f"{name}, {load.bucket}: {out_of_memory_words(error, job.activity, job.loaded)}") from error


def _steps(job: Job, load: Load, sample: dict[str, torch.Tensor]) -> Rehearsed:
    config, device, size = job.config, dist.device(), load.samples
    job.activity.begin("building the model", patience=LONG)
    with captured_output(job.log_file):
        experts = build_experts(job.family, engine_settings(config), device)
    expert = experts.at(0)
    engine = expert.built.engine
    job.activity.stage, engine.activity = engine.stage_id, job.activity
    job.activity.begin("a step on made-up samples", patience=LONG)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    draws = [Draw((place + 0.5) / size, place) for place in range(size)]
    seconds = 0.0
    for _ in range(STEPS):
        dist.barrier()
        started = time.monotonic()
        reads = engine.is_first_stage() or engine.is_last_stage()
        batch = expert.family.micro_batch([sample] * size, draws) if reads else None
        engine.train_step(iter([batch] * config.gradient_accumulation_steps) if batch else None)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.monotonic() - started
    mine = json.dumps([engine.stage_id, peak_memory_bytes()])
    peaks: dict[int, int] = {}
    for stage, peak in map(json.loads, dist.gather_text(mine)):
        peaks[stage] = max(peak, peaks.get(stage, 0))
    return Rehearsed(load, seconds, peaks)
