"""A block with made-up weights: what runs here passes, and what does not is named before anything is loaded."""

import shutil

import pytest
import torch
from torch import nn

from models import adapters
from tests.helpers.models import TRANSFORMER_FILE, VARIANTS, WAN_T2V, native_tensors, wan_family, wan_variant
from tests.helpers.quantised import write_scaled
from tests.helpers.toy import ToyFamily
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings
from utils.train.trial import trial


def settings(kind: str | None = "lora", **others) -> EngineSettings:
    adapter = AdapterSettings(64, 64.0, dropout=0.1, exclude_modules=("blocks.2",), kind=kind) if kind else None
    optimizer = OptimizerSettings("adamw", 1e-4)
    return EngineSettings(**{"stages": 1, "micro_batches": 1, "optimizer": optimizer, "adapter": adapter, **others})


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variant_runs_and_draws_no_random_number(name, dtype):
    before = torch.get_rng_state()
    assert trial(wan_variant(name, dtype=dtype), settings()) == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [None, *adapters.KINDS])
def test_whatever_is_trained(kind):
    assert trial(wan_family(dtype="bfloat16"), settings(kind)) == []
    assert trial(wan_family(dtype="bfloat16"), settings(kind, checkpointing=True, offload_checkpoints=True)) == []


def test_the_block_is_small_and_has_the_real_ones_heads_and_modules():
    family = wan_family(dtype="bfloat16", transformer_dtype="float8")
    real, small = (each.build_skeleton() for each in (family, family.trial()))
    assert len(small.blocks) == 1 < len(real.blocks)
    for one, other in zip(real.blocks[0].modules(), small.blocks[0].modules(), strict=True):
        assert type(one) is type(other)
    assert [p.dtype for p in real.blocks[0].parameters()] == [p.dtype for p in small.blocks[0].parameters()]
    wide = family._sizes._replace(dim=5120, num_heads=40, ffn_dim=13824, num_layers=40)
    family._sizes = wide
    tried = family.trial()._sizes
    assert (tried.dim, tried.num_heads, tried.num_layers) == (256, 2, 1), "heads of 128"
    assert family._sizes == wide, "the family itself is as it was"


@pytest.mark.parametrize("by_row", [False, True])
def test_float8_with_scales_of_its_own(by_row, tmp_path):
    shutil.copy(WAN_T2V / "config.json", tmp_path)
    write_scaled(tmp_path / TRANSFORMER_FILE, native_tensors(), by_row=by_row)
    family = wan_family(WAN_T2V, transformer_path=tmp_path, dtype="bfloat16")
    scale = dict(family.trial().build_skeleton().named_parameters())["blocks.0.ffn.net.0.proj.weight_scale"]
    assert scale.shape == ((96, 1) if by_row else ())
    assert trial(family, settings()) == []


class Broken(nn.Module):
    """Stands before the block."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def forward(self, inputs):
        if self.error:
            raise self.error
        return tuple(tensor * torch.nan for tensor in inputs)


@pytest.mark.parametrize(
    ("error", "said", "mend"),
    [
        (NotImplementedError('"addmm" not implemented for\nmore'), '("addmm" not implemented for)', "another dtype"),
        (ValueError("the flash back end needs CUDA"), "(the flash back end needs CUDA)", "another dtype"),
        (torch.OutOfMemoryError("CUDA out of memory."), "(CUDA out of memory.)", "end what else runs there"),
        (None, "gives no finite numbers on CPU, first in blocks.0.", "choose another dtype"),
    ],
)
def test_what_does_not_run_is_named_with_its_message(error, said, mend, monkeypatch):
    family = wan_family(dtype="bfloat16")
    small = family.trial()
    layers = small.pipeline_layers
    small.pipeline_layers = lambda skeleton: [Broken(error), *layers(skeleton)]
    family.trial = lambda: small
    (wrong,) = trial(family, settings())
    assert wrong.startswith("[model] dtype = 'bfloat16': a block of Wan2.1 T2V custom size ")
    assert said in wrong and mend in wrong
    assert "\n" not in wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_of_the_adapter_that_does_not_go_with_the_models_is_named(dtype):
    lora = AdapterSettings(16, 16.0, dtype=dtype)
    (wrong,) = trial(wan_family(dtype="float32"), settings(adapter=lora))
    name = str(dtype).removeprefix("torch.")
    assert wrong.startswith(f"[adapter] dtype = '{name}' with [model] dtype = 'float32': a block of Wan2.1 T2V custom ")
    assert wrong.endswith("; set [adapter] dtype = 'float32'")
    assert trial(wan_family(dtype="bfloat16"), settings(adapter=lora)) == []


def test_an_adapter_is_not_blamed_where_the_block_does_not_run_without_it():
    family = wan_family(dtype="bfloat16")
    small = family.trial()
    layers = small.pipeline_layers
    small.pipeline_layers = lambda skeleton: [Broken(TypeError("no kernel")), *layers(skeleton)]
    family.trial = lambda: small
    (wrong,) = trial(family, settings(adapter=AdapterSettings(16, 16.0, dtype=torch.bfloat16)))
    assert wrong.startswith("[model] dtype = 'bfloat16': a block of ") and wrong.endswith("built for this device")


def test_a_family_that_knows_no_samples_is_left_out():
    assert trial(ToyFamily(), settings()) is None
