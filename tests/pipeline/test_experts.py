"""Two experts in one run equal two plain loops, resume anywhere to the last bit, and never share the device."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.launch import gather_results, relative_error, run_ranks
from tests.helpers.models import materialise, run_layers
from tests.helpers.toy_experts import SHARES, ToyExpert, ToyExperts
from tests.pipeline.test_resume import assert_equal, metrics, write_inputs

STEPS, LR, CLIP, RANK, WARMUP = 8, 2.0, 0.02, 2, 2
SEED = 5
# by stages and switch_every; turns of 3 end with steps 3 and 6
CUTS = {1: {1: (3,), 3: (1, 2, 4, 5, 7)}, 2: {1: (), 3: (4,)}}
RECUT = 4  # the step at which one stage's checkpoint goes on with two
CONFIG = f"""
output_dir = '{{folder}}/runs'
dataset = '{{folder}}/dataset.toml'
eval_datasets = [{{{{name = 'held_out', config = '{{folder}}/eval.toml'}}}}]
epochs = 20
seed = {SEED}
max_steps = {STEPS}
gradient_accumulation_steps = 2
gradient_clipping = {CLIP}
warmup_steps = {WARMUP}
lr_scheduler = 'cosine'
eval_every_n_steps = 4
save_every_n_steps = 100
checkpoint_every_n_minutes = 0.0001
map_num_proc = 1
[model]
type = 'toy_experts'
[adapter]
type = 'lora'
rank = {RANK}
[optimizer]
type = 'sgd'
lr = {LR}
"""


def words(folder: Path, stages: int, every: int) -> list[str]:
    sets = {
        "pipeline_stages": stages,
        "model.switch_every": every,
        "output_dir": f"'{folder}/runs_{stages}_{every}'",
        "cache_dir": f"'{folder}/cache'",
    }
    changed = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    return ["--config", str(folder / "config.toml"), *changed]


def train_once(arguments: list[str]) -> tuple[Any, dict[str, Any]]:
    """The run as the command line makes it, and what its idle expert holds at the end."""
    import train
    from utils.train.assemble import build_run
    from utils.train.loop import train as loop
    from utils.train.setup import join, prepare_data, read_config

    job = read_config(train.parse_arguments(arguments))
    join(job)
    run = build_run(job, prepare_data(job))
    assert loop(run)
    return run, {name: held(expert.built.engine.module) for name, expert in run.experts.items()}


def held(module) -> dict[str, Any]:
    """Where the frozen parameters of a stage are, in bytes."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    copies = {c.untyped_storage().data_ptr() for c in module.parking._copies}
    storages = {p.untyped_storage().data_ptr() for p in frozen}
    return {
        "parked": module.parking.parked,
        "in host copy": storages <= copies,
        "apart": not storages & copies,
        "frozen": len(frozen),
        "trained in host copy": any(
            p.untyped_storage().data_ptr() in copies for p in module.parameters() if p.requires_grad
        ),
    }


def plain_loops(run, every: int) -> dict[str, Any]:
    """Weights, losses of each step and evaluation of two separate loops fed the samples of their own turns."""
    from utils.data.dataset import EvalItem
    from utils.train.build import AdapterSettings, prepare_skeleton
    from utils.train.evaluate import QUANTILES
    from utils.train.schedules import learning_rate_factor

    dataset, found = run.loader._dataset_at(0), {"weights": {}, "losses": {}, "eval": {}}
    for name in SHARES:
        family = ToyExpert(name)
        model = materialise(prepare_skeleton(family, AdapterSettings(RANK, RANK)), family, SEED)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=LR)
        mine = dataset.made_by(family)

        def losses(batch, model=model, family=family):
            return family.loss(run_layers(family.pipeline_layers(model), batch.inputs, torch.float32), batch.target)

        for step in range(STEPS):
            if ToyExperts(ToyExperts.Config(switch_every=every)).expert_at(step) != name:
                continue
            for group in optimizer.param_groups:
                group["lr"] = LR * learning_rate_factor("cosine", step, WARMUP, STEPS)
            loss = losses(mine.training_batch(run.plan.step(step).items)).mean()
            loss.backward()
            assert torch.nn.utils.clip_grad_norm_(trained.values(), CLIP) > CLIP, "clipping must be active"
            optimizer.step()
            optimizer.zero_grad()
            found["losses"][step + 1] = loss.item()
        found["weights"][name] = {n: p.detach().clone() for n, p in trained.items()}
        held_out = run.eval_sets[0].dataset.made_by(family)
        with torch.no_grad():
            found["eval"][name] = [
                float(
                    torch.cat(
                        [losses(held_out.eval_batch([EvalItem(i, q)])) for i in range(len(held_out.entries))]
                    ).mean()
                )
                for q in QUANTILES
            ]
    return found


