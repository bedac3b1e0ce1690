"""Grids of loss masks against plain numpy: time, space, framing, colour, and what cannot be used."""

import io
import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from tests.helpers.clips import clip_of
from tests.helpers.configs import SPEC
from tests.helpers.media import write_frames, write_image, write_video
from utils.data.keys import Keys
from utils.data.mask_files import fitting_mask
from utils.data.masks import MaskJob, dimmed, mask_grid, too_short
from utils.data.media import decode_clip, probe
from utils.data.media_types import MediaError
from utils.data.records import Bucket, Fill, Framing
from utils.data.stat_index import hash_file
from utils.data.thumbnails import Strip, draw

WHOLE = Bucket(64, 48, 9)  # 3 x 6 x 8 cells
NOISE = np.random.default_rng(5)


def grey(*shape: int) -> np.ndarray:
    """Random levels, as RGB."""
    return NOISE.integers(0, 256, (*shape, 1), np.uint8).repeat(3, axis=-1)


def image(path, pixels: np.ndarray):
    Image.fromarray(pixels).save(path)
    return path


def cells(planes: np.ndarray) -> np.ndarray:
    """Levels [9, 48, 64] -> means [3, 6, 8]: the first frame, then four at a time, in blocks of 8 x 8."""
    small = planes.astype(np.float64).reshape(9, 6, 8, 8, 8).mean((2, 4))
    return np.stack([small[0], small[1:5].mean(0), small[5:9].mean(0)])


@pytest.fixture
def masked(tmp_path):
    """A clip of 20 frames with the mask at a path; changes are of the clip."""

    def make(mask, source=None, **changed):
        clip = clip_of(source or write_video(tmp_path / "clip.mp4", 20), WHOLE)
        found = mask and fitting_mask(clip.media, mask, hash_file(mask), probe(mask))
        return replace(clip, media=replace(clip.media, mask=found), **changed)

    return make


def job_of(clip) -> MaskJob:
    job = Keys.mask(clip, SPEC)
    assert job is not None
    return job


def near(grid, wanted):
    assert grid.dtype == np.uint8 and grid.shape == wanted.shape
    return abs(grid - wanted).max() <= 1


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_an_image_stands_for_all_frames(masked, tmp_path):
    pixels = grey(48, 64)
    grid = mask_grid(job_of(masked(image(tmp_path / "m.png", pixels))))
    assert near(grid, cells(np.stack([pixels[..., 0]] * 9)))
    assert (grid == grid[:1]).all() and grid.std() > 5


def test_a_video_is_averaged_over_the_frames_of_a_latent_frame(masked, tmp_path):
    frames = grey(20, 48, 64)
    clip = masked(write_frames(tmp_path / "m.mov", frames), start=Fraction(5, 16))
    assert near(mask_grid(job_of(clip)), cells(frames[5:14, ..., 0]))
    looped = replace(clip, start=Fraction(0), fill=Fill("loop", 6))
    assert near(mask_grid(job_of(looped)), cells(frames[[i % 6 for i in range(9)], ..., 0]))


def test_a_moving_square_lands_in_its_latent_frames(masked, tmp_path):
    frames = np.zeros((20, 48, 64, 3), np.uint8)
    for number in range(9):  # a cell further to the right in each frame, wrapping after eight
        left = 8 * (number % 8)
        frames[number, 16:24, left : left + 8] = 255
    grid = mask_grid(job_of(masked(write_frames(tmp_path / "m.mov", frames))))
    rows = grid[:, 2]
    assert rows[0].tolist() == [255, 0, 0, 0, 0, 0, 0, 0]
    assert rows[1].tolist() == [0, 64, 64, 64, 64, 0, 0, 0]  # a quarter of the time in each
    assert rows[2].tolist() == [64, 0, 0, 0, 0, 64, 64, 64]
    assert grid.sum() == rows.sum()


def test_a_mask_of_another_frame_rate_follows_the_clips_moments(masked, tmp_path):
    frames = np.zeros((30, 48, 64, 3), np.uint8)
    frames[12:] = 255  # from 0.5 s on, at 24 frames a second
    grid = mask_grid(job_of(masked(write_frames(tmp_path / "m.mov", frames, fps=24))))
    assert grid[:, 0, 0].tolist() == [0, 0, 64]  # frame 8 is shown at 0.5 s, the last of the third cell


