"""Two nodes of two ranks: they train as one does, and end together when one of them fails; see `helpers.nodes`."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import forked
from tests.helpers.launch import ROOT
from tests.helpers.nodes import start_hostfile, start_nodes
from tests.helpers.tiny import tiny_checkpoint
from tests.pipeline.test_resume import write_inputs

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]

FAULTY = ROOT / "tests" / "helpers" / "faulty_train.py"
SETS = ["--set", "pipeline_stages=2", "--set", "eval_every_n_steps=2", "--set", "save_every_n_steps=2"]
ONE_NODE = "one_node"  # its run's folder


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/"))} for line in lines]


def run_in(folder: Path) -> Path:
    (run,) = (path for path in folder.iterdir() if path.name != "cache")
    return run


def on_one_node(folder: Path, _: None) -> list[str]:
    """Three steps in one go, on four ranks of one node; then starts that go wrong, and what their ranks said."""
    import train
    from utils.train import preflight, setup

    forked.import_all()
    words = ["--config", str(folder / "config.toml"), *SETS, "--set", "max_steps=3"]
    own = ["--set", f"output_dir='{folder / ONE_NODE}'", "--set", f"cache_dir='{folder / 'runs' / 'cache'}'"]
    assert forked.results(4, folder / "said", lambda: train.main([*words, *own])) == [0] * 4
    setup.MEETING_S, preflight.SHARED_S = 2.0, 0.5

    def elsewhere() -> int:
        where = folder / f"folder{os.environ['RANK']}"
        where.mkdir()
        os.chdir(where)
        return train.main([*words, "--set", "output_dir='mine'"])

    def but_one() -> int:
        return 0 if os.environ["RANK"] == "1" else train.main([*words, *own, "--set", "stall_timeout_s=2"])

    told = []
    for action in (elsewhere, but_one):
        ranks = forked.start(2, folder / action.__name__, action)
        statuses = forked.statuses(ranks, 60)
        status = statuses[0] or torch.load(folder / action.__name__ / "result_0.pt")
        assert status == 1, ranks[0].log.read_text()
        told.append(ranks[0].log.read_text())
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_inputs(folder)
    tiny_checkpoint(folder)
    return folder


def test_two_nodes_train_and_resume_as_one_node_does(folder):
    first = start_nodes([folder] * 2, *SETS, "--set", "max_steps=2")
    assert [node.status for node in first] == [0, 0], first
    assert "2 pipeline stages x 2 data ranks" in first[0].said
    run = run_in(folder / "runs")
    assert {path.name for path in (run / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(4)}
    assert (run / "latest").read_text() == "global_step2\n"
    assert not list((folder / "runs").glob(".shared-*")), "what was written to see who shares the folder is gone"
    assert not (run / "alive").exists()
    second = start_hostfile(folder, *SETS, "--set", "max_steps=3", "--resume_from_checkpoint")
    assert second.status == 0, second.said
    assert "going on from global_step2" in second.said
    assert "node_rank=1" in second.said or "nnodes=2, num_local_procs=2, node_rank=1" in second.said
    assert [line["step"] for line in metrics_of(run) if "train/loss" in line] == [1, 2, 3]
    unshared, alone = forked.run_forked("tests.pipeline.test_nodes:on_one_node", folder)
    whole = run_in(folder / ONE_NODE)
    assert metrics_of(run) == metrics_of(whole)
    loras = {path.relative_to(whole): load_file(path) for path in whole.rglob("adapter_model.safetensors")}
    assert loras
    for name, expected in loras.items():
        found = load_file(run / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert "output_dir = 'mine': " in unshared and "(rank 1) does not see what " in unshared
    assert "cache_dir = 'mine/cache': " in unshared and "all nodes must share this folder" in unshared
    assert "error: 1 of 2 ranks did not come to 127.0.0.1:" in alone and "rank 1" in alone


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_inputs(folder)
    head, _, rest = (folder / "config.toml").read_text().partition("[model]")
    rest = "[adapter]" + rest.partition("[adapter]")[2]
    (folder / "config.toml").write_text(f"{head}[model]\ntype = 'faulty'\n{rest}")
    return folder


def test_an_error_on_one_node_is_the_last_word_of_both(toy):
    fault = {"TOY_FAULT": "refuse", "TOY_FAULT_RANK": "3", "TOY_FAULT_CALL": "5", "TOY_FAULT_EVALUATING": "0"}
    sets = ["--set", "max_steps=9", "--set", "activation_checkpointing=false"]
    nodes = start_nodes([toy] * 2, *sets, script=FAULTY, **fault)
    assert [node.status for node in nodes] == [1, 1], nodes
    assert abs(nodes[0].at - nodes[1].at) < 30
    error = "a clip that nobody likes; use another"
    place = "in step 3, forward of micro-batch 1 (bucket 64x64x"
    first = f"rank 3 ended first, {place}"
    other = nodes[0].said
    told = next(line for line in other.splitlines() if "error: rank 3 ended first" in line)
    assert first in told and ", sample " in told and told.endswith(error)
    table = other.rpartition("Root Cause (first observed failure):")[2]
    assert first in table and error in table, "torchrun's own last words have it too"
    own = nodes[1].said
    assert f"error: {error}" in own and place in own
    assert error in own.rpartition("Root Cause (first observed failure):")[2]
