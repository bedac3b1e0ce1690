"""What is seen of clips, black, still, bars and cuts, and what is remembered of it."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.helpers.clips import clip_of
from tests.helpers.media import write_image, write_video
from utils.data.inspection import inspect, look_at, measure, small_size, spread, view_of
from utils.data.records import Bucket, Fill
from utils.data.stat_index import StatIndex

SHAPE = (54, 96, 3)


def scene(seed, frames, speed=2):
    """[frames, h, w, 3]: smooth random colours that move to the left."""
    coarse = np.random.default_rng(seed).integers(40, 230, (6, 40, 3))
    wide = np.kron(coarse, np.ones((9, 9, 1))).astype(np.uint8)
    return np.stack([wide[:, i * speed : i * speed + SHAPE[1]] for i in range(frames)])


def seen(pixels):
    return measure(pixels, [i / 16 for i in range(len(pixels))])


def test_a_moving_scene_is_fine():
    look = seen(scene(1, 24))
    assert (look.black, look.bars, look.cuts) == (0.0, (0.0, 0.0), ())
    assert look.still < 0.1


@pytest.mark.parametrize("at", [1, 6, 12, 22])
def test_a_cut_is_found_where_it_is(at):
    joined = np.concatenate([scene(1, at), scene(2, 24 - at)])
    assert seen(joined).cuts == (round(at / 16, 2),)


def test_what_is_no_cut():
    flash = scene(1, 24)
    flash[12] = 255
    assert seen(flash).cuts == (), "the old scene is back after it"
    fast = scene(1, 17, speed=15)
    assert np.abs(np.diff(fast.astype(int), axis=0)).mean() > 14, "as much change as at a cut"
    assert seen(fast).cuts == (), "a swift pan changes as much at every frame"
    ramp = np.linspace(0, 1, 24)[:, None, None, None]
    assert seen((scene(1, 24) * (1 - ramp) + scene(2, 24) * ramp).astype(np.uint8)).cuts == (), "a dissolve"


def test_black_and_still():
    dark = np.random.default_rng(0).integers(0, 9, (16, *SHAPE)).astype(np.uint8)
    assert seen(dark).black == 1
    stars = dark.copy()
    stars[:, ::8, ::8] = 250
    assert seen(stars).black == 0, "bright points on black are a picture"
    faded = scene(1, 16)
    faded[:4] = 0
    assert seen(faded).black == 0.25
    grain = np.random.default_rng(0).integers(-4, 5, (17, *SHAPE))
    frozen = (scene(1, 1).astype(int) + grain).astype(np.uint8)
    assert seen(frozen).still == 1, "grain is no motion"
    assert 0.45 <= seen(np.concatenate([frozen[:9], scene(1, 9)[1:]])).still <= 0.6
    assert seen(scene(1, 1)).still == 0, "an image need not move"


def test_bars_are_black_on_both_sides():
    boxed = scene(1, 9)
    boxed[:, :7] = boxed[:, -7:] = 0
    assert seen(boxed).bars == (round(14 / 54, 3), 0.0)
    assert seen(boxed.swapaxes(1, 2)).bars == (0.0, round(14 / 54, 3))
    night = scene(1, 9)
    night[:, :20] = 0
    assert seen(night).bars == (0.0, 0.0), "a dark sky is above alone"
    moving = boxed.copy()
    moving[4, -7:] = 200
    assert seen(moving).bars == (0.0, 0.0), "a bar is one in every frame"


def test_prints_survive_other_sizes_and_colours():
    def apart(a, b):
        return (int(a, 16) ^ int(b, 16)).bit_count()

    one, other = seen(scene(1, 9)).print, seen(scene(2, 9)).print
    half = [np.asarray(Image.fromarray(frame).resize((48, 27)).resize((96, 54))) for frame in scene(1, 9)]
    assert apart(one, seen((np.stack(half).astype(int) * 9 // 10 + 12).astype(np.uint8)).print) <= 12
    assert apart(one, other) > 40
    assert seen(np.full((9, *SHAPE), 90, np.uint8)).print == "", "flat frames are not compared"


def test_frames_are_spread_over_all_of_a_clip():
    assert spread(1, 49) == [0]
    assert spread(17, 49) == list(range(17))
    numbers = spread(121, 49)
    assert (len(set(numbers)), numbers[0], numbers[-1]) == (49, 0, 120)


def test_files_are_looked_at_once(tmp_path):
    paths = [write_video(tmp_path / f"{i}.mp4", 12 + i, grain=True) for i in range(2)]
    still = write_image(tmp_path / "still.png")
    clips = [clip_of(path) for path in paths] + [clip_of(still, Bucket(64, 48, 1))]
    clips.append(replace(clips[0], bucket=Bucket(32, 24, 9)))
    index = StatIndex(tmp_path / "looks.jsonl")
    looks, reasons = look_at(clips, workers=2, index=index)
    assert reasons == {}
    assert set(looks) == {view_of(clip) for clip in clips}
    assert looks[view_of(clips[0])] == inspect(clips[0])
    written = (tmp_path / "looks.jsonl").read_text().splitlines()
    assert len([line for line in written if line]) == 3, "a line a file, whatever the number of its clips"

    paths[0].write_bytes(b"")  # it would fail now
    index.put(paths[0], {view_of(clips[0]): looks[view_of(clips[0])], view_of(clips[3]): looks[view_of(clips[3])]})
    again, reasons = look_at(clips, workers=0, index=StatIndex(tmp_path / "looks.jsonl"))
    assert (again, reasons) == (looks, {})


def test_views_differ_where_the_pixels_do(tmp_path):
    clip = clip_of(write_video(tmp_path / "a.mp4", 20))
    changes = [
        {"start": Fraction(1, 16)},
        {"fps": Fraction(24)},
        {"source_fps": Fraction(8)},
        {"fill": Fill("loop", 5)},
        {"bucket": Bucket(48, 64, 9)},
        {"bucket": Bucket(64, 48, 5)},
    ]
    assert len({view_of(replace(clip, **change)) for change in [{}, *changes]}) == 1 + len(changes)
    assert view_of(replace(clip, bucket=Bucket(640, 480, 9))) == view_of(replace(clip, bucket=Bucket(1280, 960, 9)))
    assert small_size(replace(clip, bucket=Bucket(1280, 720, 9)), 96) == (96, 54)


def test_what_cannot_be_decoded_has_its_reason(tmp_path):
    clip = clip_of(write_video(tmp_path / "short.mp4", 10), Bucket(64, 48, 33))
    looks, reasons = look_at([clip], workers=0, index=StatIndex(tmp_path / "looks.jsonl"))
    assert looks == {}
    assert "ends too early" in reasons[view_of(clip)]
