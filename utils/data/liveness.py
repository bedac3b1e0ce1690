"""Whether a process is still there, for those who can see each other's process ids."""

import os
import socket
from pathlib import Path


def machine() -> str:
    """Boot and process namespace: containers may share a host's name, and have process ids of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: beats alone must tell
        return f"{socket.gethostname()} {os.getpid()}"


def born_at(pid: int) -> str:
    """When a process started, in the kernel's own unit; "" where there is none, or a dead one that nobody has reaped.

    See proc(5): /proc/PID/stat is `pid (name) state ...` and start time is field 22; a name may hold anything.

    Raises:
        OSError: it cannot be seen, as where this process has too many files open; that is no sign of death.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if state in "ZX" else fields[18]
