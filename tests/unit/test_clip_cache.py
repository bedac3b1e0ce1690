"""Clips of every kind on their way into the cache and out of it: what is encoded, shared, told and read in turn."""

from dataclasses import replace
from fractions import Fraction

import pytest

from models.base import MicroBatch
from tests.helpers.media import frame_numbers
from tests.unit.test_keys import CLIP, LATENTS, SAMPLE, ByteEncoder, ConvEncoder, keys_of  # noqa: F401 (a fixture)
from tests.unit.test_precache import Bench, Settings
from utils.config.load import load_dataset
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.manifest import Manifest
from utils.data.plan import Item
from utils.data.records import Fill


class Clips(Bench):
    """The bench with one folder to cut in several ways."""

    def settings(self, **kwargs):
        return Settings(path=self.data, resolutions=((64, 48),), **{"frame_buckets": (9,)} | kwargs)

    def shown(self):
        """The frame numbers of every clip that was encoded, sorted."""
        return sorted(frame_numbers(pixels) for pixels in self.encoders[0].items if len(pixels) > 1)


class Recorder:
    """Stands where a family does and gives back what it was given."""

    def micro_batch(self, samples, draws):
        return MicroBatch(tuple(samples), ())


@pytest.fixture
def bench(tmp_path):
    """Videos of 12, 13 and 14 frames, and one of 30 at 24 fps, which are 20."""
    return Clips(tmp_path)


def test_cutting_in_another_way_encodes_what_is_new(bench):
    _, report = bench.run(bench.settings())
    assert report.made["latents"].encoded == 5
    manifest, report = bench.run(bench.settings(video_clip_mode="uniform", frame_sample=3))
    assert report.made["latents"].encoded == 8  # starts 0 1 3, 0 2 4, 0 2 5 and 0 5 11: the first ones are there
    assert [entry.name for entry in manifest.entries if "clip0" in entry.name] == [
        "clip0.mp4@0.00s",
        "clip0.mp4@0.06s",
        "clip0.mp4@0.19s",
    ]
    assert bench.shown()[:2] == [[*range(1, 10)], [*range(2, 11)]]
    _, report = bench.run(bench.settings(video_clip_mode="uniform", frame_sample=3))
    assert report.made["latents"].encoded == 0


def test_native_frames_are_entries_of_their_own(bench):
    bench.run(bench.settings())
    _, report = bench.run(bench.settings(fps="native"))
    assert report.made["latents"].encoded == 4
    assert bench.shown() == [[*range(9)]] * 4
    _, report = bench.run(bench.settings(fps=16))  # the same said in another way
    assert report.made["latents"].encoded == 0


def test_short_videos_are_told_of_and_filled_up(bench):
    manifest, _ = bench.run(bench.settings(frame_buckets=(17,), short_clips="loop"))
    assert manifest.notices == [
        f"{bench.data}: 3 videos are shorter than every bucket; with short_clips = 'loop' such start again from the "
        "first frame until it is full"
    ]
    assert [*range(12), *range(5)] in bench.shown() and not manifest.skipped
    assert {entry.bucket.frames for entry in manifest.entries} == {1, 17}

    smaller, _ = bench.run(bench.settings(frame_buckets=(13,), short_clips="smaller_bucket"))
    assert len(smaller.notices) == 1 and "1 video is shorter than every bucket" in smaller.notices[0]
    assert sorted(entry.bucket.frames for entry in smaller.entries) == [1, 9, 13, 13, 13]
    assert bench.manifest(bench.settings(frame_buckets=(13,))).notices == []


def test_the_manifest_survives_the_disk(bench, tmp_path):
    settings = bench.settings(frame_buckets=(17,), short_clips="pad", fps=20.5, video_clip_mode="random_start")
    manifest = bench.manifest(settings)
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    jobs = manifest.jobs["latents"]
    assert {job.source_fps for job in jobs} == {0, Fraction(41, 2)}  # 0 of the image
    assert {job.fill for job in jobs} == {None, Fill("pad", 9), Fill("pad", 10)}


