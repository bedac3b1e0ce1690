"""Starts of two ranks that are stopped while they cache, whose disk is full, or that meet another in a run folder."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import forked
from tests.helpers.caching import wait_until
from tests.helpers.media import write_video
from tests.helpers.slow_start import SECONDS
from utils.data.cache import CacheStore

pytestmark = pytest.mark.pipeline

CLIPS = 30
CONFIG = """
output_dir = '{folder}/runs'
cache_dir = '{folder}/cache'
dataset = '{folder}/dataset.toml'
epochs = 100000
save_every_n_steps = 1000000
checkpoint_every_n_minutes = 0.001
keep_last = 2
map_num_proc = 1
requeue_exit_code = 85
[model]
type = 'slow'
[adapter]
type = 'lora'
rank = 2
[optimizer]
type = 'adamw'
lr = 1e-3
"""
DATASET = """
resolutions = [64]
frame_buckets = [5]
[[directory]]
path = '{folder}/train'
"""
# A shell script: its first word is the folder of the inputs, what follows is the command to start.
MOUNTED = """
mkdir "$0/cache" "$0/runs"
mount -t tmpfs -o size=250k none "$0/cache" && mount -t tmpfs -o size=100m none "$0/runs" && exec "$@"
"""


class Ended(NamedTuple):
    """What became of a start."""

    statuses: list[int]
    seconds: float  # after the signal
    said: str
    entries: int  # in the cache by then
    left: list[int]  # processes


def write_inputs(folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    for number in range(CLIPS):
        size = (64 + 2 * (number % 6), 64 + 2 * (number // 6))
        write_video(folder / "train" / f"clip{number:02d}.mp4", 5, size=size, grain=True)
        (folder / "train" / f"clip{number:02d}.txt").write_text(f"caption {number}")
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder))


# --- in the process that forks ----------------------------------------------------------------------------------------


def begin(folder: Path, name: str, *words: str, ranks: int = 2) -> list[forked.Rank]:
    import models
    import train

    models.FAMILIES["slow"] = "tests.helpers.slow_start:SlowToy"
    words = ("--config", str(folder / "config.toml"), *words)
    return forked.start(ranks, folder / name, lambda: sys.exit(train.main(words)))


def says(rank: forked.Rank, words: str) -> bool:
    return rank.log.exists() and words in rank.log.read_text()


def count_entries(folder: Path) -> int:
    return len(list((folder / "cache" / "latents").glob("*/*.safetensors")))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def end(folder: Path, ranks: list[forked.Rank], signals: list[tuple[int, int]]) -> Ended:
    """Send (rank, signal), one after another, and see what comes of it."""
    below = [child for rank in ranks for child in children(rank.pid)]
    begun = time.monotonic()
    for rank, number in signals:
        os.kill(ranks[rank].pid, number)
        time.sleep(0.02)
    return ended(folder, ranks, below, begun)


def ended(folder: Path, ranks: list[forked.Rank], below: list[int], begun: float) -> Ended:
    statuses, seconds = forked.statuses(ranks, timeout_s=60), time.monotonic() - begun
    deadline = time.monotonic() + 5
    while any(map(is_there, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    said = "\n".join(rank.log.read_text() for rank in ranks)
    return Ended(statuses, seconds, said, count_entries(folder), [pid for pid in below if is_there(pid)])


def stops(folder: Path, _: None) -> dict[str, Ended]:
    """Starts on one cache, each stopped after it has encoded a little; then one that is left alone."""
    forked.import_all()
    os.environ[SECONDS] = "0.2"
    both, told = [0, 1], {}
    cases = {
        "SIGUSR1 to rank 1": [(1, signal.SIGUSR1)],
        "SIGTERM to rank 1": [(1, signal.SIGTERM)],
        "Ctrl-C": [(rank, signal.SIGINT) for rank in both],
        "Ctrl-C, and the launcher's SIGTERM": [(r, n) for n in (signal.SIGINT, signal.SIGTERM) for r in both],
        "Ctrl-C, twice": [(rank, signal.SIGINT) for _ in range(2) for rank in both],
        "kill -9": [(rank, signal.SIGKILL) for rank in both],
    }
    for number, (name, signals) in enumerate(cases.items()):
        before, ranks = count_entries(folder), begin(folder, f"stop{number}", "--cache_only")
        wait_until(lambda before=before: count_entries(folder) >= before + 2)
        told[name] = end(folder, ranks, signals)
    ranks = begin(folder, "early", "--cache_only")
    wait_until(lambda: says(ranks[0], "loading libraries"))
    told["SIGUSR1 while loading"] = end(folder, ranks, [(0, signal.SIGUSR1)])
    ranks = begin(folder, "plan", "--plan", ranks=1)
    wait_until(lambda: says(ranks[0], "plan for"))
    told["SIGTERM to --plan"] = end(folder, ranks, [(0, signal.SIGTERM)])
    os.environ[SECONDS] = "0"
    told["left alone"] = ended(folder, begin(folder, "last", "--cache_only"), [], time.monotonic())
    return {**told, **second_starts(folder)}


def latest(folder: Path) -> str:
    """Name of the newest checkpoint of the only run; empty where there is none."""
    return "".join(path.read_text() for path in (folder / "runs").glob("*/latest"))


def second_starts(folder: Path) -> dict[str, Ended]:
    """A run that is gone on with while it is training, and again after it was killed."""
    told, resume = {}, "--resume_from_checkpoint"
    os.environ[SECONDS] = "0"
    first = begin(folder, "first")
    wait_until(lambda: latest(folder))
    told["second"] = ended(folder, begin(folder, "second", resume), [], time.monotonic())
    told["first"] = end(folder, first, [(0, signal.SIGKILL)])
    third = begin(folder, "third", resume)
    newest = latest(folder)
    wait_until(lambda: latest(folder) != newest)
    told["third"] = end(folder, third, [(1, signal.SIGHUP)])
    return told


def full_disks(folder: Path, _: None) -> dict[str, Ended]:
    """The cache is a disk of its own; it is made larger for the second start. So are the runs."""
    forked.import_all()
    told = {"full": ended(folder, begin(folder, "full", "--cache_only"), [], time.monotonic())}
    store = CacheStore(folder / "cache")
    for path in (folder / "cache" / "latents").glob("*/*.safetensors"):
        store.read("latents", path.stem)  # raises where it is damaged
    subprocess.run(["mount", "-o", "remount,size=4m", str(folder / "cache")], check=True)
    told["larger"] = ended(folder, begin(folder, "larger", "--cache_only"), [], time.monotonic())
    return {**told, "at the end": full_at_the_end(folder)}


def full_at_the_end(folder: Path) -> Ended:
    """The run's disk is filled while it trains; room is made once it waits for that."""
    sets = ("max_steps=400", "checkpoint_every_n_minutes=1000")
    ranks = begin(folder, "run", *(word for each in sets for word in ("--set", each)))
    wait_until(lambda: list((folder / "runs").glob("*/metrics.jsonl")))
    filler = folder / "runs" / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    wait_until(lambda: says(ranks[0], "Waiting up to"))
    filler.unlink()
    told = ended(folder, ranks, [], time.monotonic())
    return told._replace(entries=len(list((folder / "runs").glob("*/step400/*.safetensors"))))


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    write_inputs(folder)
    return folder, forked.run_forked("tests.pipeline.test_interrupted_starts:stops", folder)


