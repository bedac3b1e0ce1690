"""A step that was left out: looked into on all ranks, its batch kept on disk for `--replay`."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.base import MicroBatch, ModelFamily
from models.weights import write_safetensors
from utils import dist
from utils.data.plan import StepPlan
from utils.train.disk import attempt, first_trouble
from utils.train.nonfinite import (
    DATA,
    FROZEN,
    GRADIENT,
    LOSS,
    WEIGHT,
    Incident,
    Origin,
    Sample,
    batch_origins,
    gather_origins,
    not_finite,
)

if TYPE_CHECKING:
    from utils.train.engine import ReelEngine
    from utils.train.loop import Run

FOLDER = "nonfinite"
FORMAT = 1
NAME = re.compile(r"step_\d+\.json")  # the report of a replay has another
MAX_KEPT = 10  # steps; each is as large as its latents and captions


class KeptBatch(NamedTuple):
    """One micro-batch of a step, as it was."""

    data_rank: int
    index: int  # in the step of that data rank
    number: int  # in the whole step
    samples: Sequence[Sample]
    held: Sequence[int]  # samples, by slot, whose target is to be the base model's prediction
    file: Path

    def read(self) -> MicroBatch:
        """Its tensors. `ValueError` where they are not all there."""
        return _read(self.file, self.index)


class KeptStep(NamedTuple):
    """What a file for `--replay` holds."""

    facts: Mapping[str, Any]
    batches: Sequence[KeptBatch]

    @property
    def step(self) -> int:
        return self.facts["step"]


def examine(run: "Run", plan: StepPlan, loss: float, lr: float) -> tuple[Incident, str]:
    """What went wrong in the step that the engine has just refused, and where its batch is kept. All ranks call this
    and get the same."""
    engine = run.experts.engine
    run.activity.note("what was not finite", None)
    batches, trouble = _again(run, plan)
    items = plan.micro_batches_of(engine.data_rank)
    names = [[run.name_of(item.entry) for item in each] for each in items]
    mine = first_origin(engine, batches, names)
    origins = gather_origins(mine)
    files = _cached(run, plan, mine)
    told = _told_of_all(run, plan, batches)
    step = run.state.step + 1
    incident = Incident(step, loss, engine.grad_norm, lr, _samples(told), origins, run.experts.awake, files)
    facts = {
        "format": FORMAT,
        "model": run.family.title,
        "expert": incident.expert,
        "step": step,
        "epoch": plan.epoch,
        "bucket": list(plan.bucket),
        "seed": run.plan.seed,
        "loss": str(loss),
        "grad_norm": str(incident.grad_norm),
        "lr": lr,
        "origins": [origin.words() for origin in origins],
        "micro_batches": told,
    }
    return incident, _keep(run.run_dir / FOLDER, engine, batches, facts, trouble)


def samples_of(run: "Run", plan: StepPlan) -> list[Sample]:
    """The samples of a step over all data ranks, with their timesteps; all ranks call this. Reads the step again."""
    return _samples(_told_of_all(run, plan, _again(run, plan)[0]))


def _again(run: "Run", plan: StepPlan) -> tuple[list[MicroBatch], str | None]:
    """The micro-batches of this data rank, and why there are none."""
    try:
        return ([] if run.loader is None else run.loader.again(plan.step)), None
    except (OSError, ValueError) as error:  # the cache: damaged, or gone
        return [], str(error)


def _cached(run: "Run", plan: StepPlan, mine: Origin | None) -> list[str]:
    """Files of the cache that are not finite, of all ranks on which that was the first; all ranks call this."""
    found: list[str] = []
    if run.loader is not None and mine is not None and mine.cause == DATA:
        with suppress(OSError, ValueError):  # as above; what is told without it is less, not wrong
            found += map(str, run.loader.not_finite(plan.step))
    return sorted({path for text in dist.gather_text(json.dumps(found)) for path in json.loads(text)})


Told = Mapping[int, Sequence[Sequence[Mapping[str, Any]]]]  # data rank -> micro-batches -> samples


def _told_of_all(run: "Run", plan: StepPlan, batches: Sequence[MicroBatch]) -> Told:
    engine, family = run.experts.engine, run.experts[run.experts.awake].family
    mine = []
    if engine.is_first_stage():
        items = plan.micro_batches_of(engine.data_rank)
        mine = [_told(run, family, each, batch) for each, batch in zip(items, batches, strict=False)]
    of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([engine.data_rank, mine]))]
    return {data_rank: told for data_rank, told in sorted(of_ranks, key=lambda each: each[0]) if told}


def _samples(told: Told) -> list[Sample]:
    return [Sample(each["name"], each["t"]) for batches in told.values() for batch in batches for each in batch]


def first_origin(
    engine: "ReelEngine", batches: Sequence[MicroBatch], samples: Sequence[Sequence[str]]
) -> Origin | None:
    """The tensor of this rank that explains most: a weight, what was read, a loss, a gradient."""
    weights = dict(engine.module.named_local())
    frozen = {name: weight for name, weight in weights.items() if not weight.requires_grad}
    found: dict[int, Sequence[str]] = {
        FROZEN: [f"the frozen weight {name}" for name in not_finite(frozen)],
        WEIGHT: [
            f"the trained weight {name}" for name in not_finite({k: v for k, v in weights.items() if k not in frozen})
        ],
        DATA: batch_origins(batches, samples, engine.is_first_stage()),
        # the engine keeps the loss of each micro-batch where it is made
        LOSS: [f"the loss of micro-batch {i}" for i, loss in enumerate(engine.fwd_outputs) if not loss.isfinite()],
        # the backward pass comes to the last ones first
        GRADIENT: [f"the gradient of {name}" for name in reversed(engine.bad_gradients)],
    }
    cause = next((cause for cause, names in found.items() if names), None)
    return None if cause is None else Origin(cause, engine.stage_id, engine.data_rank, found[cause][0])


def _told(run: "Run", family: ModelFamily, items: Sequence[Any], batch: MicroBatch) -> list[dict[str, Any]]:
    return [
        {
            "name": run.name_of(item.entry),
            "t": t,
            "entry": item.entry,
            "turn": item.turn,
            "held": run.is_regularization(item.entry),
        }
        for item, t in zip(items, family.timesteps(batch), strict=True)
    ]


# --- on disk ----------------------------------------------------------------------------------------------------------


def _keep(
    folder: Path, engine: "ReelEngine", batches: Sequence[MicroBatch], facts: Mapping[str, Any], trouble: str | None
) -> str:
    """In words where it is, or why it is not. The first stage writes what all read; rank 0 what it is."""
    path = folder / f"step_{facts['step']}.json"
    mine = _file_of(path, engine.data_rank)

    def write() -> None:
        if engine.is_first_stage():
            folder.mkdir(exist_ok=True)
            tensors = {name: t.clone().contiguous() for i, batch in enumerate(batches) for name, t in _named(i, batch)}
            write_safetensors(mine, tensors)

    def finish() -> None:
        staged = path.with_name(f"tmp-{path.name}")
        staged.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        staged.replace(path)

    others = [other for other in folder.glob("step_*.json") if NAME.fullmatch(other.name) and other != path]
    if dist.is_main() and len(others) >= MAX_KEPT:
        trouble = f"{MAX_KEPT} are there already"
    trouble = first_trouble(trouble)
    trouble = trouble or first_trouble(attempt(write))
    trouble = trouble or first_trouble(attempt(finish) if dist.is_main() else None)
    if trouble and engine.is_first_stage() and not path.exists():
        attempt(lambda: mine.unlink(missing_ok=True))  # on a full disk nothing is left lying
    return f"its batch is not kept: {trouble}" if trouble else f"look into it with --replay {shlex.quote(str(path))}"


def _file_of(path: Path, data_rank: int) -> Path:
    return path.with_name(f"{path.stem}_data_{data_rank:02d}.safetensors")


def _named(index: int, batch: MicroBatch) -> list[tuple[str, Tensor]]:
    parts = {"input": batch.inputs, "target": batch.target, "weights": (batch.weights,)}
    return [(f"{index}.{part}.{i}", t) for part, tensors in parts.items() for i, t in enumerate(tensors)]


def read_kept(path: Path) -> KeptStep:
    """What `examine` kept, JSON and safetensors alone.

    Raises:
        ValueError: no such file, or another kind of file; says so.
    """
    where = f"--replay {path}"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']}")
        kept = [
            KeptBatch(
                int(data_rank),
                index,
                index * len(facts["micro_batches"]) + int(data_rank),
                [Sample(each["name"], each["t"]) for each in told],
                [slot for slot, each in enumerate(told) if each["held"]],
                _file_of(path, int(data_rank)),
            )
            for data_rank, batches in facts["micro_batches"].items()
            for index, told in enumerate(batches)
        ]
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror or error}); see <run>/{FOLDER}/") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        mend = f"name a step_N.json of <run>/{FOLDER}/"
        raise ValueError(f"{where}: is no batch that this version kept ({error}); {mend}") from error
    return KeptStep(facts, kept)


def _read(file: Path, index: int) -> MicroBatch:
    parts: dict[str, list[Tensor]] = {"input": [], "target": [], "weights": []}
    try:
        with safe_open(file, framework="pt") as reader:
            names = set(reader.keys())
            for part, tensors in parts.items():
                while (name := f"{index}.{part}.{len(tensors)}") in names:
                    tensors.append(reader.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); it is kept beside the file that --replay names") from error
    if not all(parts.values()):
        raise ValueError(f"{file}: micro-batch {index} is not in it; it is not what was kept")
    return MicroBatch(tuple(parts["input"]), tuple(parts["target"]), parts["weights"][0])
