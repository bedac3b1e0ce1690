"""A checkpoint of p stages x d data ranks goes on with any other p' x d', where the global batch is the same."""

import json
import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import forked
from tests.helpers.launch import relative_error
from tests.pipeline.test_resume import metrics, write_inputs

pytestmark = pytest.mark.pipeline

STEPS, CUT, GLOBAL_MICRO_BATCHES = 5, 2, 2
GRIDS = [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]  # stages, data ranks
PAIRS = list(permutations(GRIDS, 2))
# two experts, each of which has taken a step before the cut; one of them is idle there
CONFIG = f"""
cache_dir = '{{folder}}/cache'
dataset = '{{folder}}/dataset.toml'
epochs = 20
max_steps = {STEPS}
gradient_clipping = 0.1
warmup_steps = 2
lr_scheduler = 'cosine'
uncond_fraction = 0.3
eval_every_n_steps = 100
save_every_n_steps = 100
checkpoint_every_n_minutes = 0.0001
map_num_proc = 1
[model]
type = 'toy_experts'
[adapter]
type = 'lora'
rank = 2
dropout = 0.2
[optimizer]
type = 'adamw_optimi'
lr = 1e-2
weight_decay = 0.01
"""


def starts(folder: Path, _: None) -> dict:
    """A whole run of each grid; then each goes on from the checkpoints of all others, one start after the other."""
    import models

    models.FAMILIES["toy_experts"] = "tests.helpers.toy_experts:ToyExperts"
    forked.import_all()
    for grid in GRIDS:
        run(folder, grid, [folder / name(grid)])
    for grid in GRIDS:
        run(folder, grid, [cut_copy(folder, source, grid) for source in GRIDS if source != grid])
    return {"folder": str(folder)}


def name(grid: tuple[int, int]) -> str:
    return "{}x{}".format(*grid)


def cut_copy(folder: Path, source: tuple[int, int], grid: tuple[int, int]) -> Path:
    """The output folder of a run of `source` that was killed after the cut, for `grid` to go on in."""
    (whole,) = (folder / name(source)).iterdir()
    output = folder / f"{name(source)}_to_{name(grid)}"
    kept = ("metrics.jsonl", f"global_step{CUT}")
    for each in kept:
        copy = shutil.copytree if (whole / each).is_dir() else shutil.copy
        (output / whole.name).mkdir(parents=True, exist_ok=True)
        copy(whole / each, output / whole.name / each)
    return output


def run(folder: Path, grid: tuple[int, int], outputs: list[Path]) -> None:
    """Starts of train.py with this grid, in the same processes: from the beginning, or where there is a checkpoint."""
    import train

    stages, data_ranks = grid
    sets = {"pipeline_stages": stages, "gradient_accumulation_steps": GLOBAL_MICRO_BATCHES // data_ranks}
    words = ["--config", str(folder / "config.toml"), *(w for k, v in sets.items() for w in ("--set", f"{k}={v}"))]

    def action() -> list[int]:
        ended = []
        for output in outputs:
            more = ["--set", f"output_dir='{output}'"]
            more += ["--resume_from_checkpoint"] if output.exists() and list(output.glob("*/global_step*")) else []
            ended.append(train.main([*words, *more]))
        return ended

    ranks = stages * data_ranks
    assert forked.results(ranks, folder / f"logs_{outputs[0].name}", action) == [[0] * len(outputs)] * ranks


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    write_inputs(folder)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return Path(forked.run_forked("tests.pipeline.test_elastic:starts", folder)["folder"])


def the_run(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found


def equal(whole: Path, other: Path) -> None:
    """Losses and gradient norms of each step, and what was trained."""
    for key in ("train/loss", "train/grad_norm"):
        one, two = ([line[key] for line in metrics(str(run)) if key in line] for run in (whole, other))
        assert len(one) == STEPS
        assert two == pytest.approx(one, rel=1e-5)
    files = sorted(path.name for path in (whole / f"step{STEPS}").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        one, two = (load_file(run / f"step{STEPS}" / file) for run in (whole, other))
        assert set(one) == set(two)
        assert max(relative_error(two[key], one[key]) for key in one) < 1e-5


@pytest.mark.parametrize("grid", GRIDS[1:], ids=name)
def test_the_grid_does_not_change_a_run(runs, grid):
    equal(the_run(runs / name(GRIDS[0])), the_run(runs / name(grid)))


@pytest.mark.parametrize(("source", "grid"), PAIRS, ids=lambda grid: name(grid))
def test_a_checkpoint_goes_on_with_another_grid(runs, source, grid):
    equal(the_run(runs / name(source)), the_run(runs / f"{name(source)}_to_{name(grid)}"))


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_the_optimizer_has_state_at_the_cut(runs, grid):
    """Else there would be nothing to split anew."""
    folder = the_run(runs / name(grid)) / f"global_step{CUT}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert len([file for file in files if file.startswith("weights_early")]) == grid[0]
    for file in files:
        if file.startswith("optimizer_"):
            state = torch.load(folder / file, weights_only=True)["state"]
            assert state
            assert all(of["exp_avg"].any() for name, of in state.items() if "lora_B" in name)
