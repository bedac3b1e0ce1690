"""TOML files to frozen settings: every error of every file in one report, and the resolved copy for the run folder."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import toml
from pydantic import BaseModel, ValidationError

from utils.config.dataset_schema import DatasetConfig
from utils.config.fields import Refused, refusal
from utils.config.foreign_keys import FOREIGN_KEYS
from utils.config.messages import HOMES, Homes, Problem, dotted, home_of, problems, shown, unknown_key
from utils.config.musubi import from_musubi, is_musubi
from utils.config.schema import MOST_EVAL_DATASETS, OptimizerConfig, RunConfig
from utils.config.source import SECRET_KEYS, ConfigError, Location, Source, read_toml, redacted_text, with_overrides

__all__ = [
    "ConfigError",
    "LoadedConfig",
    "config_digest",
    "load_config",
    "load_dataset",
    "redacted_text",
    "resolved_dataset_toml",
    "resolved_toml",
]

Model = TypeVar("Model", bound=BaseModel)

# Optimizers of pytorch-optimizer have arguments of these names, so in [optimizer] they are no strays.
_ALSO_OPTIMIZER_ARGUMENTS = frozenset({"warmup_steps", "seed", "compile", "max_steps"})


class LoadedConfig(NamedTuple):
    """A config that holds together file by file; `rules.check_rules` looks at what the files say together."""

    run: RunConfig
    model: BaseModel  # the family's own Config
    family_name: str
    dataset: DatasetConfig
    eval_datasets: dict[str, DatasetConfig]
    notices: list[str]  # worth a person's attention, no errors
    sources: Mapping[str, Source] = MappingProxyType({})  # "run", "dataset", "eval:<name>": for file and line


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read the run TOML, the dataset TOMLs it names, and the `[model]` table by the family's own schema.

    Args:
        overrides: `key=value` or `table.key=value`, the value as TOML; set on top of the run TOML.

    Raises:
        ConfigError: all that is wrong with all of the files, one message a line, in the order of the files' lines.
    """
    source = with_overrides(read_toml(path, "--config"), overrides)
    tables = dict(source.data)
    family_name, schema, found = _family(source, tables.pop("model", None))
    homes: Homes = (("in [model]", schema), *HOMES) if schema else HOMES
    model = _validate(schema, source, homes, found, ("model",)) if schema else None
    run = _validate(RunConfig, source, homes, found, data=tables)
    found += _strays(tables.get("optimizer"), source, homes)
    messages = [text for _, text in sorted(found, key=lambda problem: problem[0])]

    named = _dataset_files(source)
    sources: dict[str, Source] = {"run": source}
    datasets: dict[str, DatasetConfig] = {}
    notices: list[str] = []
    for name, (location, file) in named.items():
        try:
            sources[name] = read_toml(file, source.where(location) + dotted(location))
            if is_musubi(sources[name]):
                sources[name], said = from_musubi(sources[name], *_batches(source.data))
                notices += said
            datasets[name] = _dataset(sources[name], homes)
        except ConfigError as error:
            messages += error.messages
    if messages or run is None or model is None:
        raise ConfigError(list(dict.fromkeys(messages)))
    return LoadedConfig(
        run=run,
        model=model,
        family_name=family_name,
        dataset=datasets["dataset"],
        eval_datasets={item.name: datasets[f"eval:{item.name}"].held_out() for item in run.eval_datasets},
        notices=_notices(run, source) + notices + _of_held_out(datasets, sources),
        sources=sources,
    )


def _batches(data: Mapping[str, Any]) -> tuple[str, Any]:
    """The key of the raw run TOML that says how large batches are, and its value."""
    key = "max_tokens_per_gpu" if "max_tokens_per_gpu" in data else "micro_batch_size_per_gpu"
    return key, data.get(key, 1)


def load_dataset(path: Path, named_by: str = "dataset") -> DatasetConfig:
    """One dataset TOML by itself. Raises `ConfigError` with all that is wrong with it."""
    source = read_toml(path, named_by)
    return _dataset(from_musubi(source).source if is_musubi(source) else source, HOMES)


def _dataset(source: Source, homes: Homes) -> DatasetConfig:
    found: list[Problem] = []
    dataset = _validate(DatasetConfig, source, homes, found)
    if dataset is None:
        raise ConfigError([text for _, text in sorted(found, key=lambda problem: problem[0])])
    return dataset


def _validate(
    schema: type[Model],
    source: Source,
    homes: Homes,
    found: list[Problem],
    table: Location = (),
    data: Mapping[str, Any] | None = None,
) -> Model | None:
    """`schema` on a table of the file, or on `data`; what is wrong with it is added to `found`."""
    if data is None:
        data = source.data[str(table[0])] if table else source.data
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        elsewhere = [(place, model) for place, model in homes if model is not schema]
        found += problems(error, source, schema, elsewhere, table)
        return None


