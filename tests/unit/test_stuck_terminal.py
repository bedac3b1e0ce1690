"""A terminal or a pipe that takes nothing holds nobody up, and tells what it missed once it is read again."""

import math
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers.launch import ROOT
from utils.monitor.console import LiveLine
from utils.monitor.logs import Forgiving

PATIENCE_S = 0.2
LINES = 400  # of 200 characters: more than the buffer of a pty (4 to 20 KB) or a pipe (64 KB)

# Trains with nobody looking, says so on standard error, waits for a word, goes on, ends with its cursor shown again.
CHILD = """
import logging, os, sys, time
from pathlib import Path
from utils.monitor.console import LiveLine, StepReport
from utils.monitor.logs import log_to_file, setup_logging, terminal
logger = logging.getLogger("train")
def train(live, first, last, pause_s):
    for step in range(first, last):
        logger.info("record %d %s", step, "x" * 180)
        live.update(StepReport(step, last, 1, 0.5, 1e-4, 1.0, 1.0))
        time.sleep(pause_s)
folder, lines, user = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if user:
    log_to_file(folder, 0)
    os.setuid(user)
console = terminal(float(sys.argv[4]))
setup_logging(0, console)
if not user:
    log_to_file(folder, 0)
with LiveLine(console) as live:
    train(live, 0, lines, 0)
    sys.__stderr__.write("went on\\n")
    sys.__stderr__.flush()
    sys.stdin.readline()
    train(live, lines, lines + 10, 0.05)
"""


def start(folder: Path, out: int, user: int = 0) -> subprocess.Popen:
    words = [sys.executable, "-c", CHILD, str(folder), str(LINES), str(user), str(PATIENCE_S)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, stdout=out, text=True, env=environment, **pipes)


def read_all(reader: int) -> str:
    """What comes until the last writer has closed, which a pty tells by an error."""
    taken = b""
    try:
        while piece := os.read(reader, 65536):
            taken += piece
    except OSError:
        pass
    return taken.decode().replace("\r\n", "\n")


def told(process: subprocess.Popen, reader: int) -> str:
    """Waits until the child has gone on without being read, then reads it to its end."""
    killer = threading.Timer(30, process.kill)  # else a child that is held up holds this test up
    killer.start()
    try:
        assert process.stderr.readline() == "went on\n", process.stderr.read()
        process.stdin.write("\n")
        process.stdin.flush()
        taken = read_all(reader)
        assert process.wait() == 0, process.stderr.read()
    finally:
        killer.cancel()
        process.kill()
        process.communicate()
    return taken


@pytest.mark.parametrize("kind", ["pty", "pipe", "pty of another user"])
def test_what_takes_nothing_holds_nobody_up_and_is_told_what_it_missed(tmp_path, kind):
    user = 65534 if "user" in kind else 0
    if user and os.getuid() != 0:
        pytest.skip("only root may become another user")
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = start(tmp_path, writer, user)
    os.close(writer)
    taken = told(process, reader)
    os.close(reader)

    first, last = (len(re.findall(rf"record {step} x+\n", taken)) for step in (0, LINES + 9))
    assert first == last == 1, "what was begun is kept, and what comes later is shown again"
    (missed,) = re.findall(r"\((\d+) lines not shown: the terminal took nothing for a while; see the log file\)", taken)
    steps = [int(step) for step in re.findall(r"record (\d+) ", taken)]
    assert steps == sorted(steps)
    if kind == "pipe":
        assert int(missed) == LINES + 10 + (LINES + 10) - taken.count("\n") + 1  # records and plain live lines
    else:
        assert int(missed) == LINES + 10 - len(steps)
        assert f"step {LINES + 9}/" in taken.split("not shown")[1], "the live line too"
        assert taken.rindex("\x1b[?25h") > taken.rindex("\x1b[?25l"), "the cursor is there again"
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert [int(step) for step in re.findall(r"record (\d+) ", log)] == list(range(LINES + 10))
    assert log.endswith(f"the terminal took nothing for a while: {missed} lines not shown there\n")


def full(patience_s: float) -> tuple[int, Forgiving]:
    """A pipe that takes no more, and the reader of it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    file = Forgiving(os.fdopen(writer, "wb"), "utf-8", patience_s)
    file.write("x" * 200_000)  # no end of line: not waited for
    return reader, file


def test_it_is_waited_for_once_and_a_live_line_never():
    started = time.monotonic()
    reader, file = full(PATIENCE_S)
    for _ in range(20):
        file.write("\rstep 3")
    assert time.monotonic() - started < PATIENCE_S
    for _ in range(20):
        file.write("a record\n")
    assert PATIENCE_S <= time.monotonic() - started < 4 * PATIENCE_S
    os.close(reader)
    file.close()


@pytest.mark.parametrize("patience_s", [20, math.inf])
def test_one_that_is_slow_for_less_than_that_misses_nothing(patience_s):
    """The second as `--plan | less`, which people page through."""
    reader, file = full(patience_s)
    taken = []
    thread = threading.Timer(0.1, lambda: taken.append(read_all(reader)))
    thread.start()
    file.write("a record\n")
    file.settle()
    file.close()
    thread.join()
    assert taken == ["x" * 200_000 + "a record\n"]
    os.close(reader)


def test_a_cursor_that_was_hidden_is_shown_though_that_text_was_left_out():
    reader, file = full(0.0)
    with LiveLine(Console(file=file, force_terminal=True, width=80)):
        pass
    file.write("missed\n")
    os.set_blocking(reader, False)
    taken = b""
    for _ in range(100):
        try:
            taken += os.read(reader, 65536)
        except BlockingIOError:
            file.write("")
    assert taken.decode().lstrip("x").startswith("\x1b[?25h(")
    os.close(reader)
    file.close()
