"""The memory that is estimated before a start, against what really is there: tensors kept, states, parameters."""

import gc
import weakref

import pytest
import torch

from models import adapters
from models.base import Draw
from tests.helpers.models import VARIANTS, materialise, wan_family, wan_variant
from tests.helpers.toy import ToyFamily
from utils.data.records import Bucket
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, prepare_skeleton, runner_of
from utils.train.estimate import STATE_BYTES, Load, estimate, state_bytes
from utils.train.optimizers import OPTIMIZERS

BUCKET = Bucket(256, 320, 9)  # 960 tokens, or 240 with TI2V-5B's stride: more than the 512 rows of text, or fewer
ADAMW = OptimizerSettings("adamw", 1e-4)


def settings(kind: str | None = "lora", rank: int = 4, **others) -> EngineSettings:
    adapter = AdapterSettings(rank, rank, kind=kind) if kind else None
    return EngineSettings(**{"stages": 1, "micro_batches": 1, "optimizer": ADAMW, "adapter": adapter, **others})


class Step:
    """A forward pass as training makes it, and what of it is there until the backward pass."""

    def __init__(self, family, chosen: EngineSettings, samples: int = 2) -> None:
        skeleton = materialise(prepare_skeleton(family, chosen.adapter), family)
        for name, parameter in skeleton.named_parameters():
            parameter.requires_grad_(chosen.adapter is None or adapters.is_adapter(name))
        self.weights = {p.untyped_storage().data_ptr() for p in skeleton.parameters()}
        self.layers, self.runner = family.pipeline_layers(skeleton), runner_of(family, chosen)
        draws = [Draw((i + 0.5) / samples, i) for i in range(samples)]
        self.inputs = family.micro_batch([family.blank_sample(*BUCKET)] * samples, draws).inputs

    def kept_by_layer(self) -> list[int]:
        """Bytes that each layer saves for its backward pass, each storage once; left out are weights, and the rotary
        tables, which all blocks share."""
        found, passed = [], self.inputs
        for layer in self.layers:
            storages: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor, storages=storages) -> torch.Tensor:
                storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), self.runner.precision("cpu"):
                passed = self.runner.run(layer, passed)
            tables = (table for pair in self.layers[1]._rotary._tables.values() for table in pair)
            shared = self.weights | {table.untyped_storage().data_ptr() for table in tables}
            mine = (tensor for place, tensor in storages.items() if place not in shared)
            found.append(sum(tensor.untyped_storage().nbytes() for tensor in mine))
        return found

    def inputs_alive(self) -> int:
        """Bytes of the first tensor that goes into each block and is still there after the whole forward pass."""
        seen, passed = [], self.inputs
        with self.runner.precision("cpu"):
            for layer in self.layers:
                if getattr(layer, "checkpointable", False):
                    seen.append(weakref.ref(passed[0].untyped_storage()))
                    size = passed[0].untyped_storage().nbytes()
                passed = self.runner.run(layer, passed)
        gc.collect()
        return size * sum(ref() is not None for ref in seen)


@pytest.mark.parametrize("kind", [None, *adapters.KINDS])
@pytest.mark.parametrize(("name", "dtype"), [("wan_t2v", "float32"), *((name, "bfloat16") for name in VARIANTS)])
def test_a_block_keeps_what_the_formula_says(name, dtype, kind):
    """The first block of a stage keeps less: nothing before it is trained. So the second counts."""
    family = wan_variant(name, dtype=dtype)
    for rank in (2, 4) if kind == "lokr" else (4,):
        measured = Step(family, settings(kind, rank)).kept_by_layer()
        told = family.activations(*BUCKET, kind, rank)
        assert 2 * told.block == pytest.approx(measured[2], rel=0.1 if kind == "lokr" else 0.04)
        assert 2 * told.head == pytest.approx(measured[-1], rel=0.1)


