"""The part of the model that one rank holds: where to cut, what to fill, how to run its layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from utils.data.plan import counter_hash
from utils.train.parking import Parking

Boundary = tuple[Tensor, ...]

COMPILED_VERSIONS = 64  # of a layer; torch's own limit of 8 is four buckets


class StageRow(NamedTuple):
    """One stage, for people."""

    stage: int
    first_layer: int
    last_layer: int
    parameters: int
    trainable: int
    weight_bytes: int
    frozen_bytes: int  # of them, not trained


def partition(weights: Sequence[int], stages: int, may_cut: Sequence[bool] | None = None) -> list[int]:
    """First layer of each stage, and the end, so that the heaviest stage is as light as can be.

    Args:
        weights: one number a layer.
        may_cut: whether a stage may begin at this layer; all may by default.

    Raises:
        ValueError: there are fewer places to cut than stages ask for.
    """
    count = len(weights)
    total = [0]
    for weight in weights:
        total.append(total[-1] + weight)
    places = [0, *(i for i in range(1, count) if may_cut is None or may_cut[i]), count]
    if len(places) - 1 < stages:
        raise ValueError(
            f"pipeline_stages = {stages} is more than the model can be cut into: each stage needs a transformer block, "
            f"and there are {len(places) - 1}; use pipeline_stages <= {len(places) - 1}"
        )
    # best[k][j]: (heaviest stage, previous place) for the first k stages ending at places[j]
    best: list[dict[int, tuple[int, int]]] = [{0: (0, -1)}]
    for _ in range(stages):
        row: dict[int, tuple[int, int]] = {}
        for j in range(1, len(places)):
            options = [(max(w, total[places[j]] - total[places[i]]), i) for i, (w, _) in best[-1].items() if i < j]
            if options:
                row[j] = min(options)
        best.append(row)
    bounds, j = [count], len(places) - 1
    for k in range(stages, 0, -1):
        j = best[k][j][1]
        bounds.append(places[j])
    return bounds[::-1]


def choose_bounds(
    layers: Sequence[nn.Module],
    stages: int,
    method: str,
    split: Sequence[int] | None,
    trainable: Callable[[nn.Parameter], bool],
) -> list[int]:
    """First layer of each stage, and the end, by `partition_method`.

    The first and the last layer (embedding and head) stay with a block: a stage without a block would idle through
    almost the whole step. All parameters count, frozen ones too: it is memory and time that should be even.

    Raises:
        ValueError: a stage would hold no block or no trainable tensor; names the key and a split that works.
    """
    blocks = [i for i, layer in enumerate(layers) if getattr(layer, "checkpointable", False)]
    counts = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    may_cut = [blocks[0] < i <= blocks[-1] for i in range(len(layers))]
    if method == "manual":
        bounds = [0, *(split or ()), len(layers)]
        _check_manual(bounds, stages, blocks, len(layers))
    else:
        weights = counts if method == "parameters" else [1] * len(layers)
        bounds = partition(weights, stages, may_cut)
    for stage, (first, end) in enumerate(pairwise(bounds)):
        if not any(trainable(p) for layer in layers[first:end] for p in layer.parameters()):
            raise ValueError(
                f"stage {stage} (layers {first} to {end - 1}) would hold nothing to train: every stage needs a trained "
                "tensor; use fewer pipeline_stages, another partition_split, or fewer exclude_modules"
            )
    return bounds


def _check_manual(bounds: Sequence[int], stages: int, blocks: Sequence[int], count: int) -> None:
    split = list(bounds[1:-1])
    if len(split) != stages - 1 or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(
            f"partition_split = {split} must be {stages - 1} rising layer numbers between 1 and {count - 1} for "
            f"pipeline_stages = {stages}"
        )
    for stage, (first, end) in enumerate(pairwise(bounds)):
        if not any(first <= block < end for block in blocks):
            raise ValueError(
                f"partition_split = {split} leaves stage {stage} (layers {first} to {end - 1}) without a transformer "
                f"block; blocks are layers {blocks[0]} to {blocks[-1]}"
            )


class LayerRunner(NamedTuple):
    """How layers are run, whatever the model."""

    autocast: torch.dtype | None  # None: as the parameters are
    checkpointing: bool  # recompute a checkpointable layer in the backward pass
    offload: bool  # and keep its input in host memory meanwhile
    dropout_seed: int | None  # None: no layer draws random numbers

    def precision(self, device: str) -> Any:
        """What layers are run within, on a device of that type."""
        return torch.autocast(device, self.autocast) if self.autocast else nullcontext()

    def run(self, layer: nn.Module, inputs: Boundary) -> Any:
        recompute = self.checkpointing and torch.is_grad_enabled() and getattr(layer, "checkpointable", False)
        if not recompute:
            return layer(inputs)
        place = nullcontext()
        if self.offload:
            place = torch.autograd.graph.save_on_cpu(pin_memory=inputs[0].is_cuda)
        with place:
            keep_random_state = self.dropout_seed is not None
            return checkpoint(_flat, layer, *inputs, use_reentrant=False, preserve_rng_state=keep_random_state)


class StagedModule(PipelineModule):
    """This rank's layers, with parameters of their own; the others stay on meta.

    Args:
        layers: all layers of the model, parameters on meta.
        bounds: first layer of each stage, and the end.
        fill: gives a meta parameter its values, by its name in the skeleton.
        loss_fn: prediction and target to one loss a sample, [B].
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        bounds: Sequence[int],
        skeleton: nn.Module,
        fill: Callable[[str, nn.Parameter], nn.Parameter],
        runner: LayerRunner,
        loss_fn: Callable[[Tensor, Boundary], Tensor],
    ) -> None:
        self._bounds, self._fill, self._runner = list(bounds), fill, runner
        self._skeleton = [skeleton]  # in a list: the skeleton is not a part of this stage
        self.rows = stage_rows(layers, bounds)
        self.random_path: tuple[object, ...] = ()  # (step, micro-batch of the global batch), set by the engine
        super().__init__(
            layers, num_stages=len(bounds) - 1, loss_fn=loss_fn, partition_method="given", dynamic_shape=True
        )

    def _partition_layers(self, method: str = "given") -> None:
        self.parts = list(self._bounds)
        self._set_bounds(start=self.parts[self.stage_id], stop=self.parts[self.stage_id + 1])

    def _build(self) -> None:
        super()._build()
        mine = {id(p) for p in self.parameters()}
        for name, parameter in list(self._skeleton[0].named_parameters()):
            if id(parameter) in mine:
                parent, _, leaf = name.rpartition(".")
                setattr(self._skeleton[0].get_submodule(parent), leaf, self._fill(name, parameter))
        for parameter in self.parameters():
            assert not parameter.is_meta
            parameter.ds_pipe_replicated = False  # what PipelineModule._build does for the ones it saw
        del self._fill  # and with it what it reads from
        self.parking = Parking(self.parameters())

    def compile_layers(self) -> None:
        """Let torch compile each checkpointable layer in place; the first step of each shape waits for it."""
        for layer in self.forward_funcs:
            if getattr(layer, "checkpointable", False):
                # beyond the limit torch goes on uncompiled; each bucket needs a version to train and one to evaluate,
                # and with regularization sets one without the adapter
                layer.compile(dynamic=False, recompile_limit=COMPILED_VERSIONS)

    def named_local(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This stage's parameters under the skeleton's names."""
        for name, parameter in self._skeleton[0].named_parameters():
            if not parameter.is_meta:
                yield name, parameter

    def named_local_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """This stage's modules under the skeleton's names; a layer that has none there as `layer 3`."""
        mine = {id(module) for module in self.modules()} - {id(self)}
        for name, module in self._skeleton[0].named_modules():
            if id(module) in mine:
                mine.remove(id(module))
                yield name, module
        for index, layer in enumerate(self.forward_funcs, start=self._local_start):
            if id(layer) in mine:
                yield f"layer {index}", layer

    def forward(self, forward_input: Any) -> Any:
        runner, inputs = self._runner, forward_input
        with runner.precision(inputs[0].device.type):
            for index, layer in enumerate(self.forward_funcs, start=self._local_start):
                if runner.dropout_seed is not None and self.training:
                    # a layer's dropout depends on counters, not on what ran before: resume repeats it
                    torch.manual_seed(counter_hash(runner.dropout_seed, "dropout", *self.random_path, index))
                inputs = runner.run(layer, inputs)
        return inputs


def _flat(layer: nn.Module, *inputs: Tensor) -> Any:
    return layer(inputs)


def stage_rows(layers: Sequence[nn.Module], bounds: Sequence[int]) -> list[StageRow]:
    """The table of stages, from parameters on meta."""
    rows = []
    for stage, (first, end) in enumerate(pairwise(bounds)):
        parameters = [p for layer in layers[first:end] for p in layer.parameters()]
        rows.append(
            StageRow(
                stage,
                first,
                end - 1,
                sum(p.numel() for p in parameters),
                sum(p.numel() for p in parameters if p.requires_grad),
                sum(p.numel() * p.element_size() for p in parameters),
                sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
            )
        )
    return rows
