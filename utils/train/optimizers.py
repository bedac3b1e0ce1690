"""Optimizers by name, parameter groups, and optimizer state keyed by parameter name."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NamedParameters = Iterable[tuple[str, nn.Parameter]]

# `[optimizer] type`, lower case -> "module:Class". Names that are not here are looked up in pytorch_optimizer.
OPTIMIZERS: dict[str, str] = {
    "adamw": "torch.optim:AdamW",
    "adamw_optimi": "optimi:AdamW",  # Kahan summation on bfloat16 parameters
    "stableadamw": "optimi:StableAdamW",  # the same, with the update clipped by its root mean square
    "adam8bit": "bitsandbytes.optim:Adam8bit",
    "adamw8bit": "bitsandbytes.optim:AdamW8bit",
    "sgd": "torch.optim:SGD",
    "lion": "pytorch_optimizer:Lion",
    "prodigy": "pytorch_optimizer:Prodigy",  # estimates its step size over its own parameters: one estimate a stage
}

PACKAGES = {"optimi": "torch-optimi", "bitsandbytes": "bitsandbytes", "pytorch_optimizer": "pytorch-optimizer"}

_CLOSURE = "it evaluates the loss again inside its step, which a pipeline cannot do"
_HESSIAN = "it needs gradients of gradients, which a pipeline does not keep"
_OWN_RATE = "it sets its own learning rate, which the schedule would overwrite"
_WHOLE_MODEL = "it wants the whole model, of which a rank holds one stage"
_OWN_TRAFFIC = "it sends between ranks by itself, which the pipeline does already"
_UNSAVED = "part of its memory lies outside its state, so a resumed run would not continue the same training"

# Names of pytorch_optimizer that cannot work here, and why. Found by running all of them (test_optimizers.py does).
UNSUITABLE: dict[str, str] = {
    "adahessian": _HESSIAN,
    "adalomo": _WHOLE_MODEL,
    "adammini": _WHOLE_MODEL,
    "adashift": _UNSAVED,
    "alig": _CLOSURE,
    "asgd": _OWN_RATE,
    "bsam": _CLOSURE,
    "conda": _UNSAVED,
    "demo": _OWN_TRAFFIC,
    "distributedmuon": _OWN_TRAFFIC,
    "lbfgs": _CLOSURE,
    "lomo": _WHOLE_MODEL,
    "lorarite": "it expects LoRA matrices in pairs of one group",
    "magma": "it wraps another optimizer",
    "muonclip": _WHOLE_MODEL,
    "ranger21": _UNSAVED,
    "scalableshampoo": _UNSAVED,
    "sophiah": _HESSIAN,
    "stablespam": _UNSAVED,
    "swats": _OWN_RATE,
    # diffusion-pipe's own
    "adamw8bitkahan": "it is not carried over; use adamw8bit, or adamw_optimi for Kahan summation",
    "automagic": "it is not carried over; use prodigy",
    "genericoptim": "it is not carried over; use muon, adamw_optimi or adamw8bit",
    "offload": "optimizer offload to the CPU is not offered; use adamw8bit to save memory",
}

# These ask each group whether its parameters are matrices to orthogonalise; the others get Adam's rule.
MUON_LIKE = frozenset({"adago", "adamuon", "muon", "normuon"})

# Options that every class of pytorch_optimizer takes through **kwargs, and that its signatures do not show.
PYTORCH_OPTIMIZER_EXTRAS = ("adam_debias", "adanorm", "adanorm_r", "cautious", "stable_adamw", "use_gc")

# Group values that a resumed run takes from its config and not from the checkpoint, so that an edited config counts.
# Everything else in a group is progress (a step count, Prodigy's d, whether Kahan summation is on) and is restored.
FROM_CONFIG = frozenset({"lr", "weight_decay", "betas", "beta1", "beta2", "eps", "momentum", "dampening", "nesterov"})


def optimizer_class(name: str) -> type[Optimizer]:
    """The class behind `[optimizer] type = name`, case-insensitive.

    Raises:
        ValueError: the name is unknown (the nearest are named), cannot work here, or needs a package that is absent.
    """
    key = name.lower()
    if key in UNSUITABLE:
        raise ValueError(f"[optimizer] type = {name!r} cannot be used: {UNSUITABLE[key]}")
    if key in OPTIMIZERS:
        module, _, attribute = OPTIMIZERS[key].partition(":")
        return getattr(_import(module, name), attribute)
    library = _import("pytorch_optimizer", name)
    offered = set(library.get_supported_optimizers())
    if key in offered:
        return library.load_optimizer(key)
    known = sorted((offered | OPTIMIZERS.keys()) - UNSUITABLE.keys())
    near = difflib.get_close_matches(key, known, n=3) or sorted(OPTIMIZERS)
    raise ValueError(
        f"[optimizer] type = {name!r} is not known; the nearest are: {', '.join(near)} "
        "(any name of the pytorch-optimizer package can be used)"
    )


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES.get(module.partition(".")[0])
        if package is None:
            raise
        raise ValueError(
            f"[optimizer] type = {name!r} needs the package {package}, which cannot be imported ({error}); "
            f"install it with: pip install {package}"
        ) from error


def parameter_groups(named_parameters: NamedParameters, weight_decay: float, lr: float) -> list[dict[str, Any]]:
    """At most two groups: weights of two or more dimensions are decayed, vectors and scalars (biases, norms) are not.

    Parameters that need no gradient are left out, and so is a group that would be empty.
    """
    trained = [p for _, p in named_parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, "lr": lr},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": lr},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    name: str, named_parameters: NamedParameters, lr: float, weight_decay: float | None = None, **kwargs: Any
) -> Optimizer:
    """The optimizer of the `[optimizer]` table.

    Args:
        name: `[optimizer] type`, case-insensitive.
        lr: base rate; the loop sets `group["lr"]` before each step.
        weight_decay: None takes the class's own default. Never used on parameters of fewer than two dimensions.
        kwargs: the table's other keys; lists (TOML has no tuples) become tuples.

    Raises:
        ValueError: unknown optimizer, a key that its class does not take, or a value that it refuses.
    """
    cls = optimizer_class(name)
    signature = inspect.signature(cls).parameters
    given = dict(kwargs) if weight_decay is None else {**kwargs, "weight_decay": weight_decay}
    _check_keywords(name, signature, given)
    if weight_decay is None and "weight_decay" in signature:
        weight_decay = signature["weight_decay"].default
    groups = parameter_groups(named_parameters, weight_decay or 0.0, lr)
    if name.lower() in MUON_LIKE:
        for group in groups:
            group["use_muon"] = group["params"][0].ndim >= 2
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    try:
        return cls(groups, lr=lr, **options)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        values = ", ".join(f"{key} = {value!r}" for key, value in {"lr": lr, **given}.items())
        raise ValueError(f"[optimizer] type = {name!r} refuses its settings ({values}): {error}") from error


def _check_keywords(name: str, signature: Mapping[str, inspect.Parameter], given: Mapping[str, Any]) -> None:
    named = {key for key, p in signature.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    takes_extras = len(named) < len(signature)
    known = sorted((named | set(PYTORCH_OPTIMIZER_EXTRAS if takes_extras else ())) - {"params"})
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"[optimizer] {key} is not a setting of {name!r}{hint} Known: {', '.join(known)}")


def optimizer_state_by_name(optimizer: Optimizer, named_parameters: NamedParameters) -> dict[str, Any]:
    """Everything that the optimizer remembers, by parameter name, so that it survives another order of parameters.

    Tensors are the live ones, not copies: save them before the next step. The result is made of tensors and plain
    values, which `torch.load(weights_only=True)` reads back.

    Returns:
        state: parameter name -> key -> tensor or plain value; a parameter that had no gradient yet is absent.
        shapes: parameter name -> its shape, for every optimized parameter.
        shared: key -> value for what belongs to no single parameter (MADGRAD's step count).
        groups: `{"names": [...], "values": {...}, "on_device": [keys of tensors kept beside the parameters]}` each.
        kind: the optimizer's package and class, whose state says nothing to another.
    """
    names = {id(p): name for name, p in named_parameters}
    live = partial(map_tensors, change=Tensor.detach)
    return {
        "state": {names[id(p)]: live(dict(v)) for p, v in optimizer.state.items() if isinstance(p, Tensor)},
        "shapes": {names[id(p)]: list(p.shape) for group in optimizer.param_groups for p in group["params"]},
        "shared": {key: live(value) for key, value in optimizer.state.items() if isinstance(key, str)},
        "groups": [_saved_group(group, names) for group in optimizer.param_groups],
        "kind": _kind(optimizer),
    }


def _kind(optimizer: Optimizer) -> str:
    """With the package: torch and optimi each have an AdamW, and only one of them counts steps for each parameter."""
    return f"{type(optimizer).__module__.partition('.')[0]}.{type(optimizer).__name__}"


def _saved_kind(saved: Mapping[str, Any], optimizer: Optimizer) -> str:
    """`kind` of a state; earlier versions noted the class alone, or nothing, and there its state tells."""
    name = type(optimizer).__name__
    kind = saved.get("kind") or name
    states = [each for each in saved["state"].values() if each]
    if kind == "AdamW" and states:
        return "torch.AdamW" if "step" in states[0] else "optimi.AdamW"
    return _kind(optimizer) if kind == name else kind


def _saved_group(group: Mapping[str, Any], names: Mapping[int, str]) -> dict[str, Any]:
    values = {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
    return {
        "names": [names[id(p)] for p in group["params"]],
        "values": map_tensors(values, Tensor.detach),
        # a checkpoint is read to the CPU, and D-Adaptation's sums belong on the device while optimi's step does not
        "on_device": [key for key, v in values.items() if isinstance(v, Tensor) and v.device.type != "cpu"],
    }


def merge_optimizer_states(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of what several stages saved, for a stage that takes parameters from more than one of them.

    What belongs to no single parameter is taken from the first stage that has it.
    """
    merged: dict[str, Any] = {"state": {}, "shapes": {}, "shared": {}, "groups": [], "kind": None}
    for part in parts:
        merged["kind"] = part.get("kind") or merged["kind"]
        merged["state"] |= part["state"]
        merged["shapes"] |= part["shapes"]
        merged["shared"] = {**part["shared"], **merged["shared"]}
        merged["groups"] += part["groups"]
    return merged


def load_optimizer_state_by_name(
    optimizer: Optimizer, named_parameters: NamedParameters, state: Mapping[str, Any]
) -> list[str]:
    """Put back what `optimizer_state_by_name` gave, bit for bit.

    `Optimizer.load_state_dict` is not used: it casts float state to the parameter's dtype, which would round the
    float32 state of a bfloat16 parameter. Settings named in `FROM_CONFIG` stay as the optimizer was built. What was
    saved of other parameters is passed over; `shapes` and `shared` may be absent.

    Returns:
        Names of optimized parameters that the saved optimizer did not have; these start afresh.

    Raises:
        ValueError: a parameter had another shape when it was saved, or the optimizer was of another class.
    """
    kind = _saved_kind(state, optimizer)
    if kind != _kind(optimizer):
        raise ValueError(
            f"the checkpoint's optimizer is {kind} and [optimizer] type asks for {_kind(optimizer)}; set type back, or "
            "pass --reset_optimizer to start with a fresh one"
        )
    names = {id(p): name for name, p in named_parameters}
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    _check_shapes(parameters, state.get("shapes", {}))
    for name, p in parameters.items():
        if name in state["state"]:
            optimizer.state[p] = _restored(state["state"][name], p.device, optimizer)
    optimizer.state.update(map_tensors(dict(state.get("shared", {})), Tensor.clone))
    for group in optimizer.param_groups:
        members = {names[id(p)] for p in group["params"]}
        saved = next((g for g in state["groups"] if members.intersection(g["names"])), None)
        if saved is not None:
            device = group["params"][0].device
            for key in saved["values"].keys() - FROM_CONFIG:
                target = device if key in saved["on_device"] else None
                group[key] = map_tensors(saved["values"][key], partial(Tensor.to, device=target, copy=True))
    known = state["state"].keys() | {name for group in state["groups"] for name in group["names"]}
    return [name for name in parameters if name not in known]


def _check_shapes(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, list[int]]) -> None:
    for name, p in parameters.items():
        if name in saved and list(p.shape) != list(saved[name]):
            raise ValueError(
                f"optimizer state of {name}: saved for shape {list(saved[name])}, now it is {list(p.shape)}; "
                "the checkpoint is of another model or LoRA rank. To go on without it: --reset_optimizer"
            )


