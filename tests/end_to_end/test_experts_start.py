"""Both experts of Wan2.2 A14B as a user starts them: through the `deepspeed` launcher, two LoRAs in one folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.launch import ROOT, free_port
from tests.helpers.models import wan_family
from tests.helpers.tiny import tiny_checkpoint
from tests.pipeline.test_resume import write_inputs
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings
from utils.train.experts import check_experts

pytestmark = pytest.mark.end_to_end

STEPS, RANK = 4, 2
SAVED = "epoch1"  # which ends with step 4
NAMES = ("high_noise", "low_noise")
CONFIG = f"""
output_dir = '{{folder}}/runs'
dataset = '{{folder}}/dataset.toml'
eval_datasets = [{{{{name = 'held_out', config = '{{folder}}/eval.toml'}}}}]
epochs = 9
max_steps = {STEPS}
pipeline_stages = 2
gradient_accumulation_steps = 2
eval_every_n_steps = {STEPS}
save_every_n_steps = {STEPS}
checkpoint_every_n_minutes = 0.0001
map_num_proc = 1
[model]
type = 'wan'
ckpt_path = '{{folder}}/official'
expert = 'both'
switch_every = 2
high_noise_share = 0.5
[adapter]
type = 'lora'
rank = {RANK}
[optimizer]
type = 'adamw'
lr = 1e-3
"""


class Start(NamedTuple):
    folder: Path
    run: Path
    told: str


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    folder = tmp_path_factory.mktemp("experts")
    write_inputs(folder)
    tiny_checkpoint(folder, variant="t2v-a14b", dim=48, heads=2, layers=3)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    command = [
        *(Path(sys.executable).with_name("deepspeed"), f"--master_port={free_port()}", "--num_gpus=2"),
        *("train.py", "--deepspeed", "--config", folder / "config.toml"),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "cache")
    return Start(folder, run, done.stdout)


def test_two_loras_come_out_each_with_its_expert(start):
    saved = start.run / SAVED
    files = sorted(path.name for path in saved.glob("*.safetensors"))
    assert files == [f"adapter_model_{name}.safetensors" for name in NAMES]
    loras = [load_file(saved / file) for file in files]
    assert set(loras[0]) == set(loras[1])
    for lora in loras:
        assert all(tensor.any() for name, tensor in lora.items() if "lora_B" in name), "B starts at zero"
    assert not any(loras[0][name].equal(loras[1][name]) for name in loras[0] if "lora_B" in name)
    for file, noise in zip(files, ("high", "low"), strict=True):
        with safe_open(saved / file, "pt") as reader:
            assert f"{noise} noise" in reader.metadata()["base_model"]


def test_steps_are_taken_in_turns_and_told(start):
    lines = [json.loads(line) for line in (start.run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["step"]: line for line in lines if "train/loss" in line}
    taken = [next(n for n in NAMES if f"train/loss_{n}" in steps[step]) for step in range(1, STEPS + 1)]
    assert taken == ["low_noise", "low_noise", "high_noise", "high_noise"]
    for step, name in enumerate(taken, start=1):
        assert any(f"step {step}/{STEPS}" in line and name in line for line in start.told.splitlines())
    held_out = [line for line in lines if "held_out/loss" in line][-1]
    mean = sum(held_out[f"held_out_{name}/loss"] for name in NAMES) / 2
    assert held_out["held_out/loss"] == pytest.approx(mean)
    record = json.loads((start.run / "run.json").read_text())[-1]
    assert record["turns of the experts"].startswith("2 low_noise, 2 high_noise, 2 low_noise")
    course = json.loads(next(start.run.glob("global_step*/state.json")).read_text())["course"]
    assert course["model"] == "Wan2.2 T2V-A14B both experts custom size", "or a resume could take another for it"


def test_what_is_shown_names_both(start):
    rows = [line.split() for line in start.told.splitlines() if "_noise" in line and " KiB" in line]
    assert [row[:2] for row in rows] == [[stage, name] for stage in "01" for name in NAMES]
    assert "high_noise 50%, low_noise 50% of the steps" in start.told
    assert f"trained LoRAs of high_noise and low_noise  {start.run / SAVED}\n" in start.told


def test_a_run_of_both_can_start_from_what_one_wrote(start):
    """From the folder, or with a file for each."""
    family = wan_family(start.folder / "official", expert="both")
    saved = start.run / SAVED
    files = {name: saved / f"adapter_model_{name}.safetensors" for name in NAMES}
    for existing in (saved, files):
        adapter = AdapterSettings(RANK, RANK, init_from_existing=existing)
        check_experts(family, EngineSettings(2, 1, OptimizerSettings("adamw", 1e-3), adapter=adapter))
    for name, expert in family.experts().items():
        found, own = (expert.load_adapter(path) for path in (saved, files[name]))
        assert all(found[key].equal(own[key]) for key in own)
