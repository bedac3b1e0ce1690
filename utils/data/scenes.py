"""Where another scene begins within a clip: at a cut, in a dissolve, or behind a fade to one colour and back.

All that is looked at are the mean colours of a few blocks of each frame.
"""

from collections.abc import Sequence

import numpy as np

# Levels are of 0 to 255.
_CUT_LEVEL = 14.0  # mean change over all blocks
_CUT_RATIOS = (3.5, 1.7)  # how many times the median, and the largest, of the changes around it
_CUT_SPAN = 4  # frames around it, before and after

_FADE_S = (0.15, 1.3)  # shortest and longest of a gradual change
_FADE_LEVEL = 14.0  # root mean square of the change from its first frame to its last
_OTHER_SCENE = 0.3  # correlation of the blocks: scenes that have nothing to do with each other lie below
_SAME_SCENE = 0.8  # and darker or brighter frames of one scene above
_OFF_LINE = 0.2  # how far from the straight way between two scenes a dissolve may stray, as a share of its length
_AROUND = 0.35  # what else may move before and after it, as a share of the change
_EVEN = 0.4  # contrast of the weaker of two scenes, as a share of the other's: less is a fade
_FLAT_LEVEL = 4.0  # a frame whose blocks differ by less is of one colour


def scene_changes(blocks: np.ndarray, times_s: Sequence[float]) -> list[int]:
    """Frames that are of another scene than those before them, ascending.

    Args:
        blocks: mean colours, float32 [N, rows, columns, 3].
        times_s: when each frame is shown.
    """
    flat = blocks.reshape(len(blocks), -1)
    cuts = _cuts(flat)
    if len(flat) < 5:
        return cuts
    found = list(cuts)
    for first, last, middle in [*_dips(blocks, times_s), *_dissolves(blocks, times_s)]:
        if not any(first <= known <= last for known in found):
            found.append(middle)
    return sorted(found)


def _cuts(flat: np.ndarray) -> list[int]:
    """From one frame to the next. `flat` [N, values].

    The change must stand out from the motion around it, and last: after a flash the old scene is back.
    """
    change = np.abs(np.diff(flat, axis=0)).mean(1)  # [N - 1]: from frame i to i + 1
    found = []
    for i in np.flatnonzero(change >= _CUT_LEVEL):
        around = np.concatenate([change[max(0, i - _CUT_SPAN) : i], change[i + 1 : i + 1 + _CUT_SPAN], [1.0]])
        before, after = flat[max(0, i - 1)], flat[min(len(flat) - 1, i + 2)]
        lasts = np.abs(after - before).mean() >= change[i] / 2
        to_median, to_largest = _CUT_RATIOS
        if lasts and change[i] >= max(to_median * np.median(around), to_largest * around.max()):
            found.append(int(i) + 1)
    return found


