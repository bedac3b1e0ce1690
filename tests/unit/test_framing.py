"""Which part of a picture a clip shows: its choice by content, and the pixels against FFmpeg's and Pillow's own."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import av.filter
import numpy as np
import pytest
from PIL import Image

from tests.helpers.clips import clip_of
from tests.helpers.media import write_frames
from tests.unit.test_buckets import image, media
from tests.unit.test_clips import cut
from utils.config.fields import Crop
from utils.data.framing import CROPS, framed
from utils.data.inspection import inspect, view_of
from utils.data.media import decode_clip
from utils.data.media_types import cover_size, fit_size, picture_box
from utils.data.records import Bucket, Fill, Framing

RATE = Fraction(16)
HALF = Fraction(1, 2)
UPRIGHT = (96, 64)  # px, as shown: 72x48 where it covers 48x48, 64x43 where it covers 64x32 or lies in 64x64
# name -> bucket, framing, what FFmpeg is told
CUTS = {
    "left": ((48, 48), Framing(Fraction(0)), "scale=72:48:flags=bicubic,crop=48:48:0:0"),
    "off the middle": ((48, 48), Framing(Fraction(7, 24)), "scale=72:48:flags=bicubic,crop=48:48:7:0"),
    "right, mirrored": ((48, 48), Framing(Fraction(1), flip=True), "scale=72:48:flags=bicubic,crop=48:48:24:0,hflip"),
    "high": ((64, 32), Framing(HALF, Fraction(3, 11)), "scale=64:43:flags=bicubic,crop=64:32:0:3"),
    "whole": ((64, 64), Framing(pad=True), "scale=64:43:flags=bicubic,pad=64:64:0:10:black"),
    "whole, mirrored": ((64, 64), Framing(flip=True, pad=True), "scale=64:43:flags=bicubic,pad=64:64:0:10:black,hflip"),
}
# name -> quarter turns clockwise that bring it upright, width of its pixels over their height
SOURCES = {
    "plain": (0, Fraction(1)),
    "turned": (1, Fraction(1)),
    "upside down": (2, Fraction(1)),
    "turned back": (3, Fraction(1)),
    "not square": (0, Fraction(2)),
    "turned, not square": (1, Fraction(2)),
}


def pictures(count=5):
    """Frames of which no two places are alike, smooth, so that scaling has one answer: uint8 [F, h, w, 3]."""
    y, x = np.mgrid[0 : UPRIGHT[1], 0 : UPRIGHT[0]]
    waves = [
        127 + 60 * np.sin(x / a + number) + 60 * np.cos(y / b) for number, a, b in ((0, 17, 9), (1, 11, 13), (2, 23, 7))
    ]
    return np.stack([np.stack(waves, -1) + 2 * number for number in range(count)]).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("framing")


@pytest.fixture(scope="module", params=SOURCES)
def source(request, folder):
    turns, pixel_shape = SOURCES[request.param]
    stored = np.rot90(pictures(), turns, axes=(1, 2))[:, :, :: int(pixel_shape)]
    path = folder / f"{request.param.replace(' ', '_').replace(',', '')}.mov"
    return write_frames(path, stored, rotation=(-90 * turns) % 360, pixel_shape=pixel_shape), turns


def by_ffmpeg(path, turns, filters):
    """The frames of a file through FFmpeg's own filters, which know nothing of rotation flags: uint8 [F, h, w, 3]."""
    found = []
    with av.open(str(path)) as container:
        graph = av.filter.Graph()
        steps = ["format=gbrp", *["transpose=clock"] * turns, *filters.split(","), "format=rgb24"]
        nodes = [graph.add_buffer(template=container.streams.video[0])]
        nodes += [graph.add(*step.split("=", 1)) for step in [*steps, "buffersink"]]
        graph.link_nodes(*nodes).configure()
        for frame in container.decode(video=0):
            graph.push(frame)
            found.append(graph.pull().to_ndarray())
    return np.stack(found)


def test_videos_are_framed_as_ffmpeg_frames_them(source):
    path, turns = source
    for name, ((width, height), framing, filters) in CUTS.items():
        found = decode_clip(path, True, Fraction(0), RATE, 5, width, height, framing=framing)
        away = np.abs(found.astype(int) - by_ffmpeg(path, turns, filters))
        assert away.max() <= 2 and away.mean() < 0.5, (name, away.max(), away.mean())
        shown = picture_box(UPRIGHT, (width, height), framing)
        assert shown == ((0, 10, 64, 53) if framing.pad else (0, 0, width, height))


