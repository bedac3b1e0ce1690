"""A family and plain settings to this rank's engine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import adapters
from models.adapter_layers import AdapterShape, add_adapter, initial_value
from models.base import ModelFamily, WeightSource
from models.fused import FusedWeights
from models.quantised import FLOAT8
from models.targets import excluding
from utils.train.engine import ReelEngine
from utils.train.fuse import Fusion, check_fusions, load_fusions
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
    init_from_existing: Path | Mapping[str, Path] | None = None  # one path, or one an expert
    kind: str = "lora"  # one of `models.adapters.KINDS`
    factor: int = -1  # of a LoKr, see `AdapterShape`
    decompose_both: bool = False

    @property
    def shape(self) -> AdapterShape:
        return AdapterShape(self.rank, self.alpha, self.dropout, self.factor, self.decompose_both)


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
    fuse: tuple[Fusion, ...] = ()  # merged into the base before anything else
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
    base: Callable[[], WeightSource] | None = None  # opens what was trained on, where that decides what is saved


def prepare_skeleton(family: ModelFamily, adapter: AdapterSettings | None) -> nn.Module:
    """The whole model on meta, with its adapter, dtypes and `requires_grad` as they will be.

    Raises:
        ValueError: all weights are to be trained, and some are kept in float8.
    """
    skeleton = family.build_skeleton()
    if adapter is None:
        _refuse_float8(skeleton)
        skeleton.requires_grad_(True)
    else:
        skeleton.requires_grad_(False)
        targets = family.lora_targets(skeleton, adapter.exclude_modules)
        add_adapter(skeleton, targets, adapter.kind, adapter.shape)
    for name, parameter in skeleton.named_parameters():
        parameter.requires_grad_(adapter is None or adapters.is_adapter(name))
        parameter.data = parameter.data.to(_dtype(family, adapter, name))
    return skeleton


def _refuse_float8(skeleton: nn.Module) -> None:
    low = [name for name, parameter in skeleton.named_parameters() if parameter.dtype in FLOAT8]
    if low:
        raise ValueError(
            f"[model] the checkpoint has {len(low)} weights in float8, first {low[0]}, and without [adapter] all "
            "weights are trained; set transformer_dtype = 'bfloat16' to expand them, or add [adapter]"
        )


def _dtype(family: ModelFamily, adapter: AdapterSettings | None, name: str) -> torch.dtype:
    if adapter is None or not adapters.is_adapter(name):
        return family.storage_dtype(adapters.base_name(name))
    return torch.float32 if adapters.needs_float32(name) else adapter.dtype


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
    loaded = load_fusions(family, settings.fuse)
    check_fusions(cut.skeleton, loaded)
    found = starting_adapter(family, settings.adapter, FusedWeights(family.open_weights(), loaded))
    if found is not None:
        assert settings.adapter is not None, "nothing else has a start"
        _check_start(cut.skeleton, found, settings.adapter)
    return cut


def _check_start(skeleton: nn.Module, found: Mapping[str, Tensor], adapter: AdapterSettings) -> None:
    """Whether the tensors of `init_from_existing` are those that are trained; one message for all that is missing."""
    where = f"[adapter] init_from_existing: '{adapter.init_from_existing}'"
    wanted = {adapters.plain_name(n): p for n, p in skeleton.named_parameters() if adapters.is_adapter(n)}
    modules = list(dict.fromkeys(split[0] for name in wanted if (split := adapters.split_name(name))))
    absent = [module for module in modules if module not in adapters.by_module(found)]
    if absent:
        entries = excluding(absent, modules)
        mend = f"set exclude_modules = {[*adapter.exclude_modules, *entries]}" if entries else _made_with(found)
        raise ValueError(f"{where} has nothing for {len(absent)} modules of this run, first {absent[0]}; {mend}")
    for name, parameter in wanted.items():
        if fault := _misfit(found, name, parameter):
            raise ValueError(f"{where}: {fault}")
    if unused := sorted(set(found) - set(wanted)):
        raise ValueError(
            f"{where}: {len(unused)} of its tensors would be dropped, first {unused[0]}; use the exclude_modules that "
            "the adapter was made with"
        )


def build_engine(family: ModelFamily, settings: EngineSettings, device: torch.device) -> Built:
    """Cut the model, read this rank's share of the weights, and wrap it for DeepSpeed.

    Raises:
        ValueError: the cut or the weights do not fit; says which key or file.
    """
    skeleton, layers, bounds = cut_model(family, settings)
    runner = runner_of(family, settings)
    weights = fused_weights(family, settings)
    start = starting_adapter(family, settings.adapter, weights)
    fill = parameter_filler(skeleton, weights, start, settings.seed, device)
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
    return Built(engine, optimizer, trained, base_of(family, settings))


def runner_of(family: ModelFamily, settings: EngineSettings) -> LayerRunner:
    """How the family's layers are run."""
    has_dropout = settings.adapter is not None and settings.adapter.dropout > 0
    return LayerRunner(
        autocast=None if family.compute_dtype == torch.float32 else family.compute_dtype,
        checkpointing=settings.checkpointing,
        offload=settings.offload_checkpoints,
        dropout_seed=settings.seed if has_dropout else None,
    )


