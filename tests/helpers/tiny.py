"""Tiny checkpoints in every layout, for tests that need a real folder on disk."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_wan.py"


@cache
def tiny_wan() -> ModuleType:
    """examples/tiny_wan.py as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location("tiny_wan", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiny_checkpoint(
    folder: Path, layout: str = "official", shards: int = 1, seed: int = 0, variant: str = "t2v", **sizes: int
) -> Path:
    """A random Wan in `folder` / `layout`, 5 MB unless `sizes` (fields of `tiny_wan.Sizes`) say otherwise.

    Takes about 0.3 s once the libraries are imported. Layouts made with equal seeds and sizes hold equal weights.
    """
    module = tiny_wan()
    target = folder / layout
    module.write_checkpoint(target, layout, seed, shards, module.Sizes(**sizes), variant)
    return target
