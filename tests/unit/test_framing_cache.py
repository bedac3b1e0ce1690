"""Crops, padding and mirror images on their way into the cache and out of it: what is encoded, and who reads what."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from tests.helpers.configs import DATASET, SPEC, complaints, folder, load, top  # noqa: F401 (a fixture)
from tests.helpers.media import write_image, write_video
from tests.unit.test_clip_cache import Clips, Recorder
from tests.unit.test_keys import CLIP, LATENTS, SAMPLE, ByteEncoder, ConvEncoder, keys_of  # noqa: F401 (a fixture)
from utils.config.rules import advice
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.manifest import Manifest
from utils.data.plan import BatchShape, EpochPlan, Item
from utils.data.records import Framing

SQUARE = {"resolutions": (48,)}  # of clips of 64x48: 16 px are cut off


class Frames(Clips):
    def settings(self, **kwargs):
        return replace(super().settings(), **(SQUARE | kwargs))


@pytest.fixture
def bench(tmp_path):
    """Four videos and an image."""
    return Frames(tmp_path)


def encoded(bench, **settings):
    _, report = bench.run(bench.settings(**settings))
    return report.made["latents"].encoded


def test_each_framing_is_encoded_once(bench):
    assert encoded(bench) == 5
    assert encoded(bench, flip=True) == 5  # the mirrored half
    assert all(len(pixels) in (1, 9) for pixels in bench.encoders[0].items)
    assert encoded(bench, flip=True) == encoded(bench) == 0
    assert encoded(bench, crop="pad") == 5
    assert encoded(bench, crop="random") == 5  # none of these five is the middle
    assert encoded(bench, crop="random", crop_sample=2) == 5  # one more each
    assert encoded(bench, crop="random", crop_sample=2, flip=True) == 10
    assert encoded(bench, crop="random", crop_sample=3, flip=True) == 10
    # nothing is cut off at this shape, so that there is nothing to choose or to pad
    assert encoded(bench, resolutions=((64, 48),)) == 5
    for crop in ("random", "pad"):
        assert encoded(bench, resolutions=((64, 48),), crop=crop, crop_sample=4) == 0


def test_uses_take_turns_and_held_out_clips_do_not(bench):
    write_video(bench.data / "clip0.mp4", 12, half=True)  # black on its left
    manifest, _ = bench.run(bench.settings(flip=True, crop="random", crop_sample=3))
    entries = manifest.entries
    assert all(len(set(entry.media_keys)) == 6 for entry in entries)
    plan = EpochPlan(entries, [2.0], lambda bucket: BatchShape(1, 1, 1), seed=3)
    read = [Counter() for _ in entries]
    for step in range(plan.first_step(5)):
        for item in plan.step(step).items:
            [(_, key)] = entries[item.entry].media_of(item.turn)
            read[item.entry][key] += 1
    for index, entry in enumerate(entries):  # 8 uses of 6 turns
        assert sorted(read[index].values()) == [1, 1, 1, 1, 2, 2] and set(read[index]) == set(entry.media_keys)

    dataset = CachedDataset(Recorder(), bench.store, entries, manifest.empty_text_key, seed=1)
    assert entries[0].name == "clip0.mp4"
    turns = [dataset.training_batch([Item(0, turn)]).inputs[0]["latents"].tolist() for turn in range(7)]
    assert turns == [
        bench.store.read("latents", entries[0].media_keys[turn % 6])["latents"].tolist() for turn in range(7)
    ]
    assert len(set(map(str, turns))) == 6
    assert dataset.eval_batch([EvalItem(0, 0.5)]).inputs[0]["latents"].tolist() == turns[0] == turns[6]


def test_the_manifest_survives_the_disk(bench, tmp_path):
    manifest = bench.manifest(bench.settings(flip=True, crop="random", crop_sample=2))
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    framings = {job.framing for job in manifest.jobs["latents"]}
    assert len(framings) > 4 and all(isinstance(framing.across, Fraction) for framing in framings if framing)


def test_small_files_are_told_of(bench):
    write_image(bench.data / "large.png", (200, 100))
    (bench.data / "large.txt").write_text("a large one")
    write_image(bench.data / "narrow.png", (200, 15))
    (bench.data / "narrow.txt").write_text("a narrow one")
    manifest = bench.manifest(bench.settings(resolutions=(96,), bucket_no_upscale=True))
    assert {entry.name: str(entry.bucket) for entry in manifest.entries} == {
        **{f"clip{number}.mp4": "48x48x9" for number in range(3)},
        "large.png": "96x96x1",
        "long.mp4": "48x48x9",
        "still.png": "48x48x1",
    }
    assert [item.path.name for item in manifest.skipped] == ["narrow.png"]
    [notice] = manifest.notices
    assert notice.startswith(f"{bench.data}: 5 files are smaller than their buckets; with bucket_no_upscale = true")
    assert bench.manifest(bench.settings(bucket_no_upscale=True)).notices == []
    stills = {"frame_buckets": (1,), "stills": True, "bucket_no_upscale": True}  # musubi-tuner's target_frames = [1]
    [notice] = bench.manifest(bench.settings(resolutions=(96,), **stills)).notices
    assert notice.startswith(f"{bench.data}: 5 files are smaller"), "large.png covers its bucket"
    assert bench.manifest(bench.settings(**stills)).notices == []


# --- names ------------------------------------------------------------------------------------------------------------


def test_names_change_with_the_framing_and_with_nothing_else(keys_of):  # noqa: F811
    keys = keys_of(ConvEncoder, ByteEncoder)
    framings = [Framing(), Framing(Fraction(1, 3)), Framing(down=Fraction(1, 3)), Framing(flip=True), Framing(pad=True)]
    clips = [replace(CLIP, framing=framing) for framing in framings]
    assert len({LATENTS, *(keys.media(clip)[0] for clip in clips)}) == 6
    assert len({SAMPLE, *map(keys.sample, clips)}) == 6
    in_turn = replace(CLIP, framings=(Framing(flip=True),))
    assert keys.sample(in_turn) != SAMPLE
    plain, mirrored = in_turn.each_turn()
    assert (keys.media(plain), keys.media(mirrored)) == ((LATENTS,), keys.media(clips[3]))


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_held_out_sets_are_neither_mirrored_nor_cropped_by_chance():
    given = top("flip = true", "crop = 'random'", "crop_sample = 4", run=DATASET)
    loaded = load(top("eval_datasets = ['held.toml']", "eval_every_n_epochs = 1"), given, held=given)
    assert advice(loaded, SPEC) == []
    kept, held = (dataset.directory[0] for dataset in (loaded.dataset, loaded.eval_datasets["held"]))
    assert (kept.flip, kept.crop, kept.crop_sample) == (True, "random", 4)
    assert (held.flip, held.crop, held.crop_sample) == (False, "center", 1)
    assert loaded.notices == [
        "held.toml: flip = true and crop = 'random' have no effect on a held-out set: its clips are evaluated plain, "
        "the middle of each"
    ]
    padded = load(top("eval_datasets = ['held.toml']"), given, held=top("crop = 'pad'", run=DATASET))
    assert padded.eval_datasets["held"].directory[0].crop == "pad" and padded.notices == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("crop = 'random'", "crop_sample = 2"), []),
        (
            ("crop_sample = 2", "crop = 'pad'"),
            ["dataset.toml:1: crop_sample = 2 has no effect with crop = 'pad'; it is for 'random'"],
        ),
        (
            ("crop = 'random'",),
            ["dataset.toml:1: crop = 'random' with crop_sample = 1 gives a file one crop; more of them take turns"],
        ),
    ],
)
def test_advice_on_crops(lines, said):
    assert advice(load(dataset=top(*lines, run=DATASET)), SPEC) == said


@pytest.mark.usefixtures("folder")
def test_a_crop_that_there_is_not():
    assert complaints(dataset=top("crop = 'centre'", run=DATASET)) == [
        "dataset.toml:1: crop = 'centre' is not known; use 'center', 'random' or 'pad'"
    ]
