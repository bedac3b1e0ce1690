"""Find and check the weights of a frozen encoder, fill its module with them, and take it down again."""

import gc
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from models.base import WeightSource
from models.weights import WeightReader, weight_files


def frozen_files(path: Path, stem: str, what: str) -> list[Path]:
    """The file `path`, or the files in folder `path` whose names start with `stem`.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{what}: {path} does not exist; download it, or correct the path in the config")
    files = weight_files(path, stem)
    if not files:
        raise FileNotFoundError(f"{what}: {path} holds no {stem}*.safetensors; download the folder again")
    return files


@contextmanager
def odd_shapes_told(what: str, reader: WeightReader) -> Iterator[None]:
    """Within, sizes are read off shapes and a network is made of them on `meta`: what Python says of shapes that no
    such network has becomes a `ValueError` with the file."""
    try:
        yield
    except (ValueError, LookupError, ArithmeticError, TypeError, AssertionError, RuntimeError) as error:
        if isinstance(error, ValueError) and str(reader.location) in str(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{what} {reader.location}: its tensors are of no such network ({reason}); download it again"
        ) from error


def check_frozen(module: nn.Module, reader: WeightReader, ignored: Collection[str] = ()) -> None:
    """Compare the reader's tensors with the module's by name and shape; `ignored` ones may be there or not.

    Raises:
        ValueError: one message with counts, first names and the file.
    """
    needed = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    stored = reader.shapes()
    reader.check(needed | {name: stored[name] for name in ignored if name in stored})


def fill_frozen(module: nn.Module, reader: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
    """Give a module made on `meta` its weights, one tensor at a time, so that no second copy of them is ever held."""
    # A tied parameter has two names and only the first of them on disk; both get one tensor, hence one memory.
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tied = {name: names[id(parameter)] for name, parameter in module.state_dict(keep_vars=True).items()}
    weights = {name: reader.read(name).to(device, dtype) for name in names.values()}
    module.load_state_dict({name: weights[first] for name, first in tied.items()}, assign=True)
    module.requires_grad_(False).eval()


def free_memory(device: torch.device) -> None:
    """Give back what was dropped just before. Modules are full of reference cycles, so collect before emptying."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