def base_of(family: ModelFamily, settings: EngineSettings) -> Callable[[], WeightSource] | None:
    """Opens the weights that an adapter is trained on, where these are not the checkpoint's and its kind counts from
    them."""
    if settings.adapter is None or settings.adapter.kind != "dora" or not settings.fuse:
        return None
    return lambda: fused_weights(family, settings)


def fused_weights(family: ModelFamily, settings: EngineSettings) -> FusedWeights:
    """What is trained on: the checkpoint, with `fuse_adapters` added."""
    return FusedWeights(family.open_weights(), load_fusions(family, settings.fuse))


def starting_adapter(
    family: ModelFamily, adapter: AdapterSettings | None, weights: WeightSource
) -> dict[str, Tensor] | None:
    """Tensors of `init_from_existing`, by plain adapter name. `ValueError` names the key where it cannot be read or is
    of another kind."""
    if adapter is None or adapter.init_from_existing is None:
        return None
    try:
        tensors = family.load_adapter(adapter.init_from_existing, weights)  # its own alpha is folded in
        kinds = adapters.kinds_in(tensors)
    except (ValueError, OSError) as error:
        raise ValueError(f"[adapter] init_from_existing: {error}") from error
    if kinds != {adapter.kind}:
        found = " and ".join(sorted(kinds))
        raise ValueError(
            f"[adapter] init_from_existing: '{adapter.init_from_existing}' is of type '{found}', and this run trains "
            f"type = '{adapter.kind}'; " + (f"set type = '{found}'" if len(kinds) == 1 else "use another file")
        )
    return adapters.fold_scale(tensors, adapter.rank / adapter.alpha)


def parameter_filler(
    skeleton: nn.Module,
    weights: WeightSource,
    adapter: Mapping[str, Tensor] | None,
    seed: int,
    device: torch.device,
) -> Callable[[str, nn.Parameter], nn.Parameter]:
    """Gives a meta parameter of `skeleton` its values on `device`: from the checkpoint, an earlier adapter, or what it
    starts with, which for some is made from what was filled before."""

    def values(name: str, parameter: nn.Parameter) -> Tensor:
        if not adapters.is_adapter(name):
            return weights.read(adapters.base_name(name))
        if adapter is None:
            return initial_value(skeleton, name, parameter.shape, seed)
        return _from_adapter(adapter, name, parameter)

    def fill(name: str, parameter: nn.Parameter) -> nn.Parameter:
        data = values(name, parameter).to(device=device, dtype=parameter.dtype)
        # a copy: storage mapped from a file must not be written to, and pins the file
        return nn.Parameter(data.clone() if data.device.type == "cpu" else data, parameter.requires_grad)

    return fill


def _from_adapter(adapter: Mapping[str, Tensor], name: str, parameter: nn.Parameter) -> Tensor:
    plain = adapters.plain_name(name)
    fault = _misfit(adapter, plain, parameter)
    assert fault is None, f"check_settings lets no such adapter through: {fault}"
    return adapter[plain]


def _misfit(adapter: Mapping[str, Tensor], plain: str, parameter: nn.Parameter) -> str | None:
    found = adapter.get(plain)
    if found is not None and found.shape == parameter.shape:
        return None
    shape = "absent" if found is None else f"of shape {list(found.shape)}"
    return f"{plain} is {shape}, and this run needs {list(parameter.shape)}; {_made_with(adapter, plain)}"


def _made_with(adapter: Mapping[str, Tensor], plain: str = "") -> str:
    """The settings that decide the shapes, with the rank where the file shows it."""
    module = plain.removesuffix((adapters.split_name(plain) or ("", ""))[1])
    modules = adapters.by_module(adapter)
    rank = adapters.rank_of(modules.get(module) or next(iter(modules.values())))
    keys = [f"rank = {rank}" if rank else "rank", "exclude_modules"]
    if any(".lokr_" in name for name in adapter):
        keys += ["factor", "decompose_both"]
    return f"use what the adapter was made with: {', '.join(keys[:-1])} and {keys[-1]}"
