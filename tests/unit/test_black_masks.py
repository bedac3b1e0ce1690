"""Uses of a clip whose loss mask is black: left out one by one, remembered, and the whole sample only where all are."""

import time

import numpy as np
import pytest

from tests.helpers.media import write_frames, write_image
from tests.unit.test_mask_cache import BLACK, Masked, Recorder
from tests.unit.test_precache import precache_on_ranks
from utils.data.black_masks import BLACK_FILE, known_black
from utils.data.dataset import CachedDataset
from utils.data.manifest import Manifest
from utils.data.plan import Item
from utils.data.records import MASK
from utils.data.scan_memory import ScanMemory


class Turning(Masked):
    """clip0 alone has a mask, and three starts that its uses take in turn."""

    def __init__(self, root):
        super().__init__(root)
        for path in self.masks.iterdir():
            path.unlink()
        self.clip("clip0.mp4", 40)
        self.white_from(0)
        jobs = self.manifest(self.random()).jobs[MASK]
        self.starts = [int(job.start * 16) for job in jobs]  # as frames, in the order of the turns

    def random(self, **kwargs):
        return self.settings(**{"video_clip_mode": "random_start", "frame_sample": 3} | kwargs)

    def white_from(self, frame):
        pixels = np.zeros((40, 48, 64, 3), np.uint8)
        pixels[frame:] = 255
        write_frames(self.masks / "clip0.mov", pixels)

    def spare(self, uses):
        """Let the masks of all but so many turns be black: those that end last see white."""
        self.white_from(sorted(self.starts)[-uses] + 8)
        return [turn for turn, start in enumerate(self.starts) if start in sorted(self.starts)[-uses:]]


@pytest.fixture
def bench(tmp_path):
    return Turning(tmp_path)


def clip0(manifest):
    return next(entry for entry in manifest.entries if entry.name.startswith("clip0"))


@pytest.mark.parametrize("uses", [2, 1])
def test_a_use_that_misses_the_white_is_left_out_alone(bench, uses):
    whole = clip0(bench.manifest(bench.random()))
    assert len(set(bench.starts)) == 3 and len(whole.media_keys) == 3
    others = {entry.sample_id: entry for entry in bench.manifest(bench.random()).entries if entry.name != whole.name}
    kept = bench.spare(uses)
    manifest, report = bench.run(bench.random())
    assert len(report.black) == 3 - uses and not report.failed
    assert report.made[MASK] == (uses, 0) and report.made["latents"].encoded == 4 * 3 + 1 - (3 - uses)
    settled = manifest.settled(report.black)
    entry = clip0(settled)
    assert entry.sample_id == whole.sample_id and entry.media_keys == tuple(whole.media_keys[turn] for turn in kept)
    assert {of.sample_id: of for of in settled.entries if of.name != entry.name} == others
    lost = f"{3 - uses} crop or start of 1 clip" if uses == 2 else "2 crops or starts of 1 clip"
    assert f"{lost}: left out, since the loss mask is black there; their others stay" in settled.notices
    assert not any(job.key in whole.media_keys and job.key not in entry.media_keys for job in settled.jobs["latents"])
    dataset = CachedDataset(Recorder(), bench.store, [entry], manifest.empty_text_key, seed=1)
    for turn in range(2 * uses):
        assert dataset.training_batch([Item(0, turn)]).samples[0]["mask"].any()


def test_a_later_start_knows_and_looks_at_nothing(bench, tmp_path):
    bench.spare(2)
    first, report = bench.run(bench.random())
    again = bench.manifest(bench.random())
    assert not any(again.jobs.values()) and again.entries == first.settled(report.black).entries
    assert again.counts[MASK] == (2, 2) and [notice for notice in again.notices if "crop or start" in notice]
    assert again.settled(known_black(bench.store.root)) == again, "told once"
    again.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == again
    anew = bench.manifest(bench.random(), regenerate=True)
    assert len(anew.jobs[MASK]) == 3 and len(clip0(anew).media_keys) == 3
    (bench.store.root / BLACK_FILE).write_text("half a line\n" + "\0" * 7)
    _, report = bench.run(bench.random())
    assert report.black and report.made[MASK].encoded == 0 and report.made["latents"].encoded == 0
    bench.white_from(0)
    manifest, report = bench.run(bench.random())
    assert not report.black and len(clip0(manifest.settled(report.black)).media_keys) == 3


def test_a_sample_goes_where_all_of_its_uses_are_black(bench):
    black = write_image(bench.masks / "clip0.png", colour=BLACK)
    (bench.masks / "clip0.mov").unlink()
    moving = bench.random(crop="random", crop_sample=2, resolutions=((32, 48),))
    with pytest.raises(ValueError, match="1 mask cannot be used") as caught:
        bench.run(moving)
    assert str(caught.value).count(str(black)) == 1, "once for all crops"
    for _ in range(2):  # when it is found out, and when it is remembered
        manifest, report = bench.run(moving, skip_bad_media=True)
        remaining = manifest.settled(report.black).without(report.failed)
        assert len(remaining.entries) == 4 and "clip0.mp4" not in {entry.name for entry in remaining.entries}
        assert [item.path for item in remaining.skipped] == [black] and remaining.skipped[0].bad
    with pytest.raises(ValueError, match="1 mask cannot be used"):
        bench.run(moving)


