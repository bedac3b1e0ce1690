"""Caching by several processes: nothing is made twice, nobody waits for the slow, and any of them may be killed."""

import os
import signal
import time

import pytest
import torch

from tests.helpers.caching import LoggingVAE, clips, start, times_done, wait_until
from tests.helpers.launch import free_port
from tests.helpers.media import write_video
from utils.data.cache import CacheStore
from utils.data.precache import precache
from utils.data.records import Bucket

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]


def ends(*processes, timeout_s=60):
    """What each of them said."""
    try:
        return [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_runs_on_one_cache_make_each_item_once(tmp_path):
    said = ends(*(start(tmp_path, 60, 0.1, port=port) for port in (1, 2)))
    made = [int(text.split()[-1]) for text in said]
    assert sum(made) == 60 and min(made) > 3, said
    assert set(times_done(tmp_path).values()) == {1} and len(times_done(tmp_path)) == 60
    assert not list((tmp_path / "claims").iterdir()) and not list((tmp_path / "jobs").iterdir())


def test_a_killed_job_loses_what_it_was_at_and_no_more(tmp_path):
    first = start(tmp_path, 40, 0.05, port=1)
    wait_until(lambda: len(times_done(tmp_path)) >= 8)
    first.kill()
    first.wait()
    assert list((tmp_path / "claims").iterdir()), "it was killed in the middle of something"
    begun = time.monotonic()
    [said] = ends(start(tmp_path, 40, 0.001, port=2))
    assert "encoded" in said and time.monotonic() - begun < 15, "the claims of the dead hold nobody up"
    twice = [caption for caption, times in times_done(tmp_path).items() if times > 1]
    assert len(times_done(tmp_path)) == 40 and len(twice) <= 1


def test_a_run_goes_on_where_another_on_the_same_clips_is_killed(tmp_path):
    one, other = (start(tmp_path, 40, 0.05, port=port) for port in (1, 2))
    pids = {str(process.pid) for process in (one, other)}
    log = tmp_path / "done.log"
    wait_until(lambda: log.exists() and {line.split()[0] for line in log.read_text().splitlines()} == pids)
    one.kill()
    one.wait()
    [said] = ends(other)
    assert said.startswith("encoded ") and len(times_done(tmp_path)) == 40
    assert sum(times > 1 for times in times_done(tmp_path).values()) <= 1, "what the other was at"
    store = CacheStore(tmp_path)
    assert all(store.read("text", f"{number:040x}")["text"].equal(torch.ones(1)) for number in range(40))


def test_a_slow_rank_takes_less(tmp_path):
    port = free_port()
    slow, fast = (
        start(tmp_path, 60, 0.5, rank=0, world=2, port=port),
        start(tmp_path, 60, 0.02, rank=1, world=2, port=port),
    )
    wait_until(lambda: times_done(tmp_path, "begun.log"))
    begun = time.monotonic()
    said = ends(slow, fast)
    assert said == ["encoded 60\n"] * 2, "both know what was made by both"
    assert set(times_done(tmp_path).values()) == {1}
    assert time.monotonic() - begun < 12, "half of it would take the slow one 15 s"


@pytest.mark.parametrize("busy", [True, False])
def test_a_killed_rank_ends_the_other(tmp_path, busy):
    """At once where that one waits for it, and where it still has hours to do."""
    port, count = free_port(), 4000 if busy else 2
    ranks = [start(tmp_path, count, 0.02 if busy else 20.0 * rank, rank=rank, world=2, port=port) for rank in range(2)]
    pids = {str(process.pid) for process in ranks}
    log = tmp_path / "begun.log"
    wait_until(lambda: log.exists() and {line.split()[0] for line in log.read_text().splitlines()} == pids)
    os.kill(ranks[1].pid, signal.SIGKILL)
    begun = time.monotonic()
    said, _ = ends(*ranks, timeout_s=30)
    assert ranks[0].returncode not in (0, None) and time.monotonic() - begun < 30
    assert f"rank 1 (process {ranks[1].pid} on" in said and "has ended without a word" in said


class Meddling(LoggingVAE):
    """Sends a signal to the process that decodes, once."""

    number = signal.SIGKILL

    def encode(self, items):
        if not self._begun.exists():
            os.kill(next(int(pid) for pid in children() if b"spawn_main" in command(pid)), self.number)
        return super().encode(items)


def children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


def command(pid: str) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="looks for its child in /proc")
@pytest.mark.parametrize(
    ("number", "fate"),
    [
        (signal.SIGKILL, "the worker process was killed by SIGKILL"),
        (signal.SIGSTOP, "no progress for 3 s; raise decode_timeout_s if it is only slow"),
    ],
)
def test_a_decoder_that_dies_or_hangs_is_replaced_and_its_file_named(tmp_path, number, fate):
    """Large frames, so that it is at one when the first is done."""
    paths = [write_video(tmp_path / f"clip{number}.mp4", 9, size=(1280, 720)) for number in range(5)]
    store, encoder = CacheStore(tmp_path), Meddling(tmp_path, 0.0)
    encoder.number = number
    with pytest.raises(ValueError, match="1 clip cannot be decoded") as caught:
        precache(
            [clips(paths, Bucket(1280, 720, 9))], [encoder], store, device=torch.device("cpu"), workers=1, batch_size=1,
            decode_timeout_s=3.0,
        )  # fmt: skip
    made = [store.has("latents", f"{n:040x}") for n in range(5)]
    assert made.count(True) == 4, "the others are there"
    assert f"{paths[made.index(False)]}: {fate}" in str(caught.value)