def test_what_is_encoded_is_kept_and_nothing_is_left_running(stopped):
    folder, told = stopped
    told = {name: end for name, end in told.items() if name not in ("first", "second", "third")}
    statuses = {name: end.statuses for name, end in told.items()}
    assert statuses == {
        "SIGUSR1 to rank 1": [85, 85],
        "SIGTERM to rank 1": [143, 143],
        "Ctrl-C": [130, 130],
        "Ctrl-C, and the launcher's SIGTERM": [130, 130],
        "Ctrl-C, twice": [130, 130],
        "kill -9": [-9, -9],
        "SIGUSR1 while loading": [85, 85],
        "SIGTERM to --plan": [143],
        "left alone": [0, 0],
    }
    for name, end in told.items():
        assert end.left == [] and (end.seconds < 15 or name == "left alone"), (name, end)
        words = end.said.count("stopping before")
        assert words == (not name.startswith(("kill", "left"))) or (name == "Ctrl-C, twice" and not words), end.said
    assert "everything is encoded: SIGTERM came; what is encoded is kept" in told["SIGTERM to rank 1"].said
    assert "the plan is complete: SIGTERM came; what was found out about the" in told["SIGTERM to --plan"].said
    before = told["SIGTERM to --plan"].entries
    assert f"{CLIPS - before} of {CLIPS} clips encoded, {before} were in the cache" in told["left alone"].said
    assert len(list((folder / "cache").glob("cache_only*"))) <= 2, "of kill -9, and of Ctrl-C twice"


def test_one_start_at_a_time_goes_on_with_a_run(stopped):
    folder, told = stopped
    assert told["second"].statuses == [1, 1]
    (run,) = (folder / "runs").iterdir()
    assert told["second"].said.count(f"the run folder {run} is in use by process ") == 1
    assert told["first"].statuses[0] == -9 and "ended first" not in told["first"].said
    assert told["third"].statuses == [0, 0] and "stopping after step" in told["third"].said
    assert "SIGHUP came" in told["third"].said
    assert not (run / "in_use.json").exists() and not (run / "alive").exists()


def can_mount() -> bool:
    try:
        return not subprocess.run(
            ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
        ).returncode
    except OSError:
        return False


@pytest.fixture(scope="module")
def on_small_disks(tmp_path_factory):
    if not can_mount():
        pytest.skip("mounts small disks, which needs user namespaces")
    folder = tmp_path_factory.mktemp("disks")
    write_inputs(folder)
    inside = ["unshare", "-Urm", "sh", "-c", MOUNTED, str(folder)]
    return folder, forked.run_forked("tests.pipeline.test_interrupted_starts:full_disks", folder, inside=inside)


def test_a_full_disk_keeps_what_is_encoded_and_the_next_start_goes_on(on_small_disks):
    folder, told = on_small_disks
    full, larger = told["full"], told["larger"]
    assert full.statuses == [1, 1] and full.seconds < 30 and "Traceback" not in full.said
    assert f"the disk of cache_dir = '{folder / 'cache'}' is full: " in full.said
    assert " are still to be written; make room or name another folder, and start again: what is enc" in full.said
    assert 5 < full.entries < CLIPS and larger.statuses == [0, 0] and larger.entries == CLIPS
    assert f"{CLIPS - full.entries} of {CLIPS} clips encoded, {full.entries} were in the cache" in larger.said


def test_the_last_model_of_two_ranks_waits_for_room(on_small_disks):
    told = on_small_disks[1]["at the end"]
    assert told.statuses == [0, 0] and told.seconds < 40, told.said
    assert told.said.count("Waiting up to 10") == 1
    assert told.entries == 1, "the LoRA"
