"""Adapters merged into a whole transformer, tensor by tensor, with no more than a shard of it in memory."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models.adapters import by_module
from models.convert.common import BaseModel, device_of, folder_to_write, open_model, progress, tell
from models.fused import FusedWeights, LoadedAdapter
from models.wan import export
from models.wan.adapter_files import base_weights
from models.wan.adapter_reader import LinearShape, load_adapter
from models.wan.export import Layout
from models.wan.keymaps import TRANSFORMER
from models.wan.metadata import of_model
from models.weights import WeightReader


def merge(
    base: Path,
    lora: Sequence[tuple[Path, float]],
    out: Path,
    layout: Layout,
    dtype: str | None,
    device: str,
    force: bool,
    console: Console,
) -> None:
    """Write the transformer `base` with adapters in it to folder `out`.

    Sums are taken in float32 and rounded once. Weights in scaled fp8 become bfloat16 unless `dtype` tells otherwise.

    Args:
        lora: files or folders, each with what its change of weight is multiplied with, added in this order.
        layout: names of the tensors and config.json.
        dtype: of all tensors of the result; that of each in the base unless given.

    Raises:
        ValueError: a base that is not a whole transformer, or an adapter that does not fit it.
    """
    place, model = device_of(device), open_model(base)
    linears = {
        name.removesuffix(".weight"): LinearShape(*shape)
        for name, shape in model.reader.shapes().items()
        if name.endswith(".weight") and len(shape) == 2
    }
    adapters: list[LoadedAdapter] = []
    for path, factor in lora:
        # a DoRA counts from what the adapters before it made of the weights, as ComfyUI has it
        weights = base_weights(partial(FusedWeights, model.reader, tuple(adapters), place))
        tensors = load_adapter(path, linears, model.suffix, weights)
        adapters.append(LoadedAdapter(str(path), factor, by_module(tensors)))
    merged = FusedWeights(model.reader, adapters, place)
    dtypes = _result_dtypes(model, dtype)
    sizes = {name: _bytes(shape, dtypes[name]) for name, shape in sorted(model.reader.shapes().items())}
    told = {"reelpipe.merged": ", ".join(f"{path.name} * {factor:g}" for path, factor in lora)}
    told = of_model({"base_model": model.title, **told}, model.variant, model.sizes, model.suffix)
    sources = [*model.files, *(path for path, _ in lora)]
    with folder_to_write(out, force, sources) as folder, progress(console, "merge") as bar:
        bar.update(bar.task_ids[0], total=len(sizes))

        def read(name: str) -> Tensor:
            bar.advance(bar.task_ids[0])
            return merged.read(name).to(dtypes[name])

        config = export.config_of(model.sizes, model.variant, layout)
        export.stream_full(sizes, read, folder, config, told, layout=layout)
    total = sum(sizes.values()) / 2**30
    count = f"{len(adapters)} adapter{'s' * (len(adapters) > 1)}"
    tell(console, [f"{out}: {model.title}, {count} in it, {total:.2f} GiB, {layout} names"])


def _result_dtypes(model: BaseModel, dtype: str | None) -> dict[str, torch.dtype]:
    if dtype:
        return dict.fromkeys(model.reader.names(), getattr(torch, dtype))
    kept = WeightReader(model.files, TRANSFORMER, keeps_scale=lambda weight: True)
    stored = {name: found or torch.bfloat16 for name, found in model.reader.dtypes().items()}
    scaled = (name.removesuffix("_scale") for name in kept.names() if name.endswith(".weight_scale"))
    return stored | dict.fromkeys(scaled, torch.bfloat16)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
