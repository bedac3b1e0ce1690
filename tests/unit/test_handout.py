"""Who is given which item, what becomes of a dead one's claims, and how ranks learn of each other's end."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from utils.data import crew as crew_module
from utils.data.cache import CacheStore
from utils.data.crew import STALE_S, Crew, PeerLost, sweep
from utils.data.handout import Handout, failure_of
from utils.data.listing import Skipped
from utils.data.manifest import CaptionJob

JOBS = [CaptionJob(f"{number:040x}", f"caption {number}") for number in range(12)]


@pytest.fixture
def store(tmp_path):
    return CacheStore(tmp_path)


@pytest.fixture
def crews(store):
    """Two runs."""
    with Crew.alone(store.root) as one, Crew.alone(store.root) as other:
        yield one, other


def make(store, handout, job):
    store.write("text", job.key, {"text": torch.ones(1)}, {})
    handout.finish(job)


def take(handout, count):
    given = handout.take()
    return [next(given) for _ in range(count)]


def test_two_takers_share_and_neither_takes_what_the_other_is_at(store, crews):
    ours, theirs = (Handout(store, "text", JOBS, crew) for crew in crews)
    mine = take(ours, 3)
    assert mine == JOBS[:3] and take(theirs, 2) == JOBS[3:5]
    for job in mine:
        make(store, ours, job)
    rest = list(ours.take())
    assert rest == JOBS[5:] and ours.num_elsewhere == 2
    assert list(theirs.take()) == [] and theirs.num_elsewhere == 10, "3 when it passed them, and the rest"
    for job in rest:
        make(store, ours, job)
    for job in JOBS[3:5]:
        make(store, theirs, job)
    for handout, by_others in ((ours, 2), (theirs, 10)):
        assert not handout.wait(lambda: None) and handout.came == by_others and handout.num_left == 0
    assert not list((store.root / "claims").iterdir())


def test_what_an_owner_drops_is_taken_by_the_next(store, crews):
    ours, theirs = (Handout(store, "text", JOBS[:4], crew) for crew in crews)
    take(ours, 4)
    assert list(theirs.take()) == []
    ours.drop()
    assert theirs.wait(lambda: None) and list(theirs.take()) == JOBS[:4]


def test_a_dead_owner_loses_its_claims(store, crews):
    """Another process, that ends without tidying up."""
    code = (
        "import os, sys; from pathlib import Path; from utils.data.crew import Crew; from utils.data.cache import "
        "CacheStore; from utils.data.handout import Handout; from tests.unit.test_handout import JOBS\n"
        "store = CacheStore(Path(sys.argv[1])); crew = Crew.alone(store.root).__enter__()\n"
        "given = Handout(store, 'text', JOBS[:3], crew).take(); [next(given) for _ in range(3)]\n"
        "sys.stdout.write('claimed'); sys.stdout.flush(); sys.stdin.read(); os._exit(9)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.read(7) == b"claimed"
    ours = Handout(store, "text", JOBS[:3], crews[0])
    assert list(ours.take()) == [] and ours.num_elsewhere == 3
    process.stdin.close()
    # not reaped yet: a zombie is dead too
    begun = time.monotonic()
    assert ours.wait(lambda: None) and time.monotonic() - begun < 10
    assert list(ours.take()) == JOBS[:3]
    process.wait()


def beat_of_elsewhere(store, age_s):
    """The beat of a process on another machine, last seen `age_s` ago."""
    beat = store.root / "jobs" / "elsewhere" / "rank-0.json"
    beat.parent.mkdir(parents=True)
    beat.write_text(json.dumps({"machine": "another", "host": "node7", "pid": 1, "born": "5", "rank": 0}))
    os.utime(beat, (time.time() - age_s,) * 2)
    return beat


@pytest.mark.parametrize("age_s", [0, STALE_S + 5])
def test_another_machine_lives_as_long_as_it_beats(store, crews, age_s):
    ours = Handout(store, "text", JOBS[:1], crews[0])
    beat = beat_of_elsewhere(store, age_s)
    (store.root / "claims" / f"text-{JOBS[0].key}").write_text(str(beat.relative_to(store.root)))
    assert len(list(ours.take())) == (1 if age_s else 0)


def test_a_claim_without_an_owner_counts_for_a_moment(store, crews):
    ours = Handout(store, "text", JOBS[:1], crews[0])
    claim = store.root / "claims" / f"text-{JOBS[0].key}"
    claim.touch()
    assert list(ours.take()) == []
    os.utime(claim, (time.time() - STALE_S - 5,) * 2)
    assert ours.wait(lambda: None) and list(ours.take()) == JOBS[:1]


def test_what_one_rank_failed_on_no_other_tries(store, tmp_path):
    with Crew(tmp_path / "job", 0, 2) as one, Crew(tmp_path / "job", 1, 2) as other:
        ours, theirs = (Handout(store, "text", JOBS[:2], crew) for crew in (one, other))
        [job] = take(ours, 1)
        ours.finish(job, Skipped(Path("a.mp4"), "is broken", bad=True))
        assert list(theirs.take()) == JOBS[1:2] and theirs.came == 1
        assert failure_of(other, job.key) == Skipped(Path("a.mp4"), "is broken", bad=True)
        assert failure_of(other, JOBS[1].key) is None
    with Crew.alone(store.root) as later:
        assert take(Handout(store, "text", JOBS[:2], later), 1) == JOBS[:1], "another start tries again"


def test_fewer_are_claimed_ahead_towards_the_end(store, tmp_path):
    with Crew.alone(store.root) as alone, Crew(tmp_path / "job", 0, 2) as crew:
        assert [Handout(store, "text", JOBS[:count], alone).ahead(8) for count in (12, 8, 3, 0)] == [8, 8, 3, 1]
        assert [Handout(store, "text", JOBS[:count], crew).ahead(2) for count in (12, 8, 3, 0)] == [2, 2, 2, 2]
        assert [Handout(store, "text", JOBS[:count], crew).ahead(8) for count in (12, 8, 3, 0)] == [3, 2, 2, 2]


def test_damaged_entries_are_counted(store, crews):
    for job in JOBS[:2]:
        store.write("text", job.key, {"text": torch.ones(1)}, {})
    path = store.path("text", JOBS[0].key)
    path.write_bytes(path.read_bytes()[:-1])
    ours = Handout(store, "text", JOBS[:3], crews[0])
    assert list(ours.take()) == [JOBS[0], JOBS[2]] and ours.damaged == 1


def until_lost(crew):
    deadline = time.monotonic() + 15
    with pytest.raises(PeerLost) as caught:
        while time.monotonic() < deadline:
            crew.check()
            time.sleep(0.02)
    return str(caught.value)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(crew_module, "BEAT_S", 0.1)
    monkeypatch.setattr(crew_module, "GRACE_S", 0.3)
    monkeypatch.setattr(crew_module, "LOST_S", 1.0)


def test_ranks_learn_the_first_error_and_end_if_they_are_stuck(tmp_path, quick):
    ended = []
    with Crew(tmp_path, 0, 3, ended.append) as first, Crew(tmp_path, 1, 3):
        with pytest.raises(KeyError), Crew(tmp_path, 2, 3):
            raise KeyError("the first error")
        assert until_lost(first) == "rank 2 has stopped: 'the first error'"
        assert not ended, "it is given time to end in order"
        time.sleep(0.6)
        assert ended[0] == "rank 2 has stopped: 'the first error'"


def test_ranks_that_are_done_are_not_missed(tmp_path, quick):
    with Crew(tmp_path, 0, 2) as crew:
        with Crew(tmp_path, 1, 2):
            time.sleep(0.3)
        time.sleep(0.3)
        crew.check()


def test_a_machine_without_power_is_missed(tmp_path, quick, monkeypatch):
    store = CacheStore(tmp_path)
    beat = beat_of_elsewhere(store, STALE_S + 5)
    with Crew(beat.parent, 1, 2) as crew:
        assert until_lost(crew).startswith("rank 0 (process 1 on node7) has shown no life for")


def test_a_disk_that_let_nobody_write_for_an_hour_loses_no_rank(tmp_path, quick):
    beat = beat_of_elsewhere(CacheStore(tmp_path), 3600)
    with Crew(beat.parent, 1, 2) as crew:
        for _ in range(4):  # this rank was the first to get through, and the other follows
            time.sleep(0.5)
            crew.check()
            os.utime(beat)


def test_sweeping_takes_what_dead_jobs_left(store, crews):
    old = beat_of_elsewhere(store, 7200).parent
    os.utime(old, (time.time() - 7200,) * 2)
    os.utime(crews[0].folder, (time.time() - 7200,) * 2)
    sweep(store.root)
    assert not old.exists() and crews[0].beat.exists()


def test_a_job_elsewhere_that_was_stopped_for_a_while_is_not_swept(store):
    beat = beat_of_elsewhere(store, 600)
    os.utime(beat.parent, (time.time() - 7200,) * 2)
    sweep(store.root)
    assert beat.exists()
