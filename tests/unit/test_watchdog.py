"""What the watchdog takes for the end of a run, and what it leaves alone; two ranks of it in one process."""

import logging
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from rich.console import Console

from tests.helpers.launch import ROOT
from utils.data.liveness import born_at, machine
from utils.monitor.logs import ConsoleHandler, Forgiving, log_to_file
from utils.train import beats, watchdog
from utils.train.activity import LONG, Activity
from utils.train.faults import Fault, read_faults, write_fault
from utils.train.watchdog import FAILED, STALLED, Watchdog, prepare_folder

pytestmark = pytest.mark.alone

STALL_S = 0.5


class Kept(Watchdog):
    """Says how it would have left, and stays."""

    status = None

    def _leave(self, status):
        self.status = status
        self._stop.set()

    def _arm(self, seconds): ...


@contextmanager
def watched(folder, ranks=2, stall_timeout_s=STALL_S):
    prepare_folder(folder)
    dogs = [Kept(Activity(), folder, rank=r, world=ranks, stall_timeout_s=stall_timeout_s) for r in range(ranks)]
    for dog in dogs:
        dog.activity.stage = dog.rank
        dog.start()
    try:
        yield dogs
    finally:
        for dog in dogs:
            dog.stop()


def ended(dogs, within_s):
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and any(dog.status is None for dog in dogs):
        time.sleep(0.02)
    return [dog.status for dog in dogs]


