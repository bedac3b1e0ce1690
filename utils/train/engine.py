"""DeepSpeed's pipeline engine with the instructions that move tensors, run layers and step rewritten.

DeepSpeed keeps the schedule (1F1B), the process grid and the data-parallel reduction. What is overridden, and why
(figures measured with 0.19.8):

- Sending: a header carries dtype, shape and whether a gradient comes back, so a frozen embedding's outputs cost no
  return trip and integers may cross. Upstream wants a gradient of every float and shares one receive buffer, by
  position, between activations and gradients whatever their dtype, which deadlocks from three stages on.
- Backward: one pass over all outputs. Upstream makes one pass an output and keeps the graph in between.
- Scale: the loss is divided by the micro-batches once, on the last stage.
- Clipping: the norm is taken over all stages. Upstream's counts stage 0 only.
- Loss and norm reach all ranks in one message before the optimizer steps: what is not finite changes nothing.
- The start-up broadcast is left out: all ranks read the same files, and new weights are seeded by name.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import TRAIN_BATCH_TIMER, PipelineEngine
from torch import Tensor

from models.adapter_layers import without_adapters
from models.base import MicroBatch
from utils import dist as ours
from utils.dist_library import clear_lock
from utils.dist_meeting import MEETING_S, Say, met, silent
from utils.train.activity import NOBODY, Activity
from utils.train.forward_pass import ForwardPass, Question
from utils.train.nonfinite import not_finite
from utils.train.stages import StagedModule

HEADER_NUMBERS = 128  # int64 numbers of a header; a tensor takes 3 and its dimensions

# instruction -> what it is to people, and the stage that it waits for, counted from this one
NOTES: dict[type, tuple[str, int | None]] = {
    schedule.LoadMicroBatch: ("reading the data", None),
    schedule.ForwardPass: ("forward", None),
    schedule.BackwardPass: ("backward", None),
    schedule.SendActivation: ("sending activations", None),
    schedule.RecvActivation: ("activations", -1),
    schedule.SendGrad: ("sending gradients", None),
    schedule.RecvGrad: ("gradients", +1),
}


class Probe(schedule.TrainSchedule):
    """A training step that ends before gradients are averaged."""

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        for instructions in super().steps():
            yield [each for each in instructions if type(each) not in AFTER_BACKWARD]


def _with_weights(batch: MicroBatch) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a pass with gradients reads: DeepSpeed knows of inputs and labels only."""
    return batch.inputs, (*batch.target, batch.weights)


AFTER_BACKWARD = (schedule.ReduceTiedGrads, schedule.ReduceGrads, schedule.OptimizerStep)


def _noted(instruction: type, execute: Callable[..., None]) -> Callable[..., None]:
    """`execute`, after the watchdog was told of it."""

    def noted(engine: "ReelEngine", *arguments: Any, **named: Any) -> None:
        engine._note(instruction)
        execute(engine, *arguments, **named)

    return noted


class TensorHeader(NamedTuple):
    """What the next stage must know before it can receive a tensor."""

    dtype: torch.dtype
    wants_gradient: bool
    shape: tuple[int, ...]


def pack_headers(tensors: Sequence[Tensor]) -> Tensor:
    """Headers of a tuple of tensors as int64 [HEADER_NUMBERS], on the CPU."""
    numbers = [len(tensors)]
    for tensor in tensors:
        numbers += [PipelineEngine.DTYPE_TO_ID[tensor.dtype], int(tensor.requires_grad), tensor.ndim, *tensor.shape]
    assert len(numbers) <= HEADER_NUMBERS, f"a stage boundary of {len(tensors)} tensors does not fit its header"
    return torch.tensor(numbers + [0] * (HEADER_NUMBERS - len(numbers)))


def unpack_headers(packed: Tensor) -> list[TensorHeader]:
    """The inverse of `pack_headers`."""
    numbers = iter(packed.tolist())
    headers = []
    for _ in range(next(numbers)):
        dtype, wants_gradient, ndim = next(numbers), next(numbers), next(numbers)
        shape = tuple(next(numbers) for _ in range(ndim))
        headers.append(TensorHeader(PipelineEngine.ID_TO_DTYPE[dtype], bool(wants_gradient), shape))
    return headers


