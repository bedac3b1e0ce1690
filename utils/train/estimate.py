"""What training will hold in memory, stage by stage: counted from the model on meta, and activations by a formula."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from models.base import Activations, ModelFamily
from utils.config.load import LoadedConfig
from utils.data.buckets import bucket_table
from utils.data.clips import ClipRules, whole_length
from utils.data.records import Bucket
from utils.monitor.console import counted, short_bytes
from utils.train.build import EngineSettings, OptimizerSettings, cut_model
from utils.train.optimizers import build_optimizer, map_tensors
from utils.train.parking import tensor_bytes

PROBE = 64  # rows and columns of the matrix that an optimizer's state is measured on
# Optimizers whose step needs a GPU, so that it cannot be tried: bytes of state a trained number, two means in a byte
# each and a float32 scale for 256 of them (bitsandbytes, `optim/optimizer.py`: blocksize 256)
STATE_BYTES = {"adam8bit": 2 * (1 + 4 / 256), "adamw8bit": 2 * (1 + 4 / 256)}
ADAM_BYTES = 8  # two float32 numbers, where nothing else is known

logger = logging.getLogger(__name__)


class Held(NamedTuple):
    """Of one stage, bytes. All but the activations is certain."""

    frozen: int  # weights of the model that is on the device, in the dtypes they are kept in
    trained: int  # of all experts: those that wait keep theirs on the device
    gradients: int
    state: int  # the optimizer's
    parked: int = 0  # copies in host memory of the frozen weights of experts that take turns
    activations: int | None = None  # at the largest bucket, estimated; None: no formula
    offloaded: int = 0  # of the activations in host memory, estimated

    @property
    def certain(self) -> int:
        return self.frozen + self.trained + self.gradients + self.state

    @property
    def checkpoint(self) -> int:
        """What a checkpoint holds; and its copy in host memory while it is written, where there is room for one."""
        return self.trained + self.state

    def words(self) -> str:
        """`4.1 GiB of frozen weights, 0.6 trained ...`, then about what the activations come to."""
        parts = [
            f"{short_bytes(self.frozen)} of frozen weights",
            f"{short_bytes(self.trained)} trained",
            f"{short_bytes(self.gradients)} of gradients",
            f"{short_bytes(self.state)} of optimizer state",
        ]
        if self.activations is not None:
            parts.append(f"about {short_bytes(self.activations)} of activations")
        if self.parked or self.offloaded:
            parts.append(f"and {short_bytes(self.parked + self.offloaded)} in host memory")
        return ", ".join(parts)


class Load(NamedTuple):
    """The micro-batch that takes most."""

    bucket: Bucket
    samples: int

    def __str__(self) -> str:
        return f"micro-batches of {counted(self.samples, 'clip')} of {self.bucket}"


def largest_load(loaded: LoadedConfig, family: ModelFamily) -> Load:
    """The micro-batch with the most tokens, of all that the training set may fill: no file is looked at."""
    spec, config = family.media_spec(), loaded.run
    buckets: list[Bucket] = []
    for folder in loaded.dataset.directory:
        rules = ClipRules.of(folder, config.video_clip_mode)
        table = bucket_table(folder, spec, rules.any_length)
        frames = [*table.frames, *([whole_length(rules.max_frames, spec)] if rules.any_length else [])]
        sizes = [size for _, of_ratio in table.areas for size in of_ratio]
        buckets += [*table.fixed, *(Bucket(*size, count) for size in sizes for count in frames)]

    def tokens(bucket: Bucket) -> int:
        return family.tokens(*bucket) * samples(bucket)

    def samples(bucket: Bucket) -> int:
        return config.micro_batch_size(*bucket, family.tokens(*bucket))

    bucket = max(buckets, key=tokens)
    return Load(bucket, samples(bucket))


def estimate(family: ModelFamily, settings: EngineSettings, load: Load) -> list[Held]:
    """What each stage holds at its fullest. Raises `ValueError` where the model cannot be cut as asked.

    Left out: what single kernels take for moments, averaging over data ranks (up to 500 million numbers, when the
    activations are gone), and what torch and the driver take for themselves, 0.5 to 1 GB a GPU.
    """
    of_experts = [_stages(expert, settings, load) for expert in family.experts().values()]
    return [_together(each) for each in zip(*of_experts, strict=True)]


def _together(experts: Sequence[Held]) -> Held:
    """One stage of models that take turns: frozen weights and activations of one, and what is trained of all."""
    largest = max(experts, key=lambda each: each.frozen)
    return largest._replace(
        trained=sum(each.trained for each in experts),
        state=sum(each.state for each in experts),
        parked=sum(each.frozen for each in experts) if len(experts) > 1 else 0,
    )


def _stages(family: ModelFamily, settings: EngineSettings, load: Load) -> list[Held]:
    cut = cut_model(family, settings)
    per_number = {
        dtype: state_bytes(settings.optimizer, dtype) for dtype in {p.dtype for p in _parameters(cut.layers, True)}
    }
    adapter = settings.adapter
    kept = family.activations(*load.bucket, adapter.kind if adapter else None, adapter.rank if adapter else 0)
    stages = list(pairwise(cut.bounds))
    found = []
    for stage, (first, end) in enumerate(stages):
        layers = cut.layers[first:end]
        trained = _parameters(layers, True)
        weights = sum(map(tensor_bytes, trained))
        held = Held(
            frozen=sum(map(tensor_bytes, _parameters(layers, False))),
            trained=weights,
            gradients=weights,  # each in the dtype of its parameter
            state=round(sum(p.numel() * per_number[p.dtype] for p in trained)),
        )
        if kept is not None:
            blocks = sum(getattr(layer, "checkpointable", False) for layer in layers)
            waiting = min(len(stages) - stage, settings.micro_batches)
            held = _with_activations(held, kept, load.samples, blocks, waiting, end == len(cut.layers), settings)
        found.append(held)
    return found


def _with_activations(
    held: Held, kept: Activations, samples: int, blocks: int, waiting: int, is_last: bool, settings: EngineSettings
) -> Held:
    """A stage does `waiting` forward passes before the first backward pass (1F1B: the stages from this one to the last,
    or all micro-batches where there are fewer). Each keeps what its blocks keep and what is handed on; where blocks are
    recomputed their inputs alone, and one block in full at a time."""
    of_blocks = blocks * (kept.boundary if settings.checkpointing else kept.block)
    on_device = waiting * (of_blocks + kept.boundary)
    offloaded = waiting * of_blocks if settings.checkpointing and settings.offload_checkpoints else 0
    once = kept.head if is_last else 0
    once += kept.block if settings.checkpointing else 0
    return held._replace(activations=samples * (on_device - offloaded + once), offloaded=samples * offloaded)


def _parameters(layers: Sequence[nn.Module], trained: bool) -> list[nn.Parameter]:
    held = {id(p): p for layer in layers for p in layer.parameters()}.values()
    return [p for p in held if p.requires_grad == trained]


def state_bytes(optimizer: OptimizerSettings, dtype: torch.dtype) -> float:
    """What the optimizer remembers of each number of a trained matrix, measured after a step on a small one."""
    if (known := STATE_BYTES.get(optimizer.name.lower())) is not None:
        return known
    probe = nn.Parameter(torch.full((PROBE, PROBE), 0.5, dtype=dtype))
    probe.grad = torch.full_like(probe, 0.1)
    try:
        built = build_optimizer(
            optimizer.name,
            [("probe", probe)],
            lr=optimizer.lr,
            weight_decay=optimizer.weight_decay,
            **optimizer.arguments,
        )
        built.step()
    except RuntimeError as error:  # one that runs on GPUs alone
        logger.debug("the state of %s is not measured: %s", optimizer.name, error)
        return ADAM_BYTES
    total = 0

    def add(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor_bytes(tensor) if tensor.numel() > 1 else 0
        return tensor

    map_tensors(dict(built.state.get(probe, {})), add)
    return total / probe.numel()
