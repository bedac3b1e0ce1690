"""From a file and its settings to pixels: the frames that a clip shows are the right ones, byte for byte."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation

from tests.helpers.media import write_video
from tests.unit.test_buckets import SPEC, Settings
from utils.data.buckets import bucket_table
from utils.data.clips import CLIP_MODES, ClipRules, cut_clips
from utils.data.media import MediaError, decode_clip, probe
from utils.data.records import Fill, MediaFile

SIZE = (64, 48)
NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
SLOWING = [*range(40), *(40 + 3 * i for i in range(40))]  # 30 frames/s, then 10
SOURCES = {
    "23.976": ("a.mp4", {"fps": NTSC_FILM}),
    "29.97": ("a.mp4", {"fps": NTSC}),
    "60": ("a.mov", {"fps": 60}),
    "slower than the model": ("a.mp4", {"fps": 10}),
    "variable": ("a.mkv", {"fps": 30, "pts": SLOWING, "time_base": Fraction(1, 30)}),
    "variable, mp4": ("a.mp4", {"fps": 30, "pts": SLOWING, "time_base": Fraction(1, 30)}),
    "matroska": ("a.mkv", {"fps": NTSC}),
    "no index": ("a.ts", {"fps": 25}),
    "open groups": ("a.mp4", {"fps": 24, "options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}}),
    "flash": ("a.flv", {"fps": 25}),
    "late stamps": ("a.avi", {"fps": 25}),  # the first is 1
    "no time stamps": ("a.h264", {"fps": 25}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Each source with all of its frames: uint8 [80, h, w, 3] and the moments from which they are on show, in s."""
    folder, made = tmp_path_factory.mktemp("sources"), {}
    for name, (file, options) in SOURCES.items():
        path = folder / name.replace(" ", "_")
        path.mkdir()
        path = write_video(path / file, 80, size=SIZE, grain=True, **options)
        path = (
            path.rename(path.with_suffix(".avi")) if path.suffix == ".h264" else path
        )  # FFmpeg looks at what is inside
        made[name] = (path, *all_frames(path))
    return made


def all_frames(path):
    pixels, moments = [], []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            planar = frame.reformat(*SIZE, "gbrp", interpolation=Interpolation.BICUBIC).to_ndarray(format="gbrp")
            pixels.append(planar)
            moments.append((frame.pts or 0) * frame.time_base)
        tick = container.streams.video[0].time_base
    # Half a tick earlier: a container rounds each stamp to its own clock.
    return np.stack(pixels), [moment - moments[0] - tick / 2 for moment in moments]


def clips_of(path, mode, lengths=(17,), offset=Fraction(0), **settings):
    held = probe(path)
    left = held.frames - math.ceil(offset * held.fps)
    media = MediaFile(path, "hash", *held[:2], left, held.fps, left / held.fps, True, ("",), offset=offset)
    settings = Settings(frame_buckets=lengths, size_buckets=(), resolutions=(SIZE,), **settings)
    rules = ClipRules.of(settings, mode)
    clips = cut_clips(media, bucket_table(settings, SPEC, rules.any_length), rules, group=0)
    return [turn for clip in clips for turn in clip.each_turn()]


def pixels_of(clip, **kwargs):
    width, height, frames = clip.bucket
    options = {"source_fps": clip.source_fps, "fill": clip.fill} | kwargs
    return decode_clip(clip.media.path, True, clip.start, clip.fps, frames, width, height, **options)


def numbers_in(pixels, frames):
    """The source frame that each picture is, by equality of all bytes; -1 for none."""
    return [next((k for k, frame in enumerate(frames) if np.array_equal(picture, frame)), -1) for picture in pixels]


def on_show(moments, moment):
    return max(k for k, stamp in enumerate(moments) if stamp <= moment)


