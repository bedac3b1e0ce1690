"""A musubi-tuner dataset TOML runs as written, and what is wrong with one is told in its own words."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

import train
from models.base import MediaSpec
from tests.helpers.configs import RUN, SPEC, folder, load  # noqa: F401 (a fixture)
from tests.helpers.media import write_image, write_video
from utils.config.dataset_schema import DirectoryConfig
from utils.config.load import ConfigError, load_dataset, resolved_dataset_toml
from utils.config.musubi import shapes
from utils.config.rules import advice, check_paths, check_rules
from utils.data.buckets import bucket_table
from utils.data.cache import CacheStore
from utils.data.cutting import cut_dataset
from utils.train import preview

# As musubi-tuner's users write it, but for the paths.
DATASET = """\
[general]
caption_extension = ".txt"
batch_size = 1
enable_bucket = true
bucket_no_upscale = false

[[datasets]]
image_directory = "photos"
cache_directory = "cache/photos"
resolution = [768, 768]

[[datasets]]
video_directory = "clips"
cache_directory = "cache/head"
frame_extraction = "head"
target_frames = [1, 21]
resolution = [768, 416]

[[datasets]]
video_directory = "clips"
cache_directory = "cache/uniform"
frame_extraction = "uniform"
target_frames = [45]
frame_sample = 2
resolution = [384, 208]
"""
PLAN_RUN = """\
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 1
save_every_n_epochs = 1

[model]
type = 'wan'
ckpt_path = '/nowhere/Wan2.1-T2V-1.3B'