class ReelEngine(PipelineEngine):
    """One rank of the pipeline. `train_batch` is DeepSpeed's; `evaluate_batches` returns losses sample by sample.

    Args:
        module: this rank's stage.
        optimizer: over this stage's trainable parameters.
        micro_batches: gradient accumulation steps.
        gradient_clipping: largest norm of the whole model's gradient; 0 leaves it alone.
        reduce_dtype: what gradients are averaged in over data ranks.
    """

    def __init__(
        self,
        module: StagedModule,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batches: int,
        gradient_clipping: float,
        reduce_dtype: str = "fp32",
    ) -> None:
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # sizes differ by bucket and are ours to know
            "gradient_accumulation_steps": micro_batches,
            "communication_data_type": reduce_dtype,
            "steps_per_print": None,
        }
        mpu = module.mpu()
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=mpu,
            config=settings,
            config_class=DeepSpeedConfig(settings, mpu),
        )
        self.max_norm = gradient_clipping
        self.grad_norm = self.mean_loss = 0.0  # of the last step
        self.refused = False  # whether its loss or norm was not finite, so that nothing was changed by it
        self.bad_gradients: list[str] = []  # then those of this stage, in the skeleton's order
        self.bytes_sent = 0  # payload sent to other stages, for the benchmark
        self._number = 0  # of the next micro-batch among those of the whole step: dropout then knows no data ranks
        self.step_index = 0  # set by the loop; dropout counts from it
        self.activity = Activity()  # replaced by the run's
        self._collect = self._losses  # what a pass without gradients keeps of each micro-batch
        self._asking: tuple[Question | None, int] = (None, 0)  # in it, and at how many micro-batches
        self._sends: list[tuple[Any, Tensor]] = []

    @property
    def data_rank(self) -> int:
        return self.grid.get_data_parallel_id()

    def train_step(self, batches: Iterator[MicroBatch] | None) -> float:
        """One optimizer step; the mean of weight times loss over the global batch, on every rank.

        Where that or the gradient's norm is not finite, `refused` is set, on all ranks alike, and neither weights nor
        the optimizer's state have changed.
        """
        self._number = self.data_rank
        loss = self.train_batch(None if batches is None else map(_with_weights, batches))
        self.timers(TRAIN_BATCH_TIMER).reset()  # nobody reads it, and it keeps two CUDA events a step
        self._finish_sends()
        return float(loss)

    def evaluate_batches(
        self, batches: Iterator[MicroBatch] | None, count: int, question: Question | None = None, common: int = 0
    ) -> list[Tensor] | None:
        """Losses [B] of `count` micro-batches, on the last stage (elsewhere an empty list). Shapes may differ. None, on
        all ranks, where `question` had it left before the end.

        All ranks call this, those whose `count` is 0 too. No sample is weighted.

        Args:
            common: micro-batches that every data rank has.
        """
        self._asking = question, common
        losses = self._forward_only(batches, count, self._losses)
        self._asking = None, 0
        return None if self._pass.was_left else losses

    def predict_base(self, batches: Iterator[MicroBatch] | None, count: int) -> list[Tensor]:
        """What the model without its adapter predicts for `count` micro-batches; else as `evaluate_batches`."""
        with without_adapters(self.module):
            return self._forward_only(batches, count, lambda prediction, _: prediction)

    def _forward_only(
        self, batches: Iterator[MicroBatch] | None, count: int, collect: Callable[[Tensor, tuple[Tensor, ...]], Tensor]
    ) -> list[Tensor]:
        """What `collect` makes of prediction and target of each micro-batch, on the last stage. No dropout."""
        self._collect = collect
        self.activity.note("the others to begin this pass", None)
        try:
            with torch.no_grad():
                kept = self.eval_batch(batches, reduce_output=None, bcast_loss=False, num_micro_batches=count)
        finally:
            self.module.train()
        self._finish_sends()
        return list(kept or [])

    def _losses(self, prediction: Tensor, target: tuple[Tensor, ...]) -> Tensor:
        return self.module.loss_fn(prediction, target)

    def _inference_schedule(self, micro_batches: int) -> ForwardPass:
        """DeepSpeed asks for it in `eval_batch`."""
        self._pass = ForwardPass(micro_batches, self.num_stages, self.stage_id, self.activity, *self._asking)
        return self._pass

    def probe(self, batch: MicroBatch | None, step: int, number: int) -> float | None:
        """Forward and backward of one micro-batch as it was in a step, and no step: its gradients, averaged with none,
        lie in the parameters afterwards. Its loss on the last stage.

        Args:
            batch: on the first and the last stage.
            number: of the micro-batch in the step, counted over all data ranks.
        """
        self.zero_grad()
        self.module.train()
        self.total_loss, self._compute_loss = None, True
        self.step_index, self._number = step, number
        self.set_dataiterator(batch and map(_with_weights, iter([batch])))
        self._exec_schedule(Probe(micro_batches=1, stages=self.num_stages, stage_id=self.stage_id))
        self._finish_sends()
        return None if self.total_loss is None else float(self.total_loss)

    def _note(self, instruction: type) -> None:
        """Let the watchdog know what comes now."""
        if instruction not in NOTES:
            self.activity.note("the optimizer step", None)
            return
        what, offset = NOTES[instruction]
        peers = NOBODY if offset is None else (self.grid.stage_to_global(stage_id=self.stage_id + offset),)
        self.activity.note_next(what, peers)

    def _aggregate_total_loss(self) -> Tensor:
        return torch.tensor(self.mean_loss)  # known to all since the optimizer step

    # --- instructions -------------------------------------------------------------------------------------------

    def _exec_forward_pass(self, buffer_id: int) -> None:
        self.module.random_path = (self.step_index, self._number)
        self._number += self.grid.get_data_parallel_world_size()
        outputs = self.module(self.pipe_buffers["inputs"][buffer_id])
        if not self.is_last_stage():
            self.pipe_buffers["outputs"][buffer_id] = outputs
            return
        labels = self.pipe_buffers["labels"][buffer_id]
        if not self.module.training:
            self.fwd_outputs.append(self._collect(outputs, labels).detach())
            self.total_loss = torch.zeros((), device=self.device)
            return
        *target, weights = labels
        self.loss = (self.module.loss_fn(outputs, tuple(target)) * weights).mean()
        self.fwd_outputs.append(self.loss.detach())
        self.total_loss = self.loss.detach() + (0 if self.total_loss is None else self.total_loss)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        if self.is_last_stage():
            (self.loss / self.micro_batches).backward()
            self.loss = self.loss.detach()
            return
        outputs = [t for t in self.pipe_buffers["outputs"][buffer_id] if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, self.grad_layer)
        self.pipe_buffers["outputs"][buffer_id] = None
        self.grad_layer = None

    def _exec_send_activations(self, buffer_id: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        if not self.module.training:
            # no gradient comes back to slow this stage down, and what the next has yet to take would fill its memory
            self._finish_sends(keep=len(outputs) + 1)
        # On the host, through gloo: its sender runs ahead of the device, so the receiver learns shapes without a stall.
        # Every micro-batch has its own, as captions differ in length.
        self._send(pack_headers(outputs), self.next_stage)
        for tensor in outputs:
            self._send(tensor.detach(), self.next_stage)
        if not self.module.training:
            self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_recv_activations(self, buffer_id: int) -> None:
        packed = torch.empty(HEADER_NUMBERS, dtype=torch.int64)
        p2p.recv(packed, self.prev_stage)
        received = []
        for header in unpack_headers(packed):
            tensor = torch.empty(header.shape, dtype=header.dtype, device=self.device)
            p2p.recv(tensor, self.prev_stage)
            received.append(tensor.requires_grad_(header.wants_gradient and self.module.training))
        self.pipe_buffers["inputs"][buffer_id] = tuple(received)

    def _exec_send_grads(self, buffer_id: int) -> None:
        for tensor in self.pipe_buffers["inputs"][buffer_id]:
            if tensor.requires_grad:
                self._send(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad, self.prev_stage)
        self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        outputs = [t for t in self.pipe_buffers["outputs"][buffer_id] if t.requires_grad]
        self.grad_layer = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in outputs]
        for gradient in self.grad_layer:
            p2p.recv(gradient, self.next_stage)

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        self.grad_norm, self.mean_loss = self._whole_norm_and_loss(gradients)
        # NaN and infinity survive any sum, so a bad value on one stage or rank shows in those of all
        self.refused = not (math.isfinite(self.grad_norm) and math.isfinite(self.mean_loss))
        if self.refused:
            self.bad_gradients = not_finite({n: p.grad for n, p in self.module.named_local() if p.grad is not None})
            self.zero_grad()
            return
        if self.max_norm and self.grad_norm > self.max_norm:
            # grad_norm + 1e-6 as torch.nn.utils.clip_grad_norm_ has it
            torch._foreach_mul_(gradients, self.max_norm / (self.grad_norm + 1e-6))
        super()._exec_optimizer_step(lr_kwargs)

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        instruction: _noted(instruction, execute)
        for instruction, execute in {
            **PipelineEngine._INSTRUCTION_MAP,
            schedule.OptimizerStep: _exec_optimizer_step,
            schedule.ForwardPass: _exec_forward_pass,
            schedule.BackwardPass: _exec_backward_pass,
            schedule.SendActivation: _exec_send_activations,
            schedule.RecvActivation: _exec_recv_activations,
            schedule.SendGrad: _exec_send_grads,
            schedule.RecvGrad: _exec_recv_grads,
        }.items()
    }

    # --- parts --------------------------------------------------------------------------------------------------

    def _broadcast_model(self) -> None:
        """Nothing to do: see the top of this file."""

    def _whole_norm_and_loss(self, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Norm of the gradient over all stages, and the mean loss; equal on all ranks, as gradients are averaged."""
        told = torch.zeros(2, dtype=torch.float64, device=self.device)  # the norm's square, the loss
        if gradients:  # all in a few kernels: an adapter has hundreds of small ones
            norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
            told[0] = torch.stack(norms).double().square().sum()
        if self.is_last_stage():
            loss = self.total_loss / self.micro_batches
            if self.is_data_parallel:
                comm.all_reduce(loss, group=self.grid.get_data_parallel_group())
                loss /= self.dp_world_size
            told[1] = loss
        comm.all_reduce(told, group=self.grid.get_pipe_parallel_group())
        square, loss = told.tolist()
        return math.sqrt(square), loss

    def _send(self, tensor: Tensor, stage: int) -> None:
        """Start sending; the receiver may be busy, and this rank has work to do meanwhile."""
        tensor = tensor.contiguous()
        self.bytes_sent += tensor.numel() * tensor.element_size()
        self._sends = [(work, kept) for work, kept in self._sends if not work.is_completed()]
        self._sends.append((comm.isend(tensor, self.grid.stage_to_global(stage_id=stage)), tensor))

    def _finish_sends(self, keep: int = 0) -> None:
        """Wait for all sends but the last `keep`."""
        count = max(len(self._sends) - keep, 0)
        if count:
            self.activity.note("the others to take what was sent", None)
        for work, _ in self._sends[:count]:
            work.wait()
        self._sends = self._sends[count:]


def init_distributed(say: Say = silent, patience_s: float = MEETING_S) -> None:
    """Join the process group that the launcher described; without a launcher this process is all of it.

    Args:
        say, patience_s: as of `met`.

    Raises:
        ValueError: as `claim_device` and `met`.
    """
    ours.claim_device()
    settings: dict[str, Any] = {"dist_backend": ours.backend(), "timeout": ours.COLLECTIVE_TIMEOUT}
    settings |= {"auto_mpi_discovery": False, "verbose": False}
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed reads them here and there
        deepspeed.init_distributed(**settings, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
        return
    if not ours.on_gpu() and ours.local_rank() == 0:
        clear_lock(say)
    with nullcontext() if torch.distributed.is_initialized() else met(say, patience_s):
        deepspeed.init_distributed(**settings)
