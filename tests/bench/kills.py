"""Kills at random moments: of two ranks that save all the time, on a disk that is really synced; and of whole runs.

    python tests/bench/kills.py [--kills 60] [--runs 12] [--seed 1]

The first asserts after each kill that the newest checkpoint said to be there is found, sound and right to the last
value. The second goes on after each kill, and compares the end with a run that was never killed. Rows go to
tests/RELIABILITY.md by hand.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=60, help="of ranks that save all the time")
    parser.add_argument("--runs", type=int, default=12, help="kills of a whole run")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args()
    from tests.helpers.forked import run_forked

    with tempfile.TemporaryDirectory() as name:
        told = {"kills": flags.kills, "seed": flags.seed, "synced": True, "longest_s": 3.0}
        kills = run_forked("tests.helpers.kills:hammer", Path(name) / "saves", told, timeout_s=3600)
        tell_kills(kills)
        told = {"kills": flags.runs, "seed": flags.seed}
        tell_runs(run_forked("tests.bench.kills:whole_runs", Path(name) / "runs", told, timeout_s=3600))


def tell_kills(kills: list) -> None:
    for kill in kills:
        print(
            f"ranks {kill.ranks} after {kill.after_s:.3f} s: saved {kill.saved}, found {kill.found}, left {kill.left}"
        )
    within = [kill for kill in kills if any(name.startswith("tmp-") for name in kill.left)]
    beyond = [kill for kill in kills if kill.found > kill.saved]
    ended = [kill.ended_s for kill in kills]
    print(
        f"{len(kills)} kills, {len(within)} with something half written, {len(beyond)} went on from "
        f"more than was said to be there; lost: 0; ended after {statistics.median(ended):.2f} s, at most "
        f"{max(ended):.2f} s"
    )


def tell_runs(told: dict[str, Any]) -> None:
    count, compared = len(told["kills"]), told["compared"]
    print(f"{count} kills of runs of {told['seconds']:.1f} s; {compared} runs to their end, each equal to one without")
    for ranks, after_s, ended_s, newest in told["kills"]:
        print(f"ranks {ranks} after {after_s:.2f} s: ended after {ended_s:.1f} s, at step {newest}")


def whole_runs(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """In a process that may fork: a run that is killed and goes on, until it has been killed often enough."""
    import models
    import train
    from tests.helpers import forked
    from tests.pipeline import test_cuts
    from utils.train.checkpoint import step_of

    models.FAMILIES["faulty"] = "tests.helpers.toy_faults:FaultyToy"
    forked.import_all()
    test_cuts.write_inputs(folder)
    (folder / "config.toml").write_text(test_cuts.CONFIG.format(folder=folder))
    test_cuts.start(folder, folder / "warm")  # fills the cache
    begun = time.monotonic()
    assert test_cuts.start(folder, folder / "whole") == [0, 0]
    seconds, chance = time.monotonic() - begun, random.Random(arguments["seed"])
    output, kills, compared = folder / "killed", [], 1
    while len(kills) < arguments["kills"]:
        run = test_cuts.newest(output)
        if (run / f"step{test_cuts.STEPS}").exists():
            test_cuts.check(test_cuts.newest(folder / "whole"), run)
            shutil.rmtree(output)
            compared += 1
            continue
        words = ["--config", str(folder / "config.toml"), "--set", f"output_dir='{output}'"]
        words += ["--resume_from_checkpoint"] if list(run.glob("global_step*")) else []
        ranks = forked.start(2, folder / "logs", lambda words=words: sys.exit(train.main(words)))
        after_s, chosen = chance.uniform(0.3, 1.2) * seconds, chance.choice(((0,), (1,), (0, 1)))
        time.sleep(after_s)
        for rank in chosen:
            os.kill(ranks[rank].pid, signal.SIGKILL)
        killed = time.monotonic()
        if -signal.SIGKILL in forked.statuses(ranks, 60):  # else it was done before
            steps = [step_of(path) for path in test_cuts.newest(output).glob("global_step*")]
            kills.append((chosen, after_s, time.monotonic() - killed, max(steps, default=0)))
    assert test_cuts.start(folder, output) == [0, 0]
    test_cuts.check(test_cuts.newest(folder / "whole"), test_cuts.newest(output))
    return {"kills": kills, "seconds": seconds, "compared": compared}


if __name__ == "__main__":
    main()
