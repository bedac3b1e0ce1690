"""Which moments of a file become clips."""

from dataclasses import replace
from fractions import Fraction
from typing import get_args

import pytest

from tests.unit.test_buckets import SPEC, Settings, image, media
from utils.config.fields import ClipMode
from utils.data.buckets import bucket_table
from utils.data.clips import CLIP_MODES, ClipRules, cut_clips
from utils.data.records import Bucket, Fill
from utils.data.scan import Skipped


def cut(file, mode="single_beginning", spec=SPEC, **settings):
    settings = Settings(**settings)
    rules = ClipRules.of(settings, mode)
    return cut_clips(file, bucket_table(settings, spec, rules.any_length), rules, group=3)


def starts(clips):
    """Frames of each clip -> the numbers of the frames that clips of that length start at."""
    found = {}
    for clip in clips:
        found.setdefault(clip.bucket.frames, []).extend(start * SPEC.fps for start in (clip.start, *clip.turns))
    return found


def test_the_config_knows_the_modes():
    assert set(get_args(ClipMode)) == set(CLIP_MODES)


# --- where clips start ------------------------------------------------------------------------------------------------

# 30 frames and target_frames [9, 17, 25], by musubi-tuner's code and diffusion-pipe's
THIRTY = [
    ("single_beginning", {}, {25: [0]}),
    ("single_middle", {}, {25: [2]}),
    ("head", {}, {9: [0], 17: [0], 25: [0]}),
    ("middle", {}, {9: [10], 17: [6], 25: [2]}),
    ("chunk", {}, {9: [0, 9, 18], 17: [0], 25: [0]}),
    ("slide", {"frame_stride": 5}, {9: [0, 5, 10, 15, 20], 17: [0, 5, 10], 25: [0, 5]}),
    ("slide", {}, {9: [*range(22)], 17: [*range(14)], 25: [*range(6)]}),
    ("uniform", {"frame_sample": 4}, {9: [0, 7, 14, 21], 17: [0, 4, 8, 13], 25: [0, 1, 3, 5]}),
    ("uniform", {}, {9: [0], 17: [0], 25: [0]}),
    ("multiple_overlapping", {}, {25: [0, 5]}),
    ("full", {}, {29: [0]}),
    ("full", {"max_frames": 20}, {17: [0]}),
    ("spread", {}, {25: [0]}),
]


@pytest.mark.parametrize(("mode", "settings", "expected"), THIRTY)
@pytest.mark.parametrize("rate", [16, 24, Fraction(30000, 1001)])
def test_thirty_frames(mode, settings, expected, rate):
    # counted at the model's rate: 45 frames at 24 fps, and 57 at 29.97, are 30 at 16
    file = media(frames={16: 30, 24: 45}.get(rate, 57), fps=rate)
    clips = cut(file, mode, frame_buckets=(1, 9, 17, 25), **settings)
    assert starts(clips) == expected
    assert {(clip.media, clip.group, clip.source_fps, clip.fill) for clip in clips} == {(file, 3, 0, None)}


@pytest.mark.parametrize(("mode", "expected"), [("single_middle", {9: [6]}), ("chunk", {9: [0, 9]})])
def test_lengths_that_a_video_does_not_fill_are_passed_over(mode, expected):
    assert starts(cut(media(frames=22), mode, frame_buckets=(9, 25))) == expected


def test_equal_starts_count_once():
    clips = cut(media(frames=11), "uniform", frame_buckets=(9,), frame_sample=6)
    assert starts(clips) == {9: [0, 1, 2]}  # linspace gives 0, 0, 0, 1, 1, 2


def test_every_start_of_every_length_is_there_in_every_resolution():
    clips = cut(media(frames=20), "chunk", frame_buckets=(9, 17), resolutions=(64, 96))
    assert [(clip.bucket, clip.start * 16) for clip in clips] == [
        (Bucket(64, 64, 9), 0),
        (Bucket(64, 64, 9), 9),
        (Bucket(96, 96, 9), 0),
        (Bucket(96, 96, 9), 9),
        (Bucket(64, 64, 17), 0),
        (Bucket(96, 96, 17), 0),
    ]


