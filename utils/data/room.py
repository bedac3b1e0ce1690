"""Room for the cache: on the disk, before it is needed and when it runs out, and in the host's memory."""

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from utils.monitor.console import short_bytes

GIB = 2**30
FREE_SHARE = 0.25  # of the host's free memory that decoded clips may take, where nothing is set
_TRIAL_BYTES = 4096  # a full disk has room for an empty file
_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Groups(NamedTuple):
    """Where a version of control groups says what a group may use and uses; see the kernel's cgroup-v2 and
    cgroup-v1/memory."""

    controller: str  # of its line in /proc/self/cgroup
    root: str
    limits: tuple[str, ...]
    used: str
    cached: str  # in memory.stat: files that the kernel lets go of where room is wanted


_GROUPS = (
    # past memory.high the kernel slows a group down until it hardly moves
    _Groups("", "sys/fs/cgroup", ("memory.max", "memory.high"), "memory.current", "inactive_file"),
    _Groups(
        "memory",
        "sys/fs/cgroup/memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def unwritable(root: Path) -> str:
    """Why nothing can be written to the folder `root`, in the system's words; "" where a trial goes well."""
    try:
        with tempfile.TemporaryFile(dir=root, buffering=0) as file:  # rights tell little: of root's on NFS, say
            file.write(bytes(_TRIAL_BYTES))
    except OSError as error:
        return error.strerror or type(error).__name__
    return ""


def require_disk(root: Path, need: int) -> None:
    """Raises `ValueError` where the disk of the cache at `root` has less than `need` bytes free."""
    free = shutil.disk_usage(root).free
    if need > free:
        raise ValueError(
            f"cache_dir = '{root}': encoding takes {short_bytes(need)} of disk and {short_bytes(free)} are free; make "
            "room, or name another folder"
        )


@contextmanager
def full_disk_told(root: Path, need: Callable[[], int]) -> Iterator[None]:
    """Turn the system's word of a full disk into one of the cache at `root`.

    Args:
        need: bytes that are still to be written, as far as one knows.

    Raises:
        OSError: with a message alone, and the system's error as its cause.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        quota = "the quota" if error.errno == errno.EDQUOT else "the disk"
        raise OSError(
            f"{quota} of cache_dir = '{root}' is full: {short_bytes(shutil.disk_usage(root).free)} are free, and about "
            f"{short_bytes(need())} are still to be written; make room or name another folder, and start again: what "
            "is encoded is kept"
        ) from error


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this host, or the container or batch job that this process runs in, can still give.

    Args:
        root: where `proc` and `sys` lie.
    """
    return min([psutil.virtual_memory().available, *_groups_free(root)])


def _groups_free(root: Path) -> Iterator[int]:
    """Of each control group that this process is in, from its own up: a limit of any of them counts."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    # number, controllers, path
    parts = [each for line in lines if len(each := line.split(":", 2)) == 3]
    for groups in _GROUPS:
        folders = {root / groups.root}  # a container may see its own group there, and be told the host's path to it
        for _, controllers, path in parts:
            if groups.controller in controllers.split(",") and ".." not in path.split("/"):
                inside = Path(path.strip("/"))
                folders |= {root / groups.root / each for each in (inside, *inside.parents)}
        for folder in folders:
            yield from _group_free(folder, groups)


def _group_free(folder: Path, groups: _Groups) -> Iterator[int]:
    with suppress(OSError, ValueError):
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        free = int(dict(pairs).get(groups.cached, 0)) - int((folder / groups.used).read_text())
        for name in groups.limits:
            with suppress(OSError, ValueError):  # "max" is no number
                yield max(0, int((folder / name).read_text()) + free)
