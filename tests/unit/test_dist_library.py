"""A lock that a killed start left is taken away, one that is held is waited for."""

import os
import subprocess
import sys
import threading
import time

import pytest

from utils import dist_library

HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(1, flush=True); time.sleep(60)"


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(dist_library, "LOOK_S", 0.02)
    (tmp_path / dist_library.LIBRARY).mkdir()
    return tmp_path / dist_library.LIBRARY / "lock"


def test_a_lock_that_was_left_goes(lock):
    lock.touch()
    told = []
    started = time.monotonic()
    dist_library.clear_lock(told.append, left_s=0.2)
    assert not lock.exists()
    assert time.monotonic() - started > 0.15, "whoever made it may not be seen from here"
    assert str(lock) in told[0]
    dist_library.clear_lock(told.append)
    assert len(told) == 1


def test_a_lock_that_is_held_is_waited_for(lock):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        os.utime(lock, (0, 0))
        waiting = threading.Thread(target=dist_library.clear_lock, args=(lambda _: None, 0.0))
        waiting.start()
        time.sleep(0.3)
        assert lock.exists() and waiting.is_alive()
        process.kill()
        process.wait()
        waiting.join(10)
        assert not lock.exists()
