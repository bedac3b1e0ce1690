"""Dissolves and fades into another scene are found, and what a camera and a lamp do is not taken for one."""

import numpy as np
import pytest

from tests.unit.test_inspection import seen
from utils.data.inspection import measure

FRAMES = 40
HEIGHT, WIDTH, WIDE = 54, 96, 384  # px


def wide_picture(seed):
    """[h, 384, 3]: colours with as much of each coarseness as pictures of the world have."""
    random = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDE)[None]
    fall = np.maximum(np.hypot(down, across), 1 / WIDE)[..., None] ** -1.3
    waves = random.normal(size=(HEIGHT, WIDE // 2 + 1, 3)) + 1j * random.normal(size=(HEIGHT, WIDE // 2 + 1, 3))
    waves[0, 0] = 0
    colours = np.fft.irfft2(waves * fall, (HEIGHT, WIDE), axes=(0, 1))
    colours = 0.4 * colours + colours.mean(-1, keepdims=True)
    return np.clip(120 + 45 * colours / colours.std(), 0, 255)


def scene(seed, places=None):
    """A camera that stands in `places` px from the left of a wide picture, or drifts slowly."""
    wide = wide_picture(seed)
    places = np.arange(FRAMES) // 8 if places is None else places
    return np.stack([wide[:, place : place + WIDTH] for place in places])


def mixed(first, second, at, length):
    share = np.clip((np.arange(len(first)) - at) / length, 0, 1)[:, None, None, None]
    return (first * (1 - share) + second * share).astype(np.uint8)


def lit(frames, *points):
    """`frames` as bright as the (frame, share) points say, straight lines between them."""
    share = np.interp(np.arange(len(frames)), *zip(*points, strict=True))
    return np.clip(frames * share[:, None, None, None], 0, 255).astype(np.uint8)


def grainy(frames, seed=0):
    grain = np.random.default_rng(seed).normal(0, 3, frames.shape)
    return np.clip(frames + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("length", [3, 6, 10, 16])
@pytest.mark.parametrize("seed", range(3))
def test_a_dissolve_is_found_once_at_its_middle(length, seed):
    clip = mixed(scene(2 * seed), scene(2 * seed + 1), 12, length)
    (found,) = seen(grainy(clip)).cuts
    assert abs(found - (12 + length / 2) / 16) <= 2.5 / 16


def test_a_dissolve_and_a_cut_are_two():
    clip = mixed(scene(4), scene(5), 8, 6)
    clip[28:] = scene(3)[28:]
    soft, hard = seen(grainy(clip)).cuts
    assert abs(soft - 11 / 16) <= 2.5 / 16 and hard == 28 / 16


def test_another_scene_behind_a_fade_is_found():
    dark = (0, 1), (12, 1), (17, 0), (19, 0), (24, 1), (39, 1)
    joined = np.concatenate([scene(4)[:18], scene(5)[18:]])
    (found,) = seen(grainy(lit(joined, *dark))).cuts
    assert abs(found - 18 / 16) <= 2 / 16
    assert seen(grainy(lit(scene(1), *dark))).cuts == (), "the same scene is back"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "points",
    [
        ((0, 0), (8, 1), (39, 1)),  # from black
        ((0, 1), (30, 1), (39, 0)),  # to black
        ((0, 1), (15, 1), (20, 0.4), (39, 0.4)),  # a lamp goes out
        ((0, 0.5), (15, 0.5), (20, 1.3), (39, 1.3)),  # and on
    ],
)
def test_fades_and_lamps_of_a_single_scene_are_none(seed, points):
    assert seen(grainy(lit(scene(seed), *points))).cuts == ()


@pytest.mark.parametrize("seed", range(4))
def test_the_ways_of_a_camera_are_none(seed):
    for far in (10, 30, 60, 120):  # px, in 40 frames, and in 10 between two rests
        steady = np.linspace(0, far, FRAMES).astype(int)
        eased = (far * (1 - np.cos(np.pi * np.clip((np.arange(FRAMES) - 15) / 10, 0, 1))) / 2).astype(int)
        for way in (steady, eased):
            assert seen(grainy(scene(seed, way))).cuts == ()


def test_a_thing_that_fills_the_picture_is_none():
    clip, thing = scene(1), scene(2)
    for i in range(FRAMES):
        reach = max(0, 8 * (i - 12))
        clip[i, :, :reach] = thing[0, :, :reach]
    assert seen(grainy(clip)).cuts == ()


def test_times_count_and_not_frames():
    """Of a long clip every third frame is looked at; of a dissolve of three seconds no one speaks."""
    clip = mixed(scene(4), scene(5), 12, 4)
    (found,) = measure(clip, [i * 3 / 16 for i in range(FRAMES)]).cuts
    assert abs(found - 14 * 3 / 16) <= 3 / 16
    slow = mixed(scene(4), scene(5), 0, FRAMES - 1)
    assert measure(slow, [i * 3 / 16 for i in range(FRAMES)]).cuts == ()
