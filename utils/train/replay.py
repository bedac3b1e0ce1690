"""`--replay FILE`: the micro-batches of a kept step run again, one by one, to see where numbers stop being finite."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from utils import dist
from utils.monitor import console as show
from utils.monitor.logs import captured_output
from utils.train import checkpoint, checkpoint_read
from utils.train.activity import LONG
from utils.train.checkpoint import Part
from utils.train.disk import attempt
from utils.train.engine import ReelEngine
from utils.train.experts import Experts, build_experts
from utils.train.kept import KeptBatch, KeptStep, read_kept
from utils.train.nonfinite import batch_origins, not_finite
from utils.train.regularization import toward_base
from utils.train.setup import Job, engine_settings

logger = logging.getLogger(__name__)

MAX_NAMES = 6  # in a line


class Seen(NamedTuple):
    """What one rank saw of one micro-batch."""

    stage: int
    loss: float | None  # of the last stage
    read: list[str]  # what is not finite of what it read
    module: str | None  # the first whose output is not finite
    gradients: dict[str, tuple[float, int]]  # by name: norm, and how many values are not finite

    @property
    def bad_gradients(self) -> list[str]:
        """In the order of the backward pass."""
        return [name for name, (_, bad) in reversed(self.gradients.items()) if bad]


def replay(job: Job) -> None:
    """Build the model, fill it from the checkpoint nearest to the step, run the step's micro-batches and tell.

    Every rank calls this; any number of stages will do, and data ranks all do the same. No weight changes.

    Raises:
        ValueError: the file is none that was kept, or of another model.
    """
    path = job.flags.replay
    kept = read_kept(path)
    _refuse_other(job, kept)
    job.activity.begin("building the model", patience=LONG)
    with captured_output(None):
        # uncompiled: a hook in a compiled layer sees nothing
        experts = build_experts(job.family, replace(engine_settings(job.config), compile=False), dist.device())
    for _, expert in experts.items():
        expert.built.engine.activity = job.activity
    job.activity.stage = experts.engine.stage_id
    source = job.resume or nearest_checkpoint(path.resolve().parent.parent, kept.step)
    if source is not None:
        job.activity.begin("reading the checkpoint", patience=LONG)
        parts = {n: Part(e.built.trained, None) for n, e in experts.items()}
        checkpoint_read.load(source, parts, is_ours=False)  # the run may go on meanwhile
    if dist.is_main():
        weights = f"the weights of {source.name}" if source else "the weights that a run starts with"
        exact = "" if source and checkpoint.step_of(source) == kept.step - 1 else ", which are not those of the step"
        show.show(job.console, f"step {kept.step} of {path.resolve().parent.parent.name}, with {weights}{exact}")
    seen = run_all(experts, kept, job)
    if dist.is_main():
        told = [_facts(batch, ranks) for batch, ranks in zip(kept.batches, seen, strict=True)]
        report = path.with_name(f"{path.stem}_replay.json")
        trouble = attempt(lambda: report.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8"))
        show.show(job.console, f"every gradient: {report}" if trouble is None else f"no report: {trouble}")


def run_all(experts: Experts, kept: KeptStep, job: Job) -> list[list[Seen]]:
    """What every stage saw of each micro-batch, on every rank; told as it comes."""
    engine = experts.wake(kept.facts["expert"]).built.engine
    found = []
    for number, each in enumerate(kept.batches):
        job.activity.begin(f"micro-batch {each.index} of data rank {each.data_rank}", patience=LONG)
        mine = run_one(engine, each, kept.step)
        told = [Seen(*json.loads(text)) for text in dist.gather_text(json.dumps(mine))]
        found.append(list({seen.stage: seen for seen in reversed(told)}.values())[::-1])
        if dist.is_main():
            show.show(job.console, words(each, found[number]))
    return found


def run_one(engine: ReelEngine, kept: KeptBatch, step: int) -> Seen:
    """Forward and backward of one micro-batch, as it was in its step; gradients stay in the parameters."""
    reads = engine.is_first_stage() or engine.is_last_stage()
    batch = kept.read() if reads else None
    names = [sample.name for sample in kept.samples]
    origins = batch_origins([batch], [names], engine.is_first_stage()) if batch is not None else []
    if kept.held:
        batches = toward_base(engine, batch and iter([batch]), {0: kept.held})
        batch = batches and next(batches)
    with first_bad_output(engine) as bad_output:
        loss = engine.probe(batch, step - 1, kept.number)
    grads = {name: p.grad for name, p in engine.module.named_local() if p.grad is not None}
    bad = set(not_finite(grads))
    measured = {
        name: (float(grad.float().norm()), int((~grad.isfinite()).sum()) if name in bad else 0)
        for name, grad in grads.items()
    }
    return Seen(engine.stage_id, loss, origins, bad_output[0] if bad_output else None, measured)


@contextmanager
def first_bad_output(engine: ReelEngine) -> Iterator[list[str]]:
    """Meanwhile, a list that gets the name of the first module of this stage whose output is not finite: the innermost
    one, since it is done before those around it."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if not found and not all(t.isfinite().all() for t in _tensors(output)):
            found.append(name)

    def hook(name: str) -> Any:
        return lambda module, inputs, output: look(name, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in _modules(engine)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _modules(engine: ReelEngine) -> Iterator[tuple[str, nn.Module]]:
    return engine.module.named_local_modules()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in _tensors(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in _tensors(item))


def nearest_checkpoint(run_dir: Path, step: int) -> Path | None:
    """The complete checkpoint of the most steps before `step` was taken; where none is left, the next one after it."""
    folders = [p for p in run_dir.iterdir() if checkpoint.NAME.fullmatch(p.name)] if run_dir.is_dir() else []
    whole = sorted((p for p in folders if checkpoint.manifest_of(p) is not None), key=checkpoint.step_of)
    before = [p for p in whole if checkpoint.step_of(p) < step]
    return before[-1] if before else next(iter(whole), None)


def _refuse_other(job: Job, kept: KeptStep) -> None:
    title, experts = kept.facts.get("model"), job.family.experts()
    if title != job.family.title or kept.facts.get("expert") not in experts:
        raise ValueError(
            f"--replay {job.flags.replay}: is a step of {title}, and the config trains {job.family.title}; name the "
            "config of that run"
        )


# --- words ------------------------------------------------------------------------------------------------------------


def words(kept: KeptBatch, seen: list[Seen]) -> str:
    """What became of a micro-batch: a line, and one for each stage where something is not finite."""
    loss = next((each.loss for each in reversed(seen) if each.loss is not None), math.nan)
    norms = [norm for each in seen for norm, _ in each.gradients.values()]
    norm = math.sqrt(sum(norm**2 for norm in norms)) if norms else 0.0
    lines = [
        f"micro-batch {kept.index} of data rank {kept.data_rank}: loss {loss:.6g}, gradient norm {norm:.4g}; "
        + ", ".join(map(str, kept.samples))
    ]
    for each in seen:
        parts = [f"not finite: {_some(each.read)}"] if each.read else []
        parts += [f"first output that is not finite: {each.module}"] if each.module is not None else []
        if each.bad_gradients:
            parts.append(f"{len(each.bad_gradients)} of {len(each.gradients)} gradients: {_some(each.bad_gradients)}")
        lines += [f"stage {each.stage}: {'; '.join(parts)}"] if parts else []
    return "\n  ".join(lines if len(lines) > 1 else [*lines, "all is finite"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def _facts(kept: KeptBatch, seen: list[Seen]) -> dict[str, Any]:
    """For the report; numbers as text, since JSON knows no NaN."""
    stages = [
        {
            "stage": each.stage,
            "loss": str(each.loss),
            "read": each.read,
            "first_bad_output": each.module,
            "gradients": {n: {"norm": str(norm), "not_finite": bad} for n, (norm, bad) in each.gradients.items()},
        }
        for each in seen
    ]
    return {"data_rank": kept.data_rank, "micro_batch": kept.index, "stages": stages}
