"""One block of the model with made-up weights, run forward and backward on this device before anything is loaded."""

import logging
from dataclasses import replace
from itertools import count

import torch
from torch import nn

from models.base import Draw, ModelFamily
from models.flow_match import seeded_noise
from utils import dist
from utils.train.build import EngineSettings, prepare_skeleton, runner_of
from utils.train.memory import is_out_of_memory

MOST_RANK = 16  # of an adapter on a block that is a few hundred numbers wide
SCALE = 0.05  # of made-up weights: nothing grows, whatever the dtype

logger = logging.getLogger(__name__)


def trial(family: ModelFamily, settings: EngineSettings) -> list[str] | None:
    """What is wrong with the model's own layers, dtypes, attention, adapter and recomputation on this device.

    A call that runs in float16 may still overflow; that shows in training, step by step.

    Returns:
        Messages, none where all is well; None where the family knows no sample without a clip.
    """
    small = family.trial()
    spec = small.media_spec()
    sample = small.blank_sample(2 * spec.pixel_multiple, 2 * spec.pixel_multiple, spec.frame_stride + 1)
    if sample is None:
        return None
    settings = _as_trained(settings)
    wrong = _wrong(small, settings, sample)
    if wrong is None:
        return []
    what, (trouble, mend) = f"[model] dtype = {_name(family.compute_dtype)}", wrong
    adapter = settings.adapter
    if adapter is not None and adapter.dtype != torch.float32:
        usual = replace(settings, adapter=replace(adapter, dtype=torch.float32))
        if _wrong(small, usual, sample) is None:
            what = f"[adapter] dtype = {_name(adapter.dtype)} with {what}"
            mend = "set [adapter] dtype = 'float32'"
    return [f"{what}: a block of {family.title} {trouble}; {mend}"]


def _name(dtype: torch.dtype) -> str:
    return repr(str(dtype).removeprefix("torch."))


def _wrong(family: ModelFamily, settings: EngineSettings, sample: dict[str, torch.Tensor]) -> tuple[str, str] | None:
    """What a block does that it should not, and the mend."""
    device = dist.device_name()
    try:
        bad = _run(family, settings, sample)
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        logger.debug("the trial of a block", exc_info=True)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        mend = "choose another dtype, or install a torch that is built for this device"
        if is_out_of_memory(error):
            mend = "end what else runs there"
        return f"does not run on {device} ({reason})", mend
    return (f"gives no finite numbers on {device}, first in {bad[0]}", "choose another dtype") if bad else None


def _as_trained(settings: EngineSettings) -> EngineSettings:
    """Without what a small model has no place for, and without random numbers."""
    if settings.adapter is None:
        return settings
    rank = min(settings.adapter.rank, MOST_RANK)
    adapter = replace(settings.adapter, rank=rank, dropout=0.0, exclude_modules=(), init_from_existing=None)
    return replace(settings, adapter=adapter)


def _run(family: ModelFamily, settings: EngineSettings, sample: dict[str, torch.Tensor]) -> list[str]:
    """Forward, loss and backward. Names of trained tensors whose gradients are absent or not finite."""
    device, runner = dist.device(), runner_of(family, settings)
    skeleton = prepare_skeleton(family, settings.adapter)
    _fill(skeleton, device)
    batch = family.micro_batch([sample], [Draw(0.5, 0)])
    passed = tuple(tensor.to(device) for tensor in batch.inputs)
    with runner.precision(device.type):
        for layer in family.pipeline_layers(skeleton):
            passed = runner.run(layer, passed)
    family.loss(passed, tuple(tensor.to(device) for tensor in batch.target)).mean().backward()
    trained = {name: p.grad for name, p in skeleton.named_parameters() if p.requires_grad}
    return [name for name, grad in trained.items() if grad is None or not grad.isfinite().all()]


def _fill(skeleton: nn.Module, device: torch.device) -> None:
    """Numbers for every parameter on meta, in its dtype."""
    seeds = count()
    for name, parameter in list(skeleton.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            values = (SCALE * seeded_noise(tuple(parameter.shape), next(seeds))).to(device, parameter.dtype)
            setattr(skeleton.get_submodule(owner), leaf, nn.Parameter(values, parameter.requires_grad))
