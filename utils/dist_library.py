"""Takes away the lock that a start which was killed left on the small library that DeepSpeed compiles for CPUs."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

LIBRARY = "deepspeed_shm_comm"
LEFT_S = 120.0  # processes that are not seen from here, as in another container, may hold a lock for so long
LOOK_S = 1.0

logger = logging.getLogger(__name__)


def clear_lock(say: Callable[[str], None], left_s: float = LEFT_S) -> None:
    """Wait for who compiles it now. torch makes a file `lock` for that time, and waits for ever where one was left.

    One rank of each machine calls this before any of them compiles.
    """
    root, told = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), False
    for lock in [*root.glob(f"{LIBRARY}/lock"), *root.glob(f"*/{LIBRARY}/lock")]:
        while lock.exists():
            with suppress(FileNotFoundError):
                age_s = time.time() - lock.stat().st_mtime
                if age_s > left_s and not any(_holds(process, lock) for process in _processes()):
                    logger.warning("taking away %s: a start that compiled there was killed", lock)
                    lock.unlink()
                    break
            if not told:
                told = True
                say(f"waiting for another start that compiles DeepSpeed's library, as {lock} says")
            time.sleep(LOOK_S)


def _processes() -> Iterator[Path]:
    return (path for path in Path("/proc").iterdir() if path.name.isdigit())


def _holds(process: Path, lock: Path) -> bool:
    """Whether a process has the file open, as torch has while it compiles. False where that cannot be seen."""
    with suppress(OSError):
        return any(os.path.samefile(link, lock) for link in (process / "fd").iterdir() if link.exists())
    return False
