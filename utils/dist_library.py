"""Takes away the lock that a start which was killed left on the small library that DeepSpeed compiles for CPUs."""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

LIBRARY = "deepspeed_shm_comm"
LEFT_S = 120.0  # processes that are not seen from here, as in another container, may hold a lock for so long
LOOK_S = 1.0
MOST_SHOWN = 100  # characters of a command line
AGAIN_S = 60.0  # until it is told again who is waited for

logger = logging.getLogger(__name__)


def clear_lock(say: Callable[[str], None], left_s: float = LEFT_S) -> None:
    """Wait for who compiles it now. torch makes a file `lock` for that time, and waits for ever where one was left.

    One rank of each machine calls this before any of them compiles.

    Args:
        say: told of who is waited for, and again each minute.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob(f"{LIBRARY}/lock"), *root.glob(f"*/{LIBRARY}/lock")]:
        with suppress(FileNotFoundError):
            _wait_for(lock, say, left_s)


def _wait_for(lock: Path, say: Callable[[str], None], left_s: float) -> None:
    """Until it is gone, which may be a `FileNotFoundError`; taken away where nobody has it."""
    made, seen = 0.0, 0.0
    again: float | None = None
    while lock.exists():
        stamp, now = lock.stat().st_mtime, time.monotonic()
        if stamp != made:
            made, seen = stamp, now
        # one that came from a clock that was ahead would be young for long
        age_s = max(_now(lock.parent) - made, now - seen)
        if age_s > left_s and _holder(lock) is None:
            logger.warning("taking away %s: a start that compiled there was killed", lock)
            lock.unlink()
            return
        if again is None:
            say(f"waiting for another start that compiles DeepSpeed's library, as {lock} says")
            again = now + AGAIN_S
        elif now > again:
            say(f"waiting still: {_words(lock, left_s)}")
            again = now + AGAIN_S
        time.sleep(LOOK_S)


def _now(folder: Path) -> float:
    """By the clock that the times of files there come from, which is a file server's where one holds them."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime
    return time.time()


def _words(lock: Path, left_s: float) -> str:
    holder = _holder(lock)
    if holder is None:
        return f"no process that is seen from here has {lock} open; it is taken away when it is {left_s:.0f} s old"
    with suppress(OSError):
        command = (holder / "cmdline").read_text(errors="replace").replace("\0", " ").strip()[:MOST_SHOWN]
        return f"process {holder.name} ({command}) has {lock} open; if it is stuck, end it: kill {holder.name}"
    return f"process {holder.name} has had {lock} open until now"


def _holder(lock: Path) -> Path | None:
    return next((path for path in Path("/proc").iterdir() if path.name.isdigit() and _holds(path, lock)), None)


def _holds(process: Path, lock: Path) -> bool:
    """Whether a process has the file open, as torch has while it compiles. False where that cannot be seen."""
    with suppress(OSError):
        return any(os.path.samefile(link, lock) for link in (process / "fd").iterdir() if link.exists())
    return False