def test_silence_of_all_is_a_stall_and_the_reason_is_told(tmp_path, caplog):
    with watched(tmp_path) as dogs:
        for dog in dogs:
            dog.activity.begin("step 7")
        dogs[0].activity.note_next("activations", (1,))
        dogs[1].activity.note_next("forward")
        assert ended(dogs, 10) == [STALLED, STALLED]
    (summary,) = [p for p in (tmp_path / "stalls").iterdir() if "_rank_" not in p.name]
    (error,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert summary.read_text() == error + "\n"
    assert "rank 0 (stage 0) waits for activations of micro-batch 0 from rank 1 (stage 1), for 1 s" in error
    assert "rank 1 (stage 1) has been in forward of micro-batch 0 for 1 s\n  look at rank 1 first" in error
    for rank in (0, 1):
        (stacks,) = (tmp_path / "stalls").glob(f"*_rank_{rank}.txt")
        assert "test_silence_of_all_is_a_stall" in stacks.read_text().split("\nthread ")[1], "the main thread is first"


def test_a_stall_is_written_down_though_the_terminal_takes_nothing(tmp_path):
    """Not even by a console that waits for ever."""
    master, slave = pty.openpty()
    terminal = Forgiving(os.fdopen(slave, "wb"), "utf-8")
    terminal.write("x" * 100_000)  # no end of line: not waited for
    root = logging.getLogger()
    before = root.handlers[:]
    root.addHandler(ConsoleHandler(Console(file=terminal), 0))
    log = log_to_file(tmp_path, 0)
    try:
        with watched(tmp_path, 1) as (dog,):
            dog.activity.begin("step 7")
            deadline = time.monotonic() + 10
            while not (told := log.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            (summary,) = [p for p in (tmp_path / "stalls").iterdir() if "_rank_" not in p.name]
            assert told.split("watchdog: ")[1] == summary.read_text()
            time.sleep(0.3)
            assert dog.status is None, "the terminal was not stuck"
            while ended([dog], 0.05) == [None]:
                os.read(master, 65536)
            assert dog.status == STALLED
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            if not isinstance(handler, ConsoleHandler):
                handler.close()
        terminal.close()
        os.close(master)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_may_wait_as_long_as_another_moves(tmp_path, ranks):
    with watched(tmp_path, ranks) as dogs:
        for dog in dogs:
            dog.activity.begin("caching")
        until = time.monotonic() + 4 * STALL_S
        while time.monotonic() < until:
            dogs[-1].activity.note("the item after clip.mp4")
            time.sleep(0.02)
        assert [dog.status for dog in dogs] == [None] * ranks
        assert ended(dogs, 10) == [STALLED] * ranks, "and no longer"


def test_compiling_and_saving_take_longer(tmp_path):
    with watched(tmp_path) as dogs:
        dogs[0].activity.begin("step 1")
        dogs[1].activity.begin("step 1", patience=LONG)
        begun = time.monotonic()
        assert ended(dogs, 20) == [STALLED, STALLED]
        assert time.monotonic() - begun > LONG * STALL_S


def test_a_clock_that_jumps_is_no_stall(tmp_path):
    """As after a laptop's sleep: files of a moment ago are an hour old."""
    with watched(tmp_path) as dogs:
        for dog in dogs:
            dog.activity.begin("caching")
        until = time.monotonic() + 6 * STALL_S
        while time.monotonic() < until:
            for _ in range(15):
                dogs[1].activity.note("the item after clip.mp4")
                time.sleep(0.02)
            beat = tmp_path / beats.FOLDER / "rank_1.json"
            os.utime(beat, (time.time() - 3600,) * 2)
        assert [dog.status for dog in dogs] == [None, None]


def test_a_disk_that_fails_for_a_while_does_not_end_the_watch(tmp_path):
    class Hesitant(Kept):
        looks = 0

        def faults(self):
            self.looks += 1
            if self.looks < 5:
                raise OSError(116, "Stale file handle")
            return super().faults()

    prepare_folder(tmp_path)
    dog = Hesitant(Activity(), tmp_path, rank=0, world=1, stall_timeout_s=STALL_S)
    dog.activity.begin("step 1")
    dog.start()
    assert ended([dog], 10) == [STALLED] and dog.looks >= 5
    dog.stop()


def test_too_many_open_files_are_no_death():
    beat = beats.beat_of(1, machine(), Activity(), time.monotonic())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        gone = beats.is_gone(beat, beat.host)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not gone


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_folder_that_was_made_for_the_watch_goes_with_it(tmp_path, ranks):
    folder = tmp_path / "cache_only"
    folder.mkdir()
    with watched(folder, ranks):
        pass
    assert not folder.exists()


def test_folders_of_killed_starts_go_after_a_day(tmp_path):
    for name in ("cache_only-1-a", "cache_only-2-b", "latents"):
        (tmp_path / name / beats.FOLDER).mkdir(parents=True)
        beat = tmp_path / name / beats.FOLDER / "rank_0.json"
        beat.touch()
        for path in (beat, beat.parent, beat.parent.parent):
            os.utime(path, (time.time() - 2 * beats.LEFT_S,) * 2)
    (tmp_path / "cache_only-2-b" / beats.FOLDER / "rank_0.json").touch()
    beats.clear_left(tmp_path, "cache_only-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache_only-2-b", "latents"]


def test_zero_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "TICK_S", 0.05)
    with watched(tmp_path, stall_timeout_s=0) as dogs:
        dogs[0].activity.begin("step 1")
        assert ended(dogs, 1) == [None, None]


def test_a_stuck_rank_follows_one_that_ended(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watchdog, "FOLLOW_S", 0.2)
    with watched(tmp_path, 3, stall_timeout_s=60) as dogs:
        for dog in dogs:
            dog._tick_s = 0.05
        dogs[1].activity.begin("step 3")
        dogs[1].record("too bad")
        dogs[1].stop()
        assert ended([dogs[0], dogs[2]], 20) == [FAILED, FAILED]
    # the other rank says it too, for the file alone
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert said == ["rank 1 ended first, in step 3: too bad"]


def test_a_rank_that_left_by_itself_is_not_missed(tmp_path):
    with watched(tmp_path) as dogs:
        assert beats.read_beat(tmp_path / beats.FOLDER, 1)
        dogs[1].stop()
        assert dogs[0].faults() == []
    assert not (tmp_path / beats.FOLDER).exists()


def test_a_killed_process_is_gone_though_nobody_has_asked_for_its_status():
    host = machine()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mine = beats.beat_of(1, host, Activity(), time.monotonic())
    beat = mine._replace(pid=process.pid, born=born_at(process.pid))
    assert not beats.is_gone(mine, host) and not beats.is_gone(beat, host)
    assert beats.is_gone(beat._replace(born="1"), host), "its id was given to another process"
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert beats.is_gone(beat, host)
    assert not beats.is_gone(beat._replace(host="elsewhere"), host), "another machine has processes of its own"
    process.wait()
    assert beats.is_gone(beat, host)


def test_what_an_earlier_start_left_is_taken_away(tmp_path):
    write_fault(tmp_path, Fault(1, "old"))
    (tmp_path / beats.FOLDER).mkdir()
    (tmp_path / beats.FOLDER / "stalled").write_text("20300101_00-00-00")
    prepare_folder(tmp_path)
    assert read_faults(tmp_path) == []
    assert list((tmp_path / beats.FOLDER).iterdir()) == []


HELD_UP = """
import ctypes, pathlib, sys
from utils.train import watchdog
from utils.train.activity import Activity
watchdog.LAST_RESORT_S = 0.5
activity = Activity()
folder = pathlib.Path(sys.argv[1])
watchdog.Watchdog(activity, folder, rank=0, world=1, stall_timeout_s=1, log_file=folder / "rank_0.log").start()
activity.begin("step 1")
import time; time.sleep(0.5)
ctypes.PyDLL(None).sleep(60)  # unlike CDLL it keeps the interpreter's lock
"""


def test_c_code_that_lets_no_thread_run_does_not_hold_up_the_end(tmp_path):
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HELD_UP, str(tmp_path)], cwd=ROOT, timeout=100)
    assert done.returncode == 1
    assert time.monotonic() - begun < 50
    assert 'File "<string>", line 11' in (tmp_path / "rank_0.log").read_text()
