"""DoRA and LoKr, on a base that had a LoRA merged in, through the engine against a plain loop; and resumed."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import is_adapter
from tests.helpers.launch import gather_results, relative_error, run_ranks
from tests.helpers.models import materialise
from tests.helpers.toy import ToyFamily, ToyWeights
from tests.pipeline.test_engine import GLOBAL_BATCH, STEPS, batch

RANK, ALPHA, WEIGHT = 1, 2.0, 0.5
# settings of the adapter; lr and clip are such that clipping is active in every step, which the reference asserts
KINDS = {
    "dora": ({"kind": "dora"}, 2.0, 0.02),
    "lokr": ({"kind": "lokr"}, 5.0, 0.002),
    "lokr_both": ({"kind": "lokr", "decompose_both": True, "factor": 4}, 5.0, 0.002),
}
CUT = 2  # the step after which a run is built anew and resumed


def merged_lora() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(11)
    shapes = {"lora_A.weight": (2, 8), "lora_B.weight": (16, 2)}
    return {f"blocks.1.up.{part}": torch.randn(shape, generator=draw) for part, shape in shapes.items()}


class MergedFamily(ToyFamily):
    """The toy with the LoRA merged in by hand."""

    def open_weights(self):
        weights, lora = ToyWeights(), merged_lora()
        delta = WEIGHT * (lora["blocks.1.up.lora_B.weight"] @ lora["blocks.1.up.lora_A.weight"])

        class Merged(ToyWeights):
            def read(self, name):
                return weights.read(name) + delta if name == "blocks.1.up.weight" else weights.read(name)

        return Merged()


@lru_cache
def reference(name: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights and losses of a plain loop: no DeepSpeed, SGD with clipping active."""
    shape, lr, clip = KINDS[name]
    family = MergedFamily()
    model = family.build_skeleton()
    shape = {key: value for key, value in shape.items() if key != "kind"}
    add_adapter(model, family.lora_targets(model), KINDS[name][0]["kind"], AdapterShape(RANK, ALPHA, **shape))
    materialise(model, family)
    trained = {name: p for name, p in model.named_parameters() if is_adapter(name)}
    start = {name: p.detach().clone() for name, p in trained.items()}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=lr), []
    for step in range(STEPS):
        values = batch(step, list(range(GLOBAL_BATCH)))
        x = values.inputs
        for layer in family.pipeline_layers(model):
            x = layer(x)
        loss = family.loss(x, values.target).mean()
        loss.backward()
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        assert norm > clip, f"step {step}: norm {norm}"
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, start[name]) for name, p in trained.items()), "all parts must be trained"
    return {name: p.detach().clone() for name, p in trained.items()}, losses


def save(run_dir: Path, built) -> Path:
    from utils.train import checkpoint, checkpoint_write
    from utils.train.state import TrainState

    run_dir.mkdir(exist_ok=True)
    place = {"stage": built.engine.stage_id, "data_rank": built.engine.data_rank}
    parts = {"": checkpoint.Part(built.trained, built.optimizer)}
    told = {"epochs_done": 0, "course": {}, "meters": {}}
    return checkpoint_write.save(run_dir, TrainState(step=CUT), **told, parts=parts, **place, keep_last=None)


def train(folder: Path, cases: list[dict]) -> list[dict]:
    """On every rank: each case is a run of four steps, and one that is interrupted after two."""
    from utils.train import checkpoint, checkpoint_read
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed
    from utils.train.fuse import Fusion

    init_distributed()
    results = []
    for number, case in enumerate(cases):
        adapter, lr, clip = KINDS[case["kind"]]
        settings = EngineSettings(
            stages=case["stages"],
            micro_batches=2,
            optimizer=OptimizerSettings("sgd", lr),
            adapter=AdapterSettings(RANK, ALPHA, **adapter),
            fuse=(Fusion(folder.parent / "merged.safetensors", WEIGHT),),
            gradient_clipping=clip,
            checkpointing=case["checkpointing"],
        )

        def run(built, steps) -> list[float]:
            size = GLOBAL_BATCH // 2
            starts = (0, size)
            return [
                built.engine.train_step(iter([batch(step, list(range(s, s + size))) for s in starts])) for step in steps
            ]

        def build():
            return build_engine(ToyFamily(), settings, torch.device("cpu"))  # noqa: B023

        whole = build()
        result = {"losses": run(whole, range(STEPS)), "weights": {n: p.detach() for n, p in whole.trained.items()}}
        if case["stages"] == 2:
            first, resumed = build(), build()
            run(first, range(CUT))
            saved = save(folder / f"run{number}", first)
            checkpoint_read.load(saved, {"": checkpoint.Part(resumed.trained, resumed.optimizer)})
            run(resumed, range(CUT, STEPS))
            result["resumed"] = {n: p.detach() for n, p in resumed.trained.items()}
        results.append(result)
    return results


CASES = [{"stages": s, "kind": kind, "checkpointing": s != 2} for s in (1, 2, 3) for kind in KINDS]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("adapters"), {}
    save_file(merged_lora(), folder / "merged.safetensors")

    def of(case: dict) -> list[dict]:
        stages = case["stages"]
        cases = [c for c in CASES if c["stages"] == stages]
        if stages not in results:
            results[stages] = run_ranks("tests.pipeline.test_adapters:train", stages, folder / str(stages), cases)
        return [part[cases.index(case)] for part in results[stages]]

    return of


@pytest.mark.pipeline
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{c['stages']}")
def test_an_adapter_on_a_merged_base_equals_a_plain_loop(case, trained):
    parts, (weights, losses) = trained(case), reference(case["kind"])
    got = gather_results([part["weights"] for part in parts])
    assert set(got) == set(weights)
    assert max(relative_error(got[name], weights[name]) for name in weights) < 1e-5
    for part in parts:
        assert part["losses"] == pytest.approx(losses, rel=1e-6)


@pytest.mark.pipeline
@pytest.mark.parametrize("case", [c for c in CASES if c["stages"] == 2], ids=lambda c: c["kind"])
def test_a_resumed_run_has_the_merged_base_again(case, trained):
    for part in trained(case):
        assert part["weights"].keys() == part["resumed"].keys()
        assert all(torch.equal(part["resumed"][name], tensor) for name, tensor in part["weights"].items())
