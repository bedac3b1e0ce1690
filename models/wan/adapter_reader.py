"""Adapters from files of any spelling, strictly: what belongs to no module or fits none is an error with a guess."""

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from models.adapters import LOKR_W2, MAGNITUDE, delta_shape, fold_scale, rank_of
from models.json_files import as_table, read_table
from models.wan.adapter_files import (
    DIFFUSERS_METADATA,
    PEFT_CONFIG,
    Adapter,
    BaseWeights,
    alpha_divisor,
    with_dora_part,
)
from models.wan.adapter_formats import ALPHA, DORA_SCALE, FORMATS, PEFT_PREFIX, guess, split_key
from models.wan.metadata import DORA_NORM
from models.weights import read_header

EXPERT_SUFFIXES = ("_high_noise", "_low_noise")
OF_THE_WHOLE_FILE = ("lokr_factor",)  # musubi-tuner's note of how it cut the matrices, which their shapes tell
NAMES_SHOWN = 3  # in messages
MAX_PATTERN, MAX_REPETITIONS = 2000, 3  # of peft's patterns, which are names or `blocks.\d+.attn1`


class LinearShape(NamedTuple):
    """What an adapter has to fit."""

    out_features: int
    in_features: int


def load_adapter(
    path: Path, linears: Mapping[str, LinearShape], suffix: str = "", base: BaseWeights | None = None
) -> dict[str, Tensor]:
    """Read an adapter in any of `FORMATS`, or as musubi-tuner, LyCORIS, ai-toolkit or DiffSynth-Studio spell it.

    Args:
        path: the file, or a folder that `save_adapter` wrote.
        linears: shapes of the modules that may carry an adapter, by skeleton name.
        suffix: which expert's file to take from a folder.
        base: weights of the model; a DoRA under ComfyUI's or kohya's names that we wrote needs them.

    Returns:
        float32 tensors by plain names, alpha folded in: what `models.adapters.delta_weight` takes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: keys that belong to no module of this model, parts that are missing, or a matrix that does not fit.
    """
    file = adapter_file(path, suffix)
    return folded(file, read_adapter(file, linears), linears, base)


def folded(
    file: Path, adapter: Adapter, linears: Mapping[str, LinearShape], base: BaseWeights | None
) -> dict[str, Tensor]:
    """What `load_adapter` returns, of an adapter as `file` has it; raises as that does."""
    _check_fit(file, adapter, linears)
    tensors: dict[str, Tensor] = {}
    for module, stored in adapter.modules.items():
        scale = adapter.scales[module]
        parts = with_dora_part(module, stored, scale, MAGNITUDE, base) if DORA_SCALE in stored else stored
        scaled = fold_scale({part: tensor.float() for part, tensor in parts.items()}, scale)
        tensors |= {module + part: tensor for part, tensor in scaled.items()}
    return tensors


def _check_fit(file: Path, adapter: Adapter, linears: Mapping[str, LinearShape]) -> None:
    """Every module is whole, and changes as much as there is; one message with the count and the first of each."""
    broken: list[str] = []
    misfits: list[str] = []
    for module, stored in adapter.modules.items():
        plain = {MAGNITUDE if part == DORA_SCALE else part: tensor for part, tensor in stored.items()}
        if DORA_SCALE in stored:
            plain[MAGNITUDE] = plain[MAGNITUDE].flatten()
        try:
            shape = delta_shape(plain)
        except ValueError as error:
            broken.append(f"{module} {error}")
            continue
        if shape != linears[module]:
            misfits.append(f"{module} gives {list(shape)} and should give {list(linears[module])}")
    if broken:
        raise ValueError(f"{file}: {len(broken)} modules are not whole, first {broken[0]}; download the file again")
    if misfits:
        raise ValueError(
            f"{file}: {len(misfits)} modules do not fit, first {misfits[0]}; it is made for another size of model"
        )


def adapter_file(path: Path, suffix: str = "") -> Path:
    """`path`, or the one adapter in folder `path`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, and none is the one that `suffix` asks for; or it is a training checkpoint.
    """
    _refuse_checkpoint(path)
    if path.is_file():
        return path
    for ending in dict.fromkeys((suffix, "")):
        for form in FORMATS.values():
            if (file := path / f"{form.stem}{ending}.safetensors").is_file():
                return file
    found = sorted(path.glob("*.safetensors"))
    others = [file for file in found if suffix and file.stem.endswith(EXPERT_SUFFIXES)]
    if len(found) == 1 and not others:
        return found[0]
    if not found:
        stems = tuple(form.stem for form in FORMATS.values())
        inside = {file.parent.name for file in path.glob("*/*.safetensors") if file.name.startswith(stems)}
        mend = f"; it has folders with one, name one of them: {', '.join(sorted(inside))}" if inside else ""
        raise FileNotFoundError(f"no LoRA at '{path}'{mend}")
    names = ", ".join(file.name for file in found)
    raise ValueError(f"'{path}' holds {names}: name the file that is meant instead of the folder")


