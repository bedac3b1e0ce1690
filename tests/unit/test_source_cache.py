"""Indexes, archives, animations and captions on their way into the cache and out of it."""

import json
import tarfile
from collections import Counter
from fractions import Fraction

import pytest
from PIL import Image

from tests.helpers.media import frame_numbers, write_image, write_video
from tests.unit.test_clip_cache import Recorder
from tests.unit.test_precache import Bench, Settings
from utils.data.clips import CLIP_MODES
from utils.data.dataset import CachedDataset
from utils.data.manifest import Manifest
from utils.data.plan import Item


class Sources(Bench):
    """The bench with folders of its own choice."""

    def settings(self, path, **kwargs):
        return Settings(path=path, resolutions=((64, 48),), **{"frame_buckets": (1, 9)} | kwargs)

    def index(self, *rows):
        path = self.data.parent / "clips.jsonl"
        path.write_text("".join(json.dumps({"caption": "x", **row}) + "\n" for row in rows))
        return path

    def shown(self):
        return sorted(frame_numbers(pixels) for pixels in self.encoders[0].items)


@pytest.fixture
def bench(tmp_path):
    return Sources(tmp_path)


@pytest.mark.parametrize("fps", ["model", "native", 32])
@pytest.mark.parametrize("mode", CLIP_MODES)
def test_no_frame_is_taken_from_outside_of_a_part(bench, mode, fps):
    write_video(bench.data / "ntsc.mp4", 90, Fraction(30000, 1001))
    path = bench.index({"path": "data/ntsc.mp4", "start": 1.0, "end": 2.5})
    how = {"frame_stride": 5, "frame_sample": 3, "max_frames": 33}
    bench.run(bench.settings(path, video_clip_mode=mode, fps=fps, frame_buckets=(1, 5, 9), **how))
    shown = [number for numbers in bench.shown() for number in numbers]
    # Frame 29 is on show from 0.968 s to 1.001 s, frame 74 from 2.469 s on.
    assert shown and min(shown) >= 29 and max(shown) <= 74
    if mode in ("single_beginning", "head", "full", "spread"):
        assert min(shown) == 29


def test_parts_of_one_video_are_samples_of_their_own(bench):
    parts = [{"start": 0, "end": 0.6}, {"start": 0.6}, {}]
    path = bench.index(*({"path": "data/long.mp4", **part} for part in parts))
    manifest, report = bench.run(bench.settings(path))
    assert [entry.name for entry in manifest.entries] == ["long.mp4@0.00s", "long.mp4@0.60s", "long.mp4@0.00s"]
    assert bench.shown() == [[0, 1, 3, 4, 6, 7, 9, 10, 12], [14, 15, 17, 18, 20, 21, 23, 24, 26]]
    assert report.made["latents"].encoded == 2  # the whole video's first clip is the first part's
    short, _ = bench.run(bench.settings(bench.index({"path": "data/long.mp4", "end": 0.3}), short_clips="loop"))
    assert bench.shown() == [[0, 1, 3, 4, 0, 1, 3, 4, 0]] and short.entries[0].name == "long.mp4"


def test_an_archive_gives_what_its_files_gave(bench):
    bench.run(bench.settings(bench.data))
    archive = bench.data.parent / "clips.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(bench.data, "clips")
    manifest, report = bench.run(bench.settings(archive))
    assert len(manifest.entries) == 5 and not manifest.skipped
    assert [made.encoded for made in report.made.values()] == [0, 0]


def test_animations_are_clips(bench):
    folder = bench.data.parent / "animations"
    folder.mkdir()
    frames = [Image.new("RGB", (64, 48), (i, i, i)) for i in range(10, 210, 20)]
    for suffix in ("gif", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        path = folder / f"{suffix}.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
        path.with_suffix(".txt").write_text("fading in")
    frames[0].save(folder / "still.gif")
    (folder / "still.txt").write_text("still")
    manifest, _ = bench.run(bench.settings(folder), workers=2)
    assert [(entry.name, entry.bucket.frames) for entry in manifest.entries] == [
        ("gif.gif", 9),
        ("still.gif", 1),
        ("webp.webp", 9),
    ]
    clips = [pixels[:, 20, 30, 0].tolist() for pixels in bench.encoders[0].items if len(pixels) > 1]
    assert clips == [[10 + 20 * (10 * i // 16) for i in range(9)]] * 2  # 10 frames a second shown at 16


def test_captions_are_drawn_by_their_weights(bench):
    folder = bench.data.parent / "weighted"
    folder.mkdir()
    write_image(folder / "a.png")
    captions = [{"caption": "often", "weight": 1.5}, {"caption": "seldom", "weight": 0.5}]
    (folder / "captions.json").write_text(json.dumps({"a.png": captions}))
    manifest, report = bench.run(bench.settings(folder))
    assert report.made["text"].encoded == 3  # with the empty one
    dataset = CachedDataset(Recorder(), bench.store, manifest.entries, manifest.empty_text_key, seed=1)
    lengths = Counter(len(dataset.training_batch([Item(0, turn)]).inputs[0]["text"]) for turn in range(1000))
    assert set(lengths) == {len("often") + 1, len("seldom") + 1}
    assert 720 < lengths[len("often") + 1] < 780


def test_more_orders_of_tags_add_to_the_cache(bench):
    for path in bench.data.glob("*.txt"):
        path.write_text("a, b, c, d, e, f")
    _, report = bench.run(bench.settings(bench.data, cache_shuffle_num=4))
    assert report.made["text"].encoded == 5
    _, report = bench.run(bench.settings(bench.data, cache_shuffle_num=6))
    assert (report.made["text"].encoded, report.made["latents"].encoded) == (2, 0)


def test_what_is_told_reaches_the_manifest_and_survives_the_disk(bench, tmp_path):
    manifest = bench.manifest(bench.settings(bench.data, trigger_word="clip"))
    assert manifest.notices == [
        f"{bench.data}: captions of 1 of 5 files lack the trigger word 'clip'; "
        "write [trigger] into them, or into caption_prefix"
    ]
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
