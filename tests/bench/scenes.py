"""How many scene changes within clips are found, and how often one is found where none is.

    python tests/bench/scenes.py [--clips 200] [--seed 20261121]

The thresholds in `utils.data.scenes` were chosen on the same kind of pictures. Here every seed is a new one, of 10**6
and more, and lengths, places, speeds and contrasts are drawn at random, where the tests have a few. The pictures stay
made up (noise with as much of each coarseness as photographs have): of films these numbers say little.

Each clip has 40 frames at 16 a second. "found" is the share with a change within 3 frames of the true one, "false" the
share with any other change; each with its 95 % interval by Wilson. Kinds without a change have only the latter.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.test_scenes import FRAMES, WIDTH, grainy, lit, mixed, wide_picture
from utils.data.inspection import measure

FPS, NEAR, AT = 16, 3, np.arange(FRAMES)
Made = tuple[np.ndarray, float | None]  # a clip [N, h, w, 3], and the frame of its change


def drifting(draw: np.random.Generator, places: np.ndarray | None = None) -> np.ndarray:
    """A camera that drifts slowly before a wide picture, or goes to `places` px from its left."""
    wide = 120 + (wide_picture(int(draw.integers(10**6, 2**40))) - 120) * draw.uniform(0.5, 1)  # of less contrast
    places = AT // draw.integers(4, 40) if places is None else places
    return np.stack([wide[:, place : place + WIDTH] for place in places.astype(int)])


def cut(draw: np.random.Generator) -> Made:
    clip, at = drifting(draw), int(draw.integers(2, FRAMES - 2))
    return np.concatenate([clip[:at], drifting(draw)[at:]]), at


def dissolve(draw: np.random.Generator) -> Made:
    length = int(draw.integers(3, 18))
    at = int(draw.integers(3, FRAMES - length - 3))
    return mixed(drifting(draw), drifting(draw), at, length), at + length / 2


def down_and_up(draw: np.random.Generator, clip: np.ndarray, after: np.ndarray) -> Made:
    out, dark, up = (int(draw.integers(*bounds)) for bounds in ((3, 9), (1, 4), (3, 9)))
    begin = int(draw.integers(3, FRAMES - out - dark - up - 3))
    middle = begin + out + dark // 2
    points = (begin, 1), (begin + out, 0), (begin + out + dark, 0), (begin + out + dark + up, 1)
    return lit(np.concatenate([clip[:middle], after[middle:]]), *points), middle


def eased_pan(draw: np.random.Generator) -> Made:
    share = np.clip((AT - draw.integers(4, 20)) / draw.integers(8, 20), 0, 1)
    return drifting(draw, draw.uniform(10, 150) * (1 - np.cos(np.pi * share)) / 2), None


def lamp(draw: np.random.Generator) -> Made:
    begin, length = draw.integers(3, 25), draw.integers(1, 10)
    return lit(drifting(draw), (begin, draw.uniform(0.4, 1)), (begin + length, draw.uniform(0.4, 1.3))), None


def flash(draw: np.random.Generator) -> Made:
    clip, begin = drifting(draw), int(draw.integers(3, 34))
    clip[begin : begin + int(draw.integers(1, 3))] += draw.uniform(60, 120)
    return clip, None


def passing(draw: np.random.Generator) -> Made:
    clip, thing = drifting(draw), drifting(draw)
    speed, begin = draw.uniform(4, 16), draw.integers(2, 20)
    for i, reach in enumerate(np.clip(speed * (AT - begin), 0, WIDTH).astype(int)):
        clip[i, :, :reach] = thing[0, :, :reach]
    return clip, None


KINDS: dict[str, Callable[[np.random.Generator], Made]] = {
    "hard cut": cut,
    "dissolve of 0.2 to 1.1 s": dissolve,
    "through black to another scene": lambda draw: down_and_up(draw, drifting(draw), drifting(draw)),
    "still or slow camera": lambda draw: (drifting(draw), None),
    "steady pan to 150 px": lambda draw: (drifting(draw, np.linspace(0, draw.uniform(0, 150), FRAMES)), None),
    "pan between two rests": eased_pan,
    "shaking camera": lambda draw: (drifting(draw, 20 + np.clip(draw.normal(0, 4, FRAMES).cumsum(), -20, 99)), None),
    "lamp on or off": lamp,
    "flash": flash,
    "to black and back to the same": lambda draw: (down_and_up(draw, *[drifting(draw)] * 2)[0], None),
    "thing that fills the picture": passing,
}


def share(hits: int, count: int) -> str:
    p, z = hits / count, 1.96
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    low, high = (abs(middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return f"{100 * p:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200, help="of each kind")
    parser.add_argument("--seed", type=int, default=20261121)
    args = parser.parse_args()
    print("| kind | found | false |\n| --- | --- | --- |")
    for number, (kind, make) in enumerate(KINDS.items()):
        found = false = 0
        for index in range(args.clips):
            clip, at = make(np.random.default_rng([args.seed, number, index]))
            shown = measure(grainy(clip, [args.seed, index]), [i / FPS for i in range(FRAMES)]).cuts
            near = [at is not None and abs(time * FPS - at) <= NEAR for time in shown]
            found, false = found + any(near), false + (len(near) > 1 or near == [False])
        print(f"| {kind} | {share(found, args.clips) if at is not None else ''} | {share(false, args.clips)} |")


if __name__ == "__main__":
    main()
