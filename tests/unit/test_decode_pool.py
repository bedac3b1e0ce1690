"""Decoding ahead: within its memory and its time, past those that take long, and over the death of its workers."""

import math
import os
import signal
import time
from fractions import Fraction

import pytest

from tests.helpers.media import frame_numbers, write_video
from tests.helpers.misbehave import die_or_hang, nap
from utils.data import decode_pool
from utils.data.decode_pool import PixelJob, SharedRing, decoded_bytes, decoded_clips, decoder_bytes_of, workers_within
from utils.data.records import Bucket
from utils.data.workers import WorkerPool

BUCKET = Bucket(64, 64, 9)


def jobs_of(path, count, bucket=BUCKET):
    return [PixelJob(f"{i:040x}", path, True, Fraction(i % 3, 16), Fraction(16), bucket) for i in range(count)]


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4", 12)


@pytest.fixture
def rings(monkeypatch):
    """Every ring that is made."""
    made = []

    def make(*arguments):
        made.append(SharedRing(*arguments))
        return made[-1]

    monkeypatch.setattr(decode_pool, "SharedRing", make)
    return made


@pytest.mark.parametrize("clips_worth", [3.5, 6, 1000])
def test_decoded_clips_stay_within_their_memory(video, rings, clips_worth):
    jobs = jobs_of(video, 20)
    size = decoded_bytes(jobs)
    assert size == math.prod(BUCKET) * 3
    limit = int(size * clips_worth)
    for item in decoded_clips(jobs, workers=2, held=2, timeout_s=60, ring_bytes=limit):
        start = int(item.job.start * 16)
        assert frame_numbers(item.pixels) == list(range(start, start + 9))
    [ring] = rings
    held = os.fstat(ring._descriptor).st_blocks * 512  # pages that were written
    assert 0 < held <= min(limit, 8 * size) + 4096


def test_decoders_count_too(video, rings):
    """Of 4K in 10 bits, and of a source for which there is memory once."""
    big, small = (PixelJob("", video, True, *jobs_of(video, 1)[0][3:6], source_px=px) for px in (3840 * 2160, 64 * 48))
    assert decoder_bytes_of([small, big]) == 3840 * 2160 * 3 * 21 and decoder_bytes_of([]) == 0
    gib, each = 2**30, decoder_bytes_of([big]) + 10**8
    assert [workers_within(memory * gib, 8, each) for memory in (0, 1, 2, 4, 8)] == [1, 1, 3, 6, 8]
    assert workers_within(gib, 0, each) == 0, "in this process"
    size, decoder = decoded_bytes([small]), decoder_bytes_of([small])
    limit = 1 * size + 2 * (size + decoder) + 2 * size  # held, two workers, and two clips that wait
    jobs = [job._replace(source_px=64 * 48) for job in jobs_of(video, 12)]
    made = decoded_clips(jobs, workers=8, held=1, timeout_s=60, ring_bytes=limit, decoder_bytes=decoder)
    assert len(list(made)) == 12 and rings[0]._slots == (limit - 2 * decoder) // size


def test_at_least_one_clip_is_decoded_ahead(video, rings):
    items = [item.job for item in decoded_clips(jobs_of(video, 4), workers=1, held=1, timeout_s=60, ring_bytes=1)]
    assert len(items) == 4 and rings[0]._slots == 2


@pytest.mark.parametrize("overtake_s", [None, 0.2])
def test_one_that_takes_long_is_passed_where_that_is_asked_for(overtake_s):
    items = [0.0, 2.0, 0.01, 0.02, 0.03]
    with WorkerPool(nap, workers=2) as pool:
        given = []
        for outcome in pool.run(items, ahead=3, overtake_s=overtake_s):
            given.append(outcome.value)
    assert sorted(given) == sorted(items)
    assert given == (items if overtake_s is None else [0.0, 0.01, 0.02, 0.03, 2.0])


def test_how_many_are_handed_out_may_change():
    taken, most = [], iter([4, 4, 4, 4, 1])

    def items():
        for number in range(8):
            taken.append(number)
            yield 0.0

    with WorkerPool(nap, workers=1) as pool:
        outcomes = pool.run(items(), ahead=lambda: next(most, 1))
        next(outcomes)
        assert len(taken) == 4, "and no fifth, since only one may be out by then"
        assert len(list(outcomes)) == 7


def test_a_worker_that_dies_idle_costs_no_item():
    def items():
        yield "a"
        deadline = time.monotonic() + 30
        while pool._workers[0].queue or not pool._workers[0].started:
            yield "b"
            assert time.monotonic() < deadline
        os.kill(pool._workers[0].process.pid, signal.SIGKILL)
        pool._workers[0].process.join()
        yield "c"

    with WorkerPool(die_or_hang, workers=1) as pool:
        outcomes = list(pool.run(items(), ahead=1))
    assert outcomes[-1].item == "c" and not [outcome for outcome in outcomes if outcome.error]
