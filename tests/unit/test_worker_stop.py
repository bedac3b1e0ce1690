"""A pool that is stopped as a whole, as by Ctrl-Z or a paused container, blames no item for the time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.launch import ROOT

pytestmark = pytest.mark.alone

POOL = """
import sys
from tests.unit.test_worker_stop import in_small_steps
from utils.data.workers import WorkerPool
if __name__ == "__main__":
    with WorkerPool(in_small_steps, 1, timeout_s=2.5) as pool:
        for outcome in pool.run([0, 1], ahead=1):
            print("done" if outcome.error is None else outcome.error, flush=True)
"""


def in_small_steps(item: int) -> None:
    for _ in range(10):
        time.sleep(0.1)


def test_time_in_which_everything_was_stopped_does_not_count(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert process.stdout.readline() == "done\n"
        time.sleep(0.3)  # it is at the second
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(4)
        os.killpg(process.pid, signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "done\n"
    finally:
        process.kill()
        process.wait()
