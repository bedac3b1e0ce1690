"""Weighted samples and samples held to the base model, mixed in micro-batches, through the engine and the whole loop
against plain loops that have the base model beside the adapted one."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.adapter_layers import AdapterShape, add_adapter
from models.adapters import is_adapter, plain_name
from models.base import Draw, MicroBatch
from tests.helpers.launch import gather_results, relative_error, run_ranks
from tests.helpers.models import materialise, run_layers, wan_variant
from tests.helpers.toy import ToyFamily
from tests.helpers.toy_experts import SHARES, ToyExpert
from tests.pipeline.test_engine import batch as toy_batch
from tests.pipeline.test_resume import metrics, write_inputs

GLOBAL_BATCH, STEPS, SEED, RANK, ALPHA = 4, 5, 3, 2, 4.0
# samples of each step that are held, by slot: all, none, one, and a number that differs by data rank and micro-batch
HELD = ((0, 1, 2, 3), (), (1,), (0, 2, 3), (2,))
WEIGHTS = (0.5, 2.0, 1.0, 0.25)
# family, kind of adapter, lr, clip: such that clipping is active in every step with anything to learn
KINDS = {
    "lora": ("toy", "lora", 2.0, 0.02),
    "started": ("toy", "lora", 2.0, 0.02),  # from an adapter that was trained before
    "dora": ("toy", "dora", 2.0, 0.02),
    "lokr": ("toy", "lokr", 5.0, 0.002),
    "wan": ("wan", "lora", 20.0, 0.002),
}
CASES = [
    {"kind": kind, "stages": s, "data": d, "gas": g, "checkpointing": c}
    for kind, s, d, g, c in [
        ("lora", 1, 1, 2, False),
        ("wan", 1, 1, 4, True),
        *((kind, 2, 1, 2, kind == "dora") for kind in KINDS),
        ("lora", 1, 2, 2, True),
        ("wan", 1, 2, 1, False),
    ]
]


@lru_cache
def family_of(name: str):
    return wan_variant("wan22_ti2v", i2v_fraction=0.5) if name == "wan" else ToyFamily()


def batch(name: str, step: int, slots) -> MicroBatch:
    """With weights. Some of Wan's samples have a clean first frame, and with it a second tensor in their target."""
    if name == "toy":
        made = toy_batch(step, list(slots))
    else:
        draw = torch.Generator().manual_seed(step)
        samples = [{"latents": torch.randn(48, 2, 4, 4, generator=draw)} for _ in range(GLOBAL_BATCH)]
        samples = [{**each, "text": torch.randn(3 + i, 32, generator=draw)} for i, each in enumerate(samples)]
        draws = [Draw((i + 0.5) / GLOBAL_BATCH, 50 * step + i, choice=i % 2) for i in range(GLOBAL_BATCH)]
        made = family_of(name).micro_batch([samples[i] for i in slots], [draws[i] for i in slots])
    return made._replace(weights=torch.tensor([WEIGHTS[slot] for slot in slots]))


def start_of(kind: str) -> dict[str, torch.Tensor]:
    """First values of the adapter by plain names, where they are not what an adapter starts with."""
    model = ToyFamily().build_skeleton()
    add_adapter(model, ToyFamily().lora_targets(model), "lora", AdapterShape(RANK, ALPHA))
    shapes = {plain_name(name): p.shape for name, p in model.named_parameters() if is_adapter(name)}
    draw = torch.Generator().manual_seed(7)
    return (
        {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()} if kind == "started" else {}
    )


