"""What a worker process may do wrong; apart and light, since workers import the module of what they run."""

import os
import signal
import threading


def die_or_hang(item: str) -> int:
    """The process id, unless `item` says otherwise."""
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "hangs":
        threading.Event().wait()
    if item == "raises":
        raise KeyError(item)
    return os.getpid()


def nap(seconds: float) -> float:
    """Takes its time."""
    threading.Event().wait(seconds)
    return seconds
