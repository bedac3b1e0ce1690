"""The pace of encoding: which measurement is kept, and what a plan makes of it."""

from fractions import Fraction
from pathlib import Path

from utils.data.decode_pool import PixelJob
from utils.data.manifest import CaptionJob, Manifest
from utils.data.pace import PACE_FILE, Pace, pixels_of, read_pace, record_pace
from utils.data.records import Bucket

BUCKET = Bucket(64, 48, 9)


def manifest(clips, kinds=("latents",)):
    jobs = {
        kind: [PixelJob(f"{i}", Path("a.mp4"), True, Fraction(0), Fraction(16), BUCKET) for i in range(clips)]
        for kind in kinds
    }
    return Manifest([], [], [], {**jobs, "text": [CaptionJob("t", "a dog")]}, {}, "")


def test_the_largest_measurement_of_a_device_is_kept(tmp_path):
    one = pixels_of([BUCKET])
    assert one == 64 * 48 * 9
    record_pace(tmp_path, [manifest(0)], 5.0, "CPU", 1)
    assert read_pace(tmp_path) is None, "captions alone say nothing of clips"
    record_pace(tmp_path, [manifest(4), manifest(4)], 2.0, "CPU", 1)
    assert read_pace(tmp_path) == Pace(4 * one, 2.0, "CPU", 1), "datasets that share clips have them once"
    record_pace(tmp_path, [manifest(1)], 9.0, "CPU", 1)
    assert read_pace(tmp_path).pixels == 4 * one
    record_pace(tmp_path, [manifest(3, ("latents", "condition"))], 3.0, "CPU", 2)
    assert read_pace(tmp_path) == Pace(6 * one, 3.0, "CPU", 2)
    record_pace(tmp_path, [manifest(1)], 1.0, "NVIDIA H200", 1)
    assert read_pace(tmp_path).device == "NVIDIA H200", "another device is another pace"


def test_what_cannot_be_read_is_no_pace(tmp_path):
    for content in ("", "[]", '{"pixels": 0, "seconds": 1, "device": "CPU", "ranks": 1}', '{"pixels": 1}'):
        (tmp_path / PACE_FILE).write_text(content)
        assert read_pace(tmp_path) is None
