"""A run that was cut short anywhere and went on equals one that was not, to the last bit of every file."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import forked
from tests.helpers.toy_faults import CALL, EVALUATING, FAULT, RANK
from tests.pipeline.test_resume import assert_equal, metrics, write_inputs

pytestmark = pytest.mark.pipeline

STEPS, MICRO_BATCHES = 6, 2  # the first epoch ends with step 4
CONFIG = f"""
cache_dir = '{{folder}}/cache'
dataset = '{{folder}}/dataset.toml'
epochs = 20
max_steps = {STEPS}
pipeline_stages = 2
gradient_accumulation_steps = {MICRO_BATCHES}
warmup_steps = 2
lr_scheduler = 'cosine'
uncond_fraction = 0.3
eval_every_n_steps = 3
save_every_n_epochs = 1
checkpoint_every_n_minutes = 0.0001
map_num_proc = 1
[[eval_datasets]]
name = 'held_out'
config = '{{folder}}/eval.toml'
[[eval_datasets]]
name = 'again'
config = '{{folder}}/eval.toml'
[model]
type = 'faulty'
[adapter]
type = 'lora'
rank = 2
dropout = 0.2
[optimizer]
type = 'adamw_optimi'
lr = 1e-2
"""
# how starts one after the other end: by what, and after how many passes of the last block, while evaluating or not
Fault = tuple[str, int, bool]
EVALUATION = 2 * 27  # passes: two sets
STORIES: dict[str, list[Fault]] = {
    "in the evaluation before the first step": [("die", 5, True)],
    "in the first step": [("die", 1, False)],
    "in a step, and again": [("die", 2 * MICRO_BATCHES, False), ("die", 1, False)],
    "in the last step, in the middle of its epoch, twice": [
        ("die", STEPS * MICRO_BATCHES - 1, False),
        ("die", 1, False),
    ],
    "in an evaluation, between two sets": [("die", EVALUATION + EVALUATION // 2, True)],
    "asked to where an evaluation is due, then in that": [("terminate", 2 * MICRO_BATCHES, False), ("die", 30, True)],
    "asked to where the LoRA is due": [("terminate", 3 * MICRO_BATCHES, False)],
    "asked to in the last step, then in its evaluation": [
        ("terminate", (STEPS - 1) * MICRO_BATCHES, False),
        ("die", 5, True),
    ],
    "asked to in evaluations, and killed soon after": [
        ("doom", 5, True),  # before the first step
        ("terminate", EVALUATION - 1, True),  # as it ends, so that all is done of step 0
        ("doom", 5, True),  # of step 3
        ("doom", 30, True),  # of step 3, made up for: in the other set
        ("doom", EVALUATION + 5, True),  # of the last step
    ],
}
LEFT_COURSE = "asked to where the LoRA is due"  # here the folder that is owed is there, of a course that was left


def starts(folder: Path, _: None) -> dict:
    """The whole run; one resumed from each of its checkpoints; one for each story, resumed until it ends."""
    import models

    forked.import_all()
    models.FAMILIES["faulty"] = "tests.helpers.toy_faults:FaultyToy"
    assert start(folder, folder / "whole") == [0, 0]
    whole = newest(folder / "whole")
    leave_course(whole, folder / "elsewhere")
    told: dict = {"whole": str(whole), "cuts": {}, "stories": {}}
    for cut in range(1, STEPS + 1):
        copy = folder / f"cut_{cut}" / whole.name
        shutil.copytree(whole, copy)
        for later in range(cut + 1, STEPS + 1):
            shutil.rmtree(copy / f"global_step{later}")
        (copy / "save_quit").touch()  # for the start that was cut
        assert start(folder, copy.parent) == [0, 0]
        told["cuts"][cut] = str(copy)
    for number, (name, faults) in enumerate(STORIES.items()):
        output = folder / f"story_{number}"
        ends = [start(folder, output, fault) for fault in faults]
        if name == LEFT_COURSE:
            shutil.copytree(folder / "elsewhere" / "epoch1", newest(output) / "epoch1")
        ends.append(start(folder, output))
        told["stories"][name] = {"run": str(newest(output)), "ends": ends}
    told["full"] = no_room(folder, whole)
    told["ended"] = ended_early(folder, whole)
    return told


def leave_course(whole: Path, elsewhere: Path) -> None:
    """What the run saves, with numbers of another course."""
    shutil.copytree(whole / "epoch1", elsewhere / "epoch1")
    file = elsewhere / "epoch1" / "toy.safetensors"
    with safe_open(file, "pt") as reader:
        marks = reader.metadata()
    marks["reelpipe.course"] = marks["reelpipe.course"][::-1]
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}, file, marks)


def ended_early(folder: Path, whole: Path) -> dict:
    """Started once more after step 4, which was the end of a run, and of an epoch; then after an end before that."""
    copy = folder / "ended" / whole.name
    shutil.copytree(whole, copy)
    for later in range(5, STEPS + 1):
        shutil.rmtree(copy / f"global_step{later}")
    shutil.rmtree(copy / f"step{STEPS}")
    told = {"run": str(copy), "ends": [], "consoles": []}
    for steps in (4, 2):
        told["ends"].append(start(folder, copy.parent, more=[f"max_steps={steps}"]))
        told["consoles"].append((folder / "logs" / "ended" / "rank_0.log").read_text())
    return told


def no_room(folder: Path, whole: Path) -> dict:
    """Goes on from step 2 where no checkpoint can be written, is asked to stop; then where one can."""
    copy = folder / "full" / whole.name
    shutil.copytree(whole, copy)
    for later in range(3, STEPS + 1):
        shutil.rmtree(copy / f"global_step{later}")
    obstacle = copy / "tmp-global_step0"
    obstacle.touch()  # no folder: the clearing up before a save fails
    ends = [start(folder, copy.parent, ("terminate", MICRO_BATCHES, False))]
    console = (folder / "logs" / "full" / "rank_0.log").read_text()
    obstacle.unlink()
    return {"run": str(copy), "console": console, "ends": [*ends, start(folder, copy.parent)]}


def newest(output: Path) -> Path:
    return max(path for path in output.iterdir() if path.name != "cache") if output.is_dir() else output


def start(folder: Path, output: Path, fault: Fault | None = None, more: Sequence[str] = ()) -> list[int]:
    """Go on where there is something to go on with. How both ranks ended."""
    import train

    words = ["--config", str(folder / "config.toml"), "--set", f"output_dir='{output}'"]
    words += [word for setting in more for word in ("--set", setting)]
    words += ["--resume_from_checkpoint"] if list(newest(output).glob("global_step*")) else []

    def run() -> int:
        if fault is not None:
            what, call, evaluating = fault
            os.environ.update({FAULT: what, RANK: "1", CALL: str(call), EVALUATING: f"{evaluating:d}"})
        return train.main(words)

    return forked.statuses(forked.start(2, folder / "logs" / output.name, lambda: sys.exit(run())))


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("cuts")
    write_inputs(folder)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return forked.run_forked("tests.pipeline.test_cuts:starts", folder)


def check(whole: Path, other: Path) -> None:
    """Weights, optimizer, position, data order, evaluations, saved LoRAs, metrics.jsonl and TensorBoard."""
    last = f"global_step{STEPS}"
    files = [json.loads((run / last / "manifest.json").read_text())["files"] for run in (whole, other)]
    for name in files[0]:
        if name.endswith(".pt"):
            assert_equal(*(torch.load(run / last / name, weights_only=True) for run in (whole, other)))
        elif name.endswith(".json"):
            told = [json.loads((run / last / name).read_text()) for run in (whole, other)]
            one, two = ({key: value for key, value in each.items() if key != "owed"} for each in told)
            assert one == two
        else:
            assert files[0][name] == files[1][name], name
    saved = [sorted(str(path.relative_to(run)) for path in run.glob("[es]*/toy.safetensors")) for run in (whole, other)]
    assert saved[0] == saved[1]
    for name in saved[0]:
        assert_equal(*(load_file(run / name) for run in (whole, other)))
    assert metrics(str(other)) == metrics(str(whole))
    assert scalars(other) == scalars(whole)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(run), {"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("perf/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_the_whole_run_has_every_number_once(told):
    whole = Path(told["whole"])
    lines = metrics(told["whole"])
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, STEPS + 1))
    for name in ("held_out", "again"):
        assert [line["step"] for line in lines if f"{name}/loss" in line] == [0, 3, 6]
        assert [step for step, _ in scalars(whole)[f"{name}/loss"]] == [0, 3, 6]
    assert [path.name for path in whole.glob("epoch*")] == ["epoch1"]


@pytest.mark.parametrize("cut", range(1, STEPS + 1))
def test_after_a_cut_at_any_step(told, cut):
    check(Path(told["whole"]), Path(told["cuts"][cut]))


@pytest.mark.parametrize("story", STORIES)
def test_after_an_end_in_the_middle(told, story):
    case = told["stories"][story]
    for (what, *_), ended in zip(STORIES[story], case["ends"], strict=False):
        assert ended == ([1, -9] if what == "die" else [0, 0])
    assert case["ends"][-1] == [0, 0]
    check(Path(told["whole"]), Path(case["run"]))


def test_a_run_that_has_ended_is_not_saved_again_under_another_name(told):
    """Its last step ended an epoch, which has given the LoRA its name."""
    case = told["ended"]
    assert case["ends"] == [[0, 0], [0, 0]]
    assert sorted(path.parent.name for path in Path(case["run"]).glob("*/toy.safetensors")) == ["epoch1"]
    early = "the checkpoint is of step 4, and epochs and max_steps end the run at step 2: there is nothing to train"
    assert [early in " ".join(console.split()) for console in case["consoles"]] == [False, True]
    assert "total steps 6 -> 4: the learning rate" in " ".join(case["consoles"][0].split())


def test_a_run_that_stops_without_its_checkpoint_says_so_and_fails(told):
    """And before that the one beside training only warns; no complete one is harmed."""
    case = told["full"]
    assert case["ends"] == [[1, 1], [0, 0]]
    assert "checkpoint at step 3 not written: " in case["console"]
    assert "keeping the previous one, training goes on" in case["console"]
    wanted = "the run stops after step 4 without a checkpoint of it, see above; the newest checkpoint is "
    assert wanted in case["console"]
    check(Path(told["whole"]), Path(case["run"]))
