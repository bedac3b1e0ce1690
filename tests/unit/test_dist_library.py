"""A lock that a killed start left is taken away, one that is held is waited for."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

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


@pytest.mark.parametrize("ahead_s", [-1e9, 1e9])
def test_the_clock_of_the_disk_counts_not_this_machines(lock, monkeypatch, ahead_s):
    here = SimpleNamespace(time=lambda: time.time() - ahead_s, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(dist_library, "time", here)
    lock.touch()
    started = time.monotonic()
    dist_library.clear_lock(lambda _: None, left_s=0.2)
    assert not lock.exists()
    assert 0.15 < time.monotonic() - started < 5


def test_a_lock_from_the_future_is_as_old_as_it_was_seen(lock):
    lock.touch()
    os.utime(lock, (4e9, 4e9))
    dist_library.clear_lock(lambda _: None, left_s=0.2)
    assert not lock.exists()


def test_who_holds_a_lock_for_long_is_named_again_and_again(lock, monkeypatch):
    monkeypatch.setattr(dist_library, "AGAIN_S", 0.1)
    told = []
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        waiting = threading.Thread(target=dist_library.clear_lock, args=(told.append, 0.0))
        waiting.start()
        ends = time.monotonic() + 20
        while len(told) < 3 and time.monotonic() < ends:
            time.sleep(0.02)
        process.kill()
        process.wait()
        waiting.join(10)
    assert told[0].startswith("waiting for another start")
    for line in told[1:3]:
        assert line.startswith(f"waiting still: process {process.pid} ({sys.executable} -c import os")
        assert line.endswith(f") has {lock} open; if it is stuck, end it: kill {process.pid}")


def test_a_lock_whose_holder_is_not_seen_is_told_of_too(lock, monkeypatch):
    monkeypatch.setattr(dist_library, "AGAIN_S", 0.1)
    lock.touch()
    told = []
    dist_library.clear_lock(told.append, left_s=1.0)
    assert f"no process that is seen from here has {lock} open; it is taken away when it is 1 s old" in told[1]


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