[optimizer]
type = 'adamw'
lr = 1e-4
"""
NATIVE = "source_fps is not set, so every frame is used, whatever the rate of the file, as in musubi-tuner"


class Quiet:
    """Progress that is shown to nobody."""

    def start(self, total, label): ...

    def advance(self, n, name): ...

    def done(self): ...


def video(*lines, general=()):
    """One [[datasets]] of videos; its first line after the folder is line 4, or more by what [general] has."""
    return "\n".join(["[general]", *general, "[[datasets]]", "video_directory = 'clips'", *lines, ""])


def image(*lines):
    return "\n".join(["[general]", "[[datasets]]", "image_directory = 'photos'", *lines, ""])


def read(text):
    Path("dataset.toml").write_text(text)
    return load_dataset(Path("dataset.toml")).directory


def complaints(text):
    Path("dataset.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_dataset(Path("dataset.toml"))
    return list(caught.value.messages)


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_it_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("clips", "photos"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "still.png", size=(90, 60))
        write_video(tmp_path / name / "wide.mp4", 60, fps=30, size=(160, 90), grain=True)
        write_video(tmp_path / name / "brief.mp4", 12, size=(64, 96), grain=True)
        for path in (tmp_path / name).glob("*.*"):
            path.with_suffix(".txt").write_text("seen")
    Path("run.toml").write_text(PLAN_RUN)
    Path("dataset.toml").write_text(DATASET)
    survey = preview.begin(train.parse_arguments(["--config", "run.toml", "--plan"]))
    survey.workers = 0
    preview.explore(survey, Quiet())

    found = [(clip.group, clip.media.path.name, clip.bucket, float(clip.start)) for _, clip in survey.clips]
    assert found == [
        (0, "still.png", (944, 624, 1), 0),
        (1, "brief.mp4", (464, 688, 1), 0),  # of 12 frames: too few for 21
        (1, "wide.mp4", (768, 416, 21), 0),
        (1, "wide.mp4", (768, 416, 1), 0),
        (2, "wide.mp4", (384, 208, 45), 0),
        (2, "wide.mp4", (384, 208, 45), 15 / 16),  # of 60 frames, though at 16 a second there were 32
    ]
    assert sorted((str(item.path.parent.name), str(item)) for _, item in survey.skipped) == [
        ("clips", "brief.mp4: 12 frames at 16 fps; the smallest video bucket is 45"),
        ("clips", "still.png: is an image, and of this folder only videos are used"),
        ("clips", "still.png: is an image, and of this folder only videos are used"),
        ("photos", "brief.mp4: is a video, and of this folder only images are used"),
        ("photos", "wide.mp4: is a video, and of this folder only images are used"),
    ]
    assert survey.notices == ["clips: 1 video fills no bucket: stills alone"]
    assert survey.plan.first_step(2) == 6
    assert survey.loaded.notices == [
        "dataset.toml:9: cache_directory has no effect: cache_dir in the run TOML holds all entries"
        + " (the same in 2 more places)",
        f"dataset.toml:12: {NATIVE} (the same in 1 more place)",
    ]


@pytest.mark.parametrize("multiple", [16, 32])
@pytest.mark.parametrize("size", [(768, 768), (768, 416), (384, 208), (960, 544), (64, 64)])
def test_buckets_are_the_same(size, multiple):
    spec = MediaSpec(fps=Fraction(16), pixel_multiple=multiple, frame_stride=4, images=True)
    table = bucket_table(
        DirectoryConfig(path="clips", resolutions=[size], enable_ar_bucket=True, ar_buckets=shapes(size)), spec
    )
    found = {shape for _, row in table.areas for shape in row}
    assert all(side % multiple == 0 for shape in found for side in shape)
    if multiple == 16:
        assert found == set(shapes(size))


def test_the_shapes_of_a_small_area():
    # sqrt(64 * 64) = 64: widths 32, 48, 64, heights 128, 85 down to 80, 64
    assert shapes((64, 64)) == [(32, 128), (48, 80), (64, 64), (80, 48), (128, 32)]


# --- key by key -------------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("folder")


def test_every_key_arrives():
    lines = ("frame_extraction = 'slide'", "frame_stride = 8", "target_frames = [33, 25]", "source_fps = 30.0")
    [slide] = read(video(*lines, "num_repeats = 3", "caption_extension = '.caption'", "resolution = 512"))
    assert (slide.video_clip_mode, slide.frame_stride, slide.frame_buckets, slide.fps) == (
        "slide",
        8,
        (1, 25, 33),
        30.0,
    )
    assert (slide.num_repeats, slide.caption_extension, slide.resolutions) == (3.0, ".caption", ((512, 512),))
    assert (slide.path, slide.media, slide.enable_ar_bucket) == (Path("clips"), "videos", True)
    [full] = read(video("frame_extraction = 'full'", "max_frames = 45"))
    assert (full.video_clip_mode, full.max_frames, full.fps, full.resolutions) == ("full", 45, "native", ((960, 544),))
    [uniform] = read(video("frame_extraction = 'uniform'", "frame_sample = 4", "target_frames = [9]"))
    assert (uniform.video_clip_mode, uniform.frame_sample) == ("uniform", 4)


@pytest.mark.parametrize(
    ("lines", "stills", "lengths"),
    [
        (("target_frames = [1, 21]",), True, (1, 21)),
        (("target_frames = [1]",), True, (1,)),
        ((), True, (1,)),  # as there: target_frames is then [1]
        (("target_frames = [3]",), True, (1,)),  # rounded down
        (("target_frames = [21]",), False, (1, 21)),
        (("frame_extraction = 'full'", "target_frames = [1]"), False, (1,)),  # there it is not read with 'full'
    ],
)
def test_a_target_of_one_frame_makes_stills(lines, stills, lengths):
    [clips] = read(video(*lines))
    assert (clips.stills, clips.frame_buckets) == (stills, lengths)


def test_a_model_of_videos_alone_takes_no_stills():
    loaded = load(dataset=video("target_frames = [1, 9]", "source_fps = 16.0"))
    assert advice(loaded, SPEC) == []
    assert advice(loaded, SPEC._replace(images=False)) == [
        "dataset.toml:4: datasets[0].target_frames: directory[0].stills = true has no effect: "
        "this model trains on videos and takes no single frames"
    ]
    (refused,) = check_rules(load(dataset=video("target_frames = [1]")), 1, SPEC._replace(images=False))
    assert refused.startswith("dataset.toml:4: datasets[0].target_frames: directory[0].frame_buckets has no length for")


def test_lists_are_taken_as_they_are(tmp_path):
    """Paths are seen from here; where there is nothing, from the list's own folder."""
    (tmp_path / "lists").mkdir()
    for path in ("here.mp4", "lists/there.mp4", "both.mp4", "lists/both.mp4"):
        write_video(tmp_path / path, 12, size=(64, 48))
    write_image(tmp_path / "still.png")
    write_image(tmp_path / "odd.png")
    rows = [{"video_path": name, "caption": f"of {name}"} for name in ("here.mp4", "there.mp4", "both.mp4", "odd.png")]
    Path("lists/videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("lists/images.jsonl").write_text(json.dumps({"image_path": "still.png", "caption": "of it"}) + "\n\n")
    text = "[general]\nresolution = 64\n[[datasets]]\nvideo_jsonl_file = 'lists/videos.jsonl'\ntarget_frames = [9]\n"
    folders = read(text + "[[datasets]]\nimage_jsonl_file = 'lists/images.jsonl'\n")
    assert [(source.path, source.media) for source in folders] == [
        (Path("lists/videos.jsonl"), "videos"),
        (Path("lists/images.jsonl"), "images"),
    ]
    assert not [told for told in check_paths(load(dataset=text)) if "directory[0]" in told]
    cut = cut_dataset(folders, spec=SPEC, clip_mode="head", store=CacheStore(tmp_path / "cache"), workers=0)
    assert [(str(clip.media.path), clip.media.captions) for clip in cut.clips] == [
        ("here.mp4", ("of here.mp4",)),
        ("lists/there.mp4", ("of there.mp4",)),
        ("both.mp4", ("of both.mp4",)),
        ("still.png", ("of it",)),
    ]
    assert [str(item) for item in cut.skipped] == ["odd.png: is an image, and of this folder only videos are used"]
    assert cut.notices == []


def test_what_general_says_holds_unless_said_otherwise():
    general = ("resolution = [640, 352]", "num_repeats = 2", "target_frames = [9]")
    text = video("num_repeats = 5", general=general) + "[[datasets]]\nimage_directory = 'photos'\n"
    clips, photos = read(text)
    assert (clips.num_repeats, photos.num_repeats) == (5.0, 2.0)
    assert clips.resolutions == photos.resolutions == ((640, 352),)
    assert (clips.frame_buckets, photos.frame_buckets) == ((1, 9), (1,))


@pytest.mark.parametrize(("said", "sorted_by_shape"), [((), False), (("enable_bucket = true",), True)])
def test_images_are_sorted_by_shape_where_that_is_said(said, sorted_by_shape):
    [photos] = read(image("resolution = [512, 256]", *said))
    assert photos.enable_ar_bucket == sorted_by_shape and bool(photos.ar_buckets) == sorted_by_shape


def test_what_was_resolved_loads_again():
    Path("dataset.toml").write_text(DATASET)
    dataset = load_dataset(Path("dataset.toml"))
    Path("again.toml").write_text(resolved_dataset_toml(dataset))
    assert load_dataset(Path("again.toml")) == dataset


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "target_frames = [48, 45, 24]",
            "target_frames: lengths must be 4n+1 frames; rounded down: 24 to 21, 48 to 45",
        ),
        (
            "batch_size = 4",
            "batch_size = 4 has no effect: micro_batch_size_per_gpu = 2 in the run TOML holds",
        ),
        ("batch_size = 2", None),
        ("batch_size = 1", None),
        ("bucket_no_upscale = true", None),
        ("enable_bucket = true", None),
        (
            "enable_bucket = false",
            "enable_bucket = false crops videos to 960x544; musubi-tuner heeds it for images alone",
        ),
        ("frame_stride = 2", None),
    ],
)
def test_what_is_said_of_a_key(line, said):
    text = video("source_fps = 16.0", line, *() if "target" in line else ("target_frames = [9]",))
    loaded = load(run="micro_batch_size_per_gpu = 2\n" + RUN, dataset=text)
    assert loaded.notices == ([f"dataset.toml:5: {said}"] if said else [])


