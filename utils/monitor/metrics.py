"""Scalars to TensorBoard, `metrics.jsonl` and, when asked, wandb; their names and units in one place.

`metrics.jsonl` holds one flat JSON object a call: `step`, `epoch`, `examples`, `time` (Unix, s) and the tags, so
`pandas.read_json(path, lines=True)` gives a table. Training and evaluation of one step are separate lines. Values that
JSON cannot hold are the strings "nan", "inf" and "-inf".
"""

import importlib.util
import json
import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

logger = logging.getLogger(__name__)

# Tags shared with diffusion-pipe
LOSS = "train/loss"
EPOCH_LOSS = "train/epoch_loss"  # mean over the epoch's samples
GRAD_NORM = "train/grad_norm"  # before clipping, over all stages
LEARNING_RATE = "train/lr"
NONFINITE = "train/nonfinite"  # steps so far that were left out; written when one is
PRODIGY_D = "train/prodigy_d"  # the step size that Prodigy found, of rank 0's stage
# Ours
STEP_S = "perf/step_s"
DATA_WAIT_S = "perf/data_wait_s"
SAMPLES_PER_S = "perf/samples_per_s"
FRAMES_PER_S = "perf/frames_per_s"
PEAK_MEMORY_GIB = "perf/peak_memory_gib"

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"


def eval_tag(dataset: str, quantile: float | None = None) -> str:
    """`<dataset>/loss`, or `<dataset>/loss_quantile_0.10`."""
    return f"{dataset}/loss" if quantile is None else f"{dataset}/loss_quantile_{quantile:.2f}"


def eval_others_tag(dataset: str) -> str:
    """`<dataset>/loss_without_bad`: written beside a loss that is not finite, of the samples that are."""
    return f"{dataset}/loss_without_bad"


def of_expert(tag: str, expert: str) -> str:
    """`train/loss_high` where several models are trained in turns; the tag itself where one is, which has no name."""
    return f"{tag}_{expert}" if expert else tag


class Point(NamedTuple):
    """Where training stands."""

    step: int  # optimizer steps done
    epoch: int  # the epoch it belongs to, from 1
    examples: int  # samples trained on


class Sink(Protocol):
    """One place that metrics go to. May raise: `MetricsWriter` keeps that from the training."""

    def write(self, point: Point, tags: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class WandbSettings:
    """`[monitoring]` for wandb. The key is used for the login only; where it is None, WANDB_API_KEY is."""

    project: str | None = None
    run_name: str | None = None
    api_key: str | None = field(default=None, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)  # shown with the run, less its secrets

    def check(self) -> None:
        """Raises `ValueError` where wandb cannot work, before anything slow starts."""
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("[monitoring] enable_wandb = true needs the package wandb; install it: pip install wandb")
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        if not (self.api_key or os.environ.get("WANDB_API_KEY") or offline):
            raise ValueError(
                "[monitoring] enable_wandb = true needs a key: set the environment variable WANDB_API_KEY "
                "(on every machine that runs rank 0), or WANDB_MODE=offline"
            )


class MetricsWriter:
    """Writes each scalar everywhere. A place that fails is named in one warning and training goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool = True,
        x_axis_examples: bool = False,
        resume_step: int | None = None,
        wandb: WandbSettings | None = None,
    ) -> None:
        """
        Args:
            folder: the run folder.
            enabled: False on every rank but 0: nothing is opened or written.
            x_axis_examples: the horizontal axis is samples instead of steps.
            resume_step: last step that the loaded checkpoint knows. What an interrupted run logged after it is dropped,
                so that the resumed run leaves neither duplicates nor gaps.
            wandb: None leaves it out.
        """
        self._sinks: dict[str, Sink] = {}
        self._failed: set[str] = set()
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        last = self._try(METRICS_FILE, lambda: drop_lines_after(path, resume_step)) if resume_step is not None else None
        # without a metrics.jsonl, samples cannot be told from steps and TensorBoard keeps what it has
        purge_from = _axis(last, x_axis_examples) + 1 if last else None
        if resume_step is not None and not x_axis_examples:
            purge_from = resume_step + 1
        openers: dict[str, Callable[[], Sink]] = {
            METRICS_FILE: lambda: JsonlSink(path),
            "TensorBoard": lambda: TensorBoardSink(folder, x_axis_examples, purge_from),
        }
        if wandb is not None:
            openers["wandb"] = lambda: WandbSink(wandb, folder, importlib.import_module("wandb"))
        for name, opener in openers.items():
            sink = self._try(name, opener)
            if sink is not None:
                self._sinks[name] = sink

    def log(self, point: Point, tags: Mapping[str, float]) -> None:
        """Write `tags` at `point`. Values are Python floats: reading a tensor here would wait for the device."""
        values = {tag: float(value) for tag, value in tags.items()}
        for name, sink in self._sinks.items():
            self._try(name, lambda sink=sink: sink.write(point, values))

    def flush(self) -> None:
        """Make what was written visible to others; cheap enough for every checkpoint, not for every step."""
        for name, sink in self._sinks.items():
            self._try(name, sink.flush)

    def close(self) -> None:
        for name, sink in self._sinks.items():
            self._try(name, sink.close)
        self._sinks.clear()

    def _try(self, name: str, action: Callable[[], Any]) -> Any:
        """The action's result, or None and one warning a place. A disk full for an hour costs that hour only."""
        try:
            return action()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                logger.warning("metrics to %s fail (%s: %s); training goes on", name, type(error).__name__, error)
            return None


def _axis(point: Point, x_axis_examples: bool) -> int:
    return point.examples if x_axis_examples else point.step


class JsonlSink:
    """One line a call, complete on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self._torn = False

    def write(self, point: Point, tags: Mapping[str, float]) -> None:
        record = {**point._asdict(), "time": round(time.time(), 3), **{tag: _jsonable(v) for tag, v in tags.items()}}
        line = json.dumps(record, allow_nan=False) + "\n"
        if self._torn:
            line = "\n" + line  # a write that failed may have left half a line
        self._torn = True
        self._file.write(line)
        self._file.flush()
        self._torn = False

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _jsonable(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, values of "nan" and the like as floats; torn lines are left out."""
    records = []
    for line in _lines(path):
        record = _parsed(line)
        if record is not None:
            records.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record.items()})
    return records