def _restored(saved: Mapping[str, Any], device: torch.device, optimizer: Optimizer) -> dict[str, Any]:
    """A copy on the parameter's device, with `step` where torch keeps it: on the CPU unless fused or capturable."""
    step_on_device = any(optimizer.defaults.get(key) for key in ("fused", "capturable"))
    devices = {"step": device if step_on_device else torch.device("cpu")}
    return {
        key: map_tensors(value, partial(Tensor.to, device=devices.get(key, device), copy=True))
        for key, value in saved.items()
    }


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor in it changed; containers are rebuilt, plain values kept."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def _is_plain(value: Any) -> bool:
    """Whether `torch.load(weights_only=True)` reads the value back."""
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    # exact types: an IntEnum is an int that cannot be read back
    return value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor)


def step_size_estimate(optimizer: Optimizer) -> float | None:
    """Prodigy's and D-Adaptation's d, the mean over groups (`train/prodigy_d`); None for other optimizers."""
    estimates = [float(group["d"]) for group in optimizer.param_groups if "d" in group]
    return sum(estimates) / len(estimates) if estimates else None


@contextmanager
def eval_mode(optimizer: Optimizer) -> Iterator[None]:
    """Show the weights to evaluate or export, and give the training weights back bit for bit.

    Schedule-free optimizers train at one point and are read at another (Defazio et al. 2024, arXiv 2405.15682); their
    own way back (`train()`) interpolates and so rounds. A copy on the CPU is kept meanwhile. For every other optimizer
    this does nothing.
    """
    if not (callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().to("cpu", copy=True) for p in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