def test_colours_count_by_luminance_and_transparency_is_black(masked, tmp_path):
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :, :] = (255, 255, 255, 0)  # erased: white beneath
    for left, colour in enumerate([(255, 255, 255, 255), (255, 0, 0, 255), (0, 255, 0, 255), (255, 255, 255, 128)]):
        pixels[:, 8 * left : 8 * left + 8] = colour
    clip = masked(image(tmp_path / "m.png", pixels))
    row = mask_grid(job_of(clip))[0, 0]
    wanted = [255, 0.299 * 255, 0.587 * 255, 128, 0, 0, 0, 0]
    assert abs(row[[0, 5, 6, 7]] - np.take(wanted, [0, 5, 6, 7])).max() <= 2, "the filter rings at edges"
    whole = {name: Image.new(mode, (64, 48), level) for name, mode, level in [("l", "L", 77), ("i", "I;16", 77 << 8)]}
    for name, picture in whole.items():
        picture.save(tmp_path / f"{name}.png")
        assert (mask_grid(job_of(masked(tmp_path / f"{name}.png"))) == 77).all()


@pytest.mark.parametrize(
    "framing",
    [
        None,
        Framing(across=Fraction(1, 10), down=Fraction(3, 4)),
        Framing(flip=True),
        Framing(pad=True),
        Framing(across=Fraction(1, 4), flip=True, pad=True),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "mov"])
