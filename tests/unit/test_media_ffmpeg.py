"""Pixels beside those of the ffmpeg program: orientation, crop, frame rates, colours, bit depths, clear parts."""

from fractions import Fraction

import numpy as np
import pytest

from tests.helpers.ffmpeg import needs_ffmpeg, patch_colours, patches, pixels, run, write_pictures
from tests.helpers.media import write_video
from utils.data.media import MediaError, decode_clip, probe
from utils.data.media_types import resampled_frames

pytestmark = needs_ffmpeg
MODEL_FPS = Fraction(16)
LOSSLESS = ("-c:v", "libx264", "-qp", "0", "-preset", "ultrafast")


def decoded(path, width, height, frames=3):
    return decode_clip(path, True, Fraction(0), MODEL_FPS, frames, width, height)


def drawn(path, *options, size="96x64", pixel_format="yuv420p", encoder=LOSSLESS, filters="null"):
    source = ("-f", "lavfi", "-i", f"testsrc2=s={size}:r=16:d=0.25")
    run(*source, "-vf", filters, "-pix_fmt", pixel_format, *encoder, *options, path)
    return path


def close(one, other, mean, worst):
    apart = np.abs(one.astype(int) - other)
    return apart.mean() <= mean and apart.max() <= worst


# --- orientation, shape, crop -----------------------------------------------------------------------------------------

FLAGS = {
    "a quarter turn": ["-display_rotation", "90"],
    "upside down": ["-display_rotation", "180"],
    "three quarter turns": ["-display_rotation", "270"],
    "mirrored": ["-display_hflip"],
    "mirrored upside down": ["-display_vflip"],
    "mirrored and turned": ["-display_rotation", "90", "-display_hflip"],
}


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("drawing") / "a.mp4")


@pytest.mark.parametrize("flag", FLAGS)
def test_orientation_is_byte_for_byte_ffmpegs(tmp_path, drawing, flag):
    run(*FLAGS[flag], "-i", drawing, "-c", "copy", tmp_path / "a.mp4")
    width, height = (64, 96) if "90" in FLAGS[flag] or "270" in FLAGS[flag] else (96, 64)
    held = probe(tmp_path / "a.mp4")
    assert held[:2] == (width, height)
    assert held.special == ("mirrored" if "mirrored" in flag else "")
    assert np.array_equal(decoded(tmp_path / "a.mp4", width, height), pixels(tmp_path / "a.mp4", width, height)[:3])


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 32)])
def test_a_crop_is_byte_for_byte_ffmpegs(drawing, width, height):
    expected = pixels(drawing, width, height, f"crop={width}:{height}")
    assert np.array_equal(decoded(drawing, width, height), expected[:3])


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_that_are_not_square_and_a_turn(tmp_path, turned):
    path = drawn(tmp_path / "a.mp4", filters="setsar=4/3")
    told = "setparams=colorspace=smpte170m:range=tv:color_primaries=bt709:color_trc=bt709"
    expected = pixels(path, 128, 64, f"{told},zscale=128:64:filter=bicubic:matrix=gbr:range=full")[:3]
    if turned:
        run("-display_rotation", "90", "-i", path, "-c", "copy", tmp_path / "b.mp4")
        path, expected = tmp_path / "b.mp4", np.rot90(expected, axes=(1, 2))
    height, width = expected.shape[1:3]
    assert probe(path)[:2] == (width, height)
    assert close(decoded(path, width, height), expected, mean=0.5, worst=16)


def test_odd_sides(tmp_path):
    path = drawn(tmp_path / "a.mkv", size="66x50", filters="crop=65:49:0:0:exact=1", encoder=("-c:v", "ffv1"))
    assert probe(path)[:2] == (65, 49)
    assert np.array_equal(decoded(path, 65, 49), pixels(path, 65, 49)[:3])


# --- frame rates ------------------------------------------------------------------------------------------------------

NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)
SLOWING = {"pts": [*range(20), *range(20, 80, 3)], "time_base": Fraction(1, 30)}
RATES = {
    "23.976": ("a.mp4", {"fps": NTSC_FILM}),
    "29.97, matroska": ("a.mkv", {"fps": NTSC}),
    "60": ("a.mp4", {"fps": 60}),
    "12": ("a.mkv", {"fps": 12}),
    "variable": ("a.mkv", SLOWING),
    "variable, mp4": ("a.mp4", SLOWING),
    "B-frames": ("a.mp4", {"fps": 25, "options": {"qp": "0", "bf": "3", "x264-params": "keyint=12"}}),
}


@pytest.mark.parametrize("name", RATES)
def test_frames_are_those_of_the_fps_filter(tmp_path, name):
    file, options = RATES[name]
    path = write_video(tmp_path / file, 40, grain=True, **options)
    held = probe(path)
    count = resampled_frames(held.frames, held.fps, MODEL_FPS)
    # "up": a frame is on show from its time stamp on, and not from half a frame before it.
    expected = pixels(path, 64, 48, "fps=16:round=up")
    assert np.array_equal(decoded(path, 64, 48, count), expected[:count])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_part_cut_out_without_recoding(tmp_path, name):
    whole = write_video(tmp_path / "whole.mp4", 60, 24, grain=True)
    run("-ss", "0.9", "-i", whole, "-c", "copy", tmp_path / name)  # mp4: an edit list hides what lies before
    held = probe(tmp_path / name)
    count = resampled_frames(held.frames, held.fps, MODEL_FPS)
    expected = pixels(tmp_path / name, 64, 48, "fps=16:round=up")
    assert held.frames == (38 if name == "a.mp4" else 48)
    assert np.array_equal(decoded(tmp_path / name, 64, 48, count), expected[:count])


