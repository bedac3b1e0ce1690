"""A cache that four encoders fill: whole clips, their ends twice, and captions; each is its own kind."""

import pytest
import torch

from tests.helpers.encoders import ByteEncoder, ConditionEncoder, ConvEncoder, ImageEncoder
from tests.helpers.media import frame_numbers, write_image
from tests.helpers.models import wan_variant
from tests.unit.test_buckets import SPEC
from tests.unit.test_precache import CPU, Bench, Settings, precache_on_ranks, spoil
from utils.data.dataset import CachedDataset
from utils.data.manifest import Manifest, build_manifest
from utils.data.plan import Item
from utils.data.precache import precache
from utils.data.records import Bucket

KINDS = ("latents", "condition", "image", "text")
VIDEOS = SPEC._replace(images=False)


class ImageToVideo(Bench):
    """The bench with a condition made by the VAE and an image encoder of its own, as image to video has them."""

    def __init__(self, root):
        super().__init__(root)
        self.clip_weights = root / "clip.pth"
        self.clip_weights.write_text("clip weights")

    def make_encoders(self):
        first, last = super().make_encoders()
        return [first, ConditionEncoder(self.vae), ImageEncoder(self.clip_weights), last]

    def manifest(self, *settings, **kwargs):
        return super().manifest(*settings, **({"spec": VIDEOS} | kwargs))


@pytest.fixture
def bench(tmp_path):
    return ImageToVideo(tmp_path)


def test_every_encoder_fills_its_own_kind(bench):
    bench.clip("five.mp4", 5, caption="short")
    manifest, report = bench.run(workers=2)
    assert report.made == dict.fromkeys(KINDS, (5, 0)) | {"text": (5, 0)}  # 4 captions and the empty one
    assert tuple(report.made) == KINDS and set(manifest.counts) == set(KINDS)
    assert [encoder.batches for encoder in bench.encoders[:3]] == [[2, 2, 1]] * 3, "a batch has one shape and length"
    assert not any(encoder.loaded for encoder in bench.encoders)
    for encoder in bench.encoders[1:3]:
        whole = sorted(frame_numbers(pixels) for pixels in bench.encoders[0].items)
        ends = sorted((frame_numbers(item.pixels), item.frames) for item in encoder.items)
        assert ends == sorted(([numbers[0], numbers[-1]], len(numbers)) for numbers in whole)
    for entry in manifest.entries:
        assert entry.media_kinds is manifest.entries[0].media_kinds
        for kind, key in entry.media():
            assert kind in bench.store.read(kind, key)


def test_workers_deliver_the_same_ends_as_decoding_here(bench):
    manifest, _ = bench.run(workers=2)
    theirs = {entry.name: bench.store.read("image", entry.media_keys[2])["image"] for entry in manifest.entries}
    again = bench.manifest(regenerate=True)
    bench.fill([again], workers=0, batch_size=1, regenerate=True)
    for entry in again.entries:
        assert torch.equal(theirs[entry.name], bench.store.read("image", entry.media_keys[2])["image"])


def test_only_what_is_missing_of_a_kind_is_encoded(bench):
    clips = Bench.manifest(bench, spec=VIDEOS)  # all four
    text_to_video = [ConvEncoder(bench.vae), ByteEncoder(bench.text)]
    plain = build_manifest(
        [Settings(path=bench.data)], spec=VIDEOS, clip_mode="single_beginning", encoders=text_to_video,
        store=bench.store, workers=0,
    )  # fmt: skip
    precache([plain], text_to_video, bench.store, device=CPU, workers=0, batch_size=2)
    assert [entry.sample_id for entry in plain.entries] == [entry.sample_id for entry in clips.entries]

    assert bench.counts() == (0, 4, 4, 0), "what text to video has cached serves image to video"
    assert bench.counts() == (0, 0, 0, 0)
    bench.clip_weights.write_text("another image encoder")
    assert bench.counts() == (0, 0, 4, 0)
    bench.vae.write_text("another vae")
    assert bench.counts() == (4, 4, 0, 0)
    (bench.data / "clip1.txt").write_text("another caption")
    assert bench.counts() == (0, 0, 0, 1)
    bench.clip("new.mp4", 20, caption="clip 0")
    assert bench.counts() == (1, 1, 1, 0)
    for file in (bench.store.root / "condition").rglob("*.safetensors"):
        file.unlink()
    assert bench.counts() == (0, 5, 0, 0)


