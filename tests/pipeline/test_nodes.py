"""Two nodes of two ranks: a launcher each, as on two machines, in network namespaces where that is allowed."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT, free_port
from tests.helpers.tiny import tiny_checkpoint
from tests.pipeline.test_resume import write_inputs

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]

NODES, RANKS_A_NODE = 2, 2
LINK = "10.213.77"  # of the namespaces' own network
SETS = ["--set", "pipeline_stages=2", "--set", "eval_every_n_steps=2", "--set", "save_every_n_steps=2"]


class Place:
    """Where a node runs: the words before its command, and the address it is reached at."""

    def __init__(self, prefix: Sequence[str], address: str, interface: str) -> None:
        self.prefix, self.address, self.interface = list(prefix), address, interface


LOOPBACK = [Place([], "127.0.0.1", "lo")] * NODES


@functools.cache
def may_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid():
        return False
    name = f"reel{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    link = (
        made and subprocess.run(["ip", "link", "add", name[:15], "type", "veth"], capture_output=True).returncode == 0
    )
    subprocess.run(["ip", "link", "del", name[:15]], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return link


@contextmanager
def places() -> Iterator[list[Place]]:
    """Two network namespaces joined by a cable; or loopback."""
    if not may_make_namespaces():
        yield LOOPBACK
        return
    names = [f"reel{os.getpid()}n{node}" for node in range(NODES)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "reel0", "netns", names[0], "type", "veth", "peer", "name", "reel1", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{LINK}.{node + 1}/24", "dev", f"reel{node}")
            for device in (f"reel{node}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            Place(["ip", "netns", "exec", name], f"{LINK}.{node + 1}", f"reel{node}") for node, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_nodes(folder: Path, *words: str) -> list[tuple[int, str]]:
    """A launcher on each node, started in `folder`; how each ended and what it said."""
    port = free_port()
    with places() as nodes:
        running = []
        for number, node in enumerate(nodes):
            command = [
                *(*node.prefix, sys.executable, "-m", "torch.distributed.run", f"--nnodes={NODES}"),
                *(f"--node_rank={number}", f"--nproc_per_node={RANKS_A_NODE}"),
                *(f"--master_addr={nodes[0].address}", f"--master_port={port}"),
                *(str(ROOT / "train.py"), "--config", "config.toml", *SETS, *words),
            ]
            own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface}
            said = (folder / f"node{number}.txt").open("w+")
            process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **own}, stdout=said, stderr=subprocess.STDOUT
            )
            running.append((process, said))
        ended = []
        try:
            for process, said in running:
                process.wait(timeout=180)
                said.seek(0)
                ended.append((process.returncode, said.read()))
        finally:
            for process, said in running:
                process.kill()
                process.wait()
                said.close()
    return ended


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    write_inputs(folder)
    tiny_checkpoint(folder)
    return folder


@pytest.mark.pipeline
def test_two_nodes_train_and_resume(folder):
    first = start_nodes(folder, "--set", "max_steps=2")
    assert [status for status, _ in first] == [0, 0], first
    assert "2 pipeline stages x 2 data ranks" in first[0][1]
    (run,) = (path for path in (folder / "runs").iterdir() if path.name != "cache")
    assert {path.name for path in (run / "logs").iterdir()} == {f"rank_{rank}.log" for rank in range(4)}
    assert (run / "epoch1" / "adapter_model.safetensors").is_file() and (run / "latest").read_text() == "global_step2\n"
    assert not list((folder / "runs").glob(".shared-*")), "what was written to see who shares the folder is gone"
    second = start_nodes(folder, "--set", "max_steps=3", "--resume_from_checkpoint")
    assert [status for status, _ in second] == [0, 0], second
    assert "going on from global_step2" in second[0][1]
    assert [line["step"] for line in metrics_of(run) if "train/loss" in line] == [1, 2, 3]
