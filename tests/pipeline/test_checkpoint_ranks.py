"""Ranks that see different checkpoints, or end while one is being written beside: none is lost, and none is mixed."""

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers import forked
from tests.helpers.caching import wait_until
from tests.helpers.toy_faults import CALL, FAULT, RANK
from tests.pipeline.test_cuts import CONFIG, newest
from tests.pipeline.test_resume import assert_equal, metrics, write_inputs

pytestmark = pytest.mark.pipeline

STEPS, CUT = 6, 4  # the first epoch ends with the cut
SYNC_S = 0.4  # of a slow disk: seven times that until a checkpoint is there, where a step takes milliseconds
RUN = "20300101_00-00-00"


# --- ranks that only load and save ------------------------------------------------------------------------------------


def meet() -> int:
    import torch

    torch.distributed.init_process_group("gloo")
    return int(os.environ["RANK"])


def load_what_differs(folder: Path) -> list[str]:
    """Each rank another of two checkpoints; then one that only rank 0 sees. What each says."""
    from tests.helpers.checkpoints import save, trained
    from utils.train import checkpoint_read
    from utils.train.checkpoint import CheckpointError, Part

    run_dir = folder / "run"
    run_dir.mkdir()
    for number in (1, 2):
        save(run_dir, number)

    def load() -> list[str]:
        rank, said = meet(), []
        for name in (f"global_step{rank + 1}", "global_step1" if rank == 0 else "global_step9"):
            try:
                checkpoint_read.load(run_dir / name, {"": Part(trained(), None)})
            except CheckpointError as error:
                said.append(str(error))
        return said

    told = forked.results(2, folder / "load", load)
    return [words for said in told for words in said]


def end_in_a_save(folder: Path, case: str) -> dict:
    """Two ranks of a stage each; both begin to save, the disk of rank 1 is slow, and one of them fails."""
    from tests.helpers import kills
    from tests.helpers.checkpoints import TOLD, optimizer_of, step
    from tests.helpers.disks import CountedDisk
    from utils.train import checkpoint, checkpoint_read
    from utils.train.checkpoint import Part
    from utils.train.checkpoint_write import Checkpointer
    from utils.train.state import TrainState

    run_dir = folder / "run"
    run_dir.mkdir(parents=True)

    def save() -> float:
        rank = meet()

        def slow(_: int, call: str) -> None:
            if rank == 1 and call == "sync":
                if case == "rank 1 is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(SYNC_S)

        parameters = kills._fresh(kills.STAGES[rank])
        optimizer = optimizer_of(parameters)
        step(parameters, optimizer)
        writer = Checkpointer(run_dir, stage=rank, data_rank=0, keep_last=None, disk=CountedDisk(slow))
        writer.begin(TrainState(3), TOLD, {"": Part(parameters, optimizer)}, wait=False)
        begun = time.monotonic()
        if case == "rank 1 fails" and rank == 0:
            time.sleep(60)  # in a collective, that is: until it is killed
        time.sleep(0.2 if case == "rank 1 is killed" else 0)
        writer.rescue(15, others_live=case != "rank 1 is killed")
        return time.monotonic() - begun

    ranks = forked.start(2, folder / "ranks", save)
    if case == "rank 1 fails":
        assert forked.statuses(ranks[1:]) == [0]
        os.kill(ranks[0].pid, signal.SIGKILL)
        forked.statuses(ranks[:1])
    else:
        forked.statuses(ranks)
    names = sorted(path.name for path in run_dir.glob("*global_step*"))
    try:
        found = checkpoint.find(run_dir)
    except checkpoint.CheckpointError:
        return {"names": names, "damage": None}
    return {"names": names, "damage": checkpoint_read.verify(found)}


