"""The kinds of adapter: the parts each consists of, their names, first values, and the change of weight they make.

Names come in two forms. Plain ones, `<module>.<part>`, are what families save and load and what checkpoints of other
programs are turned into; skeleton ones have peft's adapter name in them and are those of parameters.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

ADAPTER = "default"  # peft's name for the one adapter; part of its parameter names

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # [rank, in] and [out, rank]
MAGNITUDE = ".lora_magnitude_vector"  # [out]: norm of each row of the adapted weight
LOKR_W1, LOKR_W1_A, LOKR_W1_B = ".lokr_w1", ".lokr_w1_a", ".lokr_w1_b"  # [a, c], or [a, rank] and [rank, c]
LOKR_W2, LOKR_W2_A, LOKR_W2_B = ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"  # [b, d], or [b, rank] and [rank, d]

# part of a plain name -> the same in a skeleton with adapters
SKELETON_PARTS: dict[str, str] = {
    LORA_A: f".lora_A.{ADAPTER}.weight",
    LORA_B: f".lora_B.{ADAPTER}.weight",
    MAGNITUDE: f"{MAGNITUDE}.{ADAPTER}.weight",
    **{part: f"{part}.{ADAPTER}" for part in (LOKR_W1, LOKR_W1_A, LOKR_W1_B, LOKR_W2, LOKR_W2_A, LOKR_W2_B)},
}
PLAIN_PARTS = {skeleton: plain for plain, skeleton in SKELETON_PARTS.items()}

# kind -> the sets of parts that one module of it may have
KINDS: dict[str, tuple[frozenset[str], ...]] = {
    "lora": (frozenset({LORA_A, LORA_B}),),
    "dora": (frozenset({LORA_A, LORA_B, MAGNITUDE}),),
    "lokr": tuple(
        frozenset(first) | frozenset(second)
        for first, second in product(
            ({LOKR_W1}, {LOKR_W1_A, LOKR_W1_B}),
            ({LOKR_W2}, {LOKR_W2_A, LOKR_W2_B}),
        )
    ),
}
TITLES = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}

# Of each kind the one factor that is zero at first, as peft has it, so that training starts from the base. A module
# has exactly one of these, and the change of weight is linear in it: a scale is folded in here.
SCALED = (LORA_B, LOKR_W1, LOKR_W1_A)


def split_name(name: str) -> tuple[str, str] | None:
    """Module and part of a plain adapter name; None for any other name."""
    return next(((name.removesuffix(part), part) for part in SKELETON_PARTS if name.endswith(part)), None)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Plain names to the parts of each module: `{"blocks.0.attn1.to_q": {".lora_A.weight": ...}}`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        split = split_name(name)
        assert split is not None, f"{name} is no part of an adapter"
        found.setdefault(split[0], {})[split[1]] = tensor
    return found


def kind_of(parts: Collection[str]) -> str:
    """The kind that a module with these parts has.

    Raises:
        ValueError: parts that do not belong together, or a part without its partner.
    """
    for kind, forms in KINDS.items():
        if frozenset(parts) in forms:
            return kind
    shown = ", ".join(sorted(part.lstrip(".") for part in parts)) or "nothing"
    raise ValueError(f"has {shown}, which is no whole LoRA, DoRA or LoKr")


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted skeleton belongs to an adapter."""
    return any(name.endswith(part) for part in PLAIN_PARTS)


def needs_float32(name: str) -> bool:
    """Whether a parameter, by either name, is kept and saved in float32 whatever the others are: bfloat16 would move
    each row's length by up to 0.2 %, and that before the first step."""
    return name.endswith((MAGNITUDE, SKELETON_PARTS[MAGNITUDE]))


def base_name(name: str) -> str:
    """A frozen parameter's name in the skeleton before it was adapted, which is its name in the checkpoint."""
    return name.replace(".base_layer.", ".")


def plain_name(name: str) -> str:
    """`blocks.0.attn1.to_q.lora_A.default.weight` -> `blocks.0.attn1.to_q.lora_A.weight`."""
    return _renamed(name, PLAIN_PARTS)


def skeleton_name(name: str) -> str:
    """The inverse of `plain_name`."""
    return _renamed(name, SKELETON_PARTS)


def _renamed(name: str, parts: Mapping[str, str]) -> str:
    return next((name.removesuffix(old) + new for old, new in parts.items() if name.endswith(old)), name)


