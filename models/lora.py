"""LoRA on a skeleton: put peft's adapters in, name them, initialise them by name."""

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

ADAPTER = "default"  # peft's name for the one adapter; part of its parameter names
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # [rank, in] and [out, rank]: delta W = alpha / rank * B @ A


def add_lora(skeleton: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> None:
    """Give each Linear in `targets` an adapter, float32 and on meta; all other parameters stop requiring gradients.

    The adapters take their input as it comes: run the model under autocast where it is not float32. peft would first
    make a float32 copy of every input, which autocast turns straight back.

    Raises:
        ValueError: no targets.
    """
    if not targets:
        raise ValueError("[adapter] exclude_modules leaves no module to train; remove entries from it")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="|".join(re.escape(name) for name in targets),  # a string is a regex, a list means suffixes
    )
    inject_adapter_in_model(config, skeleton, adapter_name=ADAPTER, low_cpu_mem_usage=True)
    adapted = [name for name, module in skeleton.named_modules() if isinstance(module, LoraLayer)]
    assert set(adapted) == set(targets), f"peft adapted {len(adapted)} modules of {len(targets)}"
    for name in adapted:
        skeleton.get_submodule(name).cast_input_dtype_enabled = False
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(is_lora(name))


def is_lora(name: str) -> bool:
    """Whether a parameter of an adapted skeleton belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """A frozen parameter's name in the skeleton before `add_lora`, which is its name in the checkpoint."""
    return name.replace(".base_layer.", ".")


def plain_lora_name(name: str) -> str:
    """`blocks.0.attn1.to_q.lora_A.default.weight` -> `blocks.0.attn1.to_q.lora_A.weight`."""
    return re.sub(rf"\.(lora_[AB])\.{ADAPTER}\.", r".\1.", name)


def skeleton_lora_name(name: str) -> str:
    """The inverse of `plain_lora_name`."""
    return re.sub(r"\.(lora_[AB])\.weight$", rf".\1.{ADAPTER}.weight", name)


def init_lora(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """First value of an adapter's parameter, float32 on the CPU: A as peft draws it, B zeros.

    A is Kaiming-uniform with a = sqrt(5), i.e. uniform in +-1/sqrt(in) (He et al. 2015, arXiv 1502.01852). It depends
    on `seed` and on the name only, so every way of cutting the model into stages starts from the same weights.
    """
    plain = plain_lora_name(name)
    if plain.endswith(LORA_B):
        return torch.zeros(tuple(shape))
    assert plain.endswith(LORA_A), f"{name} is no LoRA parameter"
    digest = hashlib.blake2b(f"{seed}:{plain}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: it takes no more
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def fold_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`tensors` with B times `scale`: alpha / rank makes delta W = B @ A, rank / alpha takes that back."""
    return {name: tensor * scale if name.endswith(LORA_B) else tensor for name, tensor in tensors.items()}


def without_excluded(targets: Sequence[str], exclude: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The targets that no entry of `[adapter] exclude_modules` matches.

    An entry of name characters alone (`cross_attn`, `blocks.1`) is searched as it stands, but a number at its end is a
    whole number: `blocks.1` is not `blocks.12`. Any other entry is a regular expression, searched.

    Args:
        aliases: what other naming has for each target, searched as well.

    Raises:
        ValueError: an entry that matches nothing, or is no regular expression.
    """
    excluded: set[str] = set()
    for entry in exclude:
        pattern = _entry_pattern(entry)
        matches = {name for name in targets if pattern.search(name) or pattern.search(aliases.get(name, ""))}
        if not matches:
            raise ValueError(
                f"[adapter] exclude_modules: '{entry}' matches no module; they are named like "
                f"{' or '.join(_examples(targets, aliases))}"
            )
        excluded |= matches
    return [name for name in targets if name not in excluded]


def _entry_pattern(entry: str) -> re.Pattern[str]:
    if re.fullmatch(r"[\w.]+", entry):
        return re.compile(rf"(?<!\d){re.escape(entry)}(?!\d)" if entry[-1].isdigit() else re.escape(entry))
    try:
        return re.compile(entry)
    except re.error as error:
        raise ValueError(f"[adapter] exclude_modules: '{entry}' is no regular expression: {error}") from error


def _examples(targets: Collection[str], aliases: Mapping[str, str]) -> list[str]:
    first = next(iter(targets), "")
    return [name for name in (aliases.get(first), first) if name]
