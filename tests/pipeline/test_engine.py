"""The engine against a plain single-process loop: same weights, norms and losses whatever the cut."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from models import flow_match
from models.base import Draw, MicroBatch
from tests.helpers.launch import gather_results, relative_error, run_ranks
from tests.helpers.toy import ToyFamily, ToyWeights

GLOBAL_BATCH, STEPS, CLIP, LR = 4, 4, 0.05, 0.5


def sample(step: int, slot: int) -> tuple[dict[str, torch.Tensor], Draw]:
    """Shapes change with the step, as buckets do."""
    noise = flow_match.seeded_noise((16, 1 + step % 2, 4, 4), 100 * step + slot)
    return {"latents": noise, "text": noise.flatten()[:6].reshape(2, 3)}, Draw(
        (slot + 0.5) / GLOBAL_BATCH, step * 7 + slot
    )


def batch(step: int, slots: list[int]) -> MicroBatch:
    samples, draws = zip(*(sample(step, slot) for slot in slots), strict=True)
    return ToyFamily().micro_batch(samples, draws)


@lru_cache
def reference() -> tuple[dict[str, torch.Tensor], list[float], list[float]]:
    """Weights, losses and gradient norms of a plain loop: no DeepSpeed, SGD with clipping active."""
    model = ToyFamily().build_skeleton().to_empty(device="cpu")
    weights = ToyWeights()
    model.load_state_dict({name: weights.read(name) for name in weights.names()})
    layers = ToyFamily().pipeline_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, norms = [], []
    for step in range(STEPS):
        values = batch(step, list(range(GLOBAL_BATCH)))
        x = values.inputs
        for layer in layers:
            x = layer(x)
        loss = ToyFamily().loss(x, values.target).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
    assert min(norms) > CLIP, "clipping must be active for the test to mean anything"
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses, norms


def train(folder: Path, cases: list[dict]) -> list[dict]:
    """On every rank: each case is a build of the engine and four steps."""
    from utils.train.build import EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed

    init_distributed()
    results = []
    for case in cases:
        settings = EngineSettings(
            stages=case["stages"],
            micro_batches=case["gas"],
            optimizer=OptimizerSettings("sgd", LR),
            gradient_clipping=CLIP,
            checkpointing=case["checkpointing"],
            offload_checkpoints=case.get("offload", False),
        )
        built = build_engine(ToyFamily(), settings, torch.device("cpu"))
        engine = built.engine
        data_ranks = engine.grid.get_data_parallel_world_size()
        size = GLOBAL_BATCH // (case["gas"] * data_ranks)
        losses, norms = [], []
        for step in range(STEPS):
            starts = [(m * data_ranks + engine.data_rank) * size for m in range(case["gas"])]
            losses.append(engine.train_step(iter([batch(step, list(range(s, s + size))) for s in starts])))
            norms.append(engine.grad_norm)
        weights = {name: p.detach() for name, p in built.trained.items()}
        local = [name for name, _ in engine.module.named_local()]
        results.append({"weights": weights, "losses": losses, "norms": norms, "local": local})
    return results


CASES = [
    {"stages": s, "data": d, "gas": g, "checkpointing": c}
    for s, d in [(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2)]
    for g in (1, 2, 4)
    for c in (False, True)
    if GLOBAL_BATCH % (g * d) == 0
] + [{"stages": 2, "data": 1, "gas": 2, "checkpointing": True, "offload": True}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    results = {}

    def of(case: dict) -> list[dict]:
        ranks = case["stages"] * case["data"]
        if ranks not in results:
            cases = [c for c in CASES if c["stages"] * c["data"] == ranks]
            parts = run_ranks("tests.pipeline.test_engine:train", ranks, tmp_path_factory.mktemp("ranks"), cases)
            results[ranks] = [[part[i] for part in parts] for i in range(len(cases))]
        return results[ranks][[c for c in CASES if c["stages"] * c["data"] == ranks].index(case)]

    return of


@pytest.mark.pipeline
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_a_run_equals_a_plain_loop(case, trained):
    parts, (weights, losses, norms) = trained(case), reference()
    got = gather_results([part["weights"] for part in parts])
    assert set(got) == set(weights)
    assert max(relative_error(got[name], weights[name]) for name in weights) < 1e-5
    for part in parts:  # every rank tells the same, whichever stage it is
        assert part["losses"] == pytest.approx(losses, rel=1e-6)
        assert part["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.pipeline
@pytest.mark.parametrize("case", CASES[::6], ids=lambda c: "-".join(f"{k}{v}" for k, v in c.items()))
def test_a_rank_holds_its_own_stage_only(case, trained):
    parts = trained(case)
    held = {tuple(part["local"]) for part in parts}
    assert len(held) == case["stages"]
    names = [name for stage in held for name in stage]
    assert len(names) == len(set(names)) == len(reference()[0])
