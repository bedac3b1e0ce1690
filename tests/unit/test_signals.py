"""A signal is kept while libraries load, ends a start, and a flag in training; launchers that have gone are missed."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers.launch import ROOT
from utils.train.signals import STOP, StopSignals
from utils.train.stopping import AT_ONCE, SPARE_S, TooEarly, age_s
from utils.train.triggers import Decision

ASKED = {
    signal.SIGTERM: Decision.TERMINATED,
    signal.SIGINT: Decision.INTERRUPTED,
    signal.SIGUSR1: Decision.WARNED,
    signal.SIGHUP: Decision.HUNG_UP,
}


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_asks_for_a_checkpoint_and_the_old_handler_returns(number):
    before = [signal.getsignal(each) for each in ASKED]
    with StopSignals().training() as stop:
        assert stop.poll() == Decision.NONE
        os.kill(os.getpid(), number)
        assert stop.poll() == AT_ONCE | ASKED[number]
        assert stop.poll() == AT_ONCE | ASKED[number]
    assert [signal.getsignal(each) for each in ASKED] == before


def test_the_second_ctrl_c_interrupts(capfd):
    with StopSignals().training() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll() == AT_ONCE | Decision.TERMINATED | Decision.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    said = "Reelpipe: a second Ctrl-C: stopping at once; what was trained after the newest checkpoint is lost\n"
    assert capfd.readouterr().err == said


def run_child(code: str, *, launcher: str | None = None, tmp_path=None, **more) -> subprocess.Popen:
    """A process that runs `code`; with `launcher`, below a script of that name which waits for it."""
    words = [sys.executable, "-u", "-c", code]
    if launcher:
        script = tmp_path / launcher
        script.write_text(f"import subprocess\nsubprocess.run({words!r})\n")
        words = [sys.executable, "-u", str(script)]
    environment = {**os.environ, "RANK": "0"}
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment, **more)


STUCK = """
import ctypes
from utils.train import signals
signals.STUCK_S = signals.PATIENCE_S = 0.2
with signals.StopSignals() as stop:
    {stage}
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    print("ready")
    lock(mutex)  # never returns, whatever signal comes, as where gloo waits for another rank
"""


def test_a_second_ctrl_c_ends_a_rank_that_is_stuck_in_c_code():
    child = run_child(STUCK.format(stage="kept = stop.training(); kept.__enter__()"), stderr=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        time.sleep(0.6)
        assert child.poll() is None, "one asks for a checkpoint only"
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130 and child.stderr.read().count("a second Ctrl-C: stopping at once; ") == 1
    finally:
        child.kill()


ORPHAN = """
import os, sys, time
from utils.train.signals import StopSignals
from utils.train.triggers import Decision
with StopSignals().training() as stop:
    print(os.getpid(), len(stop.launchers), int(stop.poll()))
    deadline = time.monotonic() + 20
    while not stop.poll() & Decision.ORPHANED and time.monotonic() < deadline:
        time.sleep(0.05)
    print(repr(stop.poll()))
