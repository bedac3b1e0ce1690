"""Checks across tables and files: what each value allows by itself may still not fit together."""

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config.batch_rules import batch_errors
from utils.config.caption_rules import SOURCES, caption_advice
from utils.config.clip_rules import clip_advice, clip_errors
from utils.config.dataset_schema import DatasetConfig, DirectoryConfig
from utils.config.load import LoadedConfig
from utils.config.messages import dotted, shown
from utils.config.precision_rules import precision_advice, precision_errors
from utils.config.schema import AdapterConfig, OptimizerConfig, RunConfig
from utils.config.size_rules import size_advice
from utils.config.source import ConfigError, Location, Source
from utils.config.time_rules import stall_advice
from utils.config.weight_rules import held_out_advice, mask_errors, regularization_errors

if TYPE_CHECKING:  # at run time models would bring torch
    from models.base import MediaSpec

EVAL_CADENCES = ("eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples")
SAVE_CADENCES = ("save_every_n_epochs", "save_every_n_steps", "save_every_n_examples")
CHECKPOINT_CADENCES = ("checkpoint_every_n_epochs", "checkpoint_every_n_minutes")
ADAPTER_KEYS = {"dropout": ("lora", "dora"), "factor": ("lokr",), "decompose_both": ("lokr",)}  # key -> its types
MANY_RESOLUTIONS = 3  # more than this is mostly a misunderstanding: each one repeats the whole dataset

Finding = tuple[Location, str]  # where in the file, what is wrong


def require(loaded: LoadedConfig, world_size: int, spec: "MediaSpec | None" = None) -> list[str]:
    """Every check of this file. Returns what is worth saying; raises `ConfigError` with all that is wrong."""
    if errors := check_rules(loaded, world_size, spec) + check_paths(loaded):
        raise ConfigError(errors)
    return loaded.notices + advice(loaded, spec)


def check_rules(loaded: LoadedConfig, world_size: int, spec: "MediaSpec | None" = None) -> list[str]:
    """What cannot work, one message each; empty when all is well.

    Args:
        world_size: processes started.
        spec: what the family asks of its clips; without it the buckets are not held against it.
    """
    run = loaded.run
    errors = _placed(loaded, "run", [*_stages(run, world_size), *_partition(run), *_saving(run), *_evaluation(run)])
    errors += _placed(loaded, "run", [*_adapter(run), *batch_errors(run)])
    errors += _placed(loaded, "run", [*_storage(loaded), *_experts(loaded), *precision_errors(loaded)])
    errors += _placed(loaded, "dataset", list(regularization_errors(run.adapter, loaded.dataset.directory)))
    for name, dataset in _datasets(loaded).items():
        errors += _placed(loaded, name, _dataset(dataset, loaded.sources.get(name), spec, loaded.run.video_clip_mode))
    return list(dict.fromkeys(errors))


def advice(loaded: LoadedConfig, spec: "MediaSpec | None" = None) -> list[str]:
    """What works and is probably not meant, one message each; `spec` as for `check_rules`."""
    said = _placed(
        loaded, "run", [*_eval_advice(loaded.run), *_checkpoint_advice(loaded.run), *_rate_advice(loaded.run)]
    )
    said += _placed(loaded, "run", [*_bubble(loaded.run), *_optimizer_advice(loaded.run.optimizer)])
    said += _placed(loaded, "run", [*precision_advice(loaded), *_idle_model_keys(loaded), *stall_advice(loaded.run)])
    for name, dataset in _datasets(loaded).items():
        said += _placed(
            loaded, name, _dataset_advice(dataset, loaded.sources.get(name), spec, loaded.run.video_clip_mode)
        )
    for name, dataset in loaded.eval_datasets.items():
        said += _placed(loaded, f"eval:{name}", list(held_out_advice(dataset.directory)))
    return list(dict.fromkeys(said))


