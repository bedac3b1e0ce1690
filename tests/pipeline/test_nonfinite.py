"""NaN in data, outputs, gradients and weights of real runs: all ranks act alike, nothing is lost, a replay finds it."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.launch import relative_error
from tests.helpers.starts import Started, sets, start_ranks
from tests.helpers.toy_poison import EVALUATED, HOW, LENGTH
from tests.pipeline.test_resume import assert_equal, metrics, write_inputs
from utils.data.cache import _checksum
from utils.train.kept import read_kept

pytestmark = pytest.mark.pipeline

FAMILIES = {"poison": "tests.helpers.toy_poison:PoisonToy"}
STEPS = 6
CLEAN = {HOW: "", LENGTH: "-1"}


class Inputs(NamedTuple):
    """What all starts share."""

    folder: Path

    @property
    def poisonous(self) -> Path:
        """The one caption of its length."""
        captions = sorted((self.folder / "train").glob("*.txt"))
        lengths = [len(path.read_text().strip()) for path in captions]
        return next(path for path, length in zip(captions, lengths, strict=True) if lengths.count(length) == 1)

    def words(self, name: str, *words: str, **settings: object) -> list[str]:
        chosen = {
            "output_dir": f"'{self.folder}/{name}'",
            "cache_dir": f"'{self.folder}/cache'",
            "max_steps": STEPS,
            "checkpoint_every_n_minutes": 100,
            "eval_every_n_steps": 100,
            "eval_before_first_step": "false",
            "adapter__dropout": 0.0,
            "uncond_fraction": 0.0,
            "activation_checkpointing": "false",
            **settings,
        }
        return ["--config", str(self.folder / "config.toml"), *sets(**chosen), *words]

    def poisoned(self, how: str) -> dict[str, str]:
        return {HOW: how, LENGTH: str(len(self.poisonous.read_text().strip()))}

    def run(self, name: str) -> Path:
        (run,) = (self.folder / name).iterdir()
        return run


# --- in the ranks -----------------------------------------------------------------------------------------------------


def first_kept(name: str, inputs: Path) -> Path:
    (run,) = (inputs / name).iterdir()
    return sorted((run / "nonfinite").glob("step_?.json"))[0]


def replay_of(folder: Path, words: list[str]) -> list[str]:
    """`--replay NAME` to the first step that the run of that name kept."""
    return [*words[:-1], str(first_kept(words[-1], folder.parent))]


def kept_with_held(run: Path) -> Path:
    """The last step of the run that was kept and has a sample of the regularization set."""
    steps = [path for path in (run / "nonfinite").glob("step_*.json") if '"held": true' in path.read_text()]
    return max(steps, key=lambda path: int(path.stem.partition("_")[2]))  # the report of a replay has no such word


def replay_with_held(folder: Path, words: list[str]) -> list[str]:
    (run,) = (folder.parent / words[-1]).iterdir()
    return [*words[:-1], str(kept_with_held(run))]


def poison_latents(folder: Path, words: list[str]) -> None:
    """One clip's latents are NaN from now on; the checksum fits, as if the encoder had made them."""
    if os.environ["RANK"] != "0":
        return
    for path in (folder.parent / "cache" / "latents").rglob("*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            marks = file.metadata()
        if Inputs(folder.parent).poisonous.stem in marks["name"]:
            latents = load_file(path)
            latents["latents"][:, 0, 0, 0] = torch.nan
            content = safetensors.torch.save(latents)
            marks["crc32"] = _checksum(content, 8 + int.from_bytes(content[:8], "little"))
            path.write_bytes(safetensors.torch.save(latents, marks))


def signal_one_rank(folder: Path, words: list[str]) -> None:
    """SIGUSR1 to rank 1 alone, in the middle of the run."""

    def send() -> None:
        runs = folder.parent / "signalled"
        while not any(path.read_text().count("\n") > 2 for path in runs.glob("*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    if os.environ["RANK"] == "1":
        threading.Thread(target=send, daemon=True).start()


def mend_latents(folder: Path, words: list[str]) -> list[str]:
    """The cache as it was, and a run to go on with that others may not change."""
    if os.environ["RANK"] == "0":
        shutil.rmtree(folder.parent / "cache" / "latents")
    return words


HERE = "tests.pipeline.test_nonfinite"
HELD = """
resolutions = [64]
frame_buckets = [1, 5]
[[directory]]
path = '{folder}/train'
weight = 0.5
mask_path = '{folder}/masks'
[[directory]]
path = '{folder}/held'
is_regularization = true
default_mask_file = '{folder}/top.png'
"""


class Runs(NamedTuple):
    inputs: Inputs
    data_ranks: Started
    stages: Started

    def replays(self, name: str) -> dict:
        path = first_kept(name, self.inputs.folder)
        return json.loads(path.with_name(f"{path.stem}_replay.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """Two launches: of one stage on two data ranks, and of two stages, which goes on with a run of the first."""
    folder = tmp_path_factory.mktemp("nonfinite")
    write_inputs(folder)
    head, _, rest = (folder / "config.toml").read_text().partition("[model]")
    rest = "[adapter]" + rest.partition("[adapter]")[2]
    (folder / "config.toml").write_text(f"{head}[model]\ntype = 'poison'\n{rest}")
    inputs = Inputs(folder)
    across = {"pipeline_stages": 1, "gradient_accumulation_steps": 1}
    skip = {"on_nonfinite": "'skip'"}
    held = {**skip, "dataset": write_held(inputs), "checkpoint_every_n_minutes": 1e-6, "max_steps": 12}
    gradient = inputs.poisoned("gradient")
    each_step, evaluated = {"checkpoint_every_n_minutes": 1e-6}, {"eval_before_first_step": "true"}
    cat = str(len((folder / "eval" / "cat.txt").read_text().strip()))
    data_ranks = start_ranks(
        folder / "said_data_ranks",
        [
            (inputs.words("skipped", **across, **skip, **each_step, **evaluated), {**gradient, EVALUATED: cat}, ""),
            (inputs.words("stopped", **across), {**gradient, EVALUATED: "-1"}, ""),
        ],
        ranks=2,
        families=FAMILIES,
    )
    stages = start_ranks(
        folder / "said_stages",
        [
            (inputs.words("stopped", "--replay", "stopped"), gradient, f"{HERE}:replay_of"),
            (inputs.words("stopped", "--resume_from_checkpoint", **skip), gradient, ""),
            (inputs.words("output", **skip), inputs.poisoned("output"), ""),
            (inputs.words("output", "--replay", "output"), {}, f"{HERE}:replay_of"),
            (inputs.words("to_base", **held), gradient, ""),
            (inputs.words("to_base", "--replay", "to_base", **held), gradient, f"{HERE}:replay_with_held"),
            (
                inputs.words("signalled", epochs=1000, max_steps=4000, requeue_exit_code=85),
                CLEAN,
                f"{HERE}:signal_one_rank",
            ),
            (inputs.words("data", **skip), CLEAN, f"{HERE}:poison_latents"),
            (inputs.words("data", "--replay", "data"), {}, f"{HERE}:replay_of"),
            (inputs.words("weight", **skip), inputs.poisoned("weight"), f"{HERE}:mend_latents"),
        ],
        ranks=2,
        families=FAMILIES,
    )
    return Runs(inputs, data_ranks, stages)


def write_held(inputs: Inputs) -> str:
    """A dataset whose clips count half, and a regularization set of the poisonous one, which has masks in both."""
    folder, stem = inputs.folder, inputs.poisonous.stem
    for name in ("held", "masks"):
        (folder / name).mkdir()
    for path in (folder / "train").glob(f"{stem}.*"):
        shutil.copy(path, folder / "held")
    for file, box in ((f"masks/{stem}.png", (0, 0, 240, 270)), ("top.png", (0, 0, 480, 90))):
        mask = Image.new("L", (480, 270), 0)  # as large as the clip
        mask.paste(255, box)
        mask.save(folder / file)
    (folder / "held.toml").write_text(HELD.format(folder=folder))
    return f"'{folder}/held.toml'"


def refused_steps(run: Path) -> dict[int, float]:
    """Step -> how many were left out by then."""
    return {line["step"]: line["train/nonfinite"] for line in metrics(str(run)) if "train/nonfinite" in line}


def test_a_gradient_of_one_data_rank_is_left_out_by_all(runs):
    run = runs.inputs.run("skipped")
    refused = refused_steps(run)
    assert list(refused.values()) == list(range(1, len(refused) + 1))
    assert 0 < len(refused) < STEPS
    assert [line["step"] for line in metrics(str(run)) if "train/loss" in line] == list(range(1, STEPS + 1))
    assert runs.data_ranks.said[0].count("the step is left out") == len(refused)
    assert "blocks.2.down.lora_B.default.weight (stage 0, data rank" in runs.data_ranks.said[0]


def test_a_held_out_clip_that_comes_out_as_nan_is_named(runs):
    line, last = [line for line in metrics(str(runs.inputs.run("skipped"))) if "held_out/loss" in line]
    assert (line["step"], last["step"]) == (0, STEPS)
    assert line["held_out/loss"] == "nan" and 0 < line["held_out/loss_without_bad"] < 100
    said = " ".join(runs.data_ranks.said[0].split())
    told = re.search(r"held_out at step 0: the losses of 1 of (\d+) samples are not finite: cat.jpg \(all q\w+\)", said)
    assert told and int(told[1]) > 1
    assert f"; without them it is {line['held_out/loss_without_bad']:.4f}" in said
    assert "not finite: cat" not in runs.data_ranks.said[1], "one rank tells"


def test_a_step_that_is_left_out_changes_nothing(runs):
    run = runs.inputs.run("skipped")
    for step in sorted(refused_steps(run)):
        before, after = (run / f"global_step{number}" for number in (step - 1, step))
        a, b = (load_file(folder / "weights_00.safetensors") for folder in (before, after))
        assert_equal(a, b)
        a, b = (torch.load(folder / "optimizer_00.pt", weights_only=True) for folder in (before, after))
        for group in (*a["groups"], *b["groups"]):
            group["values"].pop("lr")  # follows from the step
        assert_equal(a, b)


def test_a_run_that_stops_leaves_what_was_before_and_goes_on_from_it(runs):
    """With another cut, and the steps left out: the same as the run that never stopped."""
    assert runs.data_ranks.statuses == [1, 1]
    said = runs.data_ranks.said[0]
    step = min(refused_steps(runs.inputs.run("skipped")))
    assert f"error: the gradient of step {step} is not finite (loss " in said
    assert f"the newest checkpoint is global_step{step - 1}; go on with --resume_from_checkpoint" in said
    name = runs.inputs.poisonous.stem
    assert f"{name}.mp4 (t = 0." in said or f"{name}.jpg (t = 0." in said
    assert "Traceback" not in runs.data_ranks.console
    assert "error" not in runs.data_ranks.said[1], "one rank tells"
    whole, resumed = (runs.inputs.run(name) for name in ("skipped", "stopped"))
    assert refused_steps(whole) == refused_steps(resumed)
    a, b = (load_file(run / f"step{STEPS}" / "toy.safetensors") for run in (whole, resumed))
    assert max(relative_error(b[key], a[key]) for key in a) < 1e-5
    assert all(tensor.isfinite().all() for tensor in a.values())


def bad(report: list[dict]) -> list[tuple[int, int, str | None, int]]:
    """Data rank, stage, first bad output and the number of bad gradients, of stages where something is bad."""
    return [
        (batch["data_rank"], stage["stage"], stage["first_bad_output"], worst)
        for batch in report
        for stage in batch["stages"]
        if (worst := sum(1 for told in stage["gradients"].values() if told["not_finite"])) or stage["first_bad_output"]
    ]


def test_a_replay_finds_the_backward_pass(runs):
    """Kept by two data ranks, run on two stages; half of the second stage's gradients are behind the place."""
    report = runs.replays("stopped")
    assert sorted(batch["data_rank"] for batch in report) == [0, 1]
    (first, second) = bad(report)
    assert first[1:] == (0, None, 8)
    assert second[1:] == (1, None, 4)
    assert first[0] == second[0], "one micro-batch"


def test_a_replay_finds_the_forward_pass(runs):
    stages = {stage: output for _, stage, output, _ in bad(runs.replays("output"))}
    assert stages == {0: None, 1: "blocks.2"}
    said = " ".join(runs.stages.said[0].split())  # whatever the width of the terminal
    assert "first tensor that is not finite: the loss of micro-batch " in said
    assert "stage 1: first output that is not finite: blocks.2; 8 of 8 gradients: blocks.3." in said


def test_a_replay_knows_weights_masks_and_what_is_held_to_the_base(runs):
    """Of a step of two stages, with the weights it had: the very losses, and the gradients behind the place."""
    path = kept_with_held(runs.inputs.run("to_base"))
    facts = json.loads(path.read_text())
    assert facts["step"] > 1, "the adapter has learned something, so that what is held has a loss"
    report = json.loads(path.with_name(f"{path.stem}_replay.json").read_text())
    losses = [float(batch["stages"][-1]["loss"]) for batch in report]
    assert sum(losses) / len(losses) == pytest.approx(float(facts["loss"]), rel=1e-5)
    told = [sample for batch in facts["micro_batches"]["0"] for sample in batch]
    assert {sample["held"] for sample in told} == {True, False}
    kept = read_kept(path)
    for batch, loss in zip(kept.batches, losses, strict=True):
        read = batch.read()
        masked = batch.samples[0].name.startswith(runs.inputs.poisonous.stem)
        assert [0 < mask.mean() < 1 for mask in read.target[1:]] == [True] * masked
        assert read.weights.tolist() == [1.0 if batch.held else 0.5]
        assert masked or not batch.held
        assert loss > 0
    assert {(stage, output) for _, stage, output, _ in bad(report)} == {(0, None), (1, None)}


def test_poisoned_data_is_named(runs):
    said = runs.stages.said[0]
    assert f"first tensor that is not finite: input 0 of {runs.inputs.poisonous.stem}" in said
    assert "not finite in the cache: " in " ".join(said.split())
    stages = {stage: output for _, stage, output, _ in bad(runs.replays("data"))}
    assert stages[0] == "embed"
    assert refused_steps(runs.inputs.run("data")).keys() == refused_steps(runs.inputs.run("output")).keys()


def test_a_signal_to_one_rank_is_heard_by_all(runs):
    assert [said.count("status 85\n") for said in runs.stages.said] == [1, 1]
    assert ": SIGUSR1 came" in runs.stages.said[0]
    run = runs.inputs.run("signalled")
    (name,) = (path.name for path in run.glob("global_step*"))
    steps = [line["step"] for line in metrics(str(run)) if "train/loss" in line]
    assert name == f"global_step{steps[-1]}"
    assert steps[-1] < 4000


def test_a_weight_that_is_not_finite_ends_the_run_whatever_the_policy(runs):
    assert runs.stages.statuses == [1, 1]
    said = runs.stages.said[0]
    assert "first tensor that is not finite: the frozen weight blocks.2.up.base_layer.weight (stage 1" in said
    run = runs.inputs.run("weight")
    assert not list(run.glob("global_step*"))
    assert (run / "nonfinite" / "step_1.json").is_file()
