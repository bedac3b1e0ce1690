"""Each stage's trained tensors to one folder that other programs load."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.base import ModelFamily
from models.lora import plain_lora_name
from models.weights import write_safetensors
from utils import dist
from utils.train.checkpoint import attempt, first_trouble

logger = logging.getLogger(__name__)


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
) -> Path | None:
    """Write the adapter or the model to `folder`; every rank calls this, and the folder is whole or absent. Returns
    None, and leaves what was there as it is, when it could not be written: training can go on.

    Stages hand over their tensors through files beside it: the run folder is shared by all ranks as it is, and rank 0
    needs to hold no more than the file that it writes.

    Args:
        dtype: what to save in; None keeps each tensor's own.
        extras: writes more files (configs) into the folder.
    """
    parts, staging = folder.with_name(f"tmp-parts-{folder.name}"), folder.with_name(f"tmp-{folder.name}")

    def prepare() -> None:
        for path in (parts, staging):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

    def hand_over() -> None:
        tensors = {n: p.detach().to(dtype or p.dtype).cpu().contiguous() for n, p in trained.items()}
        write_safetensors(parts / f"stage_{stage:02d}.safetensors", tensors)

    def put_together() -> None:
        gathered = _read_parts(parts, plain_lora_name if is_adapter else str)
        write = family.save_adapter if is_adapter else family.save_full
        write(gathered, staging, metadata)
        extras(staging)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(staging, folder)

    for action, mine in ((prepare, dist.is_main()), (hand_over, data_rank == 0), (put_together, dist.is_main())):
        trouble = first_trouble(attempt(action) if mine else None)  # also where ranks wait for each other
        if trouble is not None:
            break
    if dist.is_main():
        for path in (parts, staging):
            shutil.rmtree(path, ignore_errors=True)
        if trouble is not None:
            logger.error("%s not saved: %s; training goes on", folder, trouble)
    dist.barrier()
    return folder if trouble is None else None


def _read_parts(parts: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(parts.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            tensors |= {rename(name): reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return tensors
