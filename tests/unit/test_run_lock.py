"""One start at a time in a run folder, told by real processes: a living one keeps others out, a dead one nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.launch import ROOT
from utils.train import run_lock
from utils.train.run_lock import NAME, InUse, RunLock

HOLDER = """
import pathlib, sys
from utils.train.run_lock import RunLock
lock, rank = RunLock(pathlib.Path(sys.argv[1])), int(sys.argv[2])
if rank:
    lock.follow(rank)
else:
    try:
        lock.take(lambda words: print(words, flush=True), silent_s=1.0, follow_s=float(sys.argv[3]))
    except ValueError as error:
        sys.exit(str(error))
print("took it", flush=True)
word = sys.stdin.readline()
if word:
    lock.release(rank == 0, clean=word == "clean\\n")
"""


@pytest.fixture
def start(tmp_path):
    """A rank of a start that works in the folder until it is told or killed; waits until it has taken it."""
    processes = []

    def begin(rank=0, follow_s=0.0):
        words = [sys.executable, "-c", HOLDER, str(tmp_path), str(rank), str(follow_s)]
        process = subprocess.Popen(
            words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def took(process):
    return process.stdout.readline() == "took it\n"


def test_a_second_start_is_refused_and_told_who_holds_the_folder(start, tmp_path):
    first = start()
    assert took(first)
    said = start().communicate(timeout=20)[1]
    assert f"the run folder {tmp_path} is in use by process {first.pid} on " in said and ", since 20" in said
    assert f"stop it (touch {tmp_path}/save_quit), or start anew without --resume_from_checkpoint" in said
    first.communicate("clean\n", timeout=20)
    assert os.listdir(tmp_path) == []
    assert took(start())


def test_a_killed_start_holds_nothing(start, tmp_path):
    first = start()
    assert took(first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / NAME).read_text(), "it had no time to tidy up"
    begun = time.monotonic()
    assert took(start()) and time.monotonic() - begun < 5


def test_what_it_forked_off_holds_nothing_either(tmp_path):
    """A library's process that outlives a killed rank."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(tmp_path).take(lambda _: None)
        if os.fork() == 0:
            os.write(writer, str(os.getpid()).encode())
            time.sleep(60)
        time.sleep(60)
    orphan = int(os.read(reader, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        RunLock(tmp_path).take(lambda _: None)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_the_ranks_of_a_killed_one_are_waited_for(start, tmp_path):
    first = start()
    assert took(first)
    follower = start(rank=1)
    assert took(follower)
    first.kill()
    first.wait()
    said = start().communicate(timeout=20)[1]
    assert f"is in use by processes of an earlier start, whose rank 0 (process {first.pid} on " in said
    assert f") has ended; wait for its end, stop it (fuser -v {tmp_path / NAME} lists them), or start anew" in said
    second = start(follow_s=20)
    assert "waiting up to 20 s for the last ranks of an earlier start to leave" in second.stdout.readline()
    follower.communicate("\n", timeout=20)
    assert took(second)


def of_another_machine(folder):
    told = {"machine": "other-boot pid:[1]", "host": "node7", "pid": 1, "born": "5", "since": "2026-11-21 10:00:00 UTC"}
    (folder / NAME).write_text(json.dumps(told))


def test_one_of_another_machine_holds_as_long_as_it_beats(tmp_path):
    of_another_machine(tmp_path)
    said, lock = [], RunLock(tmp_path)

    def beat(words):
        said.append(words)
        subprocess.Popen(
            [sys.executable, "-c", f"import os, time; time.sleep(0.3); os.utime({str(tmp_path / NAME)!r})"]
        )

    with pytest.raises(
        ValueError, match="in use by process 1 on node7, since 2026-11-21 10:00:00 UTC; wait for its end"
    ):
        lock.take(beat, silent_s=20)
    assert "process 1 on node7, since 2026-11-21 10:00:00 UTC is at work there; looking for 20 s" in said[0]
    lock.take(said.append, silent_s=0.3)
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release(True, True)


def test_what_is_to_be_copied_is_quoted():
    assert "stop it (touch '/my runs/one/save_quit'), or" in str(InUse(Path("/my runs/one"), "process 1"))


def test_the_holder_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    lock = RunLock(tmp_path)
    lock.take(lambda _: None)
    os.utime(tmp_path / NAME, (0, 0))
    deadline = time.monotonic() + 10
    while (tmp_path / NAME).stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (tmp_path / NAME).stat().st_mtime > 1
    lock.release(True, True)


def test_a_disk_without_locks_tells_by_the_process(start, tmp_path, monkeypatch):
    first = start()
    assert took(first)

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    with pytest.raises(ValueError, match=f"in use by process {first.pid}"):
        RunLock(tmp_path).take(lambda _: None, follow_s=0)
    first.kill()
    first.wait()
    lock = RunLock(tmp_path)
    lock.take(lambda _: None, follow_s=0)
    lock.release(True, True)
