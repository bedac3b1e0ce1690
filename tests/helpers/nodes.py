"""Two nodes of two ranks on this machine: network namespaces joined by a cable where that is allowed, else loopback."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.launch import ROOT, free_port

NODES, RANKS_A_NODE = 2, 2
LINK = "10.213.77"  # of the namespaces' own network
WORDS = ("--deepspeed", "--config", "config.toml")

# Stand-ins for pdsh and ssh, which run the command "there" with nothing of the environment, as those do. Of pdsh's
# flags DeepSpeed gives -S, -f and -w; %n is the number of the host. DeepSpeed's own way to end a job, `pkill -f`, would
# find more than this job here.
PDSH = """#!/bin/bash
while [[ $1 == -* ]]; do
  case $1 in
    -w) hosts=$2; shift 2 ;;
    -f) shift 2 ;;
    *) shift ;;
  esac
done
[[ $1 == pkill* ]] && exit 0
number=0
pids=()
for host in ${hosts//,/ }; do
  command="${*//%n/$number}"
  [[ $host == reel* ]] && prefix="ip netns exec $host" || prefix=
  $prefix env -i PATH="$PATH" HOME="$HOME" bash -c "$command" > >(sed -u "s/^/$host: /") 2>&1 &
  pids+=($!)
  number=$((number + 1))
done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
"""
SSH = "#!/bin/bash\nexit 0\n"


class Place(NamedTuple):
    """Where a node runs: the words before its command, and the address and name it is reached by."""

    name: str
    prefix: Sequence[str]
    address: str
    interface: str


class Ended(NamedTuple):
    """What became of a launcher."""

    status: int
    said: str
    at: float  # s, time.monotonic


LOOPBACK = [Place(name, [], "127.0.0.1", "lo") for name in ("localhost", "127.0.0.1")]


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
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{LINK}.{node + 1}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [
            Place(name, ["ip", "netns", "exec", name], f"{LINK}.{node + 1}", "cable") for node, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def environment(interface: str, **more: str) -> dict[str, str]:
    """Of ranks that are to run on CPUs and meet over `interface`."""
    own = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    kept = {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    return {**kept, **own, **more}


def torchrun(place: Place, number: int, address: str, port: int) -> list[str]:
    """The launcher that a person starts on one of the nodes."""
    return [
        *(*place.prefix, sys.executable, "-m", "torch.distributed.run", f"--nnodes={NODES}", f"--node_rank={number}"),
        *(f"--nproc_per_node={RANKS_A_NODE}", f"--master_addr={address}", f"--master_port={port}"),
    ]


def start_nodes(
    folders: Sequence[Path], *words: str, script: Path = ROOT / "train.py", timeout_s: float = 180, **more: str
) -> list[Ended]:
    """torchrun on a node for each of `folders`, in which it is started; until all have ended by themselves.

    Args:
        more: environment.
    """
    port = free_port()
    with places() as nodes:
        commands = [
            [*torchrun(node, number, nodes[0].address, port), str(script), *WORDS, *words]
            for number, node in enumerate(nodes[: len(folders)])
        ]
        return _run(commands, folders, {**os.environ, **environment(nodes[0].interface, **more)}, timeout_s)


def start_hostfile(folder: Path, *words: str, script: Path = ROOT / "train.py", timeout_s: float = 180) -> Ended:
    """`deepspeed --hostfile` in `folder`, with stand-ins for pdsh and ssh on its path."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in {"pdsh": PDSH, "ssh": SSH}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    with places() as nodes:
        (folder / "hosts").write_text("".join(f"{node.name} slots={RANKS_A_NODE}\n" for node in nodes))
        there = environment(nodes[0].interface)
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in there.items()))
        command = [
            *(str(Path(sys.executable).parent / "deepspeed"), "--hostfile=hosts", f"--master_addr={nodes[0].address}"),
            *(f"--master_port={free_port()}", str(script), *WORDS, *words),
        ]
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        (ended,) = _run([command], [folder], {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path}, timeout_s)
    return ended


def _run(
    commands: Sequence[Sequence[str]], folders: Sequence[Path], environment: dict[str, str], timeout_s: float
) -> list[Ended]:
    logs = [folder / f"launcher{number}.txt" for number, folder in enumerate(folders)]
    running = []
    try:
        for command, folder, log in zip(commands, folders, logs, strict=True):
            with log.open("w") as out:
                settings = {"cwd": folder, "env": environment, "stdout": out, "stderr": subprocess.STDOUT}
                running.append(subprocess.Popen(command, start_new_session=True, **settings))
        ended: dict[int, float] = {}
        deadline = time.monotonic() + timeout_s
        while len(ended) < len(running) and time.monotonic() < deadline:
            for number, process in enumerate(running):
                if process.poll() is not None:
                    ended.setdefault(number, time.monotonic())
            time.sleep(0.05)
        said = [log.read_text() for log in logs]
        assert len(ended) == len(running), f"only launchers {sorted(ended)} have ended:\n" + "\n=====\n".join(said)
        return [
            Ended(process.returncode, text, ended[number])
            for number, (process, text) in enumerate(zip(running, said, strict=True))
        ]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