def check_paths(loaded: LoadedConfig, weights: bool = True) -> list[str]:
    """Every path that a config names and that is not there, each with its key.

    Args:
        weights: look for those of the model and of adapters too.
    """
    run = loaded.run
    outputs = {"output_dir": run.output_dir, "cache_dir": run.cache_dir}
    found = [_is_file((key,), folder) for key, folder in outputs.items() if folder.is_file()]
    # a cache may be there to be read alone; whether it has everything is known once the files were looked at
    to_write = [(key, folder) for key, folder in outputs.items() if key != "cache_dir" or not folder.is_dir()]
    found += [_read_only((key,), folder) for key, folder in to_write if not _can_write(folder)]
    found += [_absent(at, path) for at, path in _adapter_paths(run) if weights and not path.exists()]
    for key in type(loaded.model).model_fields if weights else ():
        value = getattr(loaded.model, key)
        if isinstance(value, Path) and not value.exists():
            found.append(_absent(("model", key), value))
    messages = _placed(loaded, "run", found)
    for name, dataset in _datasets(loaded).items():
        keys = ("path", "mask_path", "default_mask_file")
        named = ((("directory", i, key), getattr(of, key)) for i, of in enumerate(dataset.directory) for key in keys)
        folders = [(at, path) for at, path in named if path]
        found = [_absent(at, path) for at, path in folders if not path.exists()]
        sources = [(at, path) for at, path in folders if at[-1] == "path" and path.is_file()]
        files = [(at, path) for at, path in sources if path.suffix.lower() not in SOURCES]
        found += [_no_source(at, path) for at, path in files]
        found += mask_errors(dataset.directory)
        messages += _placed(loaded, name, found)
    return list(dict.fromkeys(messages))


def _adapter_paths(run: RunConfig) -> Iterator[tuple[Location, Path]]:
    start: Location = ("adapter", "init_from_existing")
    given = run.adapter.init_from_existing if run.adapter else None
    if isinstance(given, dict):
        yield from (((*start, name), path) for name, path in given.items())
    elif given:
        yield start, given
    place: Location = ("fuse_adapters",) if run.fuse_adapters else ("adapter", "fuse_adapters")
    yield from (((*place, index, "path"), entry.path) for index, entry in enumerate(run.fused))


def _is_file(location: Location, path: Path) -> Finding:
    return location, f"{dotted(location)} = '{path}' is a file; name a folder"


def _no_source(location: Location, path: Path) -> Finding:
    mend = f"name a folder, or a file that ends in {', '.join(SOURCES)}"
    return location, f"{dotted(location)} = '{path}' is a file; {mend}"


