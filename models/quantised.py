"""Weights that are stored in float8 with a scale: what ComfyUI's fp8_scaled files say of each, and W from both.

Old files: `<module>.scale_weight` beside the weight, `<module>.scale_input`, and a tensor `scaled_fp8` for the whole.
New files: `<module>.weight_scale`, `<module>.input_scale`, and `<module>.comfy_quant`, the bytes of a JSON object like
`{"format": "float8_e4m3fn"}`; or the same objects under `layers` in the header's `_quantization_metadata`.
Source of the names and formats: ComfyUI, comfy/utils.py `convert_old_quants` and comfy/quant_ops.py `QUANT_ALGOS`.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.headers import TensorInfo

WEIGHT, SCALE = ".weight", ".weight_scale"
SCALE_ENDINGS = (SCALE, ".scale_weight")
# of activations, for products of two float8 matrices. Here weights are expanded and products run in the compute dtype,
# as in training, so these are not used.
INPUT_SCALE_ENDINGS = (".input_scale", ".scale_input")
FILE_MARKER = "scaled_fp8"
MODULE_MARKER = ".comfy_quant"
METADATA_KEY = "_quantization_metadata"

FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOAT8 = frozenset(FORMATS.values())
# part of a tensor's name that only another format has -> the format
OTHER_PARTS = {
    ".weight_scale_2": "nvfp4",
    ".weight_s_rel": "asym_w4a8_int8",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".qzeros": "gptq or awq",
}
# dtype of a weight that has a scale -> the format, where no marker tells
OTHER_DTYPES = {torch.int8: "int8", torch.uint8: "nvfp4 or another format of 4 bits"}
MEND = "use the bf16, fp16, fp8 or fp8_scaled file of this model"


class Sorted(NamedTuple):
    """A file's tensors by what they are for; the others are plain weights."""

    scales: dict[str, str]  # weight -> its scale
    aside: set[str]  # markers and scales of activations


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """W = weight * scale in float32, [out, ...]; `scale` has one element or one a row of `weight`."""
    return weight.float() * row_scale(scale.float(), weight.ndim)


def row_scale(scale: Tensor, ndim: int) -> Tensor:
    """`scale` of 1 or `out` elements in a shape that multiplies the rows of a weight of `ndim` dimensions."""
    return scale.reshape(-1, *[1] * (ndim - 1))


def marked_formats(
    markers: Mapping[str, bytes], header: str | None, strip_prefix: Callable[[str], str]
) -> dict[str, str]:
    """What a file says of its modules: module -> format.

    Args:
        markers: module -> content of its `comfy_quant`.
        header: the header's `_quantization_metadata`.
        strip_prefix: its names to those of the modules; some converters write it with the prefix, some without.

    Raises:
        ValueError: a marker that cannot be read.
    """
    told: dict[str, Any] = {}
    place = f"the header's {METADATA_KEY}"
    try:
        if header is not None:
            told = {strip_prefix(name): value for name, value in json.loads(header)["layers"].items()}
        for module, content in markers.items():
            place = module + MODULE_MARKER
            told[module] = json.loads(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{place} cannot be read ({error}); download the file again") from error
    formats = {name: value.get("format") if isinstance(value, dict) else value for name, value in told.items()}
    for module, name in formats.items():
        if not isinstance(name, str):
            raise ValueError(f"{module} is marked as quantised without a format; download the file again")
    return formats


def sort_out(tensors: Mapping[str, TensorInfo], formats: Mapping[str, str]) -> Sorted:
    """Which tensors are scales, and of which weights.

    Args:
        tensors: all of a model, by names that are alike in everything but their endings.
        formats: what the markers say, by module.

    Raises:
        ValueError: a format that cannot be read (named), a scale without a weight, a weight that lost its scale.
    """
    if unreadable := _unreadable(tensors, formats):
        raise ValueError(f"{unreadable}, which cannot be trained on; {MEND}")
    scales: dict[str, str] = {}
    aside = {name for name in tensors if name.endswith((FILE_MARKER, MODULE_MARKER))}
    faults: list[str] = []
    for name in tensors:
        if module := _module(name, SCALE_ENDINGS):
            if module + WEIGHT in scales:
                faults.append(f"{module} has two scales")
            scales[module + WEIGHT] = name
        elif module := _module(name, INPUT_SCALE_ENDINGS):
            aside.add(name)
            if module + WEIGHT not in tensors:
                faults.append(f"{name} has no weight")
    faults += _scale_faults(tensors, scales)
    faults += _weight_faults(tensors, scales, formats)
    if faults:
        more = f" (and {len(faults) - 1} faults more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}. The file is damaged, or only a part of a model; download it again")
    return Sorted(scales, aside)


def _module(name: str, endings: tuple[str, ...]) -> str:
    """`name` less one of `endings`; empty where it has none."""
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), "")


def _unreadable(tensors: Mapping[str, TensorInfo], formats: Mapping[str, str]) -> str:
    """The first sign of a format that is not known here, in words."""
    for module, name in formats.items():
        if name not in FORMATS:
            return f"{module} is quantised as {name}"
    for name, tensor in tensors.items():
        if tensor.dtype is None:
            return f"{name} is stored in less than a byte a number"
        for part, kind in OTHER_PARTS.items():
            if name.endswith(part):
                return f"{name} belongs to weights quantised as {kind}"
        module = _module(name, SCALE_ENDINGS)
        weight = tensors.get(module + WEIGHT) if module else None
        if weight is not None and weight.dtype in OTHER_DTYPES:
            return f"{module} is quantised as {OTHER_DTYPES[weight.dtype]}"
        if weight is not None and not _is_plain_float(tensor.dtype):
            return f"{module} has scales of {tensor.dtype}, as mxfp8 and nvfp4 have"
    return ""


def _is_plain_float(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _scale_faults(tensors: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> Iterator[str]:
    for weight, scale in scales.items():
        if weight not in tensors:
            yield f"{scale} has no weight"
            continue
        (shape, dtype), given = tensors[weight], tensors[scale].shape
        if dtype not in FLOAT8:
            yield f"{weight} has a scale and is stored as {dtype}, not as float8"
        elif given not in ((), (1,), (1, 1), shape[:1], (*shape[:1], *[1] * (len(shape) - 1))):
            yield f"{scale} is {list(given)}, and only one scale or one a row of {list(shape)} can be read"


def _weight_faults(
    tensors: Mapping[str, TensorInfo], scales: Mapping[str, str], formats: Mapping[str, str]
) -> Iterator[str]:
    """Weights whose marker and form disagree. Without its scale a weight is wrong by a factor of thousands."""
    for module, name in formats.items():
        if module + WEIGHT not in tensors:
            yield f"{module} is marked as {name} and has no weight"
        elif tensors[module + WEIGHT].dtype != FORMATS[name]:
            yield f"{module} is marked as {name} and stored as {tensors[module + WEIGHT].dtype}"
        elif module + WEIGHT not in scales:
            yield f"{module}{WEIGHT} has lost its scale"
    if formats:
        return  # the markers tell module by module: what has none was stored without a scale
    if scales or any(name.endswith(FILE_MARKER) for name in tensors):
        for name, (shape, dtype) in tensors.items():
            if dtype in FLOAT8 and len(shape) == 2 and name.endswith(WEIGHT) and name not in scales:
                yield f"{name} has lost its scale"


def scale_fault(scale: Tensor) -> str:
    """What is wrong with the numbers of a scale, in words; empty where nothing is."""
    values = scale.float()
    if not values.isfinite().all():
        return "is not finite"
    return "" if (values > 0).all() else "is not above 0"
