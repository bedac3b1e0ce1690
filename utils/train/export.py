"""Each stage's trained tensors to one folder that other programs load."""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.base import ModelFamily
from models.lora import plain_lora_name
from utils import dist


def export(
    family: ModelFamily,
    folder: Path,
    trained: Mapping[str, nn.Parameter],
    *,
    is_adapter: bool,
    dtype: torch.dtype | None,
    stage: int,
    data_rank: int,
    metadata: Mapping[str, str],
    extras: Callable[[Path], None],
) -> Path:
    """Write the adapter or the model to `folder`; every rank calls this, and the folder is whole or absent.

    Stages hand over their tensors through files beside it: the run folder is shared by all ranks as it is, and rank 0
    needs to hold no more than the file that it writes.

    Args:
        dtype: what to save in; None keeps each tensor's own.
        extras: writes more files (configs) into the folder.
    """
    parts, staging = folder.with_name(f"tmp-parts-{folder.name}"), folder.with_name(f"tmp-{folder.name}")
    if dist.is_main():
        for path in (parts, staging):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
    dist.barrier()
    if data_rank == 0:
        tensors = {n: p.detach().to(dtype or p.dtype).cpu().contiguous() for n, p in trained.items()}
        save_file(tensors, parts / f"stage_{stage:02d}.safetensors")
    dist.barrier()
    if dist.is_main():
        gathered = _read_parts(parts, plain_lora_name if is_adapter else str)
        write = family.save_lora if is_adapter else family.save_full
        write(gathered, staging, metadata)
        extras(staging)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)
        shutil.rmtree(parts, ignore_errors=True)
    dist.barrier()
    return folder


def _read_parts(parts: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(parts.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            tensors |= {rename(name): reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return tensors