@pytest.mark.parametrize(("mode", "lengths"), [("single_beginning", [17]), ("chunk", [9, 17])])
def test_buckets_by_hand_are_those_of_the_nearest_shape(mode, lengths):
    by_hand = ((64, 48, 17), (64, 48, 9), (48, 64, 9), (48, 64, 17), (64, 48, 33), (64, 48, 1))
    clips = cut(media(640, 480, frames=17), mode, resolutions=(), size_buckets=by_hand)
    assert [clip.bucket for clip in clips] == [Bucket(64, 48, frames) for frames in lengths]


def test_beginning_gives_one_clip_per_resolution():
    clips = cut(media(frames=150, fps=24), resolutions=(256, 512))
    assert [clip.bucket for clip in clips] == [Bucket(256, 256, 65), Bucket(512, 512, 65)]
    assert {(clip.start, clip.fps, clip.group) for clip in clips} == {(0, 16, 3)}


@pytest.mark.parametrize(
    ("frames", "fps", "start"),
    [(65, 16, 0), (66, 16, 0), (67, 16, Fraction(1, 16)), (150, 24, Fraction(17, 16)), (200, 50, Fraction(15, 16))],
)
# 150 frames at 24 fps are 100 at 16: 35 to spare for bucket 65, 17 of them before. 200 at 50 are 64: 31 for bucket 33.
def test_middle_cuts_both_ends_equally(frames, fps, start):
    [clip] = cut(media(frames=frames, fps=fps), "single_middle")
    assert clip.start == start


@pytest.mark.parametrize("mode", CLIP_MODES)
def test_clips_end_inside_the_file(mode):
    file = media(frames=99, fps=Fraction(30000, 1001))
    clips = cut(file, mode, frame_stride=3, frame_sample=3)
    for turn in (turn for clip in clips for turn in clip.each_turn()):
        assert turn.start >= 0 and turn.start + (turn.bucket.frames - 1) / turn.fps < file.duration


def test_an_image_has_no_time():
    for mode in CLIP_MODES:
        [clip] = cut(image(), mode, fps="native", short_clips="loop", frame_sample=3)
        assert (clip.bucket, clip.start, clip.fps, clip.source_fps) == (Bucket(512, 512, 1), 0, 0, 0)
        assert clip.fill is None and not clip.turns


def test_spread_goes_from_the_first_frame_to_the_last():
    [clip] = cut(media(frames=30), "spread", frame_buckets=(9,))
    moments = [clip.start + i / clip.fps for i in range(9)]
    assert [int(moment * 16) for moment in moments] == [0, 3, 7, 10, 14, 18, 21, 25, 29]
    [whole] = cut(media(frames=9), "spread", frame_buckets=(9,))
    assert [whole] == cut(media(frames=9), frame_buckets=(9,))  # nothing to spread: the same cache entry


# --- stills -----------------------------------------------------------------------------------------------------------

# musubi-tuner's code with target_frames [1, 9] and a video of 12 frames; our modes of one length by the same rule
STILLS = [
    ("single_beginning", {}, {9: [0], 1: [0]}),
    ("single_middle", {}, {9: [1], 1: [5]}),
    ("head", {}, {9: [0], 1: [0]}),
    ("chunk", {}, {9: [0], 1: [*range(12)]}),
    ("slide", {"frame_stride": 5}, {9: [0], 1: [0, 5, 10]}),
    ("uniform", {"frame_sample": 3}, {9: [0, 1, 3], 1: [0, 5, 11]}),
    ("full", {}, {9: [0], 1: [0]}),
    ("spread", {}, {9: [0], 1: [0]}),
]


@pytest.mark.parametrize(("mode", "settings", "expected"), STILLS)
def test_stills_are_where_the_mode_starts_clips(mode, settings, expected):
    clips = cut(media(frames=12), mode, frame_buckets=(1, 9), stills=True, **settings)
    assert starts(clips) == expected
    stills = [clip for clip in clips if clip.bucket.frames == 1]
    assert {(clip.bucket, clip.fps, clip.media.is_video) for clip in stills} == {(Bucket(512, 512, 1), 16, True)}
    assert clips[: -len(stills)] == cut(media(frames=12), mode, frame_buckets=(1, 9), **settings)


