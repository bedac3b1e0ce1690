"""The quickstart as a user starts it: its own TOML through the `deepspeed` launcher, trained, resumed, loaded back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import toml
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.helpers.launch import ROOT, free_port
from tests.helpers.models import materialise, run_layers, wan_family
from tests.helpers.tiny import tiny_checkpoint, tiny_wan

pytestmark = pytest.mark.end_to_end

CONFIG = ROOT / "examples" / "quickstart.toml"
SETTINGS = toml.load(CONFIG)
EPOCHS, RANK = SETTINGS["epochs"], SETTINGS["adapter"]["rank"]
# Clips of examples/data/train in each bucket. Four make a step; what is left over waits for the next epoch.
CLIPS, STEP = (3, 2, 2, 9), 4
NATIVE_MODULES = [*(f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"), "ffn.0", "ffn.2"]


def steps_of(epochs: int) -> int:
    return sum(clips * epochs // STEP for clips in CLIPS)


def quickstart(folder: Path, *flags: str) -> str:
    """What a start says; the run and the checkpoint are in `folder`. Raises where its status is not 0."""
    sets = {"output_dir": f"'{folder / 'runs'}'", "model.ckpt_path": f"'{folder / 'official'}'"}
    command = [
        *(Path(sys.executable).with_name("deepspeed"), f"--master_port={free_port()}", "--num_gpus=2"),
        *("train.py", "--deepspeed", "--config", CONFIG.relative_to(ROOT)),
        *(word for key, value in sets.items() for word in ("--set", f"{key}={value}")),
        *flags,
    ]
    # the launcher runs `python` of the PATH on the ranks, and its log lines must not depend on who starts the tests
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class Starts(NamedTuple):
    """A run of the quickstart, as the first start left it and after a second one went on with it."""

    folder: Path
    run: Path
    first: str  # what the starts said
    second: str
    files: set[str]  # in the run folder after the first start
    metrics: list[dict]  # after the first start


def files_in(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> Starts:
    folder = tmp_path_factory.mktemp("quickstart")
    tiny_checkpoint(folder)
    first = quickstart(folder)
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "cache")
    files, metrics = files_in(run), read_metrics(run)
    second = quickstart(folder, "--resume_from_checkpoint", "--set", f"epochs={EPOCHS + 1}")
    return Starts(folder, run, first, second, files, metrics)


def test_it_learns(starts):
    losses = {line["step"]: line["held_out/loss"] for line in starts.metrics if "held_out/loss" in line}
    assert losses[steps_of(EPOCHS)] < 0.95 * losses[0]


def test_the_run_folder_is_what_the_readme_says(starts):
    events = {name for name in starts.files if name.startswith("events.out.tfevents.")}
    assert len(events) == 1
    configs = {"config.toml", "dataset.toml", "eval_held_out.toml"}
    state = {"state.json", "manifest.json"}
    stages = {
        f"{part}_0{stage}.{end}" for stage in (0, 1) for part, end in (("weights", "safetensors"), ("optimizer", "pt"))
    }
    loras = {"adapter_model.safetensors", "adapter_config.json"} | configs
    expected = {"metrics.jsonl", "run.json", "skipped.jsonl", "latest", "logs/rank_0.log", "logs/rank_1.log"}
    expected |= configs
    saved = range(0, EPOCHS + 1, SETTINGS["save_every_n_epochs"])[1:]
    expected |= {f"epoch{epoch}/{name}" for epoch in saved for name in loras}
    checkpoints = range(0, EPOCHS + 1, SETTINGS["checkpoint_every_n_epochs"])[-SETTINGS["keep_last"] :]
    expected |= {f"global_step{steps_of(epoch)}/{name}" for epoch in checkpoints for name in state | stages}
    assert starts.files - events == expected
    assert (starts.run.parent / "cache" / "latents").is_dir()


def test_it_says_where_everything_is_and_what_to_run_next(starts):
    closing = starts.first.partition("\nDone\n")[2]
    for path in (starts.run, starts.run / f"epoch{EPOCHS}", starts.run / f"global_step{steps_of(EPOCHS)}"):
        assert f"  {path}\n" in closing
    assert "tensorboard --logdir" in closing
    assert f"--resume_from_checkpoint {starts.run.name}" in closing


def test_a_second_start_encodes_nothing_and_says_so(starts):
    for noun, total in (("clips", sum(CLIPS) + 3), ("captions", sum(CLIPS) + 3 + 1)):  # 3 held out, the empty caption
        assert f"{total} of {total} {noun} encoded" in starts.first
        assert f"0 of {total} {noun} to encode: everything was in the cache" in starts.second


def test_a_resumed_run_goes_on_where_it_was(starts):
    assert f"going on from global_step{steps_of(EPOCHS)}" in starts.second
    metrics = read_metrics(starts.run)
    assert [line["step"] for line in metrics if "train/loss" in line] == list(range(1, steps_of(EPOCHS + 1) + 1))
    assert metrics[: len(starts.metrics)] == starts.metrics
    assert (starts.run / "latest").read_text() == f"global_step{steps_of(EPOCHS + 1)}\n"
    # the end of a run is saved even where no cadence falls on it
    assert (starts.run / f"step{steps_of(EPOCHS + 1)}" / "adapter_model.safetensors").is_file()
    assert len(json.loads((starts.run / "run.json").read_text())) == 2


def test_the_lora_has_comfyuis_keys_and_says_what_it_is(starts):
    with safe_open(starts.run / f"epoch{EPOCHS}" / "adapter_model.safetensors", "pt") as lora:
        assert set(lora.keys()) == {
            f"diffusion_model.blocks.{block}.{module}.lora_{matrix}.weight"
            for block in range(tiny_wan().Sizes().layers)
            for module in NATIVE_MODULES
            for matrix in "AB"
        }
        metadata = lora.metadata()
    assert (metadata["rank"], metadata["alpha"]) == (str(RANK), str(RANK))
    assert metadata["reelpipe.step"] == str(steps_of(EPOCHS))
    assert metadata["reelpipe.epoch"] == str(EPOCHS)
    assert metadata["base_model"].startswith("Wan2.1 T2V")


def test_diffusers_loads_the_lora_and_predicts_what_was_trained(starts):
    from diffusers import WanPipeline, WanTransformer3DModel

    from models.adapter_layers import AdapterShape, add_adapter
    from models.adapters import plain_name

    family = wan_family(starts.folder / "official")
    skeleton = family.build_skeleton()
    add_adapter(skeleton, family.lora_targets(skeleton), "lora", AdapterShape(RANK, RANK))
    materialise(skeleton, family)
    # what was trained, from the training state rather than from the file under test
    state = starts.run / f"global_step{steps_of(EPOCHS)}"
    trained = load_file(state / "weights_00.safetensors") | load_file(state / "weights_01.safetensors")
    assert skeleton.load_state_dict(trained, strict=False).unexpected_keys == []
    base = tiny_checkpoint(starts.folder, layout="diffusers")
    transformer = WanTransformer3DModel.from_pretrained(base / "transformer")
    pipeline = WanPipeline(tokenizer=None, text_encoder=None, transformer=transformer, vae=None, scheduler=None)
    inputs = random_sample(family)
    with torch.no_grad():
        ours = run_layers(family.pipeline_layers(skeleton), inputs, torch.float32)
        untrained = predict(transformer, *inputs)
        pipeline.load_lora_weights(starts.run / f"epoch{EPOCHS}")
        theirs = predict(transformer, *inputs)
    loaded = {plain_name(name.replace(".default_0.", ".default.")) for name, _ in transformer.named_parameters()}
    assert {name for name in loaded if ".lora_" in name} == {plain_name(name) for name in trained}
    assert (untrained - theirs).abs().max() > 1e-2 * theirs.abs().max(), "the LoRA should matter"
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def random_sample(family) -> tuple[torch.Tensor, ...]:
    """x_t, t and text of two samples. t is moderate: diffusers' own angles of t x 1000 are float32."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(2, 512, tiny_wan().Sizes().text_dim, generator=generator)
    return torch.randn(2, 16, 3, 4, 6, generator=generator), torch.tensor([0.2, 0.6]), text


def predict(transformer, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return transformer(x_t, t * 1000, text, return_dict=False)[0]
