"""Reading media: the frame that is shown at each moment, sizes, colours, and files that are not what they say."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.media import frame_numbers, write_image, write_video
from utils.data.media import MediaError, decode_clip, probe
from utils.data.media_types import cover_box, cover_size, resampled_frames
from utils.data.records import Fill

MODEL_FPS = Fraction(16)
NTSC_FILM, NTSC = Fraction(24000, 1001), Fraction(30000, 1001)


def shown(frames, fps, count, start=Fraction(0)):
    """The rule of the docstring, by hand: the frame on show at start + i / 16."""
    return [min(frames - 1, int((start + i / MODEL_FPS) * fps)) for i in range(count)]


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (60, 24, 40),
        (65, 16, 65),
        (100, NTSC_FILM, 66),
        (1500, NTSC_FILM, 1001),  # int(1500 * 16 / 23.976...) is 1000: a float loses a frame
        (81, NTSC, 43),
        (150, 60, 40),
        (10, 8, 20),
    ],
)
def test_resampled_length_is_exact(frames, fps, expected):
    assert resampled_frames(frames, Fraction(fps), MODEL_FPS) == expected


@pytest.mark.parametrize(
    ("name", "frames", "fps"),
    [
        ("a.mp4", 60, Fraction(24)),
        ("b.mp4", 65, Fraction(16)),
        ("c.mp4", 50, NTSC_FILM),
        ("d.mp4", 50, NTSC),
        ("e.mov", 60, Fraction(60)),
        ("f.ts", 40, Fraction(24)),
        ("slow.mp4", 20, Fraction(8)),
    ],
)
def test_frames_shown_at_16_fps(tmp_path, name, frames, fps):
    path = write_video(tmp_path / name, frames, fps)
    found = probe(path)
    assert (found.width, found.height, found.frames, found.fps) == (64, 48, frames, fps)
    assert found.is_video and found.duration == frames / fps

    count = resampled_frames(frames, fps, MODEL_FPS)
    pixels = decode_clip(path, True, Fraction(0), MODEL_FPS, count, 64, 48)
    assert pixels.shape == (count, 48, 64, 3) and pixels.dtype == np.uint8
    assert frame_numbers(pixels) == shown(frames, fps, count)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_clip_from_the_middle_is_sought(tmp_path, name):
    path = write_video(tmp_path / name, 80, 24)
    start = Fraction(23, 16)
    # Also in MPEG-TS, where a seek lands past what it was asked for.
    assert frame_numbers(decode_clip(path, True, start, MODEL_FPS, 17, 64, 48)) == shown(80, 24, 17, start)


def test_matroska_counts_frames_and_forgives_its_millisecond_clock(tmp_path):
    path = write_video(tmp_path / "a.mkv", 60, 48)
    assert (probe(path).frames, probe(path).fps) == (60, 48)
    # Frame 3 belongs to 62.5 ms and is stamped 62 or 63 ms: it is still the one shown at 1/16 s.
    assert frame_numbers(decode_clip(path, True, Fraction(0), MODEL_FPS, 20, 64, 48)) == list(range(0, 60, 3))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_rate_follows_the_time_stamps(tmp_path, name):
    ticks = [*range(15), *(15 + 3 * i for i in range(15))]  # 30 frames/s for half a second, then 10
    path = write_video(tmp_path / name, 30, 30, pts=ticks, time_base=Fraction(1, 30))
    found = probe(path)
    assert found.frames == 30 and abs(found.duration - Fraction(58, 30)) < Fraction(1, 100)
    assert found.fps == found.frames / found.duration
    expected = [max(k for k, tick in enumerate(ticks) if tick <= i * 30 / 16) for i in range(28)]
    assert frame_numbers(decode_clip(path, True, Fraction(0), MODEL_FPS, 28, 64, 48)) == expected


def test_rotation_flag_turns_the_picture(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5, size=(64, 32), rotation=90, half=True)
    assert (probe(path).width, probe(path).height) == (32, 64)
    first = decode_clip(path, True, Fraction(0), MODEL_FPS, 5, 32, 64)[4].mean(axis=(1, 2))
    assert first[:28].min() > 12 and first[36:].max() < 2  # black was left; a quarter turn to the left puts it below


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5, pixel_shape=Fraction(2))
    assert (probe(path).width, probe(path).height) == (128, 48)


SOURCES = {
    "24 fps": ("a.mp4", {"fps": 24}),
    "NTSC film": ("a.mov", {"fps": NTSC_FILM}),
    "slower than the model": ("a.mp4", {"fps": 12}),
    "matroska": ("a.mkv", {"fps": 30}),
    "no index": ("a.ts", {"fps": 24}),
    "lossy, long groups": ("a.mp4", {"fps": 24, "options": {"crf": "28"}}),
    "lossy, open groups": ("a.mp4", {"fps": 24, "options": {"x264-params": "open-gop=1:keyint=12:bframes=3"}}),
    "intra refresh": ("a.mkv", {"fps": 24, "options": {"x264-params": "intra-refresh=1:keyint=16"}}),
    "variable rate": ("a.mkv", {"pts": [i + max(0, i - 30) for i in range(70)], "time_base": Fraction(1, 30)}),
    "variable rate, mp4": ("b.mp4", {"pts": [i + max(0, i - 30) for i in range(70)], "time_base": Fraction(1, 30)}),
    "rotated": ("a.mp4", {"fps": 24, "rotation": 90}),
    "pixels that are not square": ("a.mp4", {"fps": 24, "pixel_shape": Fraction(2)}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_ends_of_a_clip_are_the_bytes_of_the_whole(tmp_path, source):
    name, options = SOURCES[source]
    path = write_video(tmp_path / name, 70, grain=True, **options)
    for start in (Fraction(0), Fraction(11, 16)):
        clip = (path, True, start, MODEL_FPS, 17, 48, 32)
        whole, ends = decode_clip(*clip), decode_clip(*clip, only=(0, 16))
        assert ends.shape == (2, 32, 48, 3) and np.array_equal(ends, whole[[0, 16]])
        assert not np.array_equal(ends[0], ends[1])


def test_the_ends_of_an_image_and_of_a_clip_that_is_too_short(tmp_path):
    image, video = write_image(tmp_path / "a.png"), write_video(tmp_path / "a.mp4", 20)
    ends = decode_clip(image, False, Fraction(0), Fraction(0), 1, 32, 32, only=(0, 0))
    assert np.array_equal(ends[0], ends[1]) and ends.shape == (2, 32, 32, 3)
    with pytest.raises(MediaError, match=r"frame 33 of the 33 from 0\.000 s on at 16 fps could not be decoded"):
        decode_clip(video, True, Fraction(0), MODEL_FPS, 33, 64, 48, only=(0, 32))


def test_odd_sizes(tmp_path):
    path = write_video(tmp_path / "a.webm", 9, size=(65, 49), codec="libvpx-vp9", options={"lossless": "1"})
    assert (probe(path).width, probe(path).height, probe(path).frames) == (65, 49, 9)
    assert frame_numbers(decode_clip(path, True, Fraction(0), MODEL_FPS, 9, 32, 48)) == list(range(9))


def test_scaling_covers_and_keeps_the_middle(tmp_path):
    assert cover_size((1280, 720), (480, 480)) == (853, 480)
    assert cover_size((65, 49), (64, 48)) == (64, 48)
    assert cover_box((1280, 720), (480, 480)) == (280.0, 0.0, 1000.0, 720.0)

    ramp = np.tile(np.arange(0, 256, 2, dtype=np.uint8)[None, :, None], (48, 1, 3))  # 128 wide, brighter to the right
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = decode_clip(tmp_path / "a.png", False, Fraction(0), Fraction(0), 1, 48, 48)
    assert np.array_equal(pixels[0], ramp[:, 40:88])


def test_colours_are_full_range_and_follow_the_matrix_tag(tmp_path):
    def decoded(matrix, value_range, luma, blue, red):
        path = tmp_path / "a.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=16, options={"qp": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            frame = av.VideoFrame(64, 48, "yuv420p")
            frame.colorspace = stream.codec_context.colorspace = matrix
            frame.color_range = stream.codec_context.color_range = value_range
            for plane, value in zip(frame.planes, (luma, blue, red), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return decode_clip(path, True, Fraction(0), MODEL_FPS, 1, 64, 48)[0, 20, 20].astype(int)

    bt709, bt601, limited, full = 1, 6, 1, 2  # as H.273 numbers them
    # BT.709: 1.1644 * 47 + 1.7927 * 112 = 255.5; BT.601: 1.1644 * 47 + 1.5960 * 112 = 233.5
    assert np.abs(decoded(bt709, limited, 63, 102, 240) - (255, 0, 0)).max() <= 2
    assert abs(decoded(bt601, limited, 63, 102, 240)[0] - 233) <= 2
    for value_range, black, white in ((limited, 0, 255), (full, 16, 235)):
        assert decoded(bt709, value_range, 16, 128, 128).tolist() == [black] * 3
        assert decoded(bt709, value_range, 235, 128, 128).tolist() == [white] * 3


def test_images(tmp_path):
    found = probe(write_image(tmp_path / "a.png"))
    assert found == (64, 48, 1, 0, 0, False, "")

    translucent = write_image(tmp_path / "b.png", colour=(255, 0, 0, 0))
    pixels = decode_clip(translucent, False, Fraction(0), Fraction(0), 1, 32, 32)
    assert pixels.shape == (1, 32, 32, 3) and pixels.min() == 255  # on white

    deep = Image.fromarray(np.full((48, 64), 128 * 256, np.uint16))
    deep.save(tmp_path / "deep.png")
    assert np.unique(decode_clip(tmp_path / "deep.png", False, Fraction(0), Fraction(0), 1, 32, 32)).tolist() == [128]

    sideways = Image.new("RGB", (64, 32))
    sideways.paste((255, 255, 255), (0, 0, 32, 32))
    exif = sideways.getexif()
    exif[0x0112] = 6  # to be turned clockwise: what is left is then above
    for suffix in ("jpg", "png", "webp", "tif", "avif"):
        path = tmp_path / f"c.{suffix}"
        sideways.save(path, exif=exif)
        assert probe(path)[:2] == (32, 64), suffix
        shown = decode_clip(path, False, Fraction(0), Fraction(0), 1, 32, 64)[0, [16, 48], 16, 0]
        assert shown[0] > 250 and shown[1] < 5, suffix


def test_animations(tmp_path):
    frames = [Image.new("RGB", (64, 48), (30 * i, 0, 0)) for i in range(8)]
    for suffix in ("gif", "webp", "png", "avif"):
        path = tmp_path / f"a.{suffix}"
        options = {"gif": {}, "png": {}, "webp": {"lossless": True}, "avif": {"quality": 100}}[suffix]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
        assert probe(path) == (64, 48, 8, 10, Fraction(4, 5), True, ""), suffix
        shown = decode_clip(path, True, Fraction(0), Fraction(10), 8, 32, 32)[:, 9, 9, 0].astype(int)
        assert abs(shown - [30 * i for i in range(8)]).max() <= (1 if suffix == "avif" else 0), suffix


def test_an_animation_keeps_its_own_time_and_lies_on_white(tmp_path):
    frames = [Image.new("RGBA", (64, 48), (30 * i, 0, 0, 255 if i else 0)) for i in range(8)]
    path = tmp_path / "a.webp"
    durations = [100, 100, 100, 100, 50, 50, 50, 50]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, lossless=True)
    assert probe(path)[2:5] == (8, Fraction(40, 3), Fraction(3, 5))

    def seen(start, fps, count, **how):
        pixels = decode_clip(path, True, Fraction(start), Fraction(fps), count, 32, 32, **how)
        return [0 if (pixel == 255).all() else round(pixel[0] / 30) for pixel in pixels[:, 9, 9]]

    assert seen(0, 20, 12) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7]
    assert seen("0.25", 10, 4) == [2, 3, 5, 7]
    assert seen(0, 20, 12, only=(0, 11)) == [0, 7]
    assert seen(0, 4, 8, source_fps=Fraction(4)) == list(range(8))  # whatever the durations say
    assert seen(0, 20, 14, fill=Fill("loop", 12)) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 0, 0]
    with pytest.raises(MediaError, match="ends too early: frame 13 of 13"):
        seen(0, 20, 13)


@pytest.mark.parametrize("disposal", [0, 1, 2, 3])
def test_a_gifs_clear_parts_and_disposal(tmp_path, disposal):
    """FFmpeg's pictures are Pillow's, laid on white."""
    frames = []
    for i in range(4):
        picture = np.zeros((48, 64, 4), np.uint8)
        picture[8:40, 8 + 4 * i : 24 + 4 * i] = (200, 30, 60, 255)
        frames.append(Image.fromarray(picture))
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, disposal=disposal, transparency=0)
    assert probe(path).special == ""
    shown = decode_clip(path, True, Fraction(0), Fraction(10), 4, 64, 48)
    with Image.open(path) as image:
        for number, picture in enumerate(shown):
            image.seek(number)
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            assert np.array_equal(picture, np.asarray(white.convert("RGB")))


def test_an_animation_under_a_stills_name_is_refused(tmp_path):
    frames = [Image.new("RGB", (64, 48), (30 * i, 0, 0)) for i in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=100)
    (tmp_path / "a.webp").rename(tmp_path / "a.jpg")
    with pytest.raises(MediaError, match=r"is an animated WEBP; rename it to a\.webp"):
        probe(tmp_path / "a.jpg")


def damaged(folder, case):
    video, image = write_video(folder / "ok.mp4", 40, 24), write_image(folder / "ok.png")
    matroska = write_video(folder / "ok.mkv", 60, 24)
    noise = folder / "ok.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(noise)
    contents = {
        "empty.mp4": b"",
        "text.mp4": b"a caption that lost its way\n" * 40,
        "playlist.mp4": b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n",
        "image.mp4": image.read_bytes(),
        "video.png": video.read_bytes(),
        "cut.mp4": video.read_bytes()[: video.stat().st_size // 2],
        "cut.mkv": matroska.read_bytes()[: matroska.stat().st_size * 2 // 3],
        "cut.jpg": noise.read_bytes()[: noise.stat().st_size // 2],
    }
    path = folder / case
    path.write_bytes(contents[case])
    return path


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("empty.mp4", "is empty"),
        ("text.mp4", "damaged, cut off, or no video at all"),
        ("playlist.mp4", "damaged, cut off, or no video at all"),
        ("image.mp4", "is not a video, whatever its name says"),
        ("video.png", "is not an image that Pillow knows"),
        ("cut.mp4", "damaged, cut off, or no video at all"),
        ("cut.mkv", "is cut off: its header tells of 2.50 s, but 1.50 s are there"),
        ("cut.jpg", "truncated"),
    ],
)
def test_damaged_files_are_named_with_the_reason(tmp_path, case, reason):
    path = damaged(tmp_path, case)
    with pytest.raises(MediaError, match=reason) as caught:
        probe(path)
    assert caught.value.path == path and str(caught.value).startswith(f"{path}: ")


def test_mp4_with_its_table_in_front_that_was_cut_off(tmp_path):
    whole = write_video(tmp_path / "a.mp4", 40, 24)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}) as to:
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(content[:-200])
    with pytest.raises(MediaError, match="is cut off: its table of frames reaches to byte"):
        probe(tmp_path / "b.mp4")


def test_what_is_no_regular_file_is_refused_without_opening_it(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")  # opening it for reading would wait for ever
    with pytest.raises(MediaError, match="is not a regular file"):
        probe(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="the file is not there"):
        probe(tmp_path / "b.mp4")


def test_asking_for_more_frames_than_there_are(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20)
    with pytest.raises(MediaError, match=r"frame 2[12] of the 33 from 0\.000 s on at 16 fps could not be decoded"):
        decode_clip(path, True, Fraction(0), MODEL_FPS, 33, 64, 48)