@pytest.mark.parametrize("name", [name for name in SOURCES if "stamps" not in name])
@pytest.mark.parametrize("mode", ["single_middle", "uniform", "spread"])
def test_at_the_models_rate_each_frame_is_the_one_on_show(sources, name, mode):
    path, frames, moments = sources[name]
    for clip in clips_of(path, mode, frame_sample=3):
        expected = [on_show(moments, clip.start + i / clip.fps) for i in range(17)]
        assert numbers_in(pixels_of(clip), frames) == expected


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_native_frames_are_taken_as_they_are(sources, name, mode):
    path, frames, _ = sources[name]
    first = {
        "single_beginning": [0],
        "single_middle": [31],
        "head": [0],
        "middle": [31],
        "chunk": [0, 17, 34, 51],
        "slide": [0, 30, 60],
        "uniform": [0, 31, 63],
        "multiple_overlapping": [0, 15, 31, 47, 63],
    }
    clips = clips_of(path, mode, fps="native", frame_stride=30, frame_sample=3)
    if mode == "spread":
        assert [numbers_in(pixels_of(clip), frames) for clip in clips] == [[i * 79 // 16 for i in range(17)]]
        return
    for clip, start in zip(clips, first.get(mode, [int(clip.start * 16) for clip in clips]), strict=True):
        assert numbers_in(pixels_of(clip), frames) == [*range(start, start + clip.bucket.frames)]
    assert clips[0].bucket.frames == (77 if mode == "full" else 17)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(("claimed", "rate"), [(30, 30), (23.976, Fraction(23976, 1000)), (12.5, Fraction(25, 2))])
def test_a_claimed_rate_decides_whatever_the_file_says(sources, name, claimed, rate):
    path, frames, _ = sources[name]
    [clip] = clips_of(path, "single_middle", fps=claimed)
    length = int(80 * 16 / rate)
    start = (length - 17) // 2
    assert numbers_in(pixels_of(clip), frames) == [int((start + i) * rate / 16) for i in range(17)]


@pytest.mark.parametrize("name", ["23.976", "60", "no index"])
def test_a_part_of_a_file_begins_at_its_offset(sources, name):
    path, frames, moments = sources[name]
    first = on_show(moments, Fraction(9, 8))
    for start, clip in enumerate(clips_of(path, "slide", fps="native", offset=Fraction(9, 8), lengths=(5,))[:4]):
        assert numbers_in(pixels_of(clip), frames) == [*range(first + start, first + start + 5)]
    [clip] = clips_of(path, "head", offset=Fraction(9, 8), lengths=(101,), short_clips="loop")
    expected = [on_show(moments, Fraction(9, 8) + Fraction(i % clip.fill.frames, 16)) for i in range(101)]
    assert numbers_in(pixels_of(clip), frames) == expected


@pytest.mark.parametrize("name", ["29.97", "variable", "no time stamps"])
@pytest.mark.parametrize("fps", ["model", "native"])
def test_the_ends_are_the_bytes_of_the_whole(sources, name, fps):
    path, _, _ = sources[name]
    for clip in clips_of(path, "uniform", fps=fps, frame_sample=3):
        assert np.array_equal(pixels_of(clip, only=(0, 16)), pixels_of(clip)[[0, 16]])


# --- short videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["23.976", "no index", "variable", "no time stamps"])
@pytest.mark.parametrize("how", ["loop", "pad"])
def test_short_videos_are_filled_up(sources, name, how):
    path, frames, _ = sources[name]
    [clip] = clips_of(path, "single_middle", lengths=(101,), fps="native", short_clips=how)
    expected = [*range(80), *(range(21) if how == "loop" else [79] * 21)]
    pixels = pixels_of(clip)
    assert numbers_in(pixels, frames) == expected
    assert np.array_equal(pixels_of(clip, only=(0, 100)), pixels[[0, 100]])
    out = np.zeros_like(pixels)
    assert pixels_of(clip, out=out) is out and np.array_equal(out, pixels)


def test_a_filled_clip_is_resampled_first(sources):
    path, frames, moments = sources["60"]
    [clip] = clips_of(path, "head", lengths=(33,), short_clips="loop")
    assert clip.fill == Fill("loop", 21)  # 80 frames at 60 fps are 21 at 16
    expected = [on_show(moments, Fraction(i % 21, 16)) for i in range(33)]
    assert numbers_in(pixels_of(clip), frames) == expected


def test_numbers_past_the_end_are_an_error(sources):
    path, _, _ = sources["29.97"]
    with pytest.raises(MediaError, match=r"frame 3 of the 17 from 4\.875 s on at 16 fps could not be decoded"):
        decode_clip(path, True, Fraction(78, 16), SPEC.fps, 17, *SIZE, source_fps=SPEC.fps)
    counted, _, _ = sources["no time stamps"]
    with pytest.raises(MediaError, match=r"frame \d of the 17 from 4\.875 s on at 16 fps could not be decoded"):
        decode_clip(counted, True, Fraction(78, 16), SPEC.fps, 17, *SIZE, source_fps=SPEC.fps)