def save_what_is_not_finite(folder: Path) -> list[tuple[int, str | None]]:
    """A weight of stage 1 is infinite. On each rank: the last checkpoint, and whether a model was saved."""
    from types import SimpleNamespace

    import torch

    from tests.helpers import kills
    from tests.helpers.checkpoints import checkpointer, optimizer_of, step
    from utils.train import saving
    from utils.train.activity import Activity
    from utils.train.state import TrainState

    def save() -> tuple[int, str | None]:
        rank = meet()
        parameters = kills._fresh(kills.STAGES[rank])
        optimizer = optimizer_of(parameters)
        step(parameters, optimizer)
        if rank == 1:
            with torch.no_grad():
                parameters["f"][7] = torch.inf
        experts = type("Experts", (dict,), {"engine": SimpleNamespace(stage_id=rank, data_rank=0)})
        run = SimpleNamespace(
            run_dir=folder,
            experts=experts({"": SimpleNamespace(built=SimpleNamespace(trained=parameters, optimizer=optimizer))}),
            state=TrainState(3),
            checkpointer=checkpointer(folder, stage=rank),
            activity=Activity(),
            last_checkpoint=-1,
            saved=None,
        )
        saving.save_checkpoint(run, wait=True)
        saving.save_model(run, "step3")
        return run.last_checkpoint, run.saved

    return forked.results(2, folder / "ranks", save)


# --- ranks that train -------------------------------------------------------------------------------------------------


def start(folder: Path, name: str, words=(), prepare=lambda rank: None) -> list[int]:
    import train

    def run() -> int:
        prepare(int(os.environ["RANK"]))
        return train.main(["--config", str(folder / "config.toml"), *words])

    return forked.statuses(forked.start(2, folder / "logs" / name, lambda: sys.exit(run())))


def in_folder(output: object) -> list[str]:
    return ["--set", f"output_dir='{output}'"]


def copied(whole: Path, output: Path, cut: int = CUT) -> Path:
    run = output / RUN
    shutil.copytree(whole, run)
    for later in range(cut + 1, STEPS + 1):
        shutil.rmtree(run / f"global_step{later}")
    shutil.rmtree(run / f"step{STEPS}")
    return run


def late(folder: Path, whole: Path) -> list[int]:
    """The last save of the old job comes into its place when rank 1 has begun, and rank 0 has not."""
    from utils.train import setup

    output, aside, flag = folder / "late", folder / "aside", folder / "flag"
    run = copied(whole, output)
    (run / f"global_step{CUT}").rename(aside)

    def prepare(rank: int) -> None:
        if rank == 0:
            wait_until(flag.exists)
            aside.rename(run / f"global_step{CUT}")
        else:
            meeting = setup.init_distributed
            setup.init_distributed = lambda *words: (flag.touch(), meeting(*words))[1]

    return start(folder, "late", [*in_folder(output), "--resume_from_checkpoint"], prepare)


def unshared(folder: Path, whole: Path) -> list[int]:
    """An output_dir that is relative, where the ranks are in different folders."""
    from utils.train import setup

    copied(whole, folder / "node_0" / "own")
    (folder / "node_1").mkdir()

    def prepare(rank: int) -> None:
        setup.SEEN_S = 0.5
        os.chdir(folder / f"node_{rank}")

    return start(folder, "unshared", [*in_folder("own"), "--resume_from_checkpoint"], prepare)


def refused(folder: Path) -> dict:
    """Rank 1 raises while the only checkpoint is being written to a slow disk; then the run goes on."""
    from utils.train import errors
    from utils.train.disk import Disk

    output = folder / "refused"
    words = in_folder(output)
    for each in ("checkpoint_every_n_minutes=1000", "checkpoint_every_n_epochs=1", "save_every_n_epochs=100"):
        words += ["--set", each]

    def prepare(rank: int) -> None:
        sync = Disk.sync
        Disk.sync = lambda self, path: (time.sleep(SYNC_S), sync(self, path))[1]
        errors.IN_STEP_WAIT_S = 0.1  # so that it is not this that gives the files time
        os.environ.update({FAULT: "refuse", RANK: "1", CALL: str(2 * CUT)})

    begun = time.monotonic()
    ends = start(folder, "refused", words, prepare)
    seconds = time.monotonic() - begun
    left = sorted(path.name for path in newest(output).glob("*global_step*"))
    ends += start(folder, "gone on", [*in_folder(output), "--resume_from_checkpoint"])
    return {"ends": ends, "left": left, "run": str(newest(output)), "seconds": seconds}