def _lines(path: Path) -> list[str]:
    """A power cut may leave any bytes at the end."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def drop_lines_after(path: Path, step: int) -> Point | None:
    """Rewrite `path` without lines of later steps and torn lines, by one rename.

    Returns:
        The last point that is left, or None.
    """
    if not path.exists():
        return None
    lines = [(line, _parsed(line)) for line in _lines(path)]
    if lines and not path.read_bytes().endswith(b"\n"):
        lines.append(("", None))  # torn before its end: the next one would be written behind it
    kept = [(line, record) for line, record in lines if record is not None and record["step"] <= step]
    if len(kept) < len(lines):
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    return Point(*(kept[-1][1][key] for key in Point._fields)) if kept else None


def tags_at(path: Path, step: int) -> set[str]:
    """All that was logged at the step, which must be the last one of the file."""
    found: set[str] = set()
    for line in reversed(_lines(path)):
        record = _parsed(line)
        if record is not None and record["step"] < step:
            break
        found |= set(record or ())
    return found


class TensorBoardSink:
    """Event files in the run folder, which is what `tensorboard --logdir <output_dir>` looks for."""

    def __init__(self, folder: Path, x_axis_examples: bool, purge_from: int | None) -> None:
        self._folder = folder
        self._x_axis_examples = x_axis_examples
        self._broken = False
        self._writer = self._open(purge_from)

    def _open(self, purge_from: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step tells readers to forget what older event files hold from that place on
        return SummaryWriter(log_dir=str(self._folder), purge_step=purge_from, flush_secs=10)

    def write(self, point: Point, tags: Mapping[str, float]) -> None:
        if self._broken:
            return
        self._broken = True
        for tag, value in tags.items():
            self._writer.add_scalar(tag, value, _axis(point, self._x_axis_examples))
        self._broken = False

    def flush(self) -> None:
        if self._broken:  # its writing thread ends with the first error; try a new file, once a checkpoint
            self._writer = self._open(None)
            self._broken = False
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A wandb run; a resumed training continues the same one."""

    def __init__(self, settings: WandbSettings, folder: Path, library: Any) -> None:
        id_file = folder / WANDB_ID_FILE
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8] + "\n")
        # the key goes in as a setting of this process: `wandb.login(key=...)` would write it to ~/.netrc
        self._run = library.init(
            project=settings.project,
            name=settings.run_name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=without_secrets(settings.config),
            settings=library.Settings(api_key=settings.api_key) if settings.api_key else None,
        )
        self._run.define_metric("*", step_metric="step")

    def write(self, point: Point, tags: Mapping[str, float]) -> None:
        # `step` is a value like the others: wandb refuses its own step argument when a resumed run goes back
        self._run.log({**tags, **point._asdict()})

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested tables without keys that end in `api_key`, `token` or `password`."""
    return {
        key: without_secrets(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not key.lower().endswith(("api_key", "token", "password"))
    }