@lru_cache
def reference(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Weights before and after, and losses, of a plain loop: SGD with clipping, the base a model that never had an
    adapter."""
    name, adapter, lr, clip = KINDS[kind]
    family = family_of(name)
    base, model = family.build_skeleton(), family.build_skeleton()
    add_adapter(model, family.lora_targets(model), adapter, AdapterShape(RANK, ALPHA))
    materialise(base, family).requires_grad_(False)
    materialise(model, family, SEED)
    trained = {n: p for n, p in model.named_parameters() if is_adapter(n)}
    for n, values in start_of(kind).items():  # alpha is folded into a file's tensors
        scale = RANK / ALPHA if ".lora_B" in n else 1
        trained[n.replace(".weight", ".default.weight")].data.copy_(values * scale)
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer, losses = torch.optim.SGD(trained.values(), lr=lr), []
    for step in range(STEPS):
        values = batch(name, step, range(GLOBAL_BATCH))
        prediction, known = (run_layers(family.pipeline_layers(m), values.inputs, torch.float32) for m in (model, base))
        is_held = torch.tensor([slot in HELD[step] for slot in range(GLOBAL_BATCH)])
        target = torch.where(is_held.view(-1, *[1] * (known.ndim - 1)), known, values.target[0])
        each = family.loss(prediction, (target, *values.target[1:]))
        assert step == 0 or each.detach()[is_held].sum() > 1e-7 or not is_held.any(), "the adapter must have moved away"
        loss = (torch.tensor(WEIGHTS) * each).mean()
        loss.backward()
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), clip)
        assert norm > clip or (step == 0 and kind != "started"), f"step {step}: norm {norm}"
        optimizer.step()
        optimizer.zero_grad()
    return start, {n: p.detach().clone() for n, p in trained.items()}, losses


def engine_runs(folder: Path, cases: list[dict]) -> list[dict]:
    """The engine in each case, fed by hand."""
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed
    from utils.train.regularization import toward_base

    init_distributed()
    results = []
    for case in cases:
        name, adapter, lr, clip = KINDS[case["kind"]]
        start = folder.parent / "start.safetensors" if case["kind"] == "started" else None
        settings = EngineSettings(
            stages=case["stages"],
            micro_batches=case["gas"],
            optimizer=OptimizerSettings("sgd", lr),
            adapter=AdapterSettings(RANK, ALPHA, kind=adapter, init_from_existing=start),
            gradient_clipping=clip,
            checkpointing=case["checkpointing"],
            seed=SEED,
        )
        built = build_engine(family_of(name), settings, torch.device("cpu"))
        engine, losses = built.engine, []
        ranks, size = case["data"], GLOBAL_BATCH // (case["gas"] * case["data"])
        for step in range(STEPS):
            starts = [(m * ranks + engine.data_rank) * size for m in range(case["gas"])]
            slots = [range(s, s + size) for s in starts]
            held = {m: [i for i, slot in enumerate(of) if slot in HELD[step]] for m, of in enumerate(slots)}
            batches = (batch(name, step, of) for of in slots)
            if HELD[step]:
                batches = toward_base(engine, batches, {m: found for m, found in held.items() if found})
            losses.append(engine.train_step(batches))
        results.append({"losses": losses, "weights": {n: p.detach() for n, p in built.trained.items()}})
    return results


# --- the whole loop, with two experts in turns ------------------------------------------------------------------------

LOOP_STEPS, LR, CLIP = 6, 2.0, 0.02
DATASET = """
resolutions = [64]
frame_buckets = [1, 5]
[[directory]]
path = '{folder}/index.jsonl'
weight = 0.5
[[directory]]
path = '{folder}/kept'
is_regularization = true
weight = 2
num_repeats = 1.5
"""
CONFIG = f"""
output_dir = '{{folder}}/runs'
dataset = '{{folder}}/dataset.toml'
epochs = 20
seed = {SEED}
max_steps = {LOOP_STEPS}
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 2
gradient_clipping = {CLIP}
save_every_n_steps = 100
checkpoint_every_n_epochs = 20
map_num_proc = 1
[model]
type = 'toy_experts'
[adapter]
type = 'lora'
rank = {RANK}
alpha = {ALPHA}
[optimizer]
type = 'sgd'
lr = {LR}
"""


def plain_loops(run) -> dict:
    """Weights by expert and losses by step, of plain loops over the batches of the run's own plan."""
    dataset, found = run.loader._dataset_at(0), {"weights": {}, "losses": {}, "mixed": 0}
    rows = map(json.loads, Path(run.run_dir.parents[1], "index.jsonl").read_text().splitlines())
    counts = {Path(row["path"]).name: 0.5 * row["weight"] for row in rows}
    for name in SHARES:
        family = ToyExpert(name)
        base, model = family.build_skeleton(), family.build_skeleton()
        add_adapter(model, family.lora_targets(model), "lora", AdapterShape(RANK, ALPHA))
        materialise(base, family).requires_grad_(False)
        materialise(model, family, SEED)
        trained = {n: p for n, p in model.named_parameters() if is_adapter(n)}
        optimizer = torch.optim.SGD(trained.values(), lr=LR)
        for step in range(LOOP_STEPS):
            if run.family.expert_at(step) != name:
                continue
            items = run.plan.step(step).items
            entries = [dataset.entries[item.entry] for item in items]
            values = dataset.made_by(family).training_batch(items)
            prediction, known = (
                run_layers(family.pipeline_layers(m), values.inputs, torch.float32) for m in (model, base)
            )
            is_held = torch.tensor([entry.group == 1 for entry in entries])
            found["mixed"] += bool(is_held.any() and not is_held.all())
            target = torch.where(is_held.view(-1, 1, 1, 1, 1), known, values.target[0])
            counted = torch.tensor([2.0 if entry.group == 1 else counts[entry.name] for entry in entries])
            loss = (counted * family.loss(prediction, (target,))).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            found["losses"][step + 1] = loss.item()
        found["weights"][name] = {n: p.detach().clone() for n, p in trained.items()}
    return found


def worker(folder: Path, cases: list[dict]) -> dict:
    """On every rank: the engine's cases, then one run of the loop with a stage a rank."""
    import models
    import train
    from utils import dist
    from utils.train.assemble import build_run
    from utils.train.loop import train as loop
    from utils.train.setup import join, prepare_data, read_config

    told = {"engine": engine_runs(folder, cases)}
    models.FAMILIES["toy_experts"] = "tests.helpers.toy_experts:ToyExperts"
    stages = ["--set", f"pipeline_stages={dist.world_size()}"]
    job = read_config(train.parse_arguments(["--config", str(folder.parent / "config.toml"), *stages]))
    join(job)
    run = build_run(job, prepare_data(job))
    assert loop(run)
    weights = {name: {n: p.detach() for n, p in e.built.trained.items()} for name, e in run.experts.items()}
    plain = plain_loops(run) if dist.world_size() == 1 else None
    return {**told, "weights": weights, "run": str(run.run_dir), "plain": plain}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, results = tmp_path_factory.mktemp("held"), {}
    save_file(start_of("started"), folder / "start.safetensors")
    write_inputs(folder)
    (folder / "kept").mkdir()
    for file in sorted((folder / "train").iterdir())[:4]:  # two files and their captions
        file.rename(folder / "kept" / file.name)
    media = [path.name for path in sorted((folder / "train").iterdir()) if path.suffix != ".txt"]
    rows = [{"path": f"train/{name}", "weight": 0.25 + 0.5 * i} for i, name in enumerate(media)]
    (folder / "index.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))

    def of(ranks: int) -> list[dict]:
        if ranks not in results:
            cases = [c for c in CASES if c["stages"] * c["data"] == ranks]
            results[ranks] = run_ranks("tests.pipeline.test_regularization:worker", ranks, folder / str(ranks), cases)
        return results[ranks]

    return of


@pytest.mark.pipeline
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_weighted_and_held_samples_equal_a_plain_loop(case, trained):
    ranks = case["stages"] * case["data"]
    number = [c for c in CASES if c["stages"] * c["data"] == ranks].index(case)
    parts, (start, weights, losses) = [part["engine"][number] for part in trained(ranks)], reference(case["kind"])
    got = gather_results([part["weights"] for part in parts])
    assert set(got) == set(weights)
    change, wanted = (torch.cat([(w[n] - start[n]).flatten() for n in weights]) for w in (got, weights))
    assert relative_error(change, wanted) < 1e-5
    for part in parts:
        assert part["losses"] == pytest.approx(losses, rel=1e-5, abs=1e-9)
        if case["kind"] != "started":
            assert part["losses"][0] == 0, "an adapter that is no change yet is the base to the last bit"


@pytest.mark.pipeline
@pytest.mark.parametrize("stages", [1, 2])
def test_the_loop_weights_and_holds_what_the_dataset_says(stages, trained):
    """Weights of an index file times those of directories; each expert is held to its own base."""
    parts, plain = trained(stages), trained(1)[0]["plain"]
    assert plain["mixed"] > 2, "steps must have samples of both sorts"
    losses = {line["step"]: line["train/loss"] for line in metrics(parts[0]["run"]) if "train/loss" in line}
    assert losses == pytest.approx(plain["losses"], rel=1e-5)
    for name in SHARES:
        got = gather_results([part["weights"][name] for part in parts])
        assert max(relative_error(got[n], weights) for n, weights in plain["weights"][name].items()) < 1e-5
