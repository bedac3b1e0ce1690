"""Room for the cache: on the disk, before it is needed and when it runs out, and in the host's memory."""

import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from utils.monitor.console import short_bytes

GIB = 2**30
FREE_SHARE = 0.25  # of the host's free memory that decoded clips may take, where nothing is set
_TRIAL_BYTES = 4096  # a full disk has room for an empty file
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What a container may use and uses, by version of control groups; see the kernel's cgroup-v2 and cgroup-v1/memory.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
        "/sys/fs/cgroup/memory/memory.stat",
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


def free_memory() -> int:
    """Bytes that this host, or the container that this process runs in, can still give."""
    return min([psutil.virtual_memory().available, *_container_free()])


def _container_free() -> Iterator[int]:
    for limit, used, cached, stat in _LIMITS:
        try:
            top = Path(limit).read_text().strip()
            if top != "max":
                pairs = (line.split() for line in Path(stat).read_text().splitlines())
                yield max(0, int(top) - int(Path(used).read_text()) + int(dict(pairs).get(cached, 0)))
        except (OSError, ValueError):
            continue