def first_value(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """First value of an adapter's parameter, float32 on the CPU: as peft draws it.

    The factor in `SCALED` is zero; the others are Kaiming-uniform with a = sqrt(5), i.e. uniform in +-1/sqrt(columns)
    (He et al. 2015, arXiv 1502.01852). They depend on `seed` and on the name only, so every way of cutting the model
    into stages starts from the same weights. DoRA's magnitude is not drawn: see `row_norms`.
    """
    plain = plain_name(name)
    split = split_name(plain)
    assert split is not None and split[1] != MAGNITUDE, f"{name} has no first value of its own"
    if split[1] in SCALED:
        return torch.zeros(tuple(shape))
    digest = hashlib.blake2b(f"{seed}:{plain}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits: it takes no more
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)


def fold_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """`tensors`, by plain names, with the factors in `SCALED` times `scale`: alpha / rank makes what `delta_weight`
    takes, rank / alpha takes that back."""
    return {name: tensor * scale if name.endswith(SCALED) else tensor for name, tensor in tensors.items()}


def row_norms(weight: Tensor) -> Tensor:
    """[out, in] to the norm of each row, [out], in float32: DoRA's magnitude of a weight that nothing was added to."""
    return torch.linalg.vector_norm(weight.float(), dim=1)


def delta_weight(parts: Mapping[str, Tensor], base: Tensor | None = None) -> Tensor:
    """What one module's adapter adds to its weight, [out, in] float32.

    LoRA: B @ A. LoKr: the Kronecker product of w1 and w2 (arXiv 2309.14859, section 3.3). DoRA: the difference to W of
    W + B @ A with its rows brought to the lengths that the magnitudes give (arXiv 2402.09353, equation 5).

    Args:
        parts: tensors by part, alpha / rank folded in, on one device.
        base: the weight W [out, in] that it is added to. Only DoRA needs it.

    Raises:
        ValueError: parts that do not make an adapter.
    """
    kind = kind_of(parts)
    full = {part: tensor.float() for part, tensor in parts.items()}
    if kind == "lokr":
        first = full[LOKR_W1] if LOKR_W1 in full else full[LOKR_W1_A] @ full[LOKR_W1_B]
        second = full[LOKR_W2] if LOKR_W2 in full else full[LOKR_W2_A] @ full[LOKR_W2_B]
        return torch.kron(first, second)
    product_ = full[LORA_B] @ full[LORA_A]
    if kind == "lora":
        return product_
    assert base is not None, "a DoRA changes the weight by what the weight is"
    direction = base.float() + product_
    norms = row_norms(direction).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays one
    return direction * (full[MAGNITUDE] / norms)[:, None] - base.float()


def delta_shape(parts: Mapping[str, Tensor]) -> tuple[int, int]:
    """(out, in) of the weight that one module's adapter fits, without computing it.

    Raises:
        ValueError: parts that do not make an adapter, or do not fit each other.
    """
    kind = kind_of(parts)
    hollow = {part: torch.empty(tensor.shape, device="meta") for part, tensor in parts.items()}
    magnitude = hollow.pop(MAGNITUDE, None)
    try:
        out, columns = delta_weight(hollow).shape
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"has parts that do not fit each other: {_shapes(parts)}") from error
    if kind == "dora" and (magnitude is None or tuple(magnitude.shape) != (out,)):
        raise ValueError(f"has parts that do not fit each other: {_shapes(parts)}")
    return out, columns


def _shapes(parts: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{part.lstrip('.')} {list(tensor.shape)}" for part, tensor in sorted(parts.items()))


def rank_of(parts: Mapping[str, Tensor]) -> int | None:
    """The inner width of one module's adapter; None for a LoKr of two whole matrices, which has none."""
    for part in (LORA_A, LOKR_W1_B, LOKR_W2_B):
        if part in parts:
            return parts[part].shape[0]
    return None


def kinds_in(names: Iterable[str]) -> set[str]:
    """Kinds of the modules in a set of plain names.

    Raises:
        ValueError: a module whose parts do not make an adapter.
    """
    modules: dict[str, set[str]] = {}
    for name in names:
        split = split_name(name)
        assert split is not None, f"{name} is no part of an adapter"
        modules.setdefault(split[0], set()).add(split[1])
    found = set()
    for module, parts in modules.items():
        try:
            found.add(kind_of(parts))
        except ValueError as error:
            raise ValueError(f"{module} {error}") from error
    return found