def worker(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """On every rank: a whole run for each `switch_every`, resumed from each cut, and another's that had one stage."""
    import models

    models.FAMILIES["toy_experts"] = "tests.helpers.toy_experts:ToyExperts"
    told = {}
    for every, cuts in CUTS[arguments["stages"]].items():
        asked = words(folder, arguments["stages"], every)
        run, places = train_once(asked)
        weights = {name: {k: p.detach() for k, p in e.built.trained.items()} for name, e in run.experts.items()}
        told[every] = {
            "weights": weights,
            "places": places,
            "plain": plain_loops(run, every),
            "whole": str(run.run_dir),
            "runs": {cut: resumed(asked, run.run_dir, run.run_dir.parent, cut) for cut in cuts},
        }
    if other := arguments.get("one stage"):
        told["recut"] = resumed(asked, Path(other), run.run_dir.parent, RECUT)
    return told


def resumed(asked: list[str], whole: Path, output: Path, cut: int) -> str:
    """A copy of the run `whole` that goes on in `output` from step `cut`."""
    import train
    from utils import dist

    copy = output / f"20300101_00-00-0{cut}{whole != output / whole.name:d}"
    if dist.is_main():
        shutil.copytree(whole, copy)
        for later in range(cut + 1, STEPS + 1):
            shutil.rmtree(copy / f"global_step{later}")
        shutil.rmtree(copy / f"step{STEPS}")
    dist.barrier()
    assert train.main([*asked, "--resume_from_checkpoint", str(copy)]) == 0
    return str(copy)


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> dict[int, list[dict]]:
    folder = tmp_path_factory.mktemp("experts")
    write_inputs(folder)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    start = partial(run_ranks, "tests.pipeline.test_experts:worker")
    one = start(1, folder, {"stages": 1})
    return {1: one, 2: start(2, folder, {"stages": 2, "one stage": one[0][3]["whole"]})}


@pytest.fixture(params=[1, 2], ids=["1stage", "2stages"])
def told(request, launched) -> list[dict]:
    return launched[request.param]


pytestmark = pytest.mark.pipeline
every_pattern = pytest.mark.parametrize("every", CUTS[1])


@every_pattern
def test_each_expert_equals_a_loop_of_its_own(told, every):
    plain = told[0][every]["plain"]
    for name in SHARES:
        got = gather_results([part[every]["weights"][name] for part in told])
        wanted = plain["weights"][name]
        assert set(got) == set(wanted)
        assert max(relative_error(got[n], wanted[n]) for n in wanted) < 1e-5
        assert all(wanted[n].any() for n in wanted), f"{name} was not trained"


@every_pattern
def test_losses_are_told_by_expert(told, every):
    plain, family = told[0][every]["plain"], ToyExperts(ToyExperts.Config(switch_every=every))
    lines = [line for line in metrics(told[0][every]["whole"]) if "train/loss" in line]
    assert [line["train/loss"] for line in lines] == pytest.approx(list(dict(sorted(plain["losses"].items())).values()))
    for line in lines:
        name = family.expert_at(line["step"] - 1)
        assert line[f"train/loss_{name}"] == line["train/loss"]
        assert line[f"train/grad_norm_{name}"] == line["train/grad_norm"]
        assert not any(key.endswith(tuple(f"_{n}" for n in SHARES if n != name)) for key in line)


@every_pattern
def test_evaluations_are_those_of_each_expert_alone(told, every):
    plain = told[0][every]["plain"]
    line = [line for line in metrics(told[0][every]["whole"]) if "held_out/loss" in line][-1]
    means = {name: sum(values) / len(values) for name, values in plain["eval"].items()}
    for name, values in plain["eval"].items():
        quantiles = [line[f"held_out_{name}/loss_quantile_{q / 10:.2f}"] for q in range(1, 10)]
        assert quantiles == pytest.approx(values, rel=1e-5)
        assert line[f"held_out_{name}/loss"] == pytest.approx(means[name], rel=1e-5)
    assert line["held_out/loss"] == pytest.approx(sum(SHARES[n] * means[n] for n in SHARES), rel=1e-5)
    assert means["early"] != pytest.approx(means["late"], rel=0.01)


@every_pattern
def test_the_idle_expert_is_in_host_memory_alone(told, every):
    for part in told:
        places = part[every]["places"]
        assert sorted(place["parked"] for place in places.values()) == [False, True]
        for place in places.values():
            assert place["in host copy"] == place["parked"]
            assert place["apart"] != place["parked"]
            assert place["frozen"] > 0
            assert not place["trained in host copy"]


@every_pattern
def test_resuming_within_a_turn_changes_no_bit(told, every):
    """Weights, optimizer state, metrics and exported files of both experts."""
    whole = Path(told[0][every]["whole"])
    files = json.loads((whole / f"global_step{STEPS}" / "manifest.json").read_text())["files"]
    assert {told.get("expert") for name, told in files.items() if name != "state.json"} == set(SHARES)
    for cut, run in told[0][every]["runs"].items():
        other = Path(run)
        for name in SHARES:
            one, two = (load_file(run / f"step{STEPS}" / f"toy_{name}.safetensors") for run in (whole, other))
            assert_equal(one, two)
        for name in files:
            one, two = (run / f"global_step{STEPS}" / name for run in (whole, other))
            if name.endswith(".pt"):
                assert_equal(torch.load(one, weights_only=True), torch.load(two, weights_only=True))
            else:
                assert one.read_bytes() == two.read_bytes(), (cut, name)
        assert metrics(str(other)) == metrics(str(whole)), cut


def test_a_checkpoint_of_both_goes_on_with_other_stages(launched):
    whole, other = launched[1][0][3]["whole"], launched[2][0]["recut"]
    for name in SHARES:
        one, two = (load_file(Path(run) / f"step{STEPS}" / f"toy_{name}.safetensors") for run in (whole, other))
        assert set(one) == set(two)
        assert max(relative_error(two[key], one[key]) for key in one) < 1e-5
