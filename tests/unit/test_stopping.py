"""Signals raise a flag, a second Ctrl-C stops at once, a launcher that has gone is missed, and time is kept."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.launch import ROOT
from utils.train.stopping import (
    AT_ONCE,
    REQUEUED,
    SPARE_S,
    StopSignals,
    TimeLimit,
    TooEarly,
    age_s,
    before_training,
    exit_status,
    reason,
)
from utils.train.triggers import Decision

ASKED = {
    signal.SIGTERM: Decision.TERMINATED,
    signal.SIGINT: Decision.INTERRUPTED,
    signal.SIGUSR1: Decision.WARNED,
}


@pytest.mark.parametrize("number", ASKED)
def test_a_signal_asks_for_a_checkpoint_and_the_old_handler_returns(number):
    before = [signal.getsignal(each) for each in ASKED]
    with StopSignals() as stop:
        assert stop.poll() == Decision.NONE
        os.kill(os.getpid(), number)
        assert stop.poll() == AT_ONCE | ASKED[number]
        assert stop.poll() == AT_ONCE | ASKED[number]
    assert [signal.getsignal(each) for each in ASKED] == before


def test_the_second_ctrl_c_interrupts():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll() == AT_ONCE | Decision.TERMINATED | Decision.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def run_child(code: str, *, launcher: str | None = None, tmp_path=None) -> subprocess.Popen:
    """A process that runs `code`; with `launcher`, below a script of that name which waits for it."""
    words = [sys.executable, "-u", "-c", code]
    if launcher:
        script = tmp_path / launcher
        script.write_text(f"import subprocess\nsubprocess.run({words!r})\n")
        words = [sys.executable, "-u", str(script)]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "RANK": "0"})


STUCK = """
import ctypes
from utils.train import stopping
stopping.STUCK_S = 0.2
with stopping.StopSignals() as stop:
    mutex = ctypes.create_string_buffer(64)
    print("ready")
    for _ in range(2):  # the second never returns, whatever signal comes, as where gloo waits for another rank
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_ctrl_c_ends_a_rank_that_is_stuck_in_c_code():
    child = run_child(STUCK)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert child.poll() is None, "one asks for a checkpoint only"
        child.send_signal(signal.SIGINT)
        assert child.wait(10) == 130
    finally:
        child.kill()


ORPHAN = """
import os, sys, time
from utils.train.stopping import StopSignals
from utils.train.triggers import Decision
with StopSignals() as stop:
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


def test_what_has_run_out_of_time_is_queued_again_and_what_was_ended_is_not():
    assert exit_status(AT_ONCE | Decision.WARNED, 85, False) == 85
    assert exit_status(AT_ONCE | Decision.TIME_UP, 85, False) == 85
    assert exit_status(AT_ONCE | Decision.TIME_UP, 85, True) == 0, "it came to its end nevertheless"
    assert exit_status(AT_ONCE | Decision.TERMINATED, 85, False) == 0
    assert exit_status(Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT, 85, False) == 0


def test_every_cause_has_words():
    causes = [each for each in Decision if each not in Decision.SAVE | Decision.CHECKPOINT | Decision.QUIT]
    assert all(reason(cause) for cause in causes if cause)
    assert reason(Decision.TERMINATED | Decision.TIME_UP) == "SIGTERM came and max_runtime_minutes is nearly over"
    assert REQUEUED == Decision.WARNED | Decision.TIME_UP


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rounds(limit: TimeLimit, clock: Clock, *seconds: float) -> list[bool]:
    """What is decided after each round."""
    decided = []
    for each in seconds:
        clock.now += each
        decided.append(bool(limit.poll() & Decision.TIME_UP))
    return decided


def test_there_is_time_for_the_longest_round_and_a_checkpoint():
    clock = Clock()
    limit = TimeLimit(10, save_s=30, clock=clock, age=100.0)  # ends after 500 s
    assert rounds(limit, clock, 10, 60, 10) == [False] * 3
    limit.saved(100)
    latest = 500 - 60 - 100 - SPARE_S - (10 + 60 + 10)  # s, from here
    assert rounds(limit, clock, *[latest / 20] * 20)[-2:] == [False, True]


def test_a_round_long_ago_is_forgotten():
    clock = Clock()
    limit = TimeLimit(10, clock=clock, age=0.0)
    assert rounds(limit, clock, 400, *[1] * 99)[-1]
    clock = Clock()
    limit = TimeLimit(20, clock=clock, age=0.0)
    assert not any(rounds(limit, clock, 400, *[1] * 100, *[1] * 300))


def test_without_a_limit_time_is_never_up():
    clock = Clock()
    assert not any(rounds(TimeLimit(None, clock=clock), clock, 1e9, 1e9))


def test_the_time_counts_from_the_start_of_the_process():
    assert 0 < age_s() < 3600


def test_before_the_first_step_there_is_nothing_to_wait_for():
    with pytest.raises(TooEarly, match=r"^SIGUSR1 came$"), before_training(None):
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(TooEarly, match=r"^max_runtime_minutes is nearly over$"), before_training(1e-9):
        time.sleep(5)
    with before_training(1e6):
        pass
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