def trainings(folder: Path, _: None) -> dict:
    import models

    forked.import_all()
    models.FAMILIES["faulty"] = "tests.helpers.toy_faults:FaultyToy"
    assert start(folder, "whole", in_folder(folder / "whole")) == [0, 0]
    whole = newest(folder / "whole")
    return {
        "whole": str(whole),
        "late": late(folder, whole),
        "unshared": unshared(folder, whole),
        "refused": refused(folder),
    }


def small(folder: Path, _: None) -> dict:
    from tests.helpers import kills
    from tests.helpers.checkpoints import optimizer_of, step

    step(warm := kills._fresh("a"), optimizer_of(warm))  # what that imports, once for all forks
    cases = ("both fail", "rank 1 fails", "rank 1 is killed")
    told = {case: end_in_a_save(folder / case, case) for case in cases}
    told["not finite"] = save_what_is_not_finite(folder / "not finite")
    told["said"] = (folder / "not finite" / "ranks" / "rank_0.log").read_text()
    return {**told, "load": load_what_differs(folder)}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    return forked.run_forked("tests.pipeline.test_checkpoint_ranks:small", tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("case", ["both fail", "rank 1 fails"])
def test_a_rank_that_fails_waits_for_the_slowest_file(saved, case):
    """Rank 0 puts it in its place where it fails too; else the next start does."""
    assert saved[case]["damage"] == [], saved[case]
    assert "global_step3" in saved[case]["names"] or case == "rank 1 fails"


def test_what_a_killed_rank_had_not_written_is_not_waited_for(saved):
    assert saved["rank 1 is killed"]["damage"] is None
    assert saved["rank 1 is killed"]["names"] == ["tmp-global_step3", "tmp-parts-global_step3"]


def test_ranks_that_see_different_checkpoints_refuse_alike(saved):
    first, second, third, fourth = saved["load"]
    wanted = "rank 0: global_step1, save 1, state.json "
    assert wanted in first and "; rank 1: global_step2, save 2, state.json " in first and "start again" in first
    assert wanted in second and "rank 1: nothing that is complete" in second
    assert (
        third.partition(": ")[2] == first.partition(": ")[2] and fourth.partition(": ")[2] == second.partition(": ")[2]
    )


def test_a_weight_of_one_stage_that_is_not_finite_is_never_written(saved):
    assert saved["not finite"] == [(-1, None)] * 2
    assert "no checkpoint of step 3: the weight f (stage 1) is not finite; keeping earlier ones" in saved["said"]
    assert "step3 is not saved: the weight f (stage 1) is not finite; what was saved before stays" in saved["said"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    write_inputs(folder)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder, forked.run_forked("tests.pipeline.test_checkpoint_ranks:trainings", folder)


def check(told: dict, run: Path) -> None:
    saved = (Path(told["whole"]) / f"step{STEPS}", run / f"step{STEPS}")
    assert_equal(*(load_file(next(each.glob("*.safetensors"))) for each in saved))
    assert metrics(str(run)) == metrics(told["whole"])


def test_a_checkpoint_that_comes_into_its_place_at_the_start_is_that_of_all_ranks(trained):
    folder, told = trained
    assert told["late"] == [0, 0]
    assert f"going on from global_step{CUT}" in (folder / "logs" / "late" / "rank_0.log").read_text()
    check(told, folder / "late" / RUN)


def test_a_rank_that_never_sees_it_is_named(trained):
    folder, told = trained
    assert told["unshared"] == [1, 1]
    said = (folder / "logs" / "unshared" / "rank_0.log").read_text()
    assert f"(rank 1) does not see the checkpoint own/{RUN}/global_step{CUT}, which rank 0 goes on from" in said
    assert "all nodes must share output_dir = 'own'" in said and "Traceback" not in said
    assert not (folder / "node_1" / "own").exists() and not (folder / "node_0" / "own" / RUN / "in_use.json").exists()


def test_an_exception_does_not_take_the_checkpoint_beside_it_with_it(trained):
    told = trained[1]["refused"]
    assert told["ends"] == [1, 1, 0, 0], told
    assert told["left"] in ([f"global_step{CUT}"], [f"tmp-global_step{CUT}", f"tmp-parts-global_step{CUT}"])
    assert told["seconds"] < 60
    check(trained[1], Path(told["run"]))
