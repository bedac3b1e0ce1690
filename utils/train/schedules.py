"""Learning-rate schedules: step to factor; pure functions.

The loop sets `group["lr"] = lr * factor` before each optimizer step, so a resumed run needs no scheduler state: the
step count says it all. Steps are counted from 0: step s is the one taken after s others.
"""

import difflib
import math
from collections.abc import Callable


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


# `lr_scheduler` -> factor at `progress` in [0, 1] through the steps after warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
}


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps at step 0 to 1 at step `warmup_steps`.

    That is `torch.optim.lr_scheduler.LinearLR(start_factor=1 / warmup_steps, total_iters=warmup_steps)`: no step is
    wasted at a rate of 0, and a diffusion-pipe config keeps its curve.
    """
    if step >= warmup_steps:
        return 1.0
    start = 1.0 / warmup_steps
    return start + (1.0 - start) * step / warmup_steps


def learning_rate_factor(name: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """What the base rate is multiplied by in step `step`.

    Decay runs over the steps after warm-up and reaches 0 at `total_steps`, one step past the last, so that every step
    trains. Beyond the end (a run made longer by hand) it stays 0. A run shorter than its warm-up never decays: that is
    worth a word at the start, and no reason to stop after the clips were encoded.

    Args:
        name: `lr_scheduler`: constant, linear or cosine.
        step: 0-based.
        total_steps: of the whole run, warm-up included.

    Raises:
        ValueError: unknown name.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"lr_scheduler = {name!r} is not known{hint} Use one of: {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return warmup_factor(step, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return SCHEDULES[name](min(progress, 1.0))