def test_padding_cuts_nothing_off_where_sides_are_rounded(folder):
    wide = np.tile(np.linspace(0, 255, 300, dtype=np.uint8)[None, None, :, None], (1, 24, 1, 3))
    path = write_frames(folder / "wide.mov", wide)
    # 96x7.68 px, which are 96x8: to cover these it would have to be 100 px wide
    found = decode_clip(path, True, Fraction(0), RATE, 1, 96, 96, framing=Framing(pad=True))
    expected = by_ffmpeg(path, 0, "scale=96:8:flags=bicubic,pad=96:96:0:44:black")
    assert np.abs(found.astype(int) - expected).max() <= 2 and found[0, 45, 0, 0] <= 2 and found[0, 45, -1, 0] >= 253


def by_pillow(picture, size, framing):
    scaled = fit_size(picture.size, size) if framing.pad else cover_size(picture.size, size)
    small, (over_w, over_h) = (
        picture.resize(scaled, Image.Resampling.LANCZOS),
        (scaled[0] - size[0], scaled[1] - size[1]),
    )
    left, top = int(over_w * framing.across), int(over_h * framing.down)
    if framing.pad:  # what is over is less than nothing
        whole = Image.new("RGB", size)
        whole.paste(small, (-left, -top))
    else:
        whole = small.crop((left, top, left + size[0], top + size[1]))
    return np.asarray(whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if framing.flip else whole)


@pytest.mark.parametrize("name", ["a.png", "turned.jpg", "moving.webp"])
def test_images_are_framed_as_pillow_frames_them(folder, name):
    frames = [Image.fromarray(frame) for frame in pictures(3)]
    path, moving = folder / name, name == "moving.webp"
    if name == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn clockwise brings it upright
        frames[0].transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=100, subsampling=0)
    else:
        more = {"save_all": True, "append_images": frames[1:], "duration": 100, "lossless": True, "exact": True}
        frames[0].save(path, **(more if moving else {}))
    for size, framing, _ in CUTS.values():
        rate, count = (Fraction(10), 3) if moving else (Fraction(0), 1)
        found = decode_clip(path, moving, Fraction(0), rate, count, *size, framing=framing)
        for pixels, frame in zip(found, frames, strict=False):
            away = np.abs(pixels.astype(int) - by_pillow(frame, size, framing))
            assert away.mean() < 1 and away.max() <= (8 if name == "turned.jpg" else 3), framing


@pytest.mark.parametrize("framing", [Framing(), Framing(Fraction(1, 5)), Framing(pad=True)])
def test_a_mirrored_clip_is_the_plain_one_mirrored(folder, framing):
    video = write_frames(folder / "video.mov", pictures())
    still = folder / "still.png"
    Image.fromarray(pictures(1)[0]).save(still)
    for path, how in [
        (video, {}),
        (video, {"fill": Fill("loop", 3)}),
        (video, {"fill": Fill("pad", 3), "only": (0, 4)}),
        (video, {"source_fps": Fraction(8), "only": (1, 2)}),
        (still, {}),
    ]:
        clip = (path, path == video, Fraction(0), RATE, 5 if path == video else 1, 48, 48)
        plain = decode_clip(*clip, framing=framing, **how)
        mirrored = decode_clip(*clip, framing=framing._replace(flip=True), **how)
        assert np.array_equal(mirrored, plain[:, :, ::-1]) and not np.array_equal(mirrored, plain)
        if framing == Framing():
            assert np.array_equal(plain, decode_clip(*clip, **how))


def test_where_a_picture_lies_in_its_bucket():
    padded = Framing(pad=True)
    assert picture_box((1280, 720), (512, 512), None) == picture_box((1, 2), (512, 512), Framing()) == (0, 0, 512, 512)
    assert picture_box((1280, 720), (512, 512), padded) == (0, 112, 512, 400)
    assert picture_box((720, 1280), (512, 512), padded) == (112, 0, 400, 512)
    assert picture_box((101, 200), (64, 64), padded) == (16, 0, 48, 64)
    # 31 px of padding: mirrored, the larger part is on the other side
    assert picture_box((103, 200), (64, 64), padded)[::2] == (15, 48)
    assert picture_box((103, 200), (64, 64), padded._replace(flip=True))[::2] == (16, 49)
    assert picture_box((10_000, 1), (64, 64), padded) == (0, 31, 64, 32)


