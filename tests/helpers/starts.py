"""Starts of train.py on real ranks that may end in any way, with a family of the tests' own."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.helpers.launch import ROOT, free_port, rank_environment


class Started(NamedTuple):
    """How all ranks ended, and what they said."""

    statuses: list[int]
    said: list[str]

    @property
    def console(self) -> str:
        return "\n".join(self.said)


def worker(folder: Path, arguments: dict) -> None:
    """On every rank: starts of train.py one after another; leaves with the status of the last.

    A start is its words, its environment, and a function that is called in the rank before it.
    """
    models, train = (importlib.import_module(name) for name in ("models", "train"))
    models.FAMILIES |= arguments["families"]
    status = 0
    for words, environment, before in arguments["starts"]:
        os.environ |= environment
        if before:
            module, _, function = before.partition(":")
            words = getattr(importlib.import_module(module), function)(folder, words) or words
        status = train.main(words)
        sys.stdout.write(f"status {status}\n")
    sys.exit(status)


def start_ranks(
    folder: Path,
    starts: Sequence[tuple[Sequence[str], dict[str, str], str]],
    *,
    ranks: int,
    families: dict[str, str],
    timeout_s: float = 200,
) -> Started:
    """Run until every rank has ended by itself.

    Args:
        folder: made; what the ranks say goes there.
        starts: see `worker`; all but the last must end well.
    """
    folder.mkdir(parents=True)
    torch.save({"starts": [tuple(start) for start in starts], "families": families}, folder / "arguments.pt")
    port = free_port()
    logs = [folder / f"said_{rank}.txt" for rank in range(ranks)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.launch", "tests.helpers.starts:worker", str(folder)],
            env=rank_environment(rank, ranks, port),
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + timeout_s
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        ended = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    said = [log.read_text() for log in logs]
    assert None not in ended, f"not all ranks have ended ({ended}):\n" + "\n".join(said)
    return Started(ended, said)


def sets(**settings: object) -> list[str]:
    """Words of a command line; a key's dots are written as two underscores."""
    return [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