@pytest.fixture
def equal(tmp_path):
    """Two clips of one shape whose black masks are equal byte by byte, as those of one camera are."""
    bench = Masked(tmp_path)
    (bench.masks / "clip1.mov").unlink()
    for name in ("clip0.png", "clip1.png"):
        write_image(bench.masks / name, colour=BLACK)
    return bench


def test_equal_black_masks_are_told_each_by_its_own_name(equal):
    manifest = equal.manifest(equal.settings())
    assert len({key for entry in manifest.entries[:2] for key in entry.mask_keys}) == 1, "it is made once"
    with pytest.raises(ValueError, match=r"^2 masks cannot be used .*without their clips") as caught:
        equal.fill([manifest])
    assert all(
        f"\n  {equal.masks / name}: the mask is black" in str(caught.value) for name in ("clip0.png", "clip1.png")
    )
    remaining = manifest.without(equal.fill([manifest], skip_bad_media=True).failed)
    told = [(item.path.name, item.reason.partition(":")[0]) for item in remaining.skipped]
    assert told == [(f"clip{i}.png", f"as the mask of clip{i}.mp4") for i in range(2)]


def test_a_sample_that_is_known_to_be_black_is_left_out_and_the_rest_remembered(equal):
    settings = equal.settings()
    first, report = equal.run(settings, skip_bad_media=True)
    again = equal.manifest(settings, skip_bad_media=True)
    assert again.jobs[MASK] == again.jobs["latents"] == [] and again.counts[MASK] == (1, 1)
    remaining = first.settled(report.black).without(report.failed)
    assert again.entries == remaining.entries and again.skipped == remaining.skipped and len(again.skipped) == 2
    memory = ScanMemory(equal.store, [settings], "skips", now_ns=time.time_ns() + 10**13)
    memory.keep(again)
    assert memory.manifest() == again
    with pytest.raises(ValueError, match="2 masks cannot be used"):
        equal.run(settings)  # `skip_bad_media` is false again
    assert len(equal.manifest(settings, skip_bad_media=True, regenerate=True).jobs[MASK]) == 2


def test_a_dataset_of_black_masks_alone_is_refused_before_anything_is_encoded(equal):
    for name in ("clip2", "long", "still"):
        write_image(equal.masks / f"{name}.png", colour=BLACK)
    found_out, known = (pytest.raises(ValueError, match=f"^no sample is left of {equal.data}; mend") for _ in range(2))
    with found_out as first:
        equal.run(equal.settings(), skip_bad_media=True)
    assert not any(encoder.items for encoder in equal.encoders)
    with known as second:
        equal.manifest(equal.settings(), skip_bad_media=True)
    assert str(first.value) == str(second.value)
    assert all(f"\n  {path}: as the mask of {path.stem}." in str(first.value) for path in equal.masks.iterdir())


def test_a_damaged_mask_is_no_black_one(bench):
    (bench.masks / "clip0.mov").write_bytes((bench.masks / "clip0.mov").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"clip0\.mp4: its mask .* cannot be used"):
        bench.run(bench.random())


def test_ranks_come_to_the_same(bench):
    bench.spare(1)
    manifest = bench.manifest(bench.random())
    reports = precache_on_ranks(bench, [manifest], [bench.make_encoders(), bench.make_encoders()])
    one, other = (manifest.settled(report.black).without(report.failed) for report in reports)
    assert one == other and len(clip0(one).media_keys) == 1
    assert reports[0].black == known_black(bench.store.root) and len(reports[0].black) == 2


# --- held-out data ----------------------------------------------------------------------------------------------------


def test_of_held_out_samples_the_first_turn_alone_is_made(bench):
    settings = bench.random(mask_path=None, flip=True)
    whole = bench.manifest(settings)
    assert {len(entry.media_keys) for entry in whole.entries} == {2, 6}
    manifest = bench.manifest(settings, held_out=True)
    assert [entry.sample_id for entry in manifest.entries] == [entry.sample_id for entry in whole.entries], "its noise"
    assert [entry.media_keys for entry in manifest.entries] == [entry.media_keys[:1] for entry in whole.entries]
    assert len(manifest.jobs["latents"]) == 5 == manifest.counts["latents"].total
    bench.fill([manifest])
    assert not any(bench.manifest(settings, held_out=True).jobs.values())


def test_of_held_out_samples_the_first_that_is_not_black(bench):
    kept = bench.spare(1)
    whole = clip0(bench.manifest(bench.random()))
    manifest = bench.manifest(bench.random(), held_out=True)
    assert len(manifest.jobs[MASK]) == 3, "which is the first cannot be told yet"
    report = bench.fill([manifest])
    assert report.made["latents"].encoded == 5
    settled = manifest.settled(report.black)
    assert clip0(settled).media_keys == (whole.media_keys[kept[0]],) and len(clip0(settled).mask_keys) == 1
    again = bench.manifest(bench.random(), held_out=True)
    assert not any(again.jobs.values()) and again.entries == settled.entries