def _can_write(folder: Path) -> bool:
    """Whether `folder`, or the nearest folder above it that exists, can be written to."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return os.access(there, os.W_OK)


def _read_only(location: Location, path: Path) -> Finding:
    return location, f"{dotted(location)} = '{path}' cannot be written to; name a folder of yours, or change its rights"


def _absent(location: Location, path: Path) -> Finding:
    hint = "" if path.is_absolute() else f" (seen from {Path.cwd()})"
    return location, f"{dotted(location)} = '{path}' does not exist{hint}"


def _datasets(loaded: LoadedConfig) -> dict[str, DatasetConfig]:
    """Each dataset under its name in `LoadedConfig.sources`."""
    return {"dataset": loaded.dataset, **{f"eval:{name}": item for name, item in loaded.eval_datasets.items()}}


def _placed(loaded: LoadedConfig, source: str, findings: Sequence[Finding]) -> list[str]:
    """File and line in front of each message."""
    file = loaded.sources.get(source)
    return [(file.where(location) if file else "") + text for location, text in findings]


def _set(run: RunConfig, keys: Sequence[str]) -> list[str]:
    return [key for key in keys if getattr(run, key) is not None]


def _stages(run: RunConfig, world_size: int) -> Iterator[Finding]:
    if world_size % run.pipeline_stages:
        fitting = [str(count) for count in range(1, world_size + 1) if world_size % count == 0]
        use = f"use {', '.join(fitting[:-1])} or {fitting[-1]}" if len(fitting) > 1 else f"use {fitting[0]}"
        started = f"the {world_size} processes started" if world_size > 1 else "the one process started"
        yield ("pipeline_stages",), f"pipeline_stages = {run.pipeline_stages} does not divide {started}; {use}"


def _partition(run: RunConfig) -> Iterator[Finding]:
    split, method, cuts = run.partition_split, run.partition_method, run.pipeline_stages - 1
    where: Location = ("partition_split",)
    if method != "manual":
        if split is not None:
            text = f"partition_split = {shown(split)} has no effect with partition_method = '{method}'"
            yield where, f"{text}; set partition_method = 'manual' or remove it"
        return
    wanted = f"{cuts} rising layer number{'' if cuts == 1 else 's'} of 1 or more for pipeline_stages = {cuts + 1}"
    if cuts == 0:
        text = "partition_method = 'manual' has nothing to split with pipeline_stages = 1; remove it"
        yield ("partition_method",), text
    elif split is None:
        yield ("partition_method",), f"partition_method = 'manual' needs partition_split: {wanted}"
    elif len(split) != cuts or any(low >= high for low, high in zip((0, *split), split, strict=False)):
        yield where, f"partition_split = {shown(split)} does not fit; give {wanted}"


def _adapter(run: RunConfig) -> Iterator[Finding]:
    """Keys of `[adapter]` that its type has no use for, and two lists of what is to be merged."""
    adapter = run.adapter
    if adapter is None:
        return
    for key, types in ADAPTER_KEYS.items():
        value = getattr(adapter, key)
        if adapter.type not in types and value != AdapterConfig.model_fields[key].default:
            text = f"adapter.{key} = {shown(value)} is for type = {' or '.join(map(repr, types))}"
            yield ("adapter", key), f"{text}, and type is '{adapter.type}'; remove it"
    if run.fuse_adapters and adapter.fuse_adapters:
        text = "adapter.fuse_adapters and fuse_adapters at the top are one key; put all entries into one of them"
        yield ("adapter", "fuse_adapters"), text


def _saving(run: RunConfig) -> Iterator[Finding]:
    if not _set(run, SAVE_CADENCES):
        yield (), f"nothing would be saved before the end of training; set {' or '.join(SAVE_CADENCES)}"


def _evaluation(run: RunConfig) -> Iterator[Finding]:
    seen: set[str] = set()
    for index, item in enumerate(run.eval_datasets):
        where: Location = ("eval_datasets", index)
        if item.name in seen:
            yield (
                where,
                f"eval_datasets has the name '{item.name}' twice; give each its own: {{name = '...', config = '...'}}",
            )
        seen.add(item.name)
        if item.config.resolve() == run.dataset.resolve():
            text = f"eval_datasets[{index}].config = '{item.config}' is the training dataset"
            yield where, f"{text}; name one with clips that are not trained on"


def _storage(loaded: LoadedConfig) -> Iterator[Finding]:
    stored = getattr(loaded.model, "transformer_dtype", None)
    if loaded.run.adapter is None and stored not in (None, getattr(loaded.model, "dtype", None)):
        text = f"model.transformer_dtype = '{stored}' is for frozen weights, and without [adapter] none are frozen"
        yield ("model", "transformer_dtype"), f"{text}; remove it or add [adapter]"


def _experts(loaded: LoadedConfig) -> Iterator[Finding]:
    if loaded.run.adapter is None and getattr(loaded.model, "expert", None) == "both":
        text = "model.expert = 'both' is for [adapter]: of two models trained whole, neither could wait in host memory"
        yield ("model", "expert"), f"{text}; add [adapter], or train expert = 'high' and then expert = 'low'"


def _owner(source: Source | None, index: int, key: str) -> Location:
    """Where a folder's setting was written: in its own table, or at the top."""
    own: Location = ("directory", index, key)
    return own if source is None or source.holds(own) or not source.holds((key,)) else (key,)


def _dataset(dataset: DatasetConfig, source: Source | None, spec: "MediaSpec | None", run_mode: str) -> list[Finding]:
    found: list[Finding] = []
    for index, folder in enumerate(dataset.directory):
        mode = folder.video_clip_mode or run_mode
        fit = [*_fit(folder, spec, mode), *clip_errors(folder, mode, spec)] if spec else []
        for key, text in [*_shape(folder), *fit]:
            place = _owner(source, index, key)
            found.append((place, f"{dotted(place)}{text}"))
    return found