def test_it_is_framed_as_the_clip(masked, tmp_path, framing, suffix):
    """A picture as its own mask: what is trained is what the model sees of it."""
    block = grey(3, 5)
    pixels = block.repeat(32, axis=0).repeat(32, axis=1)  # 160 x 96, in a bucket of 64 x 48
    write = {"png": lambda path: image(path, pixels), "mov": lambda path: write_frames(path, np.stack([pixels] * 20))}
    source = write[suffix](tmp_path / f"m.{suffix}")
    clip = masked(source, source=source, framing=framing)
    if suffix == "png":
        clip = replace(clip, bucket=clip.bucket._replace(frames=1))
    media, (width, height, frames) = clip.media, clip.bucket
    seen = decode_clip(source, media.is_video, clip.start, clip.fps, frames, width, height, framing=framing)
    planes = seen[..., 0] if frames == 9 else np.stack([seen[0, ..., 0]] * 9)
    assert near(mask_grid(job_of(clip)), cells(planes)[: (frames + 3) // 4])


def test_padding_is_left_out_without_a_mask_too(masked, tmp_path):
    source = write_video(tmp_path / "wide.mp4", 20, size=(128, 48))  # 64 x 24 in a bucket of 64 x 48
    padded = masked(None, source=source, framing=Framing(pad=True))
    grid = mask_grid(job_of(padded))
    assert grid.shape == (3, 6, 8)
    assert grid[0, :, 0].tolist() == [0, 128, 255, 255, 128, 0]  # 12 px above, so half of the second row
    assert (grid == grid[0, :, :1]).all()
    assert Keys.mask(masked(None, source=source), SPEC) is None, "what covers its bucket has no padding"
    assert Keys.mask(masked(None, framing=Framing(pad=True)), SPEC) is None, "nor has what has its shape"
    white = write_image(tmp_path / "white.png", (128, 48), (255, 255, 255))
    assert (mask_grid(job_of(masked(white, source=source, framing=Framing(pad=True)))) == grid).all()


def test_another_resolution_of_the_same_shape_is_scaled(masked, tmp_path):
    pixels = np.zeros((240, 320, 3), np.uint8)
    pixels[:, 160:] = 255
    grid = mask_grid(job_of(masked(image(tmp_path / "m.png", pixels))))
    assert (grid[..., :3] <= 1).all() and (grid[..., 5:] >= 254).all()


# --- keys and rows ----------------------------------------------------------------------------------------------------


def test_what_a_key_depends_on(masked, tmp_path):
    still = masked(image(tmp_path / "m.png", grey(48, 64)))
    video = masked(write_frames(tmp_path / "m.mov", grey(20, 48, 64)))

    def key(clip, **changed):
        return job_of(replace(clip, **changed)).key

    other = {
        "start": Fraction(1, 16),
        "fps": Fraction(8),
        "source_fps": Fraction(24),
        "fill": Fill("loop", 5),
        "framing": Framing(flip=True),
        "bucket": Bucket(32, 24, 9),
    }
    for name, value in other.items():
        assert key(video, **{name: value}) != key(video), name
        of_the_shape = name in ("framing", "bucket")
        assert (key(still, **{name: value}) != key(still)) == of_the_shape, f"{name}: an image has no moments"
    for clip in (still, video):
        renamed = clip.media.mask._replace(path=tmp_path / "elsewhere")
        edited = replace(clip.media, mask=renamed._replace(content_hash="other"))
        assert key(clip, media=replace(clip.media, content_hash="other", mask=renamed)) == key(clip)
        assert key(clip, media=edited) != key(clip)
        strided = Keys.mask(clip, SPEC._replace(latent_stride=16))
        assert strided and strided.key != key(clip) and mask_grid(strided).shape == (3, 3, 4)


def test_a_job_survives_the_disk(masked, tmp_path):
    video = write_frames(tmp_path / "m.mov", grey(20, 48, 64))
    clips = [
        masked(video, fill=Fill("pad", 7), source_fps=Fraction(41, 2)),
        masked(image(tmp_path / "m.png", grey(48, 64)), framing=Framing(across=Fraction(1, 3), flip=True)),
        masked(None, source=write_video(tmp_path / "wide.mp4", 9, size=(128, 48)), framing=Framing(pad=True)),
    ]
    for clip in clips:
        job = job_of(clip)
        assert MaskJob.of_row(json.loads(json.dumps(job.row()))) == job
        assert job.cells == 3 * 6 * 8


# --- what cannot be used ----------------------------------------------------------------------------------------------


def test_a_black_mask_leaves_nothing_to_train(masked, tmp_path):
    frames = np.full((20, 48, 64, 3), 255, np.uint8)
    frames[:9] = 2  # what a codec leaves of black
    clip = masked(write_frames(tmp_path / "m.mov", frames))
    with pytest.raises(MediaError, match=r"m\.mov: the mask is black all through the clip from 0\.00 s: nothing would"):
        mask_grid(job_of(clip))
    assert (mask_grid(job_of(replace(clip, start=Fraction(10, 16)))) == 255).all()
    black = masked(write_image(tmp_path / "m.png", colour=(0, 0, 0)))
    with pytest.raises(MediaError, match=r"m\.png: the mask is black where the clip is cut out"):
        mask_grid(job_of(black))


def test_a_video_mask_must_last_as_long_as_the_clip(masked, tmp_path):
    path = write_frames(tmp_path / "m.mov", grey(12, 48, 64))
    clip = masked(path)
    assert too_short(clip) is None and too_short(replace(clip, start=Fraction(3, 16))) is None
    late = replace(clip, start=Fraction(8, 16))
    assert too_short(late) == (
        f"its mask {path} lasts 0.75 s, and the clip from 0.50 s needs it at 1.00 s; make it as long as the video, or "
        "use an image for all frames"
    )
    assert too_short(replace(clip, turns=(late.start,))), "every turn is looked at"
    assert too_short(replace(late, source_fps=Fraction(16))) and not too_short(replace(clip, source_fps=Fraction(16)))
    assert too_short(replace(late, fill=Fill("loop", 3))) is None, "of a short clip no more frames are needed"
    with pytest.raises(MediaError, match="ends too early"):
        mask_grid(job_of(late))
    assert too_short(masked(write_image(tmp_path / "m.png"))) is None is too_short(masked(None))


def test_a_contact_sheet_is_dark_where_nothing_is_trained(masked, tmp_path):
    frames = np.full((20, 48, 64, 3), 255, np.uint8)
    frames[4, :, 32:] = 0
    bright = np.full((3, 48, 64, 3), 200, np.uint8)
    shown = dimmed(bright, [0, 4, 8], masked(write_frames(tmp_path / "m.mov", frames)))
    assert shown[:, 0, [0, 63], 0].tolist() == [[200, 200], [200, 50], [200, 200]]
    half = masked(image(tmp_path / "m.png", frames[4]))
    assert dimmed(bright, [0, 4, 8], half)[:, 0, [0, 63], 0].tolist() == [[200, 50]] * 3
    assert (dimmed(bright, [0, 4, 8], masked(None)) == bright).all()

    video = clip_of(write_frames(tmp_path / "v.mov", np.full((20, 48, 64, 3), 200, np.uint8)), WHOLE)
    strip = draw(Strip(replace(video, media=replace(video.media, mask=half.media.mask)), 64))
    sheet = Image.open(io.BytesIO(strip.jpeg))
    assert sheet.getpixel((8, 24))[0] > 180 and sheet.getpixel((56, 24))[0] < 70
