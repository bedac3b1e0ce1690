"""What the commands share: the base model, places to write to, and a progress bar."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.wan import variants
from models.wan.identify import TRANSFORMER_KEY, hint_for
from models.wan.keymaps import TRANSFORMER
from models.wan.layouts import TRANSFORMER_PLACES, TRANSFORMER_STEM, WEIGHT_SUFFIXES, expert_folders, named_expert
from models.wan.variants import Architecture, Variant
from models.weights import WeightReader, weight_files


class BaseModel(NamedTuple):
    """A transformer on disk."""

    files: tuple[Path, ...]
    reader: WeightReader  # scales of fp8 are applied while reading
    sizes: Architecture
    variant: Variant
    suffix: str  # of the expert's files, or nothing

    @property
    def title(self) -> str:
        """`Wan2.2 I2V-A14B high noise`."""
        size = "" if self.variant.boundary else f" {variants.size_name(self.sizes)}"
        return f"{self.variant.title}{self.suffix.replace('_', ' ')}{size}"


def open_model(path: Path) -> BaseModel:
    """Look at a transformer's headers.

    Args:
        path: a file, a folder of shards, or a checkpoint folder with one transformer.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: no transformer, two of them, not a whole one, or none that is supported.
    """
    files = transformer_files(path)
    reader = WeightReader(files, TRANSFORMER, what="transformer", identify=hint_for(TRANSFORMER_KEY))
    config = files[0].with_name("config.json")
    try:
        sizes = variants.architecture(variants.read_config(config) if config.is_file() else {}, reader.shapes())
        variant = variants.detect(sizes, reader.stored_names())
    except ValueError as error:
        raise ValueError("; ".join([f"{reader.location}: {error}", *reader.broken])) from error
    with torch.device("meta"):
        whole = WanTransformer3DModel(**sizes.diffusers_arguments())
    reader.check({name: tuple(parameter.shape) for name, parameter in whole.named_parameters()})
    expert = named_expert(reader.location, len(files) == 1)
    if expert and variant.model_type == variants.T2V_A14B.model_type:
        variant = variants.T2V_A14B  # the tensors are those of Wan2.1: only the name tells
    return BaseModel(files, reader, sizes, variant, f"_{expert}_noise" if expert and variant.boundary else "")


def transformer_files(path: Path) -> tuple[Path, ...]:
    """All shards of the one transformer at `path`; raises as `open_model` does."""
    if not path.exists():
        raise FileNotFoundError(f"'{path}' does not exist")
    if path.is_dir() and (experts := expert_folders(path)):
        choice = " or ".join(f"'{folder}'" for folder in experts.values())
        raise ValueError(f"'{path}' holds the transformers of Wan2.2 A14B in folders: name {choice}")
    for place in TRANSFORMER_PLACES if path.is_dir() else (".",):
        if found := weight_files(path / place, TRANSFORMER_STEM):
            return tuple(found)
    if found := weight_files(path, ""):
        return tuple(found)
    raise ValueError(f"'{path}' holds no transformer")


def file_to_write(out: Path, force: bool) -> Path:
    """`out`, if a safetensors file may be written there."""
    if out.suffix != ".safetensors":
        raise ValueError(f"OUT = '{out}' must be a file that ends in .safetensors")
    if out.exists() and not force:
        raise ValueError(f"'{out}' is there already; choose another name, or add --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


@contextmanager
def folder_to_write(out: Path, force: bool, sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder that takes the place of `out` when all is well, and is gone when it is not.

    Args:
        force: an `out` that is there may go, if it holds nothing but a transformer.
        sources: files that are read, which must not go with it.

    Raises:
        ValueError: `out` is there and stays.
    """
    if out.is_file() or out.suffix in WEIGHT_SUFFIXES:
        raise ValueError(f"--out = '{out}' is a file's name; name a folder")
    if out.exists() and not force:
        raise ValueError(f"'{out}' is there already; choose another name, or add --force to replace it")
    if read := next((file for file in sources if file.resolve().is_relative_to(out.resolve())), None):
        raise ValueError(f"--out = '{out}' holds '{read}', which is read; name another folder")
    if others := sorted(path.name for path in out.glob("*") if not _of_transformer(path)):
        raise ValueError(f"--out = '{out}' holds {others[0]}, which is no part of a transformer; name another folder")
    staging = out.with_name(f".{out.name}.partial-{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(out, ignore_errors=True)
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _of_transformer(path: Path) -> bool:
    return path.is_file() and (path.name == "config.json" or path.name.startswith(TRANSFORMER_STEM))


@contextmanager
def progress(console: Console, label: str) -> Iterator[Progress]:
    """A bar on a terminal, nothing elsewhere; `advance` its one task."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        bar.add_task(label, total=None)
        yield bar


def tell(console: Console, lines: Sequence[str]) -> None:
    """Plain lines, with nothing in them taken for markup."""
    for line in lines:
        console.print(line, markup=False, highlight=False)


def device_of(name: str) -> torch.device:
    """Raises `ValueError` for a device that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device = '{name}': {str(error).splitlines()[0]}") from error
    return device
