"""What is said of keys on cutting videos that do not go together."""

import pytest

from tests.helpers.configs import DATASET, SPEC, folder, load, top  # noqa: F401
from utils.config.clip_rules import whole_lengths
from utils.config.rules import advice, check_rules

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), None),
        (("video_clip_mode = 'chunk'",), None),
        (("video_clip_mode = 'slide'", "frame_stride = 8"), None),
        (("video_clip_mode = 'uniform'", "frame_sample = 2"), None),
        (
            ("frame_stride = 8",),
            "frame_stride = 8 has no effect with video_clip_mode = 'single_beginning'; it is for 'slide'",
        ),
        (
            ("frame_sample = 2", "video_clip_mode = 'chunk'"),
            "frame_sample = 2 has no effect with video_clip_mode = 'chunk'; it is for 'uniform' and 'random_start'",
        ),
        (
            ("max_frames = 81", "video_clip_mode = 'spread'"),
            "max_frames = 81 has no effect with video_clip_mode = 'spread'; it is for 'full'",
        ),
        (
            ("frame_stride = 1", "video_clip_mode = 'slide'"),
            "frame_stride = 1 starts a clip at every frame of a video, each encoded by itself",
        ),
        (
            ("frame_sample = 1", "video_clip_mode = 'uniform'"),
            "frame_sample = 1 gives one clip a video, from its beginning, as 'head' does",
        ),
        (("stills = true", "video_clip_mode = 'head'"), None),
        (
            ("stills = true", "video_clip_mode = 'chunk'"),
            "stills = true makes a still of every frame of a video with video_clip_mode = 'chunk'",
        ),
        (
            ("stills = true", "media = 'images'"),
            "stills = true has no effect with media = 'images': stills are frames of videos",
        ),
    ],
)
def test_advice_on_cutting(lines, said):
    loaded = load(dataset=top(*lines, run=DATASET))
    assert check_rules(loaded, 1, SPEC) == []
    assert advice(loaded, SPEC) == ([f"dataset.toml:1: {said}"] if said else [])


def test_the_mode_of_the_run_holds_for_folders_without_one():
    folders = DATASET + "frame_sample = 4\n[[directory]]\npath = 'b'\nvideo_clip_mode = 'head'\n"
    assert advice(load(top("video_clip_mode = 'uniform'"), folders), SPEC) == []
    folders += "frame_sample = 4\n"
    assert advice(load(top("video_clip_mode = 'uniform'"), folders), SPEC) == [
        "dataset.toml:10: directory[1].frame_sample = 4 has no effect with video_clip_mode = 'head'; "
        "it is for 'uniform' and 'random_start'"
    ]


def test_videos_in_full_take_no_lengths():
    full = DATASET.replace("[1, 9]", "[1]") + "video_clip_mode = 'full'\n"
    videos = SPEC._replace(images=False)
    assert check_rules(load(dataset=full), 1, videos) == [] == advice(load(dataset=full), videos)
    assert check_rules(load(dataset=top("size_buckets = [[64, 64, 9]]", "max_frames = 4", run=full)), 1, SPEC) == [
        "dataset.toml:1: size_buckets names lengths, and with video_clip_mode = 'full' videos have their own; "
        "use resolutions",
        "dataset.toml:2: max_frames = 4 is less than the shortest clip of this model; use 5 or more",
    ]
    assert advice(load(dataset=full.replace("[1]", "[1, 9]")), SPEC) == [
        "dataset.toml:2: frame_buckets has no effect on videos with video_clip_mode = 'full': clips are as long as "
        "they are"
    ]


def test_lengths_are_rounded_down_and_it_is_said():
    assert whole_lengths([1, 21, 45], 4) == ((1, 21, 45), None)
    rounded, note = whole_lengths([48, 45, 3, 24], 4)
    assert (rounded, note) == ((1, 21, 45), "lengths must be 4n+1 frames; rounded down: 3 to 1, 24 to 21, 48 to 45")
