"""Starts real gloo ranks on this machine and gives back what each of them returned."""

import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank ended with an error; the text is its own output."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, ranks: int, port: int, **extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def run_ranks(
    target: str, ranks: int, folder: Path, arguments: Any = None, timeout_s: float = 500, **extra: str
) -> list[Any]:
    """Call `target` ("module:function") as `function(folder, arguments)` on every rank; its returns, in rank order.

    Arguments and returns are what torch.save can write. The first rank to fail ends all, and its output is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    port = free_port()
    logs = [folder / f"rank_{rank}.log" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.launch", target, str(folder)],
            env=rank_environment(rank, ranks, port, **extra),
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        _wait(processes, logs, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(ranks)]


def _wait(processes: Sequence[subprocess.Popen], logs: Sequence[Path], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(p.poll() is None for p in processes):
        for rank, process in enumerate(processes):
            if process.poll():
                raise RankError(f"rank {rank} ended with {process.returncode}:\n{logs[rank].read_text()[-6000:]}")
        if time.monotonic() > deadline:
            told = "\n".join(f"--- rank {i}\n{log.read_text()[-2000:]}" for i, log in enumerate(logs))
            raise RankError(f"no end after {timeout_s} s:\n{told}")
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.returncode:
            raise RankError(f"rank {rank} ended with {process.returncode}:\n{logs[rank].read_text()[-6000:]}")


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    value, reference = value.double(), reference.double()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-12))


def gather_results(results: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of all stages; those that several data ranks hold must be equal."""
    merged: dict[str, torch.Tensor] = {}
    for part in results:
        for name, tensor in part.items():
            assert name not in merged or torch.equal(merged[name], tensor), f"{name} differs between data ranks"
            merged[name] = tensor
    return merged


if __name__ == "__main__":
    where = Path(sys.argv[2])
    module, _, function = sys.argv[1].partition(":")
    torch.set_num_threads(1)
    returned = getattr(importlib.import_module(module), function)(where, torch.load(where / "arguments.pt"))
    torch.save(returned, where / f"result_{os.environ['RANK']}.pt")