@pytest.mark.parametrize("sorted_by_shape", [True, False])
def test_small_files_are_not_enlarged_where_they_are_sorted_by_shape(sorted_by_shape):
    bucket = f"enable_bucket = {str(sorted_by_shape).lower()}"
    text = f"[[datasets]]\nimage_directory = 'photos'\nbucket_no_upscale = true\n{bucket}\n"
    loaded = load(dataset=text)
    assert loaded.dataset.directory[0].bucket_no_upscale is sorted_by_shape
    said = "dataset.toml:3: bucket_no_upscale = true has no effect without enable_bucket, as in musubi-tuner"
    assert loaded.notices == ([] if sorted_by_shape else [said])


def test_batch_size_gives_way_to_a_budget_of_tokens():
    text = video("source_fps = 16.0", "batch_size = 4", "target_frames = [9]")
    said = "batch_size = 4 has no effect: max_tokens_per_gpu = 4096 in the run TOML holds"
    assert load(run="max_tokens_per_gpu = 4096\n" + RUN, dataset=text).notices == [f"dataset.toml:5: {said}"]


def test_later_checks_name_the_file_s_own_key_and_line():
    text = (
        video("frame_stride = 2", "target_frames = [9]", "source_fps = 16.0") + "[[datasets]]\nimage_directory='no'\n"
    )
    loaded = load(dataset=text)
    assert advice(loaded, SPEC) == [
        "dataset.toml:4: datasets[0].frame_stride: directory[0].frame_stride = 2 has no effect with video_clip_mode = "
        "'head'; it is for 'slide'"
    ]
    missing = [message for message in check_paths(loaded) if message.startswith("dataset.toml:8: ")]
    assert missing == [
        f"dataset.toml:8: datasets[1].image_directory: directory[1].path = 'no' does not exist (seen from {Path.cwd()})"
    ]
    [refused] = check_rules(loaded, 1, SPEC._replace(images=False))
    assert refused.startswith("dataset.toml:8: datasets[1].image_directory: directory[1].frame_buckets has no length")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (video("target_frames = [9]", "resolution = 'big'"), "5: datasets[0].resolution = 'big' is not a resolution; "),
        (video("target_frames = []"), "4: datasets[0].target_frames = [] is not a list of frame counts; "),
        (video("target_frame = [9]"), "4: unknown key 'datasets[0].target_frame' = [9]; did you mean 'target_frames'?"),
        (
            video("flip = true"),
            "4: unknown key 'datasets[0].flip' = true; it belongs in a dataset TOML of this trainer, with a [[d",
        ),
        (video("source_fps = 0.0"), "4: datasets[0].source_fps = 0.0 is too small; use 1 or more"),
        (video("source_fps = 100000.0"), "4: datasets[0].source_fps = 100000.0 is too large; use 1000 or less"),
        (video("frame_extraction = 'tail'"), "4: datasets[0].frame_extraction = 'tail' is not known; use 'head', "),
        (video(general=["resolution = [1, 2, 3]"]), "2: general.resolution = [1, 2, 3] is not a resolution; "),
        (video("image_directory = 'b'"), "2: [datasets[0]] has video_directory and image_directory; give each a "),
        (image("image_jsonl_file = 'b'"), "2: [datasets[0]] has image_directory and image_jsonl_file; give each a "),
        (video("control_directory = 'b'"), "4: datasets[0].control_directory = 'b' is not supported yet; control "),
        (video("fp_latent_window_size = 9"), "4: datasets[0].fp_latent_window_size = 9 is not supported yet; "),
        (image("multiple_target = true"), "4: datasets[0].multiple_target = true is not supported yet; it is for "),
        (image("flux_kontext_no_resize_control = true"), "4: datasets[0].flux_kontext_no_resize_control = true is "),
        (image("target_frames = [9]"), "4: datasets[0].target_frames is for videos, and this has image_directory; re"),
        ("[general]\n[[datasets]]\nresolution = 512\n", "2: [datasets[0]] has no folder; add a video_directory or an "),
        (
            "[general]\nresolution = 512\n",
            " datasets is missing; add it (One or more folders, each begun with [[datasets]])",
        ),
        (
            "[datasets]\nvideo_directory = 'a'\n",
            "1: [datasets] holds no list of folders; begin each with [[datasets]], ",
        ),
        ("datasets = []\n", "1: datasets = [] holds no list of folders; begin each with [[datasets]], "),
        ("resolutions = [64]\n" + video("target_frames = [9]"), "1: unknown key 'resolutions' = [64]"),
    ],
)
def test_what_is_wrong_is_told_in_its_own_words(text, said):
    found = complaints(text)
    assert len(found) == 1 and found[0].startswith(f"dataset.toml:{said}"), found


def test_all_that_is_wrong_is_told_at_once():
    found = complaints(video("resolution = 'big'", "frame_sample = 0", "control_directory = 'x'"))
    assert [message.split(":")[1] for message in found] == ["4", "5", "6"]