def test_random_starts_take_turns(bench):
    settings = bench.settings(video_clip_mode="random_start", frame_sample=3)
    manifest, report = bench.run(settings)
    assert len(manifest.entries) == 5 and report.made["latents"].encoded == 4 * 3 + 1
    [index] = [i for i, entry in enumerate(manifest.entries) if entry.name == "clip0.mp4"]
    entry = manifest.entries[index]
    assert len(set(entry.media_keys)) == 3 and entry.media_kinds == ("latents",)
    dataset = CachedDataset(Recorder(), bench.store, manifest.entries, manifest.empty_text_key, seed=1)

    def latents(turn):
        return dataset.training_batch([Item(index, turn)]).inputs[0]["latents"].tolist()

    turns = [latents(turn) for turn in range(7)]
    for turn, found in enumerate(turns):
        assert found == bench.store.read("latents", entry.media_keys[turn % 3])["latents"].tolist()
    assert turns[:3] == turns[3:6] and turns[0] == turns[6] and turns[0] != turns[1] != turns[2]
    assert dataset.eval_batch([EvalItem(index, 0.5)]).inputs[0]["latents"].tolist() == turns[0]

    _, report = bench.run(replace(settings, frame_sample=4))
    assert report.made["latents"].encoded == 4  # one start more for each video


def test_a_start_that_cannot_be_encoded_takes_its_sample_with_it(bench):
    manifest = bench.manifest(bench.settings(video_clip_mode="random_start", frame_sample=3))
    entry = next(entry for entry in manifest.entries if len(entry.media_keys) == 3)
    assert manifest.lost_with([entry.media_keys[1]]) == set(entry.media_keys)


DATASET = """\
frame_buckets = [1, 9]
video_clip_mode = 'head'

[[directory]]
path = '{data}'
resolutions = [[64, 48]]

[[directory]]
path = '{data}'
resolutions = [[32, 32]]
frame_buckets = [13]
video_clip_mode = 'uniform'
frame_sample = 2
short_clips = 'smaller_bucket'
fps = 'native'
"""


def test_one_folder_used_twice_as_its_toml_says(bench, tmp_path):
    (tmp_path / "dataset.toml").write_text(DATASET.format(data=bench.data))
    manifest, report = bench.run(*load_dataset(tmp_path / "dataset.toml").directory)
    found = [[], []]
    for entry in manifest.entries:
        found[entry.group].append((entry.name.partition("@")[0], str(entry.bucket)))
    assert found[0] == [
        ("clip0.mp4", "64x48x9"),
        ("clip1.mp4", "64x48x9"),
        ("clip2.mp4", "64x48x9"),
        ("long.mp4", "64x48x9"),
        ("still.png", "64x48x1"),
    ]
    assert found[1] == [
        ("clip0.mp4", "32x32x9"),  # 12 frames: a smaller bucket, and a place for two starts
        ("clip0.mp4", "32x32x9"),
        ("clip1.mp4", "32x32x13"),  # 13: both starts are the first frame
        ("clip2.mp4", "32x32x13"),
        ("clip2.mp4", "32x32x13"),
        ("long.mp4", "32x32x13"),  # 30, for nothing is resampled
        ("long.mp4", "32x32x13"),
        ("still.png", "32x32x1"),
    ]
    assert report.made["latents"].encoded == 13 and len(manifest.notices) == 1


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_change_with_what_is_new_and_with_nothing_else(keys_of):  # noqa: F811
    keys = keys_of(ConvEncoder, ByteEncoder)
    assert (keys.media(CLIP), keys.sample(CLIP)) == ((LATENTS,), SAMPLE)
    others = [
        replace(CLIP, source_fps=Fraction(16)),
        replace(CLIP, source_fps=Fraction(30)),
        replace(CLIP, fill=Fill("loop", 9)),
        replace(CLIP, fill=Fill("pad", 9)),
        replace(CLIP, fill=Fill("pad", 10)),
    ]
    assert len({LATENTS, *(keys.media(clip)[0] for clip in others)}) == 6
    assert len({SAMPLE, *map(keys.sample, others)}) == 6
    in_turn = replace(CLIP, turns=(Fraction(1), Fraction(2)))
    assert keys.sample(in_turn) != SAMPLE
    first, *_ = in_turn.each_turn()
    assert keys.media(first) == (LATENTS,)  # the start is shared with clips that take no turns