# --- the choice -------------------------------------------------------------------------------------------------------

FILE = replace(media(1280, 720), content_hash="one")


def framings(file=FILE, **settings):
    [clip] = cut(file, frame_buckets=(33,), **settings)
    return (clip.framing, *clip.framings)


def test_crops_by_chance_depend_on_content_alone():
    four = framings(crop="random", crop_sample=4)
    assert len(set(four)) == 4 and all(framing.down == HALF and not framing.pad for framing in four)
    # 910x512 px, of which 512 are kept: every crop begins at a whole pixel
    assert all((framing.across * 398).denominator == 1 and 0 <= framing.across <= 1 for framing in four)
    moved = replace(FILE, path=Path("/elsewhere/renamed.mp4"), captions=("other",))
    assert framings(moved, crop="random", crop_sample=4) == four
    assert framings(crop="random", crop_sample=2) == four[:2]
    assert framings(replace(FILE, content_hash="two"), crop="random", crop_sample=4) != four
    upright = framings(media(720, 1280), crop="random")[0]
    assert upright.across == HALF != upright.down
    firsts = [framings(replace(FILE, content_hash=str(n)), crop="random")[0] or Framing() for n in range(200)]
    shares = sorted(float(framing.across) for framing in firsts)
    assert shares[0] < 0.05 and shares[-1] > 0.95 and 0.4 < np.mean(shares) < 0.6


def test_what_comes_to_the_middle_has_no_framing():
    assert framings() == framings(crop="pad", file=image(512, 512)) == (None,)
    assert framings(media(512, 512), crop="random", crop_sample=5) == (None,)
    # one pixel is over, so that there are two crops; rounded down the middle is the first of them
    assert set(framings(media(513, 512), crop="random", crop_sample=5)) == {Framing(Fraction(0)), Framing(Fraction(1))}
    assert None in framings(media(514, 512), crop="random", crop_sample=5)
    assert framings(media(1280, 720), crop="pad") == (Framing(pad=True),)


def test_the_config_knows_the_crops():
    assert set(get_args(Crop)) == set(CROPS)


@pytest.mark.parametrize(
    ("starts", "crops", "flip"), [(1, 1, True), (1, 4, True), (3, 1, True), (4, 4, True), (4, 6, False), (3, 3, True)]
)
def test_uses_take_every_start_in_every_framing_alike(starts, crops, flip):
    [clip] = cut(
        FILE, "random_start", frame_buckets=(33,), frame_sample=starts, crop="random", crop_sample=crops, flip=flip
    )
    turns = clip.each_turn()
    assert len(turns) == len({(turn.start, turn.framing) for turn in turns}) == starts * crops * (1 + flip)
    assert all(not turn.turns and not turn.framings for turn in turns)
    assert (turns[0].start, turns[0].framing) == (clip.start, clip.framing)
    for first, second in zip(turns, (*turns[1:], turns[0]), strict=True):
        assert not flip or (first.framing or Framing()).flip != (second.framing or Framing()).flip
        assert starts == 1 or first.start != second.start or second is turns[0]
    mirrored = Counter((turn.start, turn.framing.across) for turn in turns if turn.framing and turn.framing.flip)
    assert set(mirrored.values()) <= {1} and len(mirrored) == flip * starts * crops


def test_half_of_all_files_are_mirrored_first():
    first = Counter(framings(replace(FILE, content_hash=str(number)), flip=True) for number in range(200))
    assert set(first) == {(None, Framing(flip=True)), (Framing(flip=True), None)} and min(first.values()) > 70


def test_turns_without_framings_are_what_they_were():
    [clip] = cut(FILE, "random_start", frame_buckets=(33,), frame_sample=5)
    assert [turn.start for turn in clip.each_turn()] == [clip.start, *clip.turns]
    assert framed(clip, "center", 1, flip=False) is clip


# --- what a plan looks at ---------------------------------------------------------------------------------------------


def test_padding_is_not_taken_for_bars(folder):
    path = write_frames(folder / "bars.mov", pictures(9))
    clip = clip_of(path, Bucket(64, 64, 9))
    padded = replace(clip, framing=Framing(pad=True))
    assert inspect(padded).bars == inspect(clip).bars == (0.0, 0.0)
    assert len({view_of(clip), view_of(padded), view_of(replace(clip, framing=Framing(Fraction(0))))}) == 3
    assert view_of(replace(clip, framing=Framing(flip=True))) == view_of(clip)
