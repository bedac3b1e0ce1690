"""Which moments of a file become clips."""

from fractions import Fraction

import pytest

from tests.unit.test_buckets import SPEC, Settings, image, media
from utils.data.buckets import bucket_table
from utils.data.clips import CLIP_MODES, cut_clips
from utils.data.records import Bucket
from utils.data.scan import Skipped


def cut(file, mode="single_beginning", **settings):
    return cut_clips(file, bucket_table(Settings(**settings), SPEC), mode, group=3)


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


def test_the_clip_ends_inside_the_file_for_every_mode():
    file = media(frames=99, fps=Fraction(30000, 1001))
    for mode in CLIP_MODES:
        for clip in cut(file, mode):
            assert clip.start >= 0 and clip.start + (clip.bucket.frames - 1) / clip.fps < file.duration


def test_an_image_has_no_time():
    [clip] = cut(image(), "single_middle")
    assert (clip.bucket, clip.start, clip.fps) == (Bucket(512, 512, 1), 0, 0)


def test_too_short_is_reported_under_the_files_name():
    skipped = cut(media(frames=60, fps=24), frame_buckets=(1, 57))
    assert isinstance(skipped, Skipped) and not skipped.bad
    assert str(skipped) == "clip.mp4: 60 frames at 24 fps = 40 frames at 16 fps; the smallest video bucket is 57"


def test_an_unknown_mode_names_the_known():
    with pytest.raises(
        ValueError, match="video_clip_mode = 'all' is not known; use one of: single_beginning, single_m"
    ):
        cut(media(), "all")
