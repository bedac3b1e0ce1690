"""The contact sheet's pictures: the right frames, cut as for the encoder, small; a bad file costs its own alone."""

import io
from fractions import Fraction

import numpy as np
from PIL import Image

from tests.helpers.clips import clip_of
from tests.helpers.media import frame_numbers, write_image, write_video
from utils.data.inspection import frames_of
from utils.data.records import Bucket
from utils.data.thumbnails import Strip, draw, pictures


def opened(picture):
    image = Image.open(io.BytesIO(picture.jpeg))
    assert (image.format, image.size) == ("JPEG", (picture.width, picture.height))
    return np.asarray(image)


def test_first_middle_and_last_frame_stand_side_by_side(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    clip = clip_of(path, Bucket(64, 48, 17), start=Fraction(3, 16))
    strip = opened(draw(Strip(clip, 64)))
    assert strip.shape == (48, 3 * 64 + 2 * 3, 3)
    assert frame_numbers(np.stack([strip[:, i * 67 : i * 67 + 64] for i in range(3)])) == [3, 11, 19]


def test_pictures_are_small_and_an_image_is_one_frame(tmp_path):
    still = clip_of(write_image(tmp_path / "still.png"), Bucket(64, 48, 1))
    picture = draw(Strip(still, 32))
    assert (picture.width, picture.height) == (32, 24)
    enlarged = draw(Strip(still, 500))
    assert (enlarged.width, enlarged.height) == (64, 48), "never larger than the model sees it"


def test_what_is_cropped_away_is_not_shown(tmp_path):
    path = write_video(tmp_path / "wide.mp4", 12, size=(128, 48), half=True)
    clip = clip_of(path, Bucket(48, 48, 9))
    strip = opened(draw(Strip(clip, 48)))
    seen = frames_of(clip, [0], 48, 48)[0]
    assert np.abs(strip[:, :48].astype(int) - seen.astype(int)).mean() < 3
    assert seen[:, :20].max() < 8 < seen[:, 28:].min() + 8


def test_a_bad_file_costs_its_own_picture(tmp_path):
    good, bad = (clip_of(write_video(tmp_path / name, 12)) for name in ("good.mp4", "bad.mp4"))
    bad.media.path.write_bytes(b"")
    first, second, third = pictures([good, bad, good], side_px=32, workers=2)
    assert second is None
    assert first == third == draw(Strip(good, 32))