def test_what_is_too_short_for_a_clip_still_gives_stills():
    assert starts(cut(media(frames=5), frame_buckets=(9,), stills=True)) == {1: [0]}
    assert starts(cut(media(frames=5), frame_buckets=(1,), stills=True)) == {1: [0]}
    assert starts(cut(media(frames=5), frame_buckets=(9,), stills=True, short_clips="loop")) == {9: [0], 1: [0]}
    by_hand = {"resolutions": (), "size_buckets": ((64, 48, 9), (48, 64, 9))}
    assert [clip.bucket for clip in cut(media(640, 480, 5), stills=True, **by_hand)] == [Bucket(64, 48, 1)]


def test_stills_are_for_models_that_train_images():
    videos = SPEC._replace(images=False)
    assert starts(cut(media(frames=12), frame_buckets=(9,), stills=True, spec=videos)) == {9: [0]}
    assert isinstance(cut(media(frames=5), frame_buckets=(9,), stills=True, spec=videos), Skipped)


# --- starts by chance -------------------------------------------------------------------------------------------------


def test_random_starts_are_one_sample_and_depend_on_content_alone():
    file = media(frames=100)
    [clip] = cut(file, "random_start", frame_buckets=(33,), frame_sample=4)
    [found] = starts([clip]).values()
    assert len(set(found)) == 4 and max(found) <= 67
    assert [turn.start for turn in clip.each_turn()] == [start / 16 for start in found]
    assert all(turn.turns == () for turn in clip.each_turn())

    moved = replace(file, path=file.path / "renamed.mp4", captions=("another",))
    assert starts(cut(moved, "random_start", frame_buckets=(33,), frame_sample=4)) == {33: found}
    assert starts(cut(file, "random_start", frame_buckets=(33,), frame_sample=2)) == {33: found[:2]}
    other = replace(file, content_hash="other")
    assert starts(cut(other, "random_start", frame_buckets=(33,), frame_sample=4)) != {33: found}


def test_there_are_no_more_random_starts_than_places():
    [clip] = cut(media(frames=35), "random_start", frame_buckets=(33,), frame_sample=10)
    assert sorted(*starts([clip]).values()) == [0, 1, 2]


def test_random_starts_are_spread_over_the_whole_video():
    found = []
    for number in range(200):
        [clip] = cut(replace(media(frames=42), content_hash=str(number)), "random_start", frame_buckets=(33,))
        found.append(clip.start * 16)
    assert set(found) == set(range(10)) and max(map(found.count, found)) < 45


# --- rates ------------------------------------------------------------------------------------------------------------


def test_native_takes_each_frame_for_one_of_the_clip():
    [clip] = cut(media(frames=40, fps=60), "single_middle", fps="native", frame_buckets=(33,))
    assert (clip.start * 16, clip.fps, clip.source_fps) == (3, 16, 16)
    [clip] = cut(media(frames=40, fps=60), fps="native", frame_buckets=(33,), spec=SPEC._replace(fps=Fraction(24)))
    assert (clip.fps, clip.source_fps) == (24, 24)


def test_a_claimed_rate_stands_in_for_the_files():
    # 100 frames are 53 at 16 fps if they are 30 a second, whatever the header says
    [clip] = cut(media(frames=100, fps=8), "single_middle", fps=30, frame_buckets=(33, 65))
    assert (clip.bucket.frames, clip.start * 16, clip.fps, clip.source_fps) == (33, 10, 16, 30)
    [clip] = cut(media(frames=100), fps=23.976, frame_buckets=(33,))
    assert clip.source_fps == Fraction("23.976")


