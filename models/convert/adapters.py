"""Adapters from one format to another, and LoRA to a lower rank by singular values."""

from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from models.adapters import LORA_A, LORA_B, TITLES
from models.convert.common import device_of, file_to_write, open_model, progress, tell
from models.wan.adapter_files import Adapter, base_weights, write_adapter
from models.wan.adapter_formats import check_formats, format_of
from models.wan.adapter_reader import adapter_file, read_adapter
from models.weights import read_header


def convert(source: Path, out: Path, to: str, base: Path | None, force: bool, console: Console) -> None:
    """Write the adapter `source` to `out` in the format `to`, one of `FORMATS`. Alpha is kept where the format has a
    place for it; nothing is rounded, unless alpha has to be multiplied into matrices of 16 bits.

    Args:
        base: the model it belongs to, which a DoRA is needed for.

    Raises:
        ValueError: a file that is no adapter for Wan, or a format that cannot hold it.
    """
    file = adapter_file(source)
    adapter = read_adapter(file)
    check_formats(_kind(file, adapter), (to,))
    weights = base_weights(lambda: open_model(base).reader) if base else None
    try:
        write_adapter(adapter, file_to_write(out, force), to, weights)
    except KeyError as error:
        raise ValueError(f"--base = '{base}' has no {error}: the adapter is made for another model") from error
    tell(console, [f"{out}: {TITLES[adapter.kind]} of rank {adapter.rank}, {len(adapter.modules)} modules, {to}"])


def _kind(file: Path, adapter: Adapter) -> str:
    try:
        return adapter.kind
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


class Resized(NamedTuple):
    """One module's two matrices at a lower rank."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    kept: float  # squared Frobenius norm of the change of weight that is left
    whole: float  # and of the one that there was


def resize(
    source: Path, out: Path, rank: int, dynamic: float | None, device: str, force: bool, console: Console
) -> None:
    """Write the LoRA `source` to `out` in its own format with at most `rank` a module: the best approximation of each
    change of weight (Eckart and Young 1936).

    Args:
        dynamic: take the lowest rank that keeps this share of the Frobenius norm, where that is below `rank`.

    Raises:
        ValueError: no LoRA, or settings out of range.
    """
    if rank < 1:
        raise ValueError(f"--rank = {rank} must be 1 or more")
    if dynamic is not None and not 0 < dynamic <= 1:
        raise ValueError(f"--dynamic = {dynamic} must lie in (0, 1]")
    file, place = adapter_file(source), device_of(device)
    adapter = read_adapter(file)
    kind = _kind(file, adapter)
    if kind != "lora":
        raise ValueError(f"{file} is a {TITLES[kind]}; only a LoRA can be resized")
    file_to_write(out, force)
    modules: dict[str, dict[str, Tensor]] = {}
    kept = whole = 0.0
    with progress(console, "resize") as bar:
        for module, parts in bar.track(adapter.modules.items(), task_id=bar.task_ids[0], total=len(adapter.modules)):
            done = reduce_rank(parts[LORA_A].to(place), parts[LORA_B].to(place), rank, dynamic, adapter.scales[module])
            dtype = parts[LORA_A].dtype
            modules[module] = {LORA_A: done.down.to("cpu", dtype), LORA_B: done.up.to("cpu", dtype)}
            kept, whole = kept + done.kept, whole + done.whole
    smaller = Adapter(modules, dict.fromkeys(modules, 1.0), adapter.metadata)
    told = {"rank": str(smaller.rank), "alpha": str(smaller.rank), "reelpipe.resized_from": str(adapter.rank)}
    write_adapter(smaller._replace(metadata=adapter.metadata | told), out, format_of(read_header(file)[0]))
    ranks = sorted({parts[LORA_A].shape[0] for parts in modules.values()})
    span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
    share = (kept / whole) ** 0.5 if whole else 1.0
    tell(console, [f"{out}: rank {adapter.rank} made {span}, {share:.2%} of the Frobenius norm kept"])


def reduce_rank(down: Tensor, up: Tensor, rank: int, dynamic: float | None = None, scale: float = 1.0) -> Resized:
    """The best approximation of scale * up @ down by two matrices of `rank`, each with the root of the singular values.

    In float64, through the QR factors of both: the product [out, in] itself is never made.

    Args:
        down: [r, in].
        up: [out, r].
        dynamic: see `resize`.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(scale * r_up @ r_down.T)
    squares = values.square()
    count = min(rank, len(values))
    if dynamic is not None:
        wanted = dynamic**2 * float(squares.sum()) * (1 - 1e-12)  # rounding must not ask for one value more
        count = min(count, int((squares.cumsum(0) < wanted).sum()) + 1)
    root = values[:count].sqrt()
    return Resized(
        down=(root[:, None] * right[:count] @ q_down.T).contiguous(),
        up=(q_up @ left[:, :count] * root).contiguous(),
        kept=float(squares[:count].sum()),
        whole=float(squares.sum()),
    )