def test_a_late_first_frame_is_no_cut(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", 20, 24)
    run("-i", whole, "-c", "copy", "-output_ts_offset", "2.5", tmp_path / "a.mkv")
    assert probe(tmp_path / "a.mkv")[2:4] == (20, 24)


COPIED = ("-c", "copy", "-avoid_negative_ts", "disabled", "-output_ts_offset")
CLOCKS = {  # name of the file, how it is written, how many of 40 frames ffmpeg shows, and `special`
    "AVI": ("a.avi", ("-c:v", "mpeg4", "-q:v", "1"), 40, "clock"),
    "AVI, H.264": ("a.avi", LOSSLESS, 40, "clock"),  # FFmpeg counts its frames from 1
    "AVI, B-frames": ("a.avi", ("-c:v", "mpeg4", "-q:v", "1", "-bf", "2"), 40, "clock"),
    "a tick a frame": ("a.mov", (*LOSSLESS, "-video_track_timescale", "24"), 40, "clock"),
    "Matroska, half a second before 0": ("a.mkv", (*COPIED, "-0.5"), 40, "clock"),
    "Matroska, a moment before 0": ("a.mkv", (*COPIED, "-0.05"), 40, "clock"),
    "mp4, half a second before 0": ("a.mp4", (*COPIED, "-0.5"), 28, ""),  # an edit list hides what lies before
    "mp4, a moment before 0": ("a.mp4", (*COPIED, "-0.05"), 38, ""),
}


@pytest.mark.parametrize("name", CLOCKS)
def test_the_first_frame_is_the_first_that_ffmpeg_shows(tmp_path, name):
    file, options, shown, special = CLOCKS[name]
    whole = write_video(tmp_path / "whole.mp4", 40, 24, options={"qp": "0", "bf": "2", "g": "12"})
    run("-i", whole, *options, tmp_path / file)
    held = probe(tmp_path / file)
    assert (held.frames, held.fps, held.special) == (shown, 24, special)
    count = resampled_frames(held.frames, held.fps, MODEL_FPS)
    # by their numbers: left to its own clock, ffmpeg drops frames where such a Matroska file comes to 0
    expected = pixels(tmp_path / file, 64, 48, "setpts=N/24/TB,fps=16:round=up")
    assert np.array_equal(decoded(tmp_path / file, 64, 48, count), expected[:count])
    for source_fps in (Fraction(0), Fraction(24)):
        part = decode_clip(tmp_path / file, True, Fraction(3, 4), MODEL_FPS, 6, 64, 48, source_fps=source_fps)
        assert np.array_equal(part, expected[12:18])


# --- colours ----------------------------------------------------------------------------------------------------------

TAGS = {"709": "bt709", "170m": "smpte170m", "2020_ncl": "bt2020nc"}
X265 = ("-c:v", "libx265", "-x265-params", "lossless=1:log-level=none")


def coloured(path, pixel_format, matrix, span, encoder=LOSSLESS):
    filters = f"zscale=matrix={matrix}:range={span},format={pixel_format}"
    tags = ("-colorspace", TAGS[matrix], "-color_range", {"limited": "tv", "full": "pc"}[span])
    return write_pictures(path, patches()[None], filters, *encoder, *tags)


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le"])
@pytest.mark.parametrize("matrix", TAGS)
@pytest.mark.parametrize("span", ["limited", "full"])
def test_matrix_range_and_depth(tmp_path, pixel_format, matrix, span):
    path = coloured(tmp_path / "a.mp4", pixel_format, matrix, span)
    assert probe(path).special == ""
    assert close(patch_colours(decoded(path, 96, 48, 1)[0]), patch_colours(patches()), mean=1, worst=2)


@pytest.mark.parametrize(
    ("name", "pixel_format", "encoder"),
    [
        ("a.mov", "yuv422p10le", ("-c:v", "prores_ks")),
        ("a.mkv", "yuv444p12le", X265),
        ("a.mkv", "gbrp12le", ("-c:v", "ffv1")),
        ("a.avi", "bgr24", ("-c:v", "rawvideo")),
        ("a.avi", "uyvy422", ("-c:v", "rawvideo")),
        ("a.avi", "yuvj420p", ("-c:v", "mjpeg", "-q:v", "1")),
        ("a.mkv", "gray10le", ("-c:v", "ffv1")),
        ("a.mp4", "gray", LOSSLESS),
    ],
)
def test_other_formats_are_byte_for_byte_ffmpegs(tmp_path, name, pixel_format, encoder):
    path = drawn(tmp_path / name, pixel_format=pixel_format, encoder=encoder)
    assert close(decoded(path, 96, 64), pixels(path, 96, 64)[:3], mean=0.6, worst=3)


def test_a_matrix_that_cannot_be_undone_is_named(tmp_path):
    path = tmp_path / "a.mkv"
    drawn(path, filters="format=yuv444p,setparams=colorspace=ycgco", encoder=("-c:v", "ffv1"), pixel_format="yuv444p")
    with pytest.raises(MediaError, match="its colours are coded as YCgCo, which cannot be turned into RGB here"):
        probe(path)


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_hdr_below_the_knee_is_what_zscale_makes_of_it(tmp_path, transfer, name):
    # White at 80 cd/m2: all of it is darker than what the roll-off touches.
    filters = (
        f"format=gbrpf32le,zscale=transfer={transfer}:primaries=2020:matrix=2020_ncl:range=limited:npl=80:agamma=false,"
        "format=yuv444p10le"
    )
    tags = ("-color_primaries", "bt2020", "-color_trc", transfer, "-colorspace", "bt2020nc", "-color_range", "tv")
    params = f"lossless=1:log-level=none:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    encoder = ("-c:v", "libx265", "-x265-params", params)
    path = write_pictures(tmp_path / name, patches()[None], filters, *encoder, *tags)
    assert probe(path).special == {"smpte2084": "pq", "arib-std-b67": "hlg"}[transfer]
    zscale = "zscale=transfer=709:primaries=709:matrix=gbr:range=full:npl=203:agamma=false"
    expected = patch_colours(pixels(path, 96, 48, zscale)[0])
    apart = np.abs(patch_colours(decoded(path, 96, 48, 1)[0]) - expected)
    # Of a channel that is all but 0 beside bright others, 10 bits say little.
    assert apart[expected > 24].max() <= 2 and apart.max() <= 12


@pytest.mark.parametrize("primaries", ["bt2020", "smpte432"])
def test_wide_gamuts_become_the_ordinary_one(tmp_path, primaries):
    name = {"bt2020": "2020", "smpte432": "smpte432"}[primaries]
    filters = f"format=gbrpf32le,zscale=primaries={name}:matrix=709:range=limited,format=yuv444p10le"
    tags = ("-color_primaries", primaries, "-color_trc", "bt709", "-colorspace", "bt709", "-color_range", "tv")
    params = f"lossless=1:log-level=none:colorprim={primaries}:transfer=bt709:colormatrix=bt709"
    path = write_pictures(
        tmp_path / "a.mp4", patches()[None], filters, "-c:v", "libx265", "-x265-params", params, *tags
    )
    assert probe(path).special == "wide"
    assert close(patch_colours(decoded(path, 96, 48, 1)[0]), patch_colours(patches()), mean=2.5, worst=20)


# --- clear parts ------------------------------------------------------------------------------------------------------

CLEAR = {
    "VP9": ("a.webm", "yuva420p", ("-c:v", "libvpx-vp9", "-lossless", "1")),
    "VP8": ("a.webm", "yuva420p", ("-c:v", "libvpx", "-b:v", "4M", "-auto-alt-ref", "0")),
    "PNG": ("a.mov", "rgba", ("-c:v", "png")),
    "ProRes 4444": ("a.mov", "yuva444p10le", ("-c:v", "prores_ks", "-profile:v", "4444")),
    "QuickTime Animation": ("a.mov", "argb", ("-c:v", "qtrle")),
    "FFV1": ("a.mkv", "bgra", ("-c:v", "ffv1")),
}


@pytest.mark.parametrize("name", CLEAR)
def test_clear_parts_of_videos_are_white(tmp_path, name):
    file, pixel_format, encoder = CLEAR[name]
    picture = np.zeros((48, 96, 4), np.uint8)
    picture[:, :48], picture[:, 48:] = (255, 0, 0, 255), (0, 255, 0, 0)
    picture[:24, 24:72, 3] = 128
    path = write_pictures(tmp_path / file, np.stack([picture] * 4), f"format={pixel_format}", *encoder)
    assert probe(path).special == "alpha" and probe(path).frames == 4
    shown = decoded(path, 96, 48)[:, [40, 40, 8, 8], [10, 84, 34, 60]]
    expected = [(255, 0, 0), (255, 255, 255), (255, 127, 127), (127, 255, 127)]
    assert close(shown, np.array([expected] * 3), mean=1.5, worst=6)
    part = decode_clip(path, True, Fraction(1, 8), MODEL_FPS, 2, 96, 48)
    assert np.array_equal(part[0], decode_clip(path, True, Fraction(0), MODEL_FPS, 4, 96, 48)[2])


def test_the_fourth_byte_of_uncompressed_video_is_filler(tmp_path):
    picture = np.full((1, 48, 96, 4), (200, 100, 50, 0), np.uint8)
    path = write_pictures(tmp_path / "a.avi", picture, "format=bgra", "-c:v", "rawvideo")
    assert probe(path).special == "clock", "as of any AVI: nothing is clear"
    assert decoded(path, 96, 48, 1)[0, 20, 20].tolist() == [200, 100, 50]