"""


@pytest.mark.parametrize(("launcher", "launchers"), [("torchrun", 1), ("start.py", 0)])
def test_a_launcher_that_is_killed_is_missed(tmp_path, launcher, launchers):
    """A shell or script that started the run may go: nohup and tmux live by that."""
    child = run_child(ORPHAN.replace("+ 20", "+ 1" if not launchers else "+ 20"), launcher=launcher, tmp_path=tmp_path)
    try:
        assert child.stdout.readline().split()[1:] == [str(launchers), "0"]
    finally:
        child.kill()
    said = child.stdout.read()
    assert ("ORPHANED" in said) == bool(launchers)


# --- before that ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), zip(ASKED, (143, 130, 85, 129), strict=True))
def test_a_start_is_interrupted_and_says_what_is_kept(number, status):
    with StopSignals("cache_only") as stop:
        stop.limit(85, None)
        stop.interrupt()
        with pytest.raises(
            TooEarly, match=r"^stopping before everything is encoded: .*; what is encoded is kept"
        ) as by:
            os.kill(os.getpid(), number)
        assert by.value.status == status
        os.kill(os.getpid(), signal.SIGTERM)  # launchers send it after a Ctrl-C: what is tidied up is left in peace
        assert stop.asked & Decision.TERMINATED and stop._status() == status


def test_a_warning_while_libraries_load_is_kept_until_the_ranks_have_met():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)
        stop.limit(85, None)
        with pytest.raises(TooEarly, match="SIGUSR1 came") as caught:
            stop.interrupt()
        assert caught.value.status == 85


def test_time_that_is_over_interrupts():
    with StopSignals() as stop, pytest.raises(TooEarly, match="max_runtime_minutes is nearly over") as caught:
        stop.limit(85, (age_s() + SPARE_S + 0.5) / 60)
        stop.interrupt()
        time.sleep(5)
    assert caught.value.status == 85


def test_a_limit_that_no_start_can_keep_is_refused_instead_of_queued_for_ever():
    minutes = (age_s() + SPARE_S - 0.1) / 60
    told = rf"max_runtime_minutes = {minutes:g} leaves no time for a step: .* and 20 s are kept for the end; raise it"
    with StopSignals() as stop, pytest.raises(ValueError, match=told):
        stop.limit(85, minutes)


def test_what_another_rank_was_asked_for_interrupts_this_one_too(tmp_path):
    with StopSignals() as stop, pytest.raises(TooEarly, match="SIGTERM came") as caught:
        stop.interrupt(tmp_path / "alive")
        threading.Timer(0.1, lambda: (tmp_path / "alive").mkdir() or write(tmp_path / "alive")).start()
        time.sleep(5)
    assert caught.value.status == 143


def write(folder):
    (folder / STOP).write_text(str(int(Decision.TERMINATED)))


def test_a_rank_tells_the_others_and_knows_why_it_lost_them(tmp_path):
    with StopSignals() as stop, pytest.raises(TooEarly):
        stop.interrupt(tmp_path)
        os.kill(os.getpid(), signal.SIGHUP)
    # its thread does it, or `reported` asks before
    other = StopSignals()
    assert other.stop_of_others() is None, "they have not met"
    other._folder = tmp_path
    write(tmp_path)
    assert other.stop_of_others().status == 143


@pytest.mark.parametrize(
    ("stage", "number", "status"),
    [
        ("pass", signal.SIGTERM, 143),
        ("pass", signal.SIGINT, 130),
        ("stop.limit(85, None)", signal.SIGUSR1, 85),
        ("stop.interrupt()", signal.SIGTERM, 143),
        ("stop.conclude(); import time; time.sleep(0.6)", signal.SIGTERM, 143),
    ],
)
def test_a_start_that_is_stuck_in_c_code_is_ended(stage, number, status):
    """As where it waits for ranks that never come."""
    child = run_child(STUCK.format(stage=stage), stderr=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(number)
        assert child.wait(10) == status
        assert "conclude" in stage or "stopping before the first step: " in child.stderr.read()
    finally:
        child.kill()


def test_a_start_whose_terminal_has_gone_ends_all_the_same():
    """Nobody reads its last words any more."""
    child = run_child(STUCK.format(stage="pass"), stderr=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "ready\n"
        child.stderr.close()
        child.send_signal(signal.SIGHUP)
        assert child.wait(10) == 129
    finally:
        child.kill()


EARLY = """
import signal, sys, time, builtins, importlib
from utils.train.signals import StopSignals
with StopSignals() as stop:
    heavy = {"torch", "numpy", "pydantic", "rich", "psutil"} & sys.modules.keys()
    print(heavy or "ready")
    sys.stdin.readline()
    print(stop.asked.name)
"""


def test_a_warning_in_the_first_moments_does_not_kill():
    """Nothing slow is imported before the handlers are there."""
    child = run_child(EARLY, stdin=subprocess.PIPE)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert child.communicate("\n", timeout=10)[0] and child.returncode == 0


def test_nohup_is_left_alone():
    code = (
        "import os, signal\nfrom utils.train.signals import StopSignals\n"
        "with StopSignals() as stop:\n    stop.interrupt(); os.kill(os.getpid(), signal.SIGHUP); print(int(stop.asked))"
    )
    child = run_child(code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert child.communicate(timeout=20)[0] == "0\n" and child.returncode == 0
