"""The table of model families, imported when asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # it brings torch, which `python -m models.convert --help` can do without
    from models.base import ModelFamily

# name in `[model] type` -> "module:Class"
FAMILIES: dict[str, str] = {
    "wan": "models.wan.family:WanFamily",
}


def family_class(name: str) -> "type[ModelFamily]":
    """The class behind `[model] type = name`; `ValueError` names the known ones."""
    if name not in FAMILIES:
        raise ValueError(f"[model] type = {name!r} is not known; use one of: {', '.join(sorted(FAMILIES))}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Any = getattr(importlib.import_module(module), attribute)
    return found