def test_a_block_that_is_recomputed_keeps_its_input_alone():
    family = wan_family(dtype="bfloat16")
    step = Step(family, settings(checkpointing=True))
    told = family.activations(*BUCKET, "lora", 4)
    assert step.inputs_alive() == 3 * 2 * told.boundary
    text = 2 * 512 * 48 * 2  # one for all blocks
    assert step.kept_by_layer()[2] - text == pytest.approx(2 * told.boundary, rel=0.02)
    assert told.boundary == family.tokens(*BUCKET) * 48 * 2


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_an_optimizer_is_measured(name, dtype):
    size = dtype.itemsize
    kahan = size * (size < 4)  # the rounding error of weights of few bits
    wanted = {
        "adamw": 2 * size,
        "adamw_optimi": 2 * size + kahan,
        "stableadamw": 2 * size + kahan,
        "adam8bit": 2.03125,
        "adamw8bit": 2.03125,
        "sgd": 0,
        "lion": size,
        "prodigy": 4 * size,
    }
    assert state_bytes(OptimizerSettings(name, 1e-4), dtype) == pytest.approx(wanted[name])
    assert set(STATE_BYTES) < set(OPTIMIZERS)


def test_its_arguments_count_and_factored_states_are_small():
    assert state_bytes(OptimizerSettings("sgd", 1e-4, arguments={"momentum": 0.9}), torch.float32) == 4
    assert state_bytes(OptimizerSettings("adamw", 1e-4, arguments={"amsgrad": True}), torch.float32) == 12
    assert state_bytes(OptimizerSettings("adafactor", 1e-4), torch.float32) < 5


def test_stages_hold_their_share_and_the_first_ones_more_micro_batches():
    family = wan_family(dtype="bfloat16")
    told = family.activations(*BUCKET, "lora", 4)
    whole = estimate(family, settings(), Load(BUCKET, 2))[0]
    assert whole.activations == 2 * (3 * told.block + told.boundary + told.head)
    first, last = estimate(family, settings(stages=2, micro_batches=8), Load(BUCKET, 2))
    assert first.frozen + last.frozen == whole.frozen
    assert first.trained + last.trained == whole.trained == whole.gradients == whole.state // 2
    blocks = round(3 * first.trained / whole.trained)
    assert first.activations == 2 * 2 * (blocks * told.block + told.boundary), "two micro-batches before it goes back"
    assert last.activations == 2 * ((3 - blocks) * told.block + told.boundary + told.head)
    alone = estimate(family, settings(stages=2, micro_batches=1), Load(BUCKET, 2))[0]
    assert 2 * alone.activations == first.activations


def test_recomputation_and_host_memory_are_known():
    family = wan_family(dtype="bfloat16")
    told = family.activations(*BUCKET, "lora", 4)
    (recomputed,) = estimate(family, settings(checkpointing=True), Load(BUCKET, 1))
    assert recomputed.activations == 4 * told.boundary + told.block + told.head
    (offloaded,) = estimate(family, settings(checkpointing=True, offload_checkpoints=True), Load(BUCKET, 1))
    assert offloaded.offloaded == 3 * told.boundary
    assert offloaded.activations == recomputed.activations - offloaded.offloaded


def test_weights_are_counted_as_they_are_kept():
    """float8 halves the Linears of the blocks, a full fine-tune trains all, bfloat16 states are half as large."""
    load = Load(BUCKET, 1)
    (lora,), (low,), (full,) = (
        estimate(wan_family(dtype="bfloat16", **model), settings(kind), load)
        for model, kind in (({}, "lora"), ({"transformer_dtype": "float8"}, "lora"), ({}, None))
    )
    assert low.frozen < 0.75 * lora.frozen and low.trained == lora.trained
    assert full.frozen == 0 and full.trained == lora.frozen
    assert full.checkpoint == full.trained + full.state


def test_models_that_take_turns_share_the_device():
    class Pair(ToyFamily):
        def experts(self):
            return {"high": ToyFamily(), "low": ToyFamily()}

    (one,), (two,) = (estimate(family, settings(), Load(BUCKET, 1)) for family in (ToyFamily(), Pair()))
    assert (two.frozen, two.trained, two.state) == (one.frozen, 2 * one.trained, 2 * one.state)
    assert (one.parked, two.parked) == (0, 2 * one.frozen)
    assert one.activations is None, "the toy has no formula"
    assert "in host memory" in two.words() and "activations" not in two.words()
