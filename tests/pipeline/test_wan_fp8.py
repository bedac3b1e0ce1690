"""LoRA over a base in scaled float8, through the engine: as over the expanded base, at one and two stages."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.base import Draw
from tests.helpers.launch import gather_results, run_ranks
from tests.helpers.models import native_tensors, wan_family
from tests.helpers.quantised import write_scaled

STEPS, GLOBAL_BATCH, RANKS = 2, 4, 2


def sample(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {"latents": torch.randn(16, 2, 4, 6, generator=generator), "text": torch.randn(5, 32, generator=generator)}


def train(folder: Path, cases: list[dict]) -> list[dict]:
    """On every rank: each case is a build of the engine and two steps, in bfloat16."""
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed

    init_distributed()
    results = []
    for case in cases:
        family = wan_family(transformer_path=case["transformer"], dtype="bfloat16")
        settings = EngineSettings(
            stages=case["stages"],
            micro_batches=GLOBAL_BATCH * case["stages"] // RANKS,
            optimizer=OptimizerSettings("sgd", 20.0),
            adapter=AdapterSettings(rank=4, alpha=2.0),
            gradient_clipping=0.01,
            checkpointing=case["checkpointing"],
        )
        built = build_engine(family, settings, torch.device("cpu"))
        own = range(GLOBAL_BATCH)[built.engine.data_rank :: RANKS // case["stages"]]
        losses = []
        for step in range(STEPS):
            numbers = [step * GLOBAL_BATCH + slot for slot in own]
            draws = [Draw((number % GLOBAL_BATCH + 0.5) / GLOBAL_BATCH, number) for number in numbers]
            batches = [family.micro_batch([sample(n)], [draw]) for n, draw in zip(numbers, draws, strict=True)]
            losses.append(built.engine.train_step(iter(batches)))
        local = dict(built.engine.module.named_local())
        results.append(
            {
                "losses": losses,
                "trained": {name: p.detach() for name, p in built.trained.items()},
                "float8": {name: p.detach() for name, p in local.items() if p.dtype == torch.float8_e4m3fn},
                "scales": {name: p.detach() for name, p in local.items() if name.endswith(".weight_scale")},
            }
        )
    return results


@pytest.mark.pipeline
def test_lora_over_scaled_float8_equals_lora_over_the_expanded_base(tmp_path):
    scaled, expanded = tmp_path / "scaled.safetensors", tmp_path / "expanded.safetensors"
    save_file(write_scaled(scaled, native_tensors(), "comfy_quant", by_row=True), expanded)
    cases = [
        {"transformer": str(scaled), "stages": 2, "checkpointing": True},
        {"transformer": str(expanded), "stages": 2, "checkpointing": True},
        {"transformer": str(scaled), "stages": 1, "checkpointing": False},
    ]
    ranks = run_ranks("tests.pipeline.test_wan_fp8:train", RANKS, tmp_path, cases)
    found, reference, alone = (gather_results([rank[case]["trained"] for rank in ranks]) for case in range(3))
    assert len(found) == 60 and found.keys() == reference.keys() == alone.keys()
    assert all(tensor.abs().max() > 0 for tensor in found.values()), "B started at zero"
    for name, tensor in found.items():
        assert torch.equal(tensor, reference[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=0.02, atol=1e-4)
    for rank in ranks:
        assert rank[0]["losses"] == rank[1]["losses"] == pytest.approx(rank[2]["losses"], rel=1e-3)
    for part in ("float8", "scales"):
        held, whole = (gather_results([rank[case][part] for rank in ranks]) for case in (0, 2))
        assert len(held) == 30 and all(torch.equal(tensor, whole[name]) for name, tensor in held.items())
        assert all(0 < len(rank[0][part]) < 30 for rank in ranks), "each stage holds its own"
        assert not any(rank[1][part] for rank in ranks)
