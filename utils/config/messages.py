"""One line for people from each error that pydantic finds: where, which key, its value, and the mend."""

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from utils.config.dataset_schema import DirectoryConfig, SharedSettings
from utils.config.foreign_keys import FOREIGN_KEYS
from utils.config.schema import AdapterConfig, MonitoringConfig, OptimizerConfig, RunConfig
from utils.config.source import SECRET_KEYS, Location, Source, printable

Problem = tuple[int, str]  # line, message
MAX_PROBLEMS = 50  # of one table; with more, this is no config

Homes = Sequence[tuple[str, type[BaseModel]]]  # where keys stand, in words, and the schema of that place

HOMES: Homes = (
    ("at the top of the run TOML, above the first [table]", RunConfig),
    ("in [optimizer]", OptimizerConfig),
    ("in [adapter]", AdapterConfig),
    ("in [monitoring]", MonitoringConfig),
    ("in the dataset TOML", SharedSettings),
    ("in a [[directory]] of the dataset TOML", DirectoryConfig),
)
# pydantic's error type -> what is wrong and the mend; `{...}` come from the error's context.
_PHRASES: Mapping[str, str] = {
    "int_type": "is not a whole number; write it without quotes and decimal point",
    "float_type": "is not a number; write it without quotes",
    "bool_type": "is neither true nor false; write one of the two, without quotes",
    "string_type": "is not text; put it in quotes",
    "path_type": "is not a path; put it in quotes",
    "tuple_type": "is not a list; put it in [brackets]",
    "list_type": "is not a list; put it in [brackets]",
    "model_type": "is not a table",
    "model_attributes_type": "is not a table",
    "dict_type": "is not a table",
    "finite_number": "is not a finite number",
    "greater_than_equal": "is too small; use {ge:g} or more",
    "greater_than": "is too small; use more than {gt:g}",
    "less_than_equal": "is too large; use {le:g} or less",
    "less_than": "is too large; use less than {lt:g}",
    "too_short": "has too few items; give {min_length} or more",
    "too_long": "has too many items; give {max_length} or fewer",
    "string_too_short": "is empty; write a name",
    "literal_error": "is not known; use {expected}",
    "value_error": "{error}",
    "assertion_error": "{error}",
}


def problems(
    error: ValidationError, source: Source, model: type[BaseModel], homes: Homes, table: Location = ()
) -> list[Problem]:
    """Every error of `model`, validated on the part of `source` at `table`, with the line it stands on."""
    told = []
    for detail in error.errors(include_url=False):
        location = (*table, *detail["loc"])
        inherited = not source.holds(location) and source.holds(location[-1:])
        if detail["type"] == "missing" or not inherited:  # what is handed down is reported at the top
            told.append((source.line(location), location, detail))
    told.sort(key=lambda problem: problem[0])
    shown_ones = told[:MAX_PROBLEMS]
    found = [(line, source.where(at) + _text(detail, at, model, homes)) for line, at, detail in shown_ones]
    if left := len(told) - len(found):
        found.append((found[-1][0], f"{source.path}: and {left:,} more"))
    return found


def _text(detail: ErrorDetails, location: Location, model: type[BaseModel], homes: Homes) -> str:
    parent = _model_at(model, tuple(detail["loc"][:-1]))
    if detail["type"] == "extra_forbidden":
        return unknown_key(location, detail["input"], list(parent.model_fields) if parent else [], homes)
    if detail["type"] == "missing":
        return f"{dotted(location)} is missing; add it{_manual(parent, str(location[-1]))}"
    if detail["type"] in ("tuple_type", "list_type") and isinstance(detail["input"], dict):
        return f"[{dotted(location)}] is one table, and not a list of them; write [[{dotted(location)}]]"
    phrase = _PHRASES[detail["type"]].format(**detail.get("ctx", {})) if detail["type"] in _PHRASES else detail["msg"]
    if detail["type"] in ("model_type", "model_attributes_type"):
        phrase += _as_table(_model_at(model, tuple(detail["loc"])))
    if isinstance(detail["input"], dict):  # a whole table: its keys are named by the phrase, if at all
        return f"[{dotted(location)}] {phrase}" if location else phrase
    return f"{dotted(location)} = {shown(detail['input'], location)} {phrase}"


def unknown_key(location: Location, value: Any, known: Sequence[str], homes: Homes) -> str:
    """The line for a key that no schema has there: the place it belongs to, another trainer's name, or the nearest."""
    key = _cut(str(location[-1]))
    head = f"unknown key '{dotted(location)}' = {shown(value, location)}"
    if home := home_of(key, homes):
        return f"{head}; it belongs {home}"
    if foreign := FOREIGN_KEYS.get(key):
        return f"{head}; that is {foreign.owner}'s name: {foreign.mend}"
    if near := difflib.get_close_matches(key, known, n=1):
        return f"{head}; did you mean '{near[0]}'?"
    return f"{head}; remove it"


def home_of(key: str, homes: Homes) -> str | None:
    """Where a key may have been meant to stand: the first place that has one of this name."""
    return next((place for place, model in homes if key in _plain_keys(model)), None)


def dotted(location: Location) -> str:
    """`("directory", 1, "path")` as `directory[1].path`."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{_cut(printable(part))}" for part in location)
    return "".join(parts).lstrip(".")


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def shown(value: Any, location: Location = ()) -> str:
    """A value as TOML writes it, cut to a line; never a secret."""
    if SECRET_KEYS.intersection(location):
        return "(hidden)"
    text = printable(_toml(value))
    return _cut(text)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        items = (f"{key} = {shown(item, (key,))}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    return f"'{value}'" if isinstance(value, str) else str(value)


@cache
def _plain_keys(model: type[BaseModel]) -> frozenset[str]:
    """All but tables, and `type`, which several tables have."""
    fields = model.model_fields.items()
    return frozenset(name for name, info in fields if name != "type" and not _table_in(info.annotation))


def _table_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _table_in(part))), None)


def _model_at(model: type[BaseModel], location: Location) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in location:
        if found is None or isinstance(part, int):
            continue
        info = found.model_fields.get(part)
        found = _table_in(info.annotation) if info else None
    return found


def _as_table(model: type[BaseModel] | None) -> str:
    """How a table is begun, with the keys that it cannot do without."""
    needed = [f"{name} = ..." for name, info in model.model_fields.items() if info.is_required()] if model else []
    return f"; write {{{', '.join(needed)}}}" if needed else ""


def _manual(model: type[BaseModel] | None, key: str) -> str:
    """The first line of what the schema says about a key, in brackets."""
    info = model.model_fields.get(key) if model else None
    if info is None:
        return ""
    table = _table_in(info.annotation)
    text = info.description or (table.__doc__ if table else None)
    return f" ({text.splitlines()[0].rstrip('.')})" if text else ""