def _shape(folder: DirectoryConfig) -> Iterator[tuple[str, str]]:
    """Problems of one folder by itself: the key, and what follows its name."""
    if not folder.resolutions and not folder.size_buckets:
        yield "resolutions", " is missing, and so is size_buckets; add for instance resolutions = [512]"
    if folder.min_ar > folder.max_ar:
        yield "min_ar", f" = {folder.min_ar:g} is above max_ar = {folder.max_ar:g}; swap them"


def _fit(folder: DirectoryConfig, spec: "MediaSpec", mode: str) -> Iterator[tuple[str, str]]:
    """Problems of one folder with what the family asks for."""
    multiple, stride = spec.pixel_multiple, spec.frame_stride
    lengths = [bucket[2] for bucket in folder.size_buckets] or folder.frame_buckets
    if not spec.images and max(lengths) == 1 and mode != "full":
        text = f"has no length for videos, and this model trains on clips of at least {stride + 1} frames"
        yield "size_buckets" if folder.size_buckets else "frame_buckets", f" {text}; add one such as {8 * stride + 1}"
    if folder.size_buckets:
        for bucket in folder.size_buckets:
            head = f" has {list(bucket)}:"
            for side in bucket[:2]:
                if side % multiple:
                    yield (
                        "size_buckets",
                        f"{head} {side} px is no multiple of {multiple}; use {_near(side, multiple, 0)}",
                    )
            if (bucket[2] - 1) % stride:
                yield "size_buckets", f"{head} {_frames(bucket[2], stride)}"
        return
    for frames in folder.frame_buckets:
        if (frames - 1) % stride:
            yield "frame_buckets", f" has {_frames(frames, stride)}"
    for area in folder.resolutions:
        side = area if isinstance(area, int) else math.sqrt(area[0] * area[1])
        if side < multiple:
            yield "resolutions", f" has {shown(area)}: smaller than the smallest bucket, {multiple}x{multiple} px"


def _frames(frames: int, stride: int) -> str:
    return f"{frames} frames, and this model takes {stride}n+1; use {_near(frames, stride, 1)}"


def _near(value: int, step: int, offset: int) -> str:
    """The allowed values around one that is not: `816 or 832`."""
    low = (value - offset) // step * step + offset
    return f"{low} or {low + step}" if low > 0 else f"{low + step}"


def _eval_advice(run: RunConfig) -> Iterator[Finding]:
    cadences = _set(run, EVAL_CADENCES)
    if cadences and not run.eval_datasets:
        yield (cadences[0],), f"{cadences[0]} is set and eval_datasets is not: nothing will be evaluated"
    if run.eval_datasets and not cadences:
        when = "only before the first step" if run.eval_before_first_step else "never"
        yield ("eval_datasets",), f"eval_datasets will be evaluated {when}: set {' or '.join(EVAL_CADENCES)}"


def _checkpoint_advice(run: RunConfig) -> Iterator[Finding]:
    cadences = _set(run, CHECKPOINT_CADENCES)
    if not cadences:
        text = f"no {' or '.join(CHECKPOINT_CADENCES)} is set"
        yield (), f"{text}: if the run is killed, it cannot be resumed"
    if len(cadences) > 1:
        yield (cadences[0],), f"{' and '.join(cadences)} are both set: a checkpoint is written at either"
    if run.on_nonfinite == "stop" and run.max_nonfinite != RunConfig.model_fields["max_nonfinite"].default:
        text = f"max_nonfinite = {run.max_nonfinite} has no effect with on_nonfinite = 'stop'; it is for 'skip'"
        yield ("max_nonfinite",), text


def _rate_advice(run: RunConfig) -> Iterator[Finding]:
    if run.force_constant_lr is not None and (run.lr_scheduler != "constant" or run.warmup_steps):
        text = f"force_constant_lr = {run.force_constant_lr:g} overrules"
        yield (
            ("force_constant_lr",),
            f"{text} lr_scheduler = '{run.lr_scheduler}' and warmup_steps = {run.warmup_steps}",
        )
    if run.max_steps is not None and run.warmup_steps >= run.max_steps:
        text = f"warmup_steps = {run.warmup_steps} is not below max_steps = {run.max_steps}"
        yield ("warmup_steps",), f"{text}: the full learning rate is never reached"


