"""Damaged media through worker processes, as the trainer reads them: nothing hangs, dies or takes gigabytes, and what
cannot be used is named with its reason."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from tests.helpers.damage import gif_header, jpeg_of_size, mp4_of_frames, mutated, png_header, tried, write_good
from tests.helpers.media import write_video
from utils.data.media import MediaError, decode_clip, probe
from utils.data.workers import WorkerPool

MOST_MIB = 500  # of a worker process, in which FFmpeg and Pillow take 90
MUTATIONS = {"a.mp4": 100, "a.jpg": 100, "a.mkv": 30, "a.png": 30, "a.gif": 30, "a.webp": 30}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of one whole file of each kind, by name."""
    return write_good(tmp_path_factory.mktemp("good"))


def outcomes(paths):
    """Reasons by name, "" for what could be used; all by two worker processes that outlive everything."""
    reasons, most_mib = {}, 0
    with WorkerPool(tried, 2, timeout_s=30.0) as pool:
        workers = [worker.process.pid for worker in pool._workers]
        for outcome in pool.run(paths, ahead=8, name=lambda path: path.name):
            assert outcome.error is None, f"{outcome.item.name}: {outcome.error!r}"
            reasons[outcome.item.name], mib = outcome.value
            most_mib = max(most_mib, mib)
        assert [worker.process.pid for worker in pool._workers] == workers
    assert most_mib < MOST_MIB
    return reasons


def test_mutations(tmp_path, good):
    paths = []
    for name, count in MUTATIONS.items():
        for seed in range(count):
            paths.append(tmp_path / f"{seed}-{name}")
            paths[-1].write_bytes(mutated(good[name], seed))
    reasons = outcomes(paths)
    assert set(reasons) == {path.name for path in paths}
    for name, count in MUTATIONS.items():  # both happen, or nothing was tested
        usable = sum(not reasons[f"{seed}-{name}"] for seed in range(count))
        assert 0 < usable < count, name


def test_files_cut_off_at_many_places(tmp_path, good):
    paths = []
    for name, content in good.items():
        for place in np.linspace(0, 0.97 * len(content), 12).astype(int):
            paths.append(tmp_path / f"{place}-{name}")
            paths[-1].write_bytes(content[:place])
    reasons = outcomes(paths)
    # Only these lose an end that nothing is asked of: a few last frames, or what a PNG says behind its pixels.
    used = {name.split("-")[1] for name, reason in reasons.items() if not reason}
    assert used <= {"a.gif", "a.mkv", "a.png"}
    assert all("is empty (0 bytes)" in reasons[f"0-{name}"] for name in good)


CLAIMS = {
    "huge.png": (lambda good: png_header(65535, 65535), "has over 178 million pixels"),
    "long.png": (lambda good: png_header(2**31 - 1, 1), "has over 178 million pixels"),
    "short.png": (lambda good: png_header(13000, 13000), "truncated"),
    "strip.png": (lambda good: png_header(1, 10000), "is 1x10000: one side is over 32 times the other"),
    "strip2.png": (lambda good: png_header(10000, 1), "is 10000x1: one side is over 32 times the other"),
    "huge.gif": (lambda good: gif_header(65535, 65535, 1), "has over 178 million pixels"),
    "huge2.gif": (lambda good: gif_header(65535, 65535, 2), "has over 178 million pixels"),
    "large.gif": (lambda good: gif_header(9000, 9000, 2), "is 9000x9000, more than can be read here"),
    "huge.jpg": (lambda good: jpeg_of_size(good["a.jpg"], 65500, 65500), "has over 178 million pixels"),
    "gif.mp4": (lambda good: gif_header(16000, 16000, 2), "is 16000x16000, more than can be read here"),
    "raw.mp4": (
        lambda good: b"YUV4MPEG2 W16000 H16000 F24:1 Ip C420jpeg\nFRAME\n" + bytes(1000),
        "is 16000x16000, more than can be read here",
    ),
    "frames.mp4": (
        lambda good: mp4_of_frames(good["a.mp4"], 10**9),
        "its header tells of 1,000,000,000 frames, and it has not even as many bytes",
    ),
    "more_frames.mp4": (
        lambda good: mp4_of_frames(good["a.mp4"], 10**4),
        "is cut off: its table of frames reaches to byte",
    ),
    "list.mp4": (lambda good: b"ffconcat version 1.0\nfile 'fifo'\n", "is a play list that names other files"),
    "page.mp4": (lambda good: b"<!DOCTYPE html><html>404 Not Found</html>" * 9, "damaged, cut off, or no video at all"),
    "picture.mp4": (lambda good: good["a.jpg"], "is not a video, whatever its name says"),
    "video.jpg": (lambda good: good["a.mp4"], "is not an image that Pillow knows, whatever its name says"),
    "zeros.mp4": (lambda good: bytes(5000), "damaged, cut off, or no video at all"),
    "zeros.jpg": (lambda good: bytes(5000), "is not an image that Pillow knows, whatever its name says"),
}


def test_files_that_are_not_what_they_claim(tmp_path, good):
    for name, (content, _) in CLAIMS.items():
        (tmp_path / name).write_bytes(content(good))
    reasons = outcomes([tmp_path / name for name in CLAIMS])
    for name, (_, expected) in CLAIMS.items():
        assert expected in reasons[name], f"{name}: {reasons[name] or 'was used'}"


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "nothing.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "device.mp4").symlink_to("/dev/zero")
    expected = {
        "fifo": "is not a regular file",
        "folder": "is not a regular file",
        "link": "the file is not there",
        "loop": "Too many levels of symbolic links",
        "device": "is not a regular file",
    }
    reasons = outcomes([tmp_path / f"{name}.mp4" for name in expected])
    for name, reason in expected.items():
        assert reason in reasons[f"{name}.mp4"]


def test_a_video_without_frames(tmp_path, good):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    with pytest.raises(MediaError, match=r"holds no frames|has no video stream|damaged, cut off"):
        probe(tmp_path / "a.mkv")


def test_a_strip_of_a_video(tmp_path):
    path = write_video(tmp_path / "a.mkv", 5, size=(16, 2000), codec="ffv1")
    with pytest.raises(MediaError, match="is 16x2000: one side is over 32 times the other"):
        probe(path)
    path = write_video(tmp_path / "b.mkv", 5, size=(16, 512), codec="ffv1")
    assert probe(path)[:2] == (16, 512)
    assert decode_clip(path, True, Fraction(0), Fraction(16), 5, 64, 48).shape == (5, 48, 64, 3)


def test_fractions_for_brightness(tmp_path):
    Image.fromarray(np.full((48, 64), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MediaError, match="holds fractions of 1, which would be black here"):
        probe(tmp_path / "a.tif")
    Image.fromarray(np.full((48, 64), 128, np.float32)).save(tmp_path / "b.tif")
    assert decode_clip(tmp_path / "b.tif", False, Fraction(0), Fraction(0), 1, 32, 32).mean() == 128


def test_a_large_exif(tmp_path, good):
    # EXIF, text and thumbnails are read no further than the orientation.
    image = Image.new("RGB", (64, 48))
    exif = image.getexif()
    exif[0x010E] = "x" * 60_000
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    image.save(tmp_path / "a.png", exif=exif)
    for name in ("a.jpg", "a.png"):
        assert probe(tmp_path / name)[:2] == (48, 64)
