"""Many seeded mutations of a good file of each kind, through two worker processes as the trainer reads media.

    python tests/bench/mutations.py [--count 500] [--first 0]

Tells for each kind how many could still be used, the reasons of the others, the longest wait and the most memory; ends
with 1 if a worker process died, hung, or raised anything but a `MediaError`.
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.helpers.damage import mutated, tried, write_good
from utils.data.workers import WorkerPool

DEADLINE_S = 60.0


def try_all(paths: list[Path]) -> tuple[Counter, int, float, int]:
    """Reasons, items that were lost, the longest wait for one, s, and the most memory of a worker, MiB."""
    reasons, lost, most_mib, longest_s = Counter(), 0, 0, 0.0
    with WorkerPool(tried, 2, DEADLINE_S) as pool:
        last = perf_counter()
        for outcome in pool.run(paths, ahead=8, name=lambda path: path.name):
            longest_s, last = max(longest_s, perf_counter() - last), perf_counter()
            if outcome.error:
                lost += 1
                reasons[f"LOST {outcome.item.name}: {outcome.error!r}"] += 1
                continue
            reason, mib = outcome.value
            most_mib = max(most_mib, mib)
            reasons[re.sub(r"\d+", "#", reason.removeprefix(f"{outcome.item}: "))[:100] or "used"] += 1
    return reasons, lost, longest_s, most_mib


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    total = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, content in write_good(folder).items():
            paths = [folder / f"{seed}-{kind}" for seed in range(options.first, options.first + options.count)]
            for seed, path in enumerate(paths, options.first):
                path.write_bytes(mutated(content, seed))
            begun = perf_counter()
            reasons, lost, longest_s, mib = try_all(paths)
            total += lost
            took = perf_counter() - begun
            print(f"{kind}: {took:.1f} s, longest wait {longest_s:.1f} s, {mib} MiB, {lost} lost", flush=True)
            for reason, count in reasons.most_common():
                print(f"  {count:5} {reason}")
            for path in paths:
                path.unlink()
    raise SystemExit(1 if total else 0)


if __name__ == "__main__":
    main()
