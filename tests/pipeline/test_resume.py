"""Interrupted and resumed equals uninterrupted, bit for bit, with dropout of both kinds."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from tests.helpers import forked
from tests.helpers.launch import ROOT, relative_error
from tests.helpers.tiny import tiny_checkpoint

STEPS, CUTS = 8, (1, 4, 6)  # the first epoch ends with step 4
OTHERS = (1, 3)  # stages that go on from a checkpoint of two
CONFIG = """
output_dir = '{folder}/runs'
dataset = '{folder}/dataset.toml'
eval_datasets = [{{name = 'held_out', config = '{folder}/eval.toml'}}]
epochs = 4
max_steps = {steps}
pipeline_stages = 2
gradient_accumulation_steps = 2
warmup_steps = 2
lr_scheduler = 'cosine'
uncond_fraction = 0.3
activation_checkpointing = true
eval_every_n_steps = 4
save_every_n_steps = 100
checkpoint_every_n_minutes = 0.0001
map_num_proc = 1
[model]
type = 'wan'
ckpt_path = '{folder}/official'
dtype = 'float32'
[adapter]
type = 'lora'
rank = 4
dropout = 0.2
[optimizer]
type = '{optimizer}'
lr = 1e-3
weight_decay = 0.01
"""
DATASET = """
resolutions = [64]
frame_buckets = [1, 5]
[[directory]]
path = '{folder}/{name}'
num_repeats = {repeats}
"""


def write_inputs(folder: Path, optimizer: str = "adamw_optimi") -> None:
    data = ROOT / "examples" / "data"
    for name, files in {"train": 7, "eval": 3}.items():
        (folder / name).mkdir(parents=True)
        captioned = [
            p for p in sorted((data / name).iterdir()) if p.suffix != ".txt" and p.with_suffix(".txt").exists()
        ]
        for media in captioned[-files:]:
            shutil.copy(media, folder / name)
            shutil.copy(media.with_suffix(".txt"), folder / name)
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder, name="train", repeats=1.5))
    (folder / "eval.toml").write_text(DATASET.format(folder=folder, name="eval", repeats=1))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder, steps=STEPS, optimizer=optimizer))


def starts(folder: Path, _: None) -> dict:
    """The whole run, and once more from nothing; then one resumed from each cut, and of the middle cut with other
    stages."""
    forked.import_all()
    words, runs = ["--config", str(folder / "config.toml")], folder / "runs"
    started(2, folder / "whole", words)
    (whole,) = [path for path in runs.iterdir() if path.name != "cache"]
    (runs / "cache").rename(folder / "first_cache")
    started(2, folder / "again", words)
    (again,) = [path for path in runs.iterdir() if path not in (whole, runs / "cache")]
    caches = [str(path) for path in (folder / "first_cache", runs / "cache")]
    told = {"whole": str(whole), "again": str(again), "caches": caches, "runs": {}, "recut": {}}
    for number, (stages, cut) in enumerate([*((2, cut) for cut in CUTS), *((stages, CUTS[1]) for stages in OTHERS)]):
        copy = runs / f"20300101_00-00-0{number}"
        cut_copy(whole, copy, cut)
        more = ["--resume_from_checkpoint", copy.name, "--set", f"pipeline_stages={stages}"]
        started(stages, folder / copy.name, [*words, *more])
        told["runs" if stages == 2 else "recut"][cut if stages == 2 else stages] = str(copy)
    return told


def started(ranks: int, folder: Path, words: list[str]) -> None:
    """A start of train.py with so many ranks, which must end well."""
    import train

    assert forked.results(ranks, folder, lambda: train.main(words)) == [0] * ranks


def cut_copy(whole: Path, copy: Path, cut: int) -> None:
    """The run as it was left when it was killed after the checkpoint of step `cut`, with the numbers of later steps."""
    shutil.copytree(whole, copy)
    for later in range(cut + 1, STEPS + 1):
        shutil.rmtree(copy / f"global_step{later}")
    shutil.rmtree(copy / f"step{STEPS}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("resume")
    write_inputs(folder)
    tiny_checkpoint(folder)
    return forked.run_forked("tests.pipeline.test_resume:starts", folder)


def metrics(run: str) -> list[dict]:
    timed = ("time", "perf/")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@pytest.mark.pipeline
@pytest.mark.parametrize("cut", CUTS)
def test_the_saved_lora_is_equal(runs, cut):
    whole, resumed = (
        load_file(Path(run) / f"step{STEPS}" / "adapter_model.safetensors")
        for run in (runs["whole"], runs["runs"][cut])
    )
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(tensor.any() for name, tensor in whole.items() if "lora_B" in name), (
        "B starts at zero: nothing was trained"
    )


@pytest.mark.pipeline
@pytest.mark.parametrize("cut", CUTS)
def test_the_training_state_is_equal(runs, cut):
    folders = [Path(run) / f"global_step{STEPS}" for run in (runs["whole"], runs["runs"][cut])]
    files = [json.loads((folder / "manifest.json").read_text())["files"] for folder in folders]
    assert set(files[0]) == {
        "state.json",
        *(f"{kind}_0{s}.{end}" for s in (0, 1) for kind, end in (("weights", "safetensors"), ("optimizer", "pt"))),
    }
    for name in files[0]:
        if name.endswith(".pt"):
            a, b = (torch.load(folder / name, weights_only=True) for folder in folders)
            assert_equal(a, b)
        else:
            assert files[0][name] == files[1][name], name


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


@pytest.mark.pipeline
@pytest.mark.parametrize("cut", CUTS)
def test_metrics_have_neither_gap_nor_duplicate(runs, cut):
    whole, resumed = metrics(runs["whole"]), metrics(runs["runs"][cut])
    assert resumed == whole
    assert [line["step"] for line in whole if "train/loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in whole if "held_out/loss" in line] == [0, 4, 8]


@pytest.mark.pipeline
def test_the_latest_pointer_names_the_last_checkpoint(runs):
    assert (Path(runs["whole"]) / "latest").read_text().strip() == f"global_step{STEPS}"


def files_of(folder: Path) -> dict[str, bytes]:
    """Path below `folder` -> content, less what the README says is of one run alone."""
    own = re.compile(r"logs/.*|metrics\.jsonl|events\..*|pace\.json|uses/.*|whole/.*")
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if not own.fullmatch(name)}


def events_of(run: str) -> list[bytes]:
    """All that the one file of TensorBoard holds, less the times."""
    (file,) = Path(run).glob("events.*")
    found = []
    for event in EventFileLoader(str(file)).Load():
        event.ClearField("wall_time")
        if not any(value.tag.startswith("perf/") for value in event.summary.value):
            found.append(event.SerializeToString(deterministic=True))
    return found


@pytest.mark.pipeline
def test_the_same_config_twice_gives_identical_files(runs):
    """Two stages, dropout, recomputation, checkpoints with optimizer state, evaluations, a LoRA; and the cache."""
    one, other = (files_of(Path(runs[name])) for name in ("whole", "again"))
    wanted = {"run.json", "latest", "skipped.jsonl", "config.toml", f"global_step{STEPS}/optimizer_01.pt"}
    assert wanted | {f"global_step{STEPS}/state.json", f"step{STEPS}/adapter_model.safetensors"} <= set(one)
    assert list(one) == list(other)
    assert [name for name in one if one[name] != other[name]] == []
    assert metrics(runs["whole"]) == metrics(runs["again"])
    told = events_of(runs["whole"])
    assert len(told) > STEPS and told == events_of(runs["again"])
    one, other = (files_of(Path(cache)) for cache in runs["caches"])
    assert sum(name.startswith("latents/") for name in one) and list(one) == list(other)
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.pipeline
@pytest.mark.parametrize("stages", OTHERS)
def test_a_checkpoint_goes_on_with_other_stages(runs, stages):
    """Weights and optimizer state are kept by name, so the cut may change."""
    resumed = runs["recut"][stages]
    whole, other = (load_file(Path(r) / f"step{STEPS}" / "adapter_model.safetensors") for r in (runs["whole"], resumed))
    assert set(whole) == set(other)
    assert max(relative_error(other[name], whole[name]) for name in whole) < 1e-5
