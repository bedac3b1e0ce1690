"""Faults injected into real runs of two ranks: every rank ends, soon, and the last words are the first error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.launch import ROOT, free_port, rank_environment
from tests.helpers.toy_faults import CALL, EVALUATING, FAULT, RANK
from tests.pipeline.test_resume import write_inputs
from utils.train.watchdog import STALLED

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]

SECOND = 3  # training call of a block: two micro-batches a step, so micro-batch 1 of step 2
STALL_S = 5


def worker(folder: Path, arguments: dict[str, Any]) -> None:
    """On every rank: a start of train.py; leaves with its exit status."""
    import models
    import train

    models.FAMILIES["faulty"] = "tests.helpers.toy_faults:FaultyToy"
    if arguments.get("die_in_checkpoint") == os.environ["RANK"]:
        from tests.helpers.toy_faults import die
        from utils.train.checkpoint_write import Checkpointer

        Checkpointer._write = lambda *_: die()
    sys.exit(train.main(arguments["words"]))


class Ended(NamedTuple):
    """What became of a rank."""

    status: int
    seconds: float  # after the first of them had ended
    said: str


class Case(NamedTuple):
    run: Path
    ranks: list[Ended]

    @property
    def console(self) -> str:
        return "".join(rank.said for rank in self.ranks)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    write_inputs(folder)
    head, _, rest = (folder / "config.toml").read_text().partition("[model]")
    rest = "[adapter]" + rest.partition("[adapter]")[2]
    (folder / "config.toml").write_text(f"{head}[model]\ntype = 'faulty'\n{rest}")
    return folder


def start(inputs: Path, name: str, fault: str = "", call: int = SECOND, *, ranks: int = 2, **more: Any) -> Case:
    """Run until all ranks have ended by themselves; at most 60 s."""
    import torch

    folder = inputs / name
    folder.mkdir()
    sets = {"output_dir": f"'{folder}'", "cache_dir": f"'{inputs}/cache'", "stall_timeout_s": STALL_S, "max_steps": 3}
    sets |= {"checkpoint_every_n_minutes": 100, "eval_every_n_steps": 100, "eval_before_first_step": "false"}
    sets |= {"adapter.dropout": 0.0, "uncond_fraction": 0.0, "activation_checkpointing": "false"}
    sets |= more.pop("sets", {})
    words = ["--config", str(inputs / "config.toml")]
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    torch.save({"words": words, **more}, folder / "arguments.pt")
    extra = {FAULT: fault, RANK: "1", CALL: str(call), EVALUATING: "1" if more.get("evaluating") else "0"}
    port = free_port()
    logs = [folder / f"said_{rank}.txt" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.launch", "tests.pipeline.test_stall:worker", str(folder)],
            env=rank_environment(rank, ranks, port, **(extra if fault else {})),
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        ended = _ends(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return Case(run, [Ended(*end, log.read_text()) for end, log in zip(ended, logs, strict=True)])


def _ends(processes: list[subprocess.Popen]) -> list[tuple[int, float]]:
    ended: dict[int, float] = {}
    deadline = time.monotonic() + 180  # a machine with other jobs takes its time to start
    while len(ended) < len(processes) and time.monotonic() < deadline:
        for rank, process in enumerate(processes):
            if process.poll() is not None:
                ended.setdefault(rank, time.monotonic())
        time.sleep(0.05)
    assert len(ended) == len(processes), f"only ranks {sorted(ended)} have ended"
    return [(process.returncode, ended[rank] - min(ended.values())) for rank, process in enumerate(processes)]


def test_a_rank_that_hangs_ends_the_run_with_everyones_stacks(inputs):
    case = start(inputs, "hang", "hang")
    assert [rank.status for rank in case.ranks] == [STALLED, STALLED], case.console
    stacks = {path.name.rpartition("_rank_")[2]: path.read_text() for path in (case.run / "stalls").glob("*_rank_*")}
    assert set(stacks) == {"0.txt", "1.txt"}
    assert "toy_faults.py" in stacks["1.txt"]
    assert "in hang" in stacks["1.txt"]
    assert "_exec_recv_grads" in stacks["0.txt"]
    said = case.ranks[0].said
    assert "rank 0 (stage 0) waits for gradients of micro-batch 1 from rank 1 (stage 1)" in said
    assert "rank 1 (stage 1) has been in forward of micro-batch 1" in said
    assert "look at rank 1 first" in said
    assert "in step 2, waiting for gradients of micro-batch 1 (bucket 64x64x5, sample" in said
    assert "no progress" not in case.ranks[1].said, "one rank tells"


def test_an_error_of_one_rank_is_the_last_word(inputs):
    case = start(inputs, "refuse", "refuse")
    assert all(rank.status == 1 and rank.seconds < 15 for rank in case.ranks), case.console
    assert "a clip that nobody likes; use another" in case.ranks[1].said
    assert "in step 2, forward of micro-batch 1 (bucket 64x64x" in case.ranks[1].said
    last = case.ranks[0].said.strip().splitlines()[-1]
    assert "rank 1 ended first, in step 2, forward of micro-batch 1 (bucket 64x64x" in last
    assert ", sample " in last
    assert last.endswith("a clip that nobody likes; use another")
    assert "Traceback" not in case.console
    (fault,) = (case.run / "errors").iterdir()
    assert json.loads(fault.read_text())["text"] == "a clip that nobody likes; use another"
    assert not (case.run / "alive").exists()


@pytest.mark.parametrize("when", ["training", "evaluating", "checkpointing"])
def test_a_killed_rank_is_missed_at_once(inputs, when):
    more = {
        "training": {"fault": "die"},
        "evaluating": {"fault": "die", "evaluating": True, "sets": {"eval_before_first_step": "true"}},
        "checkpointing": {"die_in_checkpoint": "1"},
    }[when]
    case = start(inputs, f"kill_{when}", **more)
    alive, dead = case.ranks
    assert dead.status == -9
    assert alive.status == 1, alive.said
    assert alive.seconds < 15
    assert "is gone without a word" in alive.said
    last = alive.said.strip().splitlines()[-1]
    place = {
        "training": "step 2",
        "evaluating": "the evaluation of held_out",
        "checkpointing": "writing the checkpoint",
    }
    assert f"rank 0 missed it in {place[when]}" in last
    assert "Traceback" not in alive.said


def test_memory_that_runs_out_says_what_would_help(inputs):
    case = start(inputs, "memory", "run_out")
    assert [rank.status for rank in case.ranks] == [1, 1]
    said = case.ranks[1].said
    assert "GPU memory of stage 1 ran out in step 2, forward of micro-batch 1 (bucket 64x64x5, sample " in said
    assert "2.50 GiB more were asked for, 1.20 GiB of 79.15 GiB were free" in said
    assert said.count("\n  - ") == 3
    assert "activation_checkpointing = true (now false)" in said
    assert "rank 1 ended first" in case.ranks[0].said
    assert "Traceback" not in case.console
    assert "Traceback" in (case.run / "logs" / "rank_1.log").read_text()
