"""Ranks as forks of one process that has imported everything: a start then costs what a start does, and no import.

python -m tests.helpers.forked module:function folder      # in a process of its own, which has no threads to fork
"""

import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


def run_forked(
    target: str, folder: Path, arguments: Any = None, timeout_s: float = 300, inside: Sequence[str] = ()
) -> Any:
    """What `target` ("module:function") returns, called as `function(folder, arguments)` in a process that may fork.

    Args:
        inside: a command that starts what follows it, as `unshare -Urm` does.
    """
    import torch

    from tests.helpers.launch import rank_environment

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    log = folder / "forked.log"
    with log.open("w") as out:
        ended = subprocess.run(
            [*inside, sys.executable, "-m", "tests.helpers.forked", target, str(folder)],
            env={**rank_environment(0, 1, 0), "WORLD_SIZE": "1"},
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
    assert ended.returncode == 0, log.read_text()[-8000:]
    return torch.load(folder / "result.pt", weights_only=False)


def import_all() -> None:
    """What a start imports, some of it where it is first used: once for all forks."""
    for name in ("utils.train.assemble", "torch._dynamo", "torch.utils.tensorboard", "peft", "tests.helpers.toy"):
        importlib.import_module(name)


class Rank(NamedTuple):
    """One process of a start."""

    pid: int
    log: Path


def start(ranks: int, folder: Path, action: Callable[[], Any]) -> list[Rank]:
    """Fork `ranks` processes that each do `action`; their output and results are kept in `folder`."""
    from tests.helpers.launch import free_port

    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [_fork(rank, ranks, port, folder, action) for rank in range(ranks)]


def _fork(rank: int, ranks: int, port: int, folder: Path, action: Callable[[], Any]) -> Rank:
    import torch

    from tests.helpers.launch import rank_environment

    log = folder / f"rank_{rank}.log"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Rank(pid, log)
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ.update(rank_environment(rank, ranks, port))
        torch.save(action(), folder / f"result_{rank}.pt")
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def statuses(ranks: Sequence[Rank], timeout_s: float = 120) -> list[int]:
    """How each has ended, as `subprocess` tells it: below 0 by a signal. What has not by then is killed."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + timeout_s
    while len(ended) < len(ranks):
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.pid not in ended:
                    os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            if rank.pid not in ended:
                pid, status = os.waitpid(rank.pid, os.WNOHANG)
                if pid:
                    ended[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [ended[rank.pid] for rank in ranks]


def results(ranks: int, folder: Path, action: Callable[[], Any]) -> list[Any]:
    """What `action` returned on each rank."""
    import torch

    started = start(ranks, folder, action)
    ended = statuses(started)
    told = "\n".join(f"--- {rank.log}\n{rank.log.read_text()[-4000:]}" for rank in started)
    assert not any(ended), f"{ended}\n{told}"
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(ranks)]


if __name__ == "__main__":
    import torch

    where = Path(sys.argv[2])
    module, _, function = sys.argv[1].partition(":")
    torch.set_num_threads(1)
    returned = getattr(importlib.import_module(module), function)(where, torch.load(where / "arguments.pt"))
    torch.save(returned, where / "result.pt")