class _Products:
    """Scalar products of all pairs of frames, from which the rest is counted."""

    def __init__(self, blocks: np.ndarray) -> None:
        flat = blocks.reshape(len(blocks), -1).astype(np.float64)
        self.values = flat.shape[1]
        self.plain = flat @ flat.T
        centred = (blocks - blocks.mean((1, 2), keepdims=True)).reshape(len(blocks), -1).astype(np.float64)
        products = centred @ centred.T
        self.spread = np.sqrt(np.diag(products) / self.values)  # [N]: 0 where all blocks have one colour
        scale = np.maximum(self.spread, 1e-3)
        self.likeness = products / self.values / np.outer(scale, scale)  # [N, N]: correlation
        squares = np.diag(self.plain)
        self.apart = np.sqrt(np.maximum(0, squares[:, None] + squares - 2 * self.plain) / self.values)  # [N, N]: rms

    def along(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the frames between: how far on the way from `first` to `last`, and how far off it, as shares of it."""
        frames, way = np.arange(first + 1, last), self.apart[first, last]
        products = self.plain
        onward = products[frames, last] - products[frames, first] - products[first, last] + products[first, first]
        done = onward / self.values / way**2
        return done, np.sqrt(np.maximum(0, (self.apart[first, frames] / way) ** 2 - done**2))


def _dissolves(blocks: np.ndarray, times_s: Sequence[float]) -> list[tuple[int, int, int]]:
    """(first, last, middle) frame of gradual changes from one scene straight to another, the straightest first.

    In a dissolve each frame is a mixture of the two scenes. When a camera pans or a thing moves, the frames between are
    no mixtures of the first and the last, unless these are alike.
    """
    known = _Products(blocks)
    found: list[tuple[float, int, int, int]] = []
    for first, last in np.argwhere(_could_dissolve(known, np.asarray(times_s))):
        done, off = known.along(first, last)
        gradual = ((done > 0.15) & (done < 0.85)).sum() >= 2
        steady = np.diff(np.concatenate([[0.0], done, [1.0]])).min() > -0.1
        if gradual and steady and off.max() <= _OFF_LINE and _quiet_around(known, first, last):
            found.append((float(off.max()), int(first), int(last), int(first) + 1 + int(np.abs(done - 0.5).argmin())))
    return [row[1:] for row in sorted(found)]


def _could_dissolve(known: _Products, times_s: np.ndarray) -> np.ndarray:
    """[N, N]: which frame may be the last before a dissolve, and which the first behind it."""
    shortest, longest = _FADE_S
    took = times_s[None, :] - times_s[:, None]
    frames = np.arange(len(times_s))
    weaker, stronger = np.minimum.outer(known.spread, known.spread), np.maximum.outer(known.spread, known.spread)
    scenes = (weaker >= _FLAT_LEVEL) & (weaker >= _EVEN * stronger) & (known.likeness <= _OTHER_SCENE)
    in_time = (took >= shortest) & (took <= longest) & (frames[None, :] - frames[:, None] >= 3)
    return in_time & scenes & (known.apart >= _FADE_LEVEL)


def _quiet_around(known: _Products, first: int, last: int) -> bool:
    """Whether little moves before and after, for half as long as the change takes."""
    half, way = max(1, (last - first) // 2), known.apart[first, last]
    before, after = max(0, first - half), min(len(known.apart) - 1, last + half)
    return max(known.apart[before, first], known.apart[last, after]) <= _AROUND * way


def _dips(blocks: np.ndarray, times_s: Sequence[float]) -> list[tuple[int, int, int]]:
    """(first, last, middle) frame of fades to one colour out of which another scene comes.

    The scene grows darker as it is, and the next brighter: to pass by a dark wall is no fade, and when the lights come
    on again in the same scene nothing has changed.
    """
    known = _Products(blocks)
    flat = known.spread < _FLAT_LEVEL
    found = []
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat, [False]]).astype(int)))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if begin == 0 or end == len(flat):
            continue  # the clip fades in or out
        first, last = _scene_beside(known, times_s, begin - 1, -1), _scene_beside(known, times_s, end, 1)
        fades = _only_fades(known, first, begin - 1, -1) and _only_fades(known, last, end, 1)
        if fades and known.likeness[first, last] <= _OTHER_SCENE:
            found.append((first, last, int(begin + end) // 2))
    return found


def _scene_beside(known: _Products, times_s: Sequence[float], edge: int, step: int) -> int:
    """The frame of most contrast within the time of a fade from `edge` on."""
    frames = [edge]
    while 0 <= (following := frames[-1] + step) < len(times_s):
        if abs(times_s[following] - times_s[edge]) > _FADE_S[1]:
            break
        frames.append(following)
    return max(frames, key=lambda frame: known.spread[frame])


def _only_fades(known: _Products, scene: int, edge: int, step: int) -> bool:
    """Whether all that happens from `scene` to `edge`, next to the flat frames, is a change of brightness."""
    frames = [f for f in range(edge, scene, step) if known.spread[f] >= 2 * _FLAT_LEVEL]
    return all(known.likeness[scene, frame] >= _SAME_SCENE for frame in frames)
