"""Starts on large datasets: seconds and memory of each stage of the way, from the folder to the first micro-batch.

    python tests/bench/scan.py --files 100000 [--clips 1] [--changed] [--rounds 3] [--profile FILE] [--keep FOLDER]
    python tests/bench/scan.py --entries 1000000
    python tests/bench/scan.py --probe 2000 [--rounds 3]

--files    A second start: N small files with captions, of which the probes are remembered and everything is in the
           cache, each entry a real one of a tiny shape. Rank 0 does all that a start does but for building the model;
           a following rank does what is left. Each round is a new process; every second one runs on half of the
           files, so that the slope is told too.
--clips    Clips a file.
--changed  A file has changed since the last start, so that all of it is scanned.
--entries  What every rank does with N entries that rank 0 has found: no files, metadata alone. And the plan's steps:
           the first, one in the middle of a resumed run, and those around the end of an epoch.
--probe    A first start: N short h264 videos that nobody has seen; files a second and core, hashing included.

Peaks are those of the process up to the end of the stage, its libraries included. The disk's cache is warm. "core s"
are the seconds that the process was at work: on a machine that is shared they tell more than those on the wall.
"""

import argparse
import contextlib
import gc
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time, sleep

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.large_data import ROOT, make_dataset, opened, scanned


class Clock:
    """Seconds, seconds of a core, and peak memory of each stage."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, float]] = []
        self._began = perf_counter(), process_time()

    def stage(self, name: str) -> None:
        """What ran since the last call was `name`."""
        began, busy = self._began
        self.rows.append((name, perf_counter() - began, process_time() - busy, peak_gb()))
        self._began = perf_counter(), process_time()


def peak_gb() -> float:
    """Of this process alone: what getrusage tells begins with what its parent had."""
    told = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", told)[1]) / 1e6


# --- a start, each rank a process -------------------------------------------------------------------------------------


def main_rank(folder: Path, name: str, clock: Clock) -> None:
    """What rank 0 does, in the order of `utils.train.prepare.prepare` and `assemble.build_run`."""
    from models import family_class
    from utils.data.precache import precache
    from utils.data.uses import keys_of, record_use
    from utils.train.order import course_of, make_plan
    from utils.train.prepare import TRAIN, require_room, save_manifests, skipped, write_skipped

    family_class("wan")
    clock.stage("libraries")
    loaded, family, store = opened(folder, name)
    clock.stage("config")
    manifests = {TRAIN: scanned(loaded, family, store)}
    clock.stage("scan")
    train = manifests[TRAIN]
    assert not any(train.jobs.values()), "the cache is not full"
    course_of(loaded.run, make_plan(loaded.run, train, 1, family.tokens), train)
    clock.stage("check the order")
    require_room(loaded, family, manifests, store, 2**30)
    (folder / f"job_{name}").mkdir(exist_ok=True)
    save_manifests(manifests, folder / f"job_{name}")
    clock.stage("save")
    precache(
        list(manifests.values()), family.encoders(), store, device=None, workers=2, batch_size=1
    )  # fmt: skip
    clock.stage("nothing to encode")
    record_use(store.root, keys_of(manifests.values()), "bench")
    write_skipped(folder / "skipped.jsonl", skipped(manifests))
    clock.stage("note the use")
    begin_training(loaded, family, store, manifests, clock)


def following_rank(folder: Path, name: str, clock: Clock) -> None:
    """What every other rank does, once rank 0 has met it."""
    from models import family_class
    from utils.data.precache import precache
    from utils.train.prepare import TRAIN, load_manifests

    family_class("wan")
    clock.stage("libraries")
    loaded, family, store = opened(folder, name)
    clock.stage("config")
    manifests = load_manifests([TRAIN], folder / f"job_{name}")
    clock.stage("load")
    precache(list(manifests.values()), family.encoders(), store, device=None, workers=2, batch_size=1)
    clock.stage("nothing to encode")
    begin_training(loaded, family, store, manifests, clock)


def begin_training(loaded, family, store, manifests, clock):
    from utils.data.dataset import CachedDataset
    from utils.data.loader import StepLoader
    from utils.train.order import course_of, make_plan
    from utils.train.prepare import TRAIN

    manifests = {name: manifest.without({}) for name, manifest in manifests.items()}
    train = manifests[TRAIN]
    plan = make_plan(loaded.run, train, 1, family.tokens)
    course_of(loaded.run, plan, train), train.digest(), plan.counts()
    clock.stage("plan")
    dataset = CachedDataset(family, store, train.entries, train.empty_text_key, seed=1)
    loader = StepLoader(lambda _: dataset, plan, 0, 0)
    next(loader.next_step())
    clock.stage("first micro-batch")
    loader.close()


ROLES = {"rank 0": main_rank, "following": following_rank}


def play(role: str, folder: Path, name: str, profile: Path | None) -> None:
    """In a process of its own; prints the stages as JSON."""
    clock = Clock()
    with contextlib.ExitStack() as stack:
        if profile:
            import cProfile

            profiler = stack.enter_context(cProfile.Profile())
            stack.callback(lambda: profiler.dump_stats(profile))
        ROLES[role](folder, name, clock)
    print(json.dumps(clock.rows))


def second_start(arguments: argparse.Namespace) -> None:
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="bench_scan_"))
    counts = {"whole": arguments.files, "half": arguments.files // 2}
    try:
        for name, count in counts.items():
            if not (folder / f"{name}_run.toml").exists():
                make_dataset(folder, name, count, arguments.clips)
        for role in ROLES:
            rows = {name: [] for name in counts}
            for turn in range(2 * arguments.rounds):
                name = ("whole", "half")[turn % 2]
                if arguments.changed:
                    os.utime(folder / name / "clip_0000000.txt")
                    sleep(2.5)  # or it would not be remembered in any case
                words = [sys.executable, __file__, "--role", role, "--keep", str(folder), "--name", name]
                if arguments.profile and name == "whole":
                    words += ["--profile", f"{arguments.profile}.{role.replace(' ', '_')}"]
                told = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout
                rows[name].append(json.loads(told.splitlines()[-1]))
            tell(f"{role}, {arguments.files} files of {arguments.clips} clips", rows, arguments.files / 2)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)


def tell(title: str, rows: dict, half: float) -> None:
    """A table: the median of each stage, its range, and what 100,000 more files add."""
    print(f"\n{title}\n{'stage':<20}{'s':>8}{'range':>18}{'core s':>8}{'peak GB':>9}{'per 100k: core s':>18}{'GB':>7}")
    more = 100_000 / half
    for place, stage in enumerate([row[0] for row in rows["whole"][0]] + ["whole"]):
        seconds, core, peaks = ([figure(run, place, column) for run in rows["whole"]] for column in (1, 2, 3))
        of_half = [statistics.median(figure(run, place, column) for run in rows["half"]) for column in (2, 3)]
        slopes = [(statistics.median(all_) - part) * more for all_, part in zip((core, peaks), of_half, strict=True)]
        span = f"{min(seconds):.2f} to {max(seconds):.2f}"
        medians = f"{statistics.median(core):>8.2f}{statistics.median(peaks):>9.2f}"
        print(f"{stage:<20}{statistics.median(seconds):>8.2f}{span:>18}{medians}{slopes[0]:>18.2f}{slopes[1]:>7.2f}")


def figure(run: list, place: int, column: int) -> float:
    """Of one stage, or of all: seconds add up, and memory is the most."""
    if place < len(run):
        return run[place][column]
    return (max if column == 3 else sum)(row[column] for row in run)


# --- what is found, without files -------------------------------------------------------------------------------------


def many_entries(count: int) -> None:
    """Seconds and memory of a manifest of `count` entries, and of the steps that are made of it."""
    from utils.data.manifest import Count, Group, Manifest
    from utils.data.plan import BatchShape, EpochPlan
    from utils.data.records import Bucket, Entry
    from utils.train.prepare import TRAIN, load_manifests, save_manifests

    buckets = [Bucket(832, 480, 81), Bucket(480, 832, 81), Bucket(832, 480, 33), Bucket(640, 640, 1)]
    clock, kinds = Clock(), ("latents",)
    clock.stage("libraries")
    entries = [
        Entry(f"{n:040x}", f"clip_{n:07d}.mp4", buckets[n % 7 % 4], n % 2, kinds, (f"{n:039x}a",), (f"{n:039x}b",))
        for n in range(count)
    ]
    contents = {f"{n:032x}": f"/data/a_folder_of_videos/clip_{n:07d}.mp4" for n in range(count)}
    groups = [Group(Path("/data/one"), 1.0), Group(Path("/data/two"), 1.5)]
    counts = {"latents": Count(count, count), "text": Count(count, count)}
    manifest = Manifest(entries, groups, [], {"latents": [], "text": []}, counts, "0" * 40, contents)
    clock.stage("made")
    with tempfile.TemporaryDirectory() as folder:
        save_manifests({TRAIN: manifest}, Path(folder))
        clock.stage("save")
        del manifest, entries, contents
        train = load_manifests([TRAIN], Path(folder))[TRAIN]
        clock.stage("load")
    batch = BatchShape(1, 4, 8)

    def plan() -> EpochPlan:
        return EpochPlan(train.entries, [group.num_repeats for group in train.groups], lambda _: batch, 1)

    whole = plan()
    clock.stage("plan")
    whole.digest(), train.digest()
    clock.stage("digests")
    whole.step(0)
    clock.stage("first step")
    last = whole.first_step(2) - 1
    for step in range(1, 100):
        whole.step(step)
    clock.stage("99 steps")
    whole.step(last)
    clock.stage("last of epoch 1")
    longest = 0.0
    for step in range(last + 1, last + 100):
        begun = perf_counter()
        whole.step(step)
        longest = max(longest, perf_counter() - begun)
    clock.stage("99 of epoch 2")
    resumed = plan()
    clock.stage("plan again")
    middle = (whole.first_step(6) + whole.first_step(7)) // 2
    resumed.step(middle), resumed.samples_before(middle)
    clock.stage("resume in epoch 6")
    gc.collect()
    clock.stage("collect garbage")
    print(f"\n{count} entries, {last + 1} steps an epoch; the longest step around the end of an epoch {longest:.3f} s")
    print(f"{'stage':<20}{'s':>8}{'core s':>8}{'peak GB':>9}")
    for stage, seconds, core, peak in clock.rows:
        print(f"{stage:<20}{seconds:>8.3f}{core:>8.3f}{peak:>9.2f}")


# --- files that nobody has seen ---------------------------------------------------------------------------------------


def first_scan(count: int, rounds: int) -> None:
    """Files a second and core, by worker processes; each run has a memory of its own."""
    from tests.helpers.media import write_video
    from utils.data.scan import describe
    from utils.data.workers import WorkerPool

    with tempfile.TemporaryDirectory() as folder:
        # two seconds in colour with grain: 160 KB, as a short clip for a feed
        first = write_video(Path(folder) / "0.mp4", 48, 24, (640, 360), options={"crf": "30"}, grain=True)
        paths = [first, *(Path(folder) / f"{number}.mp4" for number in range(1, count))]
        for path in paths[1:]:
            shutil.copyfile(first, path)
        print(f"\n{count} h264 videos of {first.stat().st_size / 1000:.0f} kB, 640x360, 48 frames")
        for workers in (1, os.cpu_count()):
            rates = []
            for _ in range(rounds):
                with WorkerPool(describe, workers) as pool:
                    list(pool.run(paths[:1] * workers, ahead=workers))  # started
                    begun = perf_counter()
                    assert all(outcome.error is None for outcome in pool.run(paths, ahead=4 * workers))
                rates.append(count / (perf_counter() - begun) / workers)
            span = f"{min(rates):.0f} to {max(rates):.0f}"
            print(f"{workers} workers: {statistics.median(rates):.0f} files a second and core ({span})")
        begun = os.times()
        for path in paths[:200]:
            describe(path)
        ended = os.times()
        seconds = ended.user - begun.user + ended.system - begun.system
        print(f"{200 / seconds:.0f} files a second of a core's own time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int)
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--changed", action="store_true")
    parser.add_argument("--entries", type=int)
    parser.add_argument("--probe", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make the files in here, or use those that are")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.role:
        play(arguments.role, arguments.keep, arguments.name, arguments.profile)
        return
    if arguments.files:
        second_start(arguments)
    if arguments.entries:
        many_entries(arguments.entries)
    if arguments.probe:
        first_scan(arguments.probe, arguments.rounds)


if __name__ == "__main__":
    main()