def _refuse_checkpoint(path: Path) -> None:
    """A checkpoint of ours has the tensors of some stages, less their alpha: read as an adapter it would be another."""
    folder = path.parent if path.is_file() else path
    is_part = path.is_dir() or path.name.startswith("weights_")
    if is_part and (folder / "state.json").is_file() and any(folder.glob("weights_*.safetensors")):
        raise ValueError(
            f"'{path}' is a checkpoint, for --resume_from_checkpoint alone; name a folder that was saved beside it, "
            "such as epoch1 or step100"
        )


def read_adapter(file: Path, known: Mapping[str, Any] | None = None, skip: Collection[str] = ()) -> Adapter:
    """An adapter as it is stored.

    Args:
        known: skeleton names of the modules that may carry an adapter; every module of a Wan unless given.
        skip: keys to leave to somebody else.

    Raises:
        ValueError: keys that belong to none of them, or no keys at all.
    """
    _, metadata = read_header(file)  # a truncated file is told apart from a wrong one
    modules: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    unknown: list[str] = []
    keys = []
    for key, tensor in load_file(file).items():
        if key in OF_THE_WHOLE_FILE or key in skip:
            continue
        module, part = split_key(key) or ("", "")
        keys.append(key)
        if not module or (known is not None and module not in known) or (part == ALPHA and tensor.numel() != 1):
            unknown.append(key)
            continue
        parts = modules.setdefault(module, {})  # an alpha without matrices is half a module too
        if part in parts:
            raise ValueError(f"{file}: {module} has its {part.lstrip('.')} twice, the second as {key}")
        if part == ALPHA:
            alphas[module] = float(tensor)
        else:
            parts[part] = tensor
    _refuse_unknown(file, unknown)
    if not modules:
        raise ValueError(f"{file} holds no LoRA")
    modules = {module: _own_dora_part(file, module, parts, metadata) for module, parts in modules.items()}
    settings = _peft_settings(file, keys, metadata)
    scales = {m: _scale(m, parts, alphas.get(m), settings, metadata) for m, parts in modules.items()}
    return Adapter(modules, scales, metadata)


def _refuse_unknown(file: Path, unknown: list[str]) -> None:
    if not unknown:
        return
    shown = ", ".join(unknown[:NAMES_SHOWN]) + (" ..." if len(unknown) > NAMES_SHOWN else "")
    raise ValueError(
        f"{file}: {len(unknown)} keys belong to no module of this model, first {shown}. Hint: {guess(unknown[0])}"
    )


def _own_dora_part(file: Path, module: str, parts: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """dora_scale of other trainers is DoRA's magnitude in one of two shapes; ours is what ComfyUI takes."""
    if DORA_SCALE not in parts or metadata.get(DORA_NORM) == "base":
        return parts
    scale = parts[DORA_SCALE]
    if scale.ndim == 2 and scale.shape[0] == 1 and scale.shape[1] > 1:
        raise ValueError(
            f"{file}: {module} is a DoRA over columns (dora_scale is {list(scale.shape)}), which is not read; one over "
            "rows ([out, 1]) is"
        )
    rest = {part: tensor for part, tensor in parts.items() if part != DORA_SCALE}
    return {**rest, MAGNITUDE: scale.flatten()}


def _peft_settings(file: Path, keys: list[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's settings from where diffusers and peft itself keep them; empty where there are none."""
    try:
        if told := metadata.get(DIFFUSERS_METADATA):
            of_all = as_table(json.loads(told))
            return _checked_settings({key.removeprefix("transformer."): value for key, value in of_all.items()})
        beside = file.with_name(f"{PEFT_CONFIG}.json")
        if all(key.startswith(PEFT_PREFIX) for key in keys) and beside.is_file():
            return _checked_settings(read_table(beside))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: the adapter's settings cannot be read ({error})") from error
    return {}


def _checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings`, with an alpha and patterns that can be used; else a `ValueError`.

    A pattern that repeats a repetition could take for ever on a name that it does not match.
    """
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is no table")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise ValueError(f"alpha_pattern has {pattern[:80]!r}, which is no regular expression") from None
        if len(pattern) > MAX_PATTERN or len(re.findall(r"[*+?{]", pattern)) > MAX_REPETITIONS:
            raise ValueError(f"alpha_pattern has {pattern[:80]!r}, which is not a name of modules")
    for alpha in (settings.get("lora_alpha", 1), *patterns.values()):
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise ValueError(f"{str(alpha)[:40]!r} is no alpha")
    return settings


def _scale(
    module: str,
    parts: Mapping[str, Tensor],
    alpha: float | None,
    settings: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> float:
    """alpha / rank by the rule of whoever wrote the file; 1 where it tells no alpha."""
    width = alpha_divisor(parts)
    if alpha is None and settings and rank_of(parts):
        alpha, rank = float(_for_module(module, settings, "alpha_pattern", settings.get("lora_alpha", width))), width
        assert rank
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    if width is None and metadata.get("ss_network_module") == "networks.lokr" and LOKR_W2 in parts:
        width = max(parts[LOKR_W2].shape)  # musubi-tuner scales whole matrices too
    return 1.0 if alpha is None or width is None else alpha / width


def _for_module(module: str, settings: Mapping[str, Any], pattern_key: str, otherwise: Any) -> Any:
    """peft's rule: a pattern is a regular expression for the end of a module's name."""
    for pattern, value in (settings.get(pattern_key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module):
            return value
    return otherwise
