"""Adapters merged into a whole transformer, tensor by tensor, with no more than a shard of it in memory."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from models.adapters import by_module, delta_weight
from models.convert.common import BaseModel, device_of, folder_to_write, open_model, progress, tell
from models.wan import export
from models.wan.adapter_files import base_weights
from models.wan.adapter_reader import LinearShape, load_adapter
from models.wan.export import Layout
from models.wan.keymaps import TRANSFORMER
from models.wan.metadata import of_model
from models.weights import WeightReader

Parts = Mapping[str, Tensor]


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
    weights = base_weights(lambda: model.reader)
    adapters = [(by_module(load_adapter(path, linears, model.suffix, weights)), factor) for path, factor in lora]
    dtypes = _result_dtypes(model, dtype)
    sizes = {name: _bytes(shape, dtypes[name]) for name, shape in sorted(model.reader.shapes().items())}
    told = {"reelpipe.merged": ", ".join(f"{path.name} * {factor:g}" for path, factor in lora)}
    told = of_model({"base_model": model.title, **told}, model.variant, model.sizes, model.suffix)
    with folder_to_write(out, force) as folder, progress(console, "merge") as bar:
        bar.update(bar.task_ids[0], total=len(sizes))

        def read(name: str) -> Tensor:
            bar.advance(bar.task_ids[0])
            return merged(name, model.reader.read(name), adapters, place).to(dtypes[name])

        config = export.config_of(model.sizes, model.variant, layout)
        export.stream_full(sizes, read, folder, config, told, layout=layout)
    total = sum(sizes.values()) / 2**30
    count = f"{len(adapters)} adapter{'s' * (len(adapters) > 1)}"
    tell(console, [f"{out}: {model.title}, {count} in it, {total:.2f} GiB, {layout} names"])


def merged(
    name: str, tensor: Tensor, adapters: Sequence[tuple[Mapping[str, Parts], float]], device: torch.device
) -> Tensor:
    """A parameter of the base, on the CPU, with the adapters' changes added; as it is where none changes it."""
    module, _, leaf = name.rpartition(".")
    changes = [(modules[module], factor) for modules, factor in adapters if leaf == "weight" and module in modules]
    if not changes:
        return tensor
    weight = tensor.to(device, torch.float32)
    for parts, factor in changes:
        weight = weight + factor * delta_weight({part: t.to(device) for part, t in parts.items()}, weight)
    return weight.cpu()


def _result_dtypes(model: BaseModel, dtype: str | None) -> dict[str, torch.dtype]:
    if dtype:
        return dict.fromkeys(model.reader.names(), getattr(torch, dtype))
    kept = WeightReader(model.files, TRANSFORMER, keeps_scale=lambda weight: True)
    stored = {name: found or torch.bfloat16 for name, found in model.reader.dtypes().items()}
    scaled = (name.removesuffix("_scale") for name in kept.names() if name.endswith(".weight_scale"))
    return stored | dict.fromkeys(scaled, torch.bfloat16)


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
