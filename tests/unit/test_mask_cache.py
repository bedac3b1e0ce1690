"""Loss masks on their way into the cache and out of it: what is made, shared, left out, and read in turn."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.media import write_frames, write_image
from tests.unit.test_precache import Bench, Settings, precache_on_ranks
from utils.data.dataset import CachedDataset, EvalItem
from utils.data.manifest import Manifest
from utils.data.plan import Item
from utils.data.records import MASK
from utils.data.uses import keys_of

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Masked(Bench):
    """The bench (clip0 to clip2, long.mp4, still.png, of 64 x 48), with masks of some and buckets of that size."""

    def __init__(self, root):
        super().__init__(root)
        self.masks = root / "masks"
        self.masks.mkdir()
        self.half("clip0.png", 32)
        self.half("still.png", 16)
        frames = np.zeros((20, 48, 64, 3), np.uint8)
        frames[4:] = 255
        write_frames(self.masks / "clip1.mov", frames)

    def half(self, name, left):
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, left:] = 255
        Image.fromarray(pixels).save(self.masks / name)

    def settings(self, **kwargs):
        shapes = {"resolutions": ((64, 48),), "frame_buckets": (1, 9)}
        return Settings(path=self.data, **{"mask_path": self.masks} | shapes | kwargs)

    def made(self, *settings, **kwargs):
        """(masks, clips, captions) that one start makes."""
        self.manifest_made, self.report = self.run(*(settings or (self.settings(),)), **kwargs)
        return tuple(self.report.made[kind].encoded if kind in self.report.made else 0 for kind in KINDS)


KINDS = (MASK, "latents", "text")


class Recorder:
    """Stands where a family does and gives back what it was given."""

    def micro_batch(self, samples, draws):
        self.samples = list(samples)
        return self

    def _replace(self, **_):
        return self


@pytest.fixture
def bench(tmp_path):
    return Masked(tmp_path)


def test_adding_and_editing_masks_encodes_no_clip(bench):
    assert bench.made(bench.settings(mask_path=None)) == (0, 5, 5)
    assert MASK not in bench.report.made
    ids = [entry.sample_id for entry in bench.manifest_made.entries]
    assert bench.made() == (3, 0, 0) and next(iter(bench.report.made)) == MASK
    assert [entry.sample_id for entry in bench.manifest_made.entries] == ids, "the same noise as without"
    assert [len(entry.mask_keys) for entry in bench.manifest_made.entries] == [1, 1, 0, 0, 1]
    assert bench.manifest_made.counts[MASK] == (3, 0)
    assert bench.made() == (0, 0, 0) and bench.report.made[MASK].reused == 3
    bench.half("clip0.png", 8)
    assert bench.made() == (1, 0, 0)
    (bench.masks / "still.png").rename(bench.masks / "still.gif")
    assert bench.made() == (0, 0, 0), "a name changes nothing"
    write_image(bench.masks / "clip2.png", colour=WHITE)
    assert bench.made() == (1, 0, 0)
    for file in (bench.store.root / MASK).rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert bench.made(workers=2) == (4, 0, 0) and bench.report.damaged == 4


def test_clips_of_one_file_share_an_image_and_cut_up_a_video(bench):
    assert bench.made(bench.settings(video_clip_mode="uniform", frame_sample=3))[0] == 1 + 3 + 1
    first, second, third = (entry for entry in bench.manifest_made.entries if entry.name.startswith("clip0"))
    assert first.mask_keys == second.mask_keys == third.mask_keys
    default = write_image(bench.masks.parent / "default.png", colour=WHITE)
    assert bench.made(bench.settings(mask_path=None, default_mask_file=default))[0] == 2, "one a shape"


def test_a_sample_has_the_mask_of_its_turn(bench):
    settings = bench.settings(video_clip_mode="random_start", frame_sample=3, flip=True)
    made = bench.made(settings)[0]
    entries = bench.manifest_made.entries
    dataset = CachedDataset(Recorder(), bench.store, entries, bench.manifest_made.empty_text_key, seed=1)

    def mask(name, turn):
        index = next(i for i, entry in enumerate(entries) if entry.name == name)
        return dataset.training_batch([Item(index, turn)]).samples[0].get("mask")

    assert mask("clip2.mp4", 0) is None and mask("clip0.mp4", 0).shape == (3, 6, 8)
    assert mask("clip0.mp4", 0).dtype == torch.uint8 and mask("clip0.mp4", 0)[0, 0].tolist() == [0] * 4 + [255] * 4
    for index, entry in enumerate(entries):
        assert len(entry.mask_keys) in (0, len(entry.media_keys))
        for turn in range(2 * len(entry.mask_keys)):
            [sample] = dataset.training_batch([Item(index, turn)]).samples
            key = entry.mask_keys[turn % len(entry.mask_keys)]
            assert torch.equal(sample["mask"], bench.store.read(MASK, key)["mask"])
    assert torch.equal(dataset.eval_batch([EvalItem(0, 0.5)]).samples[0]["mask"], mask("clip0.mp4", 0))
    assert {len(entry.media_keys) for entry in entries} == {2, 6}, "three starts, each mirrored too"
    assert made == 2 + 6 + 2 and mask("clip0.mp4", 1)[0, 0].tolist() == [255] * 4 + [0] * 4


def test_padded_clips_have_a_mask_of_their_own(bench):
    """Of 64 x 48 in 64 x 64: 8 px above and below."""
    padded = bench.settings(crop="pad", resolutions=(64,))
    assert bench.made(padded)[0] == 4, "three with masks, and two videos of one shape share their padding"
    for entry in bench.manifest_made.entries:
        column = bench.store.read(MASK, entry.mask_keys[0])["mask"][-1, :, -1].tolist()
        assert column == [0, *[255] * 6, 0]


def test_the_manifest_survives_the_disk_and_the_keys_are_in_use(bench, tmp_path):
    manifest = bench.manifest(bench.settings())
    manifest.save(tmp_path / "manifest.json")
    loaded = Manifest.load(tmp_path / "manifest.json")
    assert loaded == manifest and len(loaded.jobs[MASK]) == 3
    assert {key for entry in manifest.entries for key in entry.mask_keys} <= keys_of([loaded])


def test_workers_and_ranks_make_the_same_masks(bench):
    manifest = bench.manifest(bench.settings())
    bench.fill([manifest], workers=2)
    first = {job.key: bench.store.read(MASK, job.key)["mask"] for job in manifest.jobs[MASK]}
    again = bench.manifest(bench.settings(), regenerate=True)
    reports = precache_on_ranks(bench, [again], [bench.make_encoders(), bench.make_encoders()], regenerate=True)
    assert reports[0].made == reports[1].made and reports[0].made[MASK] == (3, 0)
    assert all(torch.equal(mask, bench.store.read(MASK, key)["mask"]) for key, mask in first.items())


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_black_mask_is_told_before_anything_is_encoded(bench):
    black = write_image(bench.masks / "clip0.png", colour=BLACK)
    reason = "the mask is black where the clip is cut out: nothing would be trained; mend it or leave it out"
    with pytest.raises(ValueError, match="1 mask cannot be used") as caught:
        bench.run(bench.settings())
    assert str(caught.value).endswith(f"without its clip):\n  {black}: {reason}")
    assert not (bench.store.root / "latents").exists()
    manifest, report = bench.run(bench.settings(), skip_bad_media=True)
    assert report.made[MASK].encoded == 0 and report.made["latents"].encoded == 4, "nothing is made of its clip"
    remaining = manifest.without(report.failed)
    assert [entry.name for entry in remaining.entries] == ["clip1.mp4", "clip2.mp4", "long.mp4", "still.png"]
    assert [str(item) for item in remaining.skipped] == [f"clip0.png: as the mask of clip0.mp4: {reason}"]
    assert remaining.skipped[0].bad and len(remaining.jobs["latents"]) == 4


def test_a_clip_whose_mask_fails_leaves_what_others_need(bench):
    """The same folder twice, the second time without masks."""
    write_image(bench.masks / "clip0.png", colour=BLACK)
    manifest, report = bench.run(bench.settings(), bench.settings(mask_path=None), skip_bad_media=True)
    remaining = manifest.without(report.failed)
    assert [(entry.group, entry.name) for entry in remaining.entries if entry.name == "clip0.mp4"] == [(1, "clip0.mp4")]
    assert len(remaining.entries) == 9 and report.made["latents"].encoded == 5
    for entry in remaining.entries:
        assert all(bench.store.has(kind, key) for kind, key in entry.media())


def test_a_mask_video_shorter_than_the_clip_is_bad_media(bench):
    write_frames(bench.masks / "clip1.mov", np.full((6, 48, 64, 3), 255, np.uint8))
    with pytest.raises(ValueError, match=r"1 media file cannot be used.*\n  .*clip1\.mp4: its mask .*clip1\.mov lasts"):
        bench.manifest(bench.settings())
    manifest = bench.manifest(bench.settings(), skip_bad_media=True)
    assert [entry.name for entry in manifest.entries] == ["clip0.mp4", "clip2.mp4", "long.mp4", "still.png"]