def test_a_claimed_rate_is_told_of_where_the_video_is_too_short():
    too_short = "clip.mp4: 40 frames at 30 fps = 21 frames at 16 fps; the smallest video bucket is 33"
    assert str(cut(media(frames=40), fps=30.0)) == too_short
    assert str(cut(media(frames=30, fps=50), fps="native")) == (
        "clip.mp4: 30 frames at 16 fps; the smallest video bucket is 33"
    )


# --- short videos -----------------------------------------------------------------------------------------------------


def test_too_short_is_reported_under_the_files_name():
    skipped = cut(media(frames=60, fps=24), frame_buckets=(1, 57))
    assert isinstance(skipped, Skipped) and not skipped.bad
    assert str(skipped) == "clip.mp4: 60 frames at 24 fps = 40 frames at 16 fps; the smallest video bucket is 57"


@pytest.mark.parametrize("how", ["loop", "pad"])
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_a_short_video_fills_the_smallest_length(how, mode):
    length = 3 if mode == "full" else 40  # of its own length it is short only below the model's least
    [clip] = cut(media(frames=length), mode, short_clips=how, frame_buckets=(57, 65), frame_sample=3)
    assert (clip.bucket.frames, clip.start, clip.fps, clip.turns) == (5 if mode == "full" else 57, 0, 16, ())
    assert clip.fill == Fill(how, length)
    fitting = cut(media(frames=60), mode, short_clips=how, frame_buckets=(57, 65), frame_sample=3)
    assert all(clip.fill is None for clip in fitting)


def test_what_stands_in_for_missing_frames():
    assert [Fill("loop", 3).number(i) for i in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [Fill("pad", 3).number(i) for i in range(8)] == [0, 1, 2, 2, 2, 2, 2, 2]


def test_a_video_of_one_moment_has_one_frame():
    [clip] = cut(media(frames=2, fps=60), short_clips="pad", frame_buckets=(5,))
    assert clip.fill == Fill("pad", 1)


@pytest.mark.parametrize(("mode", "start"), [("single_beginning", 0), ("single_middle", 1), ("uniform", 0)])
def test_a_smaller_bucket_is_the_longest_that_the_video_fills(mode, start):
    clip = cut(media(frames=40), mode, short_clips="smaller_bucket", frame_buckets=(57, 65), frame_sample=3)[0]
    assert (clip.bucket, clip.start * 16, clip.fill) == (Bucket(512, 512, 37), start, None)
    assert cut(media(frames=60), mode, short_clips="smaller_bucket", frame_buckets=(57,))[0].bucket.frames == 57
    by_hand = {"resolutions": (), "size_buckets": ((480, 832, 57), (832, 480, 57), (832, 480, 1))}
    assert cut(media(frames=40), mode, short_clips="smaller_bucket", **by_hand)[0].bucket == Bucket(832, 480, 37)


def test_a_smaller_bucket_is_not_a_still():
    assert isinstance(cut(media(frames=4), short_clips="smaller_bucket"), Skipped)
    assert cut(media(frames=5), short_clips="smaller_bucket")[0].bucket.frames == 5


# --- clips of any length ----------------------------------------------------------------------------------------------


def test_full_needs_no_lengths_and_the_model_no_images():
    [clip] = cut(media(frames=100), "full", frame_buckets=(1,), spec=SPEC._replace(images=False))
    assert clip.bucket == Bucket(512, 512, 97)
    assert cut(media(frames=1000), "full", frame_buckets=(1,))[0].bucket.frames == 129
    assert str(cut(media(frames=4), "full")).endswith("4 frames at 16 fps; the smallest video bucket is 5")
    with pytest.raises(ValueError, match="size_buckets names lengths, and video_clip_mode = 'full' takes none"):
        cut(media(), "full", size_buckets=((64, 64, 5),))


def test_an_unknown_mode_names_the_known():
    with pytest.raises(
        ValueError, match="video_clip_mode = 'all' is not known; use one of: single_beginning, single_m"
    ):
        cut(media(), "all")


def test_a_directorys_own_mode_comes_before_the_runs():
    assert starts(cut(media(frames=30), "single_middle", video_clip_mode="chunk", frame_buckets=(9,))) == {
        9: [0, 9, 18]
    }