def _family(source: Source, table: Any) -> tuple[str, type[BaseModel] | None, list[Problem]]:
    """The family's name, the schema of its `[model]` table, and what is wrong with `type`."""
    from models import family_class  # brings torch

    where: Location = ("model", "type")
    if not isinstance(table, dict):
        return "", None, [(0, f"{source.path}: [model] is missing; add it with type = 'wan' and the weights' paths")]
    name = table.get("type")
    if not isinstance(name, str):
        said = "is missing" if name is None else f"= {shown(name)} is not text"
        return "", None, [(source.line(where), f"{source.where(where)}model.type {said}; write type = 'wan'")]
    try:
        return name, family_class(name).Config, []
    except ValueError as error:
        return name, None, [(source.line(where), source.where(where) + str(error))]


def _strays(table: Any, source: Source, homes: Homes) -> list[Problem]:
    """Keys of other places under `[optimizer]`, which takes any: a table's header ends the top of the file."""
    if not isinstance(table, dict):
        return []
    elsewhere = [(place, model) for place, model in homes if model is not OptimizerConfig]
    found = []
    for key, value in table.items():
        known = key in OptimizerConfig.model_fields or key in _ALSO_OPTIMIZER_ARGUMENTS
        if not known and (home_of(key, elsewhere) or key in FOREIGN_KEYS):
            location = ("optimizer", key)
            text = unknown_key(location, value, (), elsewhere)
            found.append((source.line(location), source.where(location) + text))
    return found


def _dataset_files(source: Source) -> dict[str, tuple[Location, Path]]:
    """The dataset TOMLs that the raw run TOML names, so that they are checked even where the run itself is wrong."""
    files: dict[str, tuple[Location, Path]] = {}
    if isinstance(named := source.data.get("dataset"), str) and named:
        files["dataset"] = (("dataset",), Path(named))
    evals = source.data.get("eval_datasets")
    for index, item in enumerate(evals[:MOST_EVAL_DATASETS] if isinstance(evals, list) else []):
        entry = {"name": Path(item).stem, "config": item} if isinstance(item, str) else item
        name, file = (entry.get("name"), entry.get("config")) if isinstance(entry, dict) else (None, None)
        if isinstance(name, str) and isinstance(file, str) and file:
            files.setdefault(f"eval:{name}", (("eval_datasets", index), Path(file)))
    return {name: (location, path.expanduser()) for name, (location, path) in files.items() if not refusal(path)}


def _notices(run: RunConfig, source: Source) -> list[str]:
    idle = ("reentrant_activation_checkpointing", "disable_block_swap_for_eval")
    notices = [f"{source.where((key,))}{key} = true has no effect here" for key in idle if getattr(run, key)]
    if run.monitoring.wandb_api_key.get_secret_value():
        where = source.where(("monitoring", "wandb_api_key"))
        notices.append(f"{where}wandb_api_key is safer in the environment variable WANDB_API_KEY; it is not copied on")
    return notices


def _of_held_out(datasets: Mapping[str, DatasetConfig], sources: Mapping[str, Source]) -> list[str]:
    """Notices of what `DatasetConfig.held_out` does without."""
    names = [name for name, dataset in datasets.items() if name.startswith("eval:") and dataset.held_out() != dataset]
    told = "flip = true and crop = 'random' have no effect on a held-out set: its clips are evaluated plain, the middle"
    return [f"{sources[name].path}: {told} of each" for name in names]


def _settings(model: BaseModel) -> dict[str, Any]:
    """What a table resolved to, as TOML can hold it: no secrets, nothing unset, no keys that are only refused."""
    refused = {
        name
        for name, info in type(model).model_fields.items()
        if any(isinstance(part, Refused) for part in info.metadata)
    }
    dumped = model.model_dump(mode="json", exclude_none=True, exclude=refused | SECRET_KEYS)
    for name in type(model).model_fields:
        value = getattr(model, name)
        if name in dumped and isinstance(value, BaseModel):
            dumped[name] = _settings(value)
        elif name in dumped and isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            dumped[name] = [_settings(item) for item in value]
    return dumped


def _toml_text(title: str, tables: Mapping[str, Any]) -> str:
    encoder = toml.TomlEncoder()
    # The package's own quoting breaks on a backslash before an x; a JSON string is a TOML string.
    encoder.dump_funcs[str] = partial(json.dumps, ensure_ascii=False)
    return f"# {title}, defaults included, as Reelpipe resolved it.\n{toml.dumps(tables, encoder=encoder)}"


def resolved_toml(loaded: LoadedConfig) -> str:
    """The run TOML, defaults and overrides written out, without secrets; loads to the same settings."""
    tables = {**_settings(loaded.run), "model": {"type": loaded.family_name, **_settings(loaded.model)}}
    return _toml_text("Every setting of the run", tables)


def resolved_dataset_toml(dataset: DatasetConfig) -> str:
    """A dataset TOML with every folder's settings written out; loads to the same settings."""
    return _toml_text("Every setting of the dataset", _settings(dataset))


def config_digest(loaded: LoadedConfig) -> str:
    """A hash of every setting but secrets, 16 hex digits: whether two runs were told the same."""
    everything = {
        "run": _settings(loaded.run),
        "model": _settings(loaded.model),
        "datasets": {name: _settings(item) for name, item in {"": loaded.dataset, **loaded.eval_datasets}.items()},
    }
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=8).hexdigest()