def _bubble(run: RunConfig) -> Iterator[Finding]:
    """Share of a 1F1B pipeline's time that a stage waits: (p - 1) / (m + p - 1), arXiv 2104.04473, section 2.2."""
    stages, micro_batches = run.pipeline_stages, run.gradient_accumulation_steps
    if micro_batches >= 2 * stages or stages == 1:
        return
    now, then = ((stages - 1) / (count + stages - 1) for count in (micro_batches, 2 * stages))
    text = f"gradient_accumulation_steps = {micro_batches} with pipeline_stages = {stages} leaves the devices idle"
    mend = f"{2 * stages} would make it {then:.0%}"
    yield ("gradient_accumulation_steps",), f"{text} {now:.0%} of the time; {mend}"


def _optimizer_advice(optimizer: OptimizerConfig) -> Iterator[Finding]:
    own = [key for key in OptimizerConfig.model_fields if key != "type"]
    for key in optimizer.model_extra or {}:
        if near := difflib.get_close_matches(key, own, n=1, cutoff=0.85):
            text = f"optimizer.{key} goes to {optimizer.type} as it is"
            yield ("optimizer", key), f"{text}; was {near[0]} meant?"


def _idle_model_keys(loaded: LoadedConfig) -> Iterator[Finding]:
    """Keys of `[model]` that were set and change nothing beside what else is set."""
    fields = type(loaded.model).model_fields
    uniform = getattr(loaded.model, "timestep_sample_method", None) == "uniform"
    folders, usual = loaded.dataset.directory, loaded.run.video_clip_mode
    lengths = {bucket[2] for each in folders for bucket in each.size_buckets}
    lengths |= {frames for each in folders if not each.size_buckets for frames in each.frame_buckets}
    images_alone = lengths == {1} and all((each.video_clip_mode or usual) != "full" for each in folders)
    idle = {
        "save_layout": (loaded.run.adapter is not None, "with [adapter], which has save_format"),
        "sigmoid_scale": (uniform, "with timestep_sample_method = 'uniform'"),
        "i2v_fraction": (images_alone, "where all buckets are for images; add a length to frame_buckets"),
    }
    for key, (is_idle, beside) in idle.items():
        if is_idle and key in fields and (value := getattr(loaded.model, key)) != fields[key].default:
            yield ("model", key), f"model.{key} = {shown(value)} has no effect {beside}"


def _dataset_advice(
    dataset: DatasetConfig, source: Source | None, spec: "MediaSpec | None", run_mode: str
) -> list[Finding]:
    found: list[Finding] = []
    for index, folder in enumerate(dataset.directory):
        mode = folder.video_clip_mode or run_mode
        said = [*_folder_advice(folder), *clip_advice(folder, mode, spec), *caption_advice(folder)]
        said += [*_image_advice(folder, spec), *size_advice(folder, spec)] if spec else []
        for key, text in said:
            place = _owner(source, index, key)
            found.append((place, f"{dotted(place)}{text}"))
    return found


def _image_advice(folder: DirectoryConfig, spec: "MediaSpec") -> Iterator[tuple[str, str]]:
    if not spec.images and any(bucket[2] == 1 for bucket in folder.size_buckets):
        yield "size_buckets", " has 1 frame, for images, and this model skips them: it trains on videos"


def _folder_advice(folder: DirectoryConfig) -> Iterator[tuple[str, str]]:
    if folder.size_buckets:
        if folder.resolutions or folder.ar_buckets:
            yield "size_buckets", " overrules resolutions, aspect ratios and frame_buckets"
        return
    if len(folder.resolutions) > MANY_RESOLUTIONS:
        count = len(folder.resolutions)
        yield "resolutions", f" has {count} entries: every clip is encoded and trained {count} times an epoch"
    if folder.ar_buckets and not folder.enable_ar_bucket:
        yield "ar_buckets", " has no effect without enable_ar_bucket = true"