def test_wan_image_to_video_takes_over_the_cache_of_text_to_video(bench):
    """With the real encoders, tiny: from a shared cache to what the first stage is given."""

    def start(family):
        settings = {"spec": family.media_spec(), "clip_mode": "single_beginning", "store": bench.store, "workers": 0}
        manifest = build_manifest([Settings(path=bench.data)], encoders=family.encoders(), **settings)
        report = precache([manifest], family.encoders(), bench.store, device=CPU, workers=0, batch_size=2)
        return manifest, report.made

    (bench.data / "still.png").unlink()
    _, made = start(wan_variant("wan_t2v"))
    assert made == {"latents": (4, 0), "text": (4, 0)}
    family = wan_variant("wan_i2v")
    manifest, made = start(family)
    assert made == {"latents": (0, 4), "condition": (4, 0), "image": (4, 0), "text": (0, 4)}
    assert start(family)[1] == dict.fromkeys(KINDS, (0, 4))
    dataset = CachedDataset(family, bench.store, manifest.entries, manifest.empty_text_key, seed=1)
    x, _, _, image = dataset.training_batch([Item(0, 0), Item(1, 0)]).inputs
    assert x.shape == (2, 36, 3, 8, 8) and image.shape[:2] == (2, 257)


def test_a_manifest_of_several_kinds_survives_the_disk(bench, tmp_path):
    manifest = bench.manifest(Settings(path=bench.data, resolutions=(64, 96)), clip_mode="single_middle")
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded == manifest and [len(jobs) for jobs in loaded.jobs.values()] == [8, 8, 8, 4]
    assert loaded.entries[0].media_kinds is loaded.entries[-1].media_kinds


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_clip_that_fails_once_is_told_once_and_left_out_whole(bench):
    spoil(bench.clip("spoilt.mp4", 30, caption="clip 0"))
    manifest, report = bench.run(workers=1, skip_bad_media=True)
    assert len(report.failed) == 1 and report.made == dict.fromkeys(KINDS[:3], (4, 0)) | {"text": (4, 0)}
    remaining = manifest.without(report.failed)
    assert [entry.name for entry in remaining.entries] == ["clip0.mp4", "clip1.mp4", "clip2.mp4", "long.mp4"]
    assert [item.path.name for item in remaining.skipped] == ["still.png", "spoilt.mp4"]
    assert [len(remaining.jobs[kind]) for kind in KINDS] == [4, 4, 4, 4]


def test_a_clip_that_fails_for_a_later_encoder_is_left_out_whole(bench):
    path = bench.clip("spoilt.mp4", 30, caption="clip 0")
    early = bench.manifest()
    precache([early], bench.encoders[:1], bench.store, device=CPU, workers=0, batch_size=2)
    manifest = bench.manifest()
    spoil(path)
    with pytest.raises(ValueError, match=r"1 clip cannot be decoded .*\n  .*spoilt\.mp4: "):
        bench.fill([manifest])
    report = bench.fill([manifest], skip_bad_media=True)
    [(key, skipped)] = report.failed.items()
    spoilt = next(entry for entry in manifest.entries if entry.name == "spoilt.mp4")
    assert dict(spoilt.media())["condition"] == key and skipped.path == path
    assert report.made["image"] == (4, 0)
    remaining = manifest.without(report.failed)
    assert spoilt not in remaining.entries and len(remaining.entries) == 4
    assert remaining.skipped[-1] == skipped and remaining.skipped.count(skipped) == 1


def test_ranks_agree_on_what_failed(bench):
    spoil(bench.clip("spoilt.mp4", 30, caption="clip 0"))
    encoders = [bench.make_encoders() for _ in range(2)]
    reports = precache_on_ranks(bench, [bench.manifest()], encoders, skip_bad_media=True)
    assert reports[0].failed == reports[1].failed and len(reports[0].failed) == 1
    assert reports[0].made == reports[1].made == dict.fromkeys(KINDS, (4, 0))


def test_images_are_left_out_by_name_and_alone_are_an_error(bench, tmp_path):
    manifest = bench.manifest()
    assert [str(item) for item in manifest.skipped] == [
        "still.png: is an image, and this model trains on clips of at least 5 frames; images are skipped, give it "
        "videos or choose a model that takes images"
    ]
    assert {entry.bucket for entry in manifest.entries} == {Bucket(64, 64, 9)}
    stills = tmp_path / "stills"
    stills.mkdir()
    write_image(stills / "a.png")
    (stills / "a.txt").write_text("a still")
    with pytest.raises(
        ValueError, match=r"nothing to train on in .*stills; left out:\n  a\.png: is an image, and this"
    ):
        bench.manifest(Settings(path=stills))
