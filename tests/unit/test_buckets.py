"""Which shapes a directory has, and which of them a file goes to."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from models.base import MediaSpec
from utils.data.buckets import bucket_table
from utils.data.records import Bucket, MediaFile

SPEC = MediaSpec(fps=Fraction(16), pixel_multiple=16, frame_stride=4, images=True)


@dataclass(frozen=True)
class Settings:
    resolutions: tuple = (512,)
    enable_ar_bucket: bool = False
    min_ar: float = 0.5
    max_ar: float = 2.0
    num_ar_buckets: int = 7
    ar_buckets: tuple = ()
    frame_buckets: tuple = (1, 33, 65)
    size_buckets: tuple = ()
    video_clip_mode: str | None = None
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    fps: str | float = "model"
    short_clips: str = "skip"
    stills: bool = False
    bucket_no_upscale: bool = False
    crop: str = "center"
    crop_sample: int = 1
    flip: bool = False


def media(width=1280, height=720, frames=100, fps=16, is_video=True):
    fps = Fraction(fps)
    duration = frames / fps if is_video else Fraction(0)
    return MediaFile(Path("clip.mp4"), "hash", width, height, frames, fps, duration, is_video, ("",))


def image(width=512, height=512):
    return media(width, height, 1, 0, is_video=False)


def assign(settings, file, spec=SPEC):
    return bucket_table(settings, spec).assign(file)


def test_without_ratios_every_resolution_is_taken_as_it_stands():
    assert assign(Settings(resolutions=(512, 256)), media()) == [Bucket(256, 256, 65), Bucket(512, 512, 65)]
    assert assign(Settings(resolutions=((832, 480),)), media()) == [Bucket(832, 480, 65)]
    several = Settings(resolutions=((480, 832), 256, (840, 480)))
    assert assign(several, media()) == [Bucket(256, 256, 65), Bucket(480, 832, 65), Bucket(832, 480, 65)]


def test_ratios_are_spaced_by_logarithm_and_keep_the_area():
    table = bucket_table(Settings(enable_ar_bucket=True), SPEC)
    assert [ratio for ratio, _ in table.areas] == [0.5, 0.63, 0.794, 1.0, 1.26, 1.587, 2.0]
    assert dict(table.areas)[2.0] == ((720, 368),)  # 512 * sqrt(2) = 724.1, 512 / sqrt(2) = 362.0
    assert table.assign(media(1280, 720)) == [Bucket(640, 400, 65)]  # 1.778 is nearer to 1.587 than to 2
    assert table.assign(media(4000, 100)) == [Bucket(720, 368, 65)]


def test_nearest_is_by_logarithm():
    settings = Settings(enable_ar_bucket=True, ar_buckets=(1.0, 4.0))
    assert assign(settings, media(210, 100)) == [Bucket(1024, 256, 65)]  # 2.1 is nearer to 1 by difference
    assert assign(settings, media(190, 100)) == [Bucket(512, 512, 65)]


def test_ratios_by_hand_as_numbers_or_pairs():
    for ratios in ((1.5, 1.0), ((3, 2), (512, 512))):
        table = bucket_table(Settings(enable_ar_bucket=True, ar_buckets=ratios), SPEC)
        assert [ratio for ratio, _ in table.areas] == [1.0, 1.5]


def test_areas_that_round_to_one_size_count_once():
    assert assign(Settings(resolutions=(512, 513)), image()) == [Bucket(512, 512, 1)]


def test_sides_are_multiples_of_what_the_model_needs():
    spec = SPEC._replace(pixel_multiple=32)
    for _, sizes in bucket_table(Settings(enable_ar_bucket=True), spec).areas:
        assert all(side % 32 == 0 for size in sizes for side in size)


@pytest.mark.parametrize(("frames", "expected"), [(33, 33), (64, 33), (65, 65), (500, 65)])
def test_a_video_goes_to_the_longest_bucket_that_it_fills(frames, expected):
    assert assign(Settings(), media(frames=frames))[0].frames == expected


def test_images_go_to_one_frame_even_when_that_is_not_listed():
    assert assign(Settings(frame_buckets=(33,)), image()) == [Bucket(512, 512, 1)]


def test_a_short_video_is_refused_with_the_arithmetic():
    settings = Settings(frame_buckets=(1, 57, 81))
    assert assign(settings, media(frames=60, fps=24)) == (
        "60 frames at 24 fps = 40 frames at 16 fps; the smallest video bucket is 57"
    )
    assert assign(settings, media(frames=70, fps=Fraction(24000, 1001))) == (
        "70 frames at 23.976 fps = 46 frames at 16 fps; the smallest video bucket is 57"
    )
    assert assign(settings, media(frames=40)) == "40 frames at 16 fps; the smallest video bucket is 57"


def test_kinds_without_a_bucket_are_told_what_to_add():
    assert "add a length such as 33 to frame_buckets" in assign(Settings(frame_buckets=(1,)), media())
    only_videos = Settings(size_buckets=((512, 512, 33),))
    assert "add a bucket of 1 frame to size_buckets" in assign(only_videos, image())


def test_a_model_without_images_refuses_them():
    spec = SPEC._replace(images=False)
    assert assign(Settings(), image(), spec) == (
        "is an image, and this model trains on clips of at least 5 frames; images are skipped, give it videos or "
        "choose a model that takes images"
    )
    assert assign(Settings(), media(), spec) == [Bucket(512, 512, 65)]
    both = Settings(size_buckets=((512, 512, 1), (256, 256, 33)))
    assert assign(both, media(), spec) == [Bucket(256, 256, 33)]
    assert "is an image, and" in assign(both, image(), spec)


@pytest.mark.parametrize("settings", [Settings(frame_buckets=(1,)), Settings(size_buckets=((512, 512, 1),))])
def test_a_model_without_images_needs_a_length_for_videos(settings):
    with pytest.raises(ValueError, match=r"all are of 1 frame, and this model trains on .* at least 5; add .* as 33"):
        bucket_table(settings, SPEC._replace(images=False))
    bucket_table(settings, SPEC)


def test_size_buckets_stand_alone():
    settings = Settings(
        resolutions=(), size_buckets=((832, 480, 81), (832, 480, 33), (480, 832, 33), (512, 512, 1), (960, 544, 1))
    )
    assert assign(settings, media(frames=100)) == [Bucket(832, 480, 81)]
    assert assign(settings, media(frames=50)) == [Bucket(832, 480, 33)]
    assert assign(settings, media(720, 1280, frames=100)) == [Bucket(480, 832, 33)]
    assert assign(settings, image(1920, 1080)) == [Bucket(960, 544, 1)]
    assert assign(settings, media(frames=20)).endswith("the smallest video bucket is 33")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(frame_buckets=(1, 32)), r"frame_buckets: 32 frames are not 4n\+1; use 29 or 33"),
        (Settings(size_buckets=((830, 480, 33),)), r"\[830, 480, 33\] has a side .* nearest: \[832, 480, 33\]"),
        (Settings(size_buckets=((832, 480, 34),)), "size_buckets: 34 frames"),
        (Settings(resolutions=()), "resolutions is not set"),
    ],
)
def test_shapes_that_the_model_cannot_take(settings, message):
    with pytest.raises(ValueError, match=message):
        bucket_table(settings, SPEC)


# --- nothing enlarged -------------------------------------------------------------------------------------------------

SMALL = {"bucket_no_upscale": True}


def test_a_file_that_covers_its_bucket_stays_in_it():
    for settings in ({"resolutions": (512,)}, {"enable_ar_bucket": True}, {"size_buckets": ((512, 512, 33),)}):
        for size in ((512, 512), (2000, 3000), (900, 520)):
            file = media(*size)
            kept = bucket_table(Settings(**settings, **SMALL), SPEC)
            assert kept.assign(file) == assign(Settings(**settings), file) and not kept.is_small(file, [33])


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        (512, (511, 600), (496, 496)),
        (512, (100, 100), (96, 96)),
        (512, (4000, 100), (96, 96)),  # as large as its height allows
        ((832, 480), (500, 500), (496, 288)),
        ((832, 480), (831, 480), (816, 464)),
        ((832, 480), (1280, 300), (512, 288)),
        ((480, 832), (300, 1280), (288, 512)),
        ((832, 480), (16, 16), (16, 16)),
        ((1600, 160), (20, 500), (16, 16)),  # ten to one is not to be had there
    ],
)
def test_a_small_file_goes_to_the_largest_size_of_the_shape(shape, size, expected):
    table = bucket_table(Settings(resolutions=(shape,), **SMALL), SPEC)
    assert table.assign(image(*size)) == [Bucket(*expected, 1)] and table.is_small(image(*size), [1])
    assert table.assign(media(*size)) == [Bucket(*expected, 65)]


def test_small_files_of_one_shape_share_a_bucket():
    table = bucket_table(Settings(enable_ar_bucket=True, **SMALL), SPEC)
    found = [table.assign(image(width, round(width * 9 / 16))) for width in range(400, 412)]
    assert set(map(str, found)) == {"[Bucket(width=368, height=224, frames=1)]"}  # near 640x400
    for width, height in ((37, 900), (333, 250), (640, 399), (639, 4000), (17, 16)):
        [bucket] = table.assign(image(width, height))
        assert bucket.width <= width and bucket.height <= height and not (bucket.width % 16 or bucket.height % 16)


def test_two_areas_that_come_to_one_small_size_count_once():
    assert assign(Settings(resolutions=(512, 256), **SMALL), image(300, 300)) == [
        Bucket(256, 256, 1),
        Bucket(288, 288, 1),
    ]
    assert assign(Settings(resolutions=(512, 256), **SMALL), image(200, 200)) == [Bucket(192, 192, 1)]


def test_sides_under_one_multiple_are_left_out():
    told = "is 600x15 px, too small for the model's 16 px a side, and with bucket_no_upscale = true not enlarged"
    assert assign(Settings(**SMALL), image(600, 15)) == told
    assert assign(Settings(size_buckets=((512, 512, 1),), **SMALL), image(600, 15)) == told
    assert assign(Settings(**SMALL), image(31, 40), SPEC._replace(pixel_multiple=32)).startswith("is 31x40 px")


def test_of_size_buckets_the_largest_that_is_covered():
    sizes = ((1024, 1024, 1), (512, 512, 1), (640, 256, 1), (320, 320, 33), (832, 480, 33), (832, 480, 65))
    settings = Settings(size_buckets=sizes, **SMALL)
    assert assign(settings, image(1023, 1200)) == [Bucket(512, 512, 1)]
    assert assign(settings, image(800, 300)) == [Bucket(640, 256, 1)]
    assert assign(settings, image(640, 500)) == [Bucket(640, 256, 1)]
    assert assign(settings, media(800, 460)) == [Bucket(320, 320, 33)]
    assert assign(settings, media(200, 460)) == (
        "is 200x460 px, smaller than each of size_buckets, and with bucket_no_upscale = true nothing is enlarged; add "
        "a bucket such as [192, 448, 33]"
    )
    table = bucket_table(settings, SPEC)
    assert table.shapes(media(800, 460), [33, 65], every=True) == [Bucket(320, 320, 33)]
    assert table.shapes(media(832, 480), [33, 65], every=True) == [Bucket(832, 480, 33), Bucket(832, 480, 65)]
    assert table.is_small(media(800, 460), [33, 65]) and not table.is_small(media(832, 480), [33, 65])


def test_with_padding_a_file_need_not_cover_its_bucket():
    padded = SMALL | {"crop": "pad"}
    assert assign(Settings(**padded), image(512, 40)) == [Bucket(512, 512, 1)]
    assert assign(Settings(**padded), image(400, 40)) == [Bucket(400, 400, 1)]
    assert assign(Settings(size_buckets=((512, 512, 1), (256, 256, 1)), **padded), image(15, 300)) == [
        Bucket(256, 256, 1)
    ]
    assert assign(Settings(**padded), image(15, 12)).startswith("is 15x12 px, too small")
