"""Each stage's trained tensors to one folder that other programs load."""

import logging
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.adapters import needs_float32, plain_name
from models.base import ModelFamily, WeightSource
from models.weights import write_safetensors
from utils import dist
from utils.train.checkpoint import DOOMED, SAVED_NAME, STAGED
from utils.train.disk import Disk, attempt, first_trouble, replace
from utils.train.nonfinite import not_finite

PARTS = f"{STAGED}parts-"  # before the name of the folder that stages hand over their tensors in
_PREFIX = re.compile(rf"^({PARTS}|{DOOMED}|{STAGED})")

logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """What is saved of one model: the family that writes it, and this stage's trained tensors by name."""

    family: ModelFamily
    trained: Mapping[str, nn.Parameter]
    base: Callable[[], WeightSource] | None = None  # what an adapter was trained on, see `utils.train.build.Built`


def export(
    models: Sequence[Model],
    folder: Path,
    *,
    is_adapter: bool,
    dtype: torch.dtype | None,
    stage: int,
    data_rank: int,
    metadata: Mapping[str, str],
    extras: Callable[[Path], None],
    formats: Sequence[str] = (),
    goes_on: bool = True,
    disk: Disk | None = None,
) -> Path | None:
    """Write the adapters or the models to `folder`; every rank calls this, and the folder is whole or absent. Returns
    None, and leaves what was there as it is, when it could not be written: training can go on.

    Stages hand over their tensors through files beside it, since all ranks share the run folder as it is.

    Args:
        models: usually one; several write files of different names.
        dtype: what to save in; None keeps each tensor's own.
        extras: writes more files (configs) into the folder.
        formats: of an adapter, a file each; none means the family's first.
        goes_on: whether training does, for the words where it could not be written.
    """
    parts, staging = folder.with_name(f"{PARTS}{folder.name}"), folder.with_name(f"{STAGED}{folder.name}")
    disk = disk or Disk()

    def prepare() -> None:
        _remove(parts, staging)
        for path in (staging, *(parts / str(number) for number in range(len(models)))):
            path.mkdir(parents=True)

    def hand_over() -> None:
        for number, model in enumerate(models):
            tensors = _all_saved(model.trained, dtype)
            write_safetensors(parts / str(number) / f"stage_{stage:02d}.safetensors", tensors)

    def put_together() -> None:
        for number, model in enumerate(models):
            gathered = _read_parts(parts / str(number), plain_name if is_adapter else str)
            told = {"base_model": model.family.title, **metadata}
            if is_adapter:
                model.family.save_adapter(gathered, staging, told, formats, model.base and model.base())
            else:
                model.family.save_full(gathered, staging, told)
        extras(staging)
        put_in_place(disk, staging, folder)

    for action, mine in ((prepare, dist.is_main()), (hand_over, data_rank == 0), (put_together, dist.is_main())):
        trouble = first_trouble(attempt(action) if mine else None)  # also where ranks wait for each other
        if trouble is not None:
            break
    if dist.is_main():
        _remove(parts, staging)
        if trouble is not None:
            logger.error("%s not saved: %s%s", folder, trouble, "; training goes on" if goes_on else "")
    dist.barrier()
    return folder if trouble is None else None


def put_in_place(disk: Disk, staging: Path, folder: Path) -> None:
    """`staging` as `folder`, whole even after a power cut. Raises `OSError`, and then `folder` is what it was."""
    for path in (*staging.rglob("*"), staging):
        disk.sync(path)
    replaced = folder.with_name(DOOMED + folder.name)
    replace(disk, staging, folder, replaced)

    def tidy() -> None:
        disk.sync(folder.parent)
        if replaced.exists():  # not before its successor would survive a power cut
            disk.remove(replaced)

    trouble = attempt(tidy)
    if trouble is not None:  # what was saved is there all the same
        logger.warning("after %s was written: %s; what it took the place of may be left over", folder, trouble)


def clear_saved(run_dir: Path, disk: Disk | None = None) -> list[str]:
    """Put an end to saves that were cut short: one that only lacked its last rename gets it, else what was there before
    is put back, and the rest is removed.

    Returns:
        The names of what was removed.

    Raises:
        OSError: something cannot be moved or removed.
    """
    disk = disk or Disk()
    for replaced in run_dir.glob(f"{DOOMED}*"):
        folder = replaced.with_name(replaced.name.removeprefix(DOOMED))
        staging = folder.with_name(STAGED + folder.name)
        if SAVED_NAME.fullmatch(folder.name) and not folder.exists():
            disk.rename(staging if staging.exists() else replaced, folder)
    left = [p for p in run_dir.glob(f"{STAGED}*") if SAVED_NAME.fullmatch(_PREFIX.sub("", p.name))]
    for path in sorted(left):
        disk.remove(path)
    return sorted(path.name for path in left)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _all_saved(trained: Mapping[str, nn.Parameter], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """This stage's tensors on the CPU. Raises `OSError` where a number is beyond what `dtype` can hold."""
    tensors = {n: _saved(n, p, dtype).cpu().contiguous() for n, p in trained.items()}
    if bad := not_finite(tensors):
        raise OSError(f"{bad[0]} is not finite in {dtype}; set save_dtype = 'bfloat16' or 'float32'")
    return tensors


def _saved(name: str, parameter: nn.Parameter, dtype: torch.dtype | None) -> Tensor:
    tensor = parameter.detach()
    return tensor if dtype is None or needs_float32(name) else tensor.to(dtype)


def _read_parts(parts: Path, rename: Callable[[str], str]) -> dict[str, Tensor]:
    tensors = {}
    for file in sorted(parts.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            tensors |= {rename(name): reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return tensors
