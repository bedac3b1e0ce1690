"""What a machine has of what training needs, and what is known to break: `python -m utils.doctor`."""

import argparse
import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GIB = 2**30
LEAST_PYTHON = (3, 10)
LEAST_SHM, LEAST_OPEN_FILES, LEAST_FREE = GIB, 1024, 20 * GIB
REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"
# What training imports; the rest of requirements.txt is for tests or for one kind of file.
PACKAGES = (
    *("torch", "deepspeed", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic", "toml"),
    *("numpy", "av", "imageio", "pillow", "tensorboard", "multiprocess", "rich", "psutil", "ninja"),
)
# Variables that change how ranks meet and compute. No others are looked at: what is not read cannot be shown.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SOCKET_IFNAME"),
    *("GLOO_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"),
)
NO_P2P_GPUS = re.compile(r"RTX (40|50)\d\d|RTX \d000 Ada")


class Line(NamedTuple):
    """One thing that was looked at."""

    level: str  # "ok", "note": worth knowing; "broken": training will not work
    what: str
    found: str
    mend: str = ""


class Facts(NamedTuple):
    """What `judge` needs of a machine; `look` finds it, and tests make it up."""

    python: tuple[int, ...]
    system: str  # of `platform.system()`
    release: str
    packages: Mapping[str, str | None]  # installed version; None where it is absent
    shm_bytes: int | None  # of /dev/shm
    open_files: int  # the limit
    gpus: Sequence[Mapping[str, Any]]  # name, gib, capability, bf16
    torch_fault: str = ""  # why torch cannot be imported
    environment: Mapping[str, str] = {}  # of VARIABLES


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


class Pair(NamedTuple):
    """What is known to break together."""

    applies: Callable[[Facts], bool]
    level: str
    told: str
    mend: str
    source: str


def _installed(facts: Facts, name: str) -> tuple[int, ...]:
    return _version(facts.packages.get(name) or "9999")


PAIRS: tuple[Pair, ...] = (
    Pair(
        lambda facts: _installed(facts, "deepspeed") < (0, 19, 3),
        "broken",
        "DeepSpeed below 0.19.3 scales gradients wrongly under a pipeline",
        "pip install -r requirements.txt",
        "DeepSpeed's release notes; tests/pipeline/test_wan_parity.py holds the gradients against one process",
    ),
    Pair(
        lambda facts: _installed(facts, "torch") < (2, 6),
        "broken",
        "torch below 2.6 may run code from a .pth file even with weights_only=True",
        "install the torch of requirements.txt",
        "CVE-2025-32434",
    ),
    Pair(
        lambda facts: _installed(facts, "numpy") >= (2,) and _installed(facts, "torch") < (2, 3),
        "broken",
        "torch below 2.3 was built for numpy 1",
        'pip install "numpy<2", or a newer torch',
        "torch 2.3's release notes",
    ),
    Pair(
        lambda facts: facts.system == "Windows",
        "broken",
        "DeepSpeed's pipeline needs NCCL or gloo over Unix sockets, which Windows has not",
        "use WSL 2 or Linux",
        "diffusion-pipe's README, Windows support",
    ),
    Pair(
        lambda facts: facts.system == "Linux" and "microsoft" in facts.release.lower(),
        "note",
        "WSL: files under /mnt are slow, and half of the memory is Windows'",
        "keep clips and cache inside WSL's own disk; set memory= in .wslconfig",
        "learn.microsoft.com/windows/wsl/wsl-config and /filesystems",
    ),
    Pair(
        lambda facts: len(_no_p2p(facts)) > 1 and facts.environment.get("NCCL_P2P_DISABLE") != "1",
        "note",
        "several GPUs of a kind without peer-to-peer: NCCL may hang or fail at the first exchange",
        "NCCL_P2P_DISABLE=1 NCCL_IB_DISABLE=1 before the command, if it does",
        "diffusion-pipe's README, RTX 4000 series",
    ),
)


def _no_p2p(facts: Facts) -> list[str]:
    return [gpu["name"] for gpu in facts.gpus if NO_P2P_GPUS.search(gpu["name"])]


