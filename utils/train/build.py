"""A family and plain settings to this rank's engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import lora
from models.base import ModelFamily, WeightSource
from utils.train.engine import ReelEngine
from utils.train.optimizers import build_optimizer
from utils.train.stages import LayerRunner, StagedModule, choose_bounds


@dataclass(frozen=True)
class AdapterSettings:
    """What is trained beside a frozen base."""

    rank: int
    alpha: float
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    exclude_modules: tuple[str, ...] = ()
    init_from_existing: Path | None = None


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its own arguments."""

    name: str
    lr: float
    weight_decay: float | None = None  # None: what the optimizer's class has
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineSettings:
    """How the model is cut, run and stepped. `adapter` None trains all parameters."""

    stages: int
    micro_batches: int
    optimizer: OptimizerSettings
    adapter: AdapterSettings | None = None
    gradient_clipping: float = 1.0
    partition_method: str = "parameters"
    partition_split: tuple[int, ...] | None = None
    checkpointing: bool = False
    offload_checkpoints: bool = False
    compile: bool = False
    seed: int = 0


class Built(NamedTuple):
    """What training needs of the model."""

    engine: ReelEngine
    optimizer: torch.optim.Optimizer
    trained: dict[str, nn.Parameter]  # this stage's, by their name in the skeleton


def prepare_skeleton(family: ModelFamily, adapter: AdapterSettings | None) -> nn.Module:
    """The whole model on meta, with its adapter, dtypes and `requires_grad` as they will be."""
    skeleton = family.build_skeleton()
    if adapter is None:
        skeleton.requires_grad_(True)
    else:
        skeleton.requires_grad_(False)
        targets = family.lora_targets(skeleton, adapter.exclude_modules)
        lora.add_lora(skeleton, targets, adapter.rank, adapter.alpha, adapter.dropout)
    for name, parameter in skeleton.named_parameters():
        is_adapter = lora.is_lora(name)
        dtype = adapter.dtype if adapter and is_adapter else family.storage_dtype(lora.base_name(name))
        parameter.requires_grad_(adapter is None or is_adapter)
        parameter.data = parameter.data.to(dtype)
    return skeleton


class Cut(NamedTuple):
    """The model on meta, in layers, and where the stages begin."""

    skeleton: nn.Module
    layers: list[nn.Module]
    bounds: list[int]


def cut_model(family: ModelFamily, settings: EngineSettings) -> Cut:
    """Raises `ValueError` where the model cannot be cut as asked; says which key."""
    skeleton = prepare_skeleton(family, settings.adapter)
    layers = family.pipeline_layers(skeleton)
    trainable = {id(p) for p in skeleton.parameters() if p.requires_grad}
    bounds = choose_bounds(
        layers, settings.stages, settings.partition_method, settings.partition_split, lambda p: id(p) in trainable
    )
    return Cut(skeleton, layers, bounds)


def check_settings(family: ModelFamily, settings: EngineSettings) -> Cut:
    """Everything that `build_engine` would refuse, found without weights: the cut, the optimizer, the adapter."""
    cut = cut_model(family, settings)
    chosen = settings.optimizer
    matrix = [("probe", nn.Parameter(torch.zeros(2, 2)))]
    build_optimizer(chosen.name, matrix, lr=chosen.lr, weight_decay=chosen.weight_decay, **chosen.arguments)
    found = starting_adapter(family, settings.adapter)
    if found is not None:
        for name, parameter in cut.skeleton.named_parameters():
            if lora.is_lora(name):
                _from_adapter(found, name, parameter)
    return cut


def build_engine(family: ModelFamily, settings: EngineSettings, device: torch.device) -> Built:
    """Cut the model, read this rank's share of the weights, and wrap it for DeepSpeed.

    Raises:
        ValueError: the cut or the weights do not fit; says which key or file.
    """
    skeleton, layers, bounds = cut_model(family, settings)
    has_dropout = settings.adapter is not None and settings.adapter.dropout > 0
    runner = LayerRunner(
        autocast=None if family.compute_dtype == torch.float32 else family.compute_dtype,
        checkpointing=settings.checkpointing,
        offload=settings.offload_checkpoints,
        dropout_seed=settings.seed if has_dropout else None,
    )
    fill = parameter_filler(family.open_weights(), starting_adapter(family, settings.adapter), settings.seed, device)
    module = StagedModule(layers, bounds, skeleton, fill, runner, family.loss)
    trained = {name: p for name, p in module.named_local() if p.requires_grad}
    chosen = settings.optimizer
    optimizer = build_optimizer(
        chosen.name, list(trained.items()), lr=chosen.lr, weight_decay=chosen.weight_decay, **chosen.arguments
    )
    engine = ReelEngine(
        module, optimizer, micro_batches=settings.micro_batches, gradient_clipping=settings.gradient_clipping
    )
    if settings.compile:
        module.compile_layers()
    return Built(engine, optimizer, trained)


def starting_adapter(family: ModelFamily, adapter: AdapterSettings | None) -> dict[str, Tensor] | None:
    """Tensors of `init_from_existing`, by plain adapter name. `ValueError` names the key where it cannot be read."""
    if adapter is None or adapter.init_from_existing is None:
        return None
    try:
        tensors = family.load_adapter(adapter.init_from_existing)  # its own alpha is folded in
    except (ValueError, OSError) as error:
        raise ValueError(f"[adapter] init_from_existing: {error}") from error
    return lora.fold_scale(tensors, adapter.rank / adapter.alpha)


def parameter_filler(
    weights: WeightSource, adapter: Mapping[str, Tensor] | None, seed: int, device: torch.device
) -> Callable[[str, nn.Parameter], nn.Parameter]:
    """Gives a meta parameter its values on `device`: from the checkpoint, an earlier adapter, or its name's seed."""

    def values(name: str, parameter: nn.Parameter) -> Tensor:
        if not lora.is_lora(name):
            return weights.read(lora.base_name(name))
        if adapter is None:
            return lora.init_lora(name, parameter.shape, seed)
        return _from_adapter(adapter, name, parameter)

    def fill(name: str, parameter: nn.Parameter) -> nn.Parameter:
        data = values(name, parameter).to(device=device, dtype=parameter.dtype)
        # a copy: storage mapped from a file must not be written to, and pins the file
        return nn.Parameter(data.clone() if data.device.type == "cpu" else data, parameter.requires_grad)

    return fill


def _from_adapter(adapter: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> Tensor:
    plain = lora.plain_lora_name(name)
    found = adapter.get(plain)
    if found is None or found.shape != parameter.shape:
        shape = "absent" if found is None else f"of shape {list(found.shape)}"
        raise ValueError(
            f"[adapter] init_from_existing: {plain} is {shape}, and this run needs {list(parameter.shape)}; "
            "use the rank and exclude_modules that the adapter was made with"
        )
    return found