def pins(text: str, python: tuple[int, ...]) -> dict[str, str]:
    """Package -> pinned version of requirements.txt, for this Python."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        wanted, _, marker = line.partition("#")[0].partition(";")
        name, equals, version = wanted.strip().partition("==")
        old = 'python_version < "3.11"' in marker
        if equals and (not marker or old == (python[:2] < (3, 11))):
            found[name.partition("[")[0].lower()] = version.strip()
    return found


def look() -> Facts:
    """This machine."""
    packages = {name: _package(name) for name in PACKAGES}
    shm = Path("/dev/shm")
    fault, gpus = "", []
    if packages["torch"]:
        try:
            gpus = list(_gpus())
        except Exception as error:  # a broken build fails in many ways, and all of them are to be told
            fault = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return Facts(
        python=sys.version_info[:3],
        system=platform.system(),
        release=platform.release(),
        packages=packages,
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else None,
        open_files=_open_files(),
        gpus=gpus,
        torch_fault=fault,
        environment={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _open_files() -> int:
    """How many this process may have open; -1 where the system knows no such limit."""
    try:
        import resource
    except ImportError:  # Windows, which is told of by itself
        return -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _package(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> Iterator[dict[str, Any]]:
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        bf16 = about.major >= 8
        capability = f"{about.major}.{about.minor}"
        yield {"name": about.name, "gib": about.total_memory / GIB, "capability": capability, "bf16": bf16}


def judge(facts: Facts, requirements: str) -> list[Line]:
    """What is right, odd and broken about `facts`, given the text of requirements.txt."""
    lines = [_python(facts)]
    pinned = pins(requirements, facts.python)
    lines += [_about(name, version, pinned.get(name)) for name, version in facts.packages.items()]
    if facts.torch_fault:
        lines.append(Line("broken", "import torch", facts.torch_fault, "install torch again, for this machine"))
    for gpu in facts.gpus:
        found = f"{gpu['name']}, {gpu['gib']:.0f} GiB, compute capability {gpu['capability']}"
        mend = "" if gpu["bf16"] else "no bfloat16: set dtype = 'float16' or 'float32' in [model]"
        lines.append(Line("ok" if gpu["bf16"] else "note", "GPU", found, mend))
    if not facts.gpus:
        mend = "training runs on the CPU, which is for tests; look at nvidia-smi and the build of torch"
        lines.append(Line("note", "GPU", "none that torch can use", mend))
    lines += _limits(facts)
    lines += [Line(p.level, "known", p.told, f"{p.mend} ({p.source})") for p in PAIRS if p.applies(facts)]
    return lines


def _python(facts: Facts) -> Line:
    found = ".".join(map(str, facts.python))
    if facts.python[:2] < LEAST_PYTHON:
        return Line("broken", "Python", found, "3.10 or newer is needed")
    return Line("ok", "Python", found)


def _about(name: str, version: str | None, pinned: str | None) -> Line:
    if version is None:
        return Line("broken", name, "not installed", "pip install -r requirements.txt")
    if pinned and _version(version) != _version(pinned):
        return Line("note", name, version, f"tested with {pinned}")
    return Line("ok", name, version)


def _limits(facts: Facts) -> Iterator[Line]:
    if facts.shm_bytes is not None:
        small = facts.shm_bytes < LEAST_SHM
        mend = "clips and NCCL travel through it: start the container with --shm-size=8g or --ipc=host"
        found = f"{facts.shm_bytes / GIB:.2f} GiB"
        yield Line("note" if small else "ok", "/dev/shm", found, mend if small else "")
    few = 0 <= facts.open_files < LEAST_OPEN_FILES
    mend = f"ulimit -n {16 * LEAST_OPEN_FILES} before the command: shards, cache and workers each hold files open"
    yield Line("note" if few else "ok", "open files", str(facts.open_files), mend if few else "")


def surroundings(facts: Facts) -> Iterator[Line]:
    """What is told and not judged, but for the disk."""
    yield Line("ok", "system", f"{platform.platform()}, {os.cpu_count()} cores")
    if facts.packages.get("psutil"):
        import psutil

        memory = psutil.virtual_memory()
        yield Line("ok", "memory", f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free")
    free = shutil.disk_usage(Path.cwd()).free
    mend = "a cache and checkpoints may take more; see --plan" if free < LEAST_FREE else ""
    yield Line("note" if mend else "ok", "disk", f"{free / GIB:.0f} GiB free in {Path.cwd()}", mend)
    if facts.packages.get("torch") and not facts.torch_fault:
        yield from _builds(bool(facts.gpus))
    for name, value in facts.environment.items():
        yield Line("ok", name, value)


def _builds(has_gpus: bool) -> Iterator[Line]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        yield Line("ok", "driver", driver.read_text().splitlines()[0].strip())
    yield Line("ok", "torch's CUDA", str(torch.version.cuda or torch.version.hip or "none: a build for the CPU"))
    if has_gpus and torch.distributed.is_nccl_available():
        yield Line("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    yield Line("ok", "gloo", "there" if torch.distributed.is_gloo_available() else "not in this build of torch")


def table(lines: Sequence[Line]) -> str:
    """One line each, what is wrong with its mend below it."""
    marks, width = {"ok": "  ", "note": "! ", "broken": "X "}, max(len(line.what) for line in lines)
    rows = [f"{marks[line.level]}{line.what:<{width}}  {line.found}" for line in lines]
    mends = [f"\n{'':{width + 4}}-> {line.mend}" if line.mend else "" for line in lines]
    return "".join(f"{row}{mend}\n" for row, mend in zip(rows, mends, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status: 1 where something is broken."""
    argparse.ArgumentParser(prog="python -m utils.doctor", description=__doc__).parse_args(arguments)
    facts = look()
    lines = [*surroundings(facts), *judge(facts, REQUIREMENTS.read_text(encoding="utf-8"))]
    broken = sum(line.level == "broken" for line in lines)
    notes = sum(line.level == "note" for line in lines)
    sys.stdout.write(f"{table(lines)}\n{broken} broken, {notes} worth a look\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
