"""From folders to a full cache: what is encoded, what is not done twice, and what happens when something breaks."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import av
import pytest
import torch

from tests.helpers.encoders import ByteEncoder, ConvEncoder
from tests.helpers.media import frame_numbers, write_image, write_video
from tests.helpers.misbehave import die_or_hang
from tests.unit.test_buckets import SPEC
from tests.unit.test_buckets import Settings as Shapes
from utils.data.cache import CacheStore
from utils.data.crew import Crew
from utils.data.decode_pool import PixelJob, decoded_clips
from utils.data.manifest import Manifest, build_manifest, overlap
from utils.data.precache import precache
from utils.data.records import Bucket
from utils.data.workers import WorkerLost, WorkerPool

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings(Shapes):
    path: Path = Path()
    num_repeats: float = 1.0
    weight: float = 1.0
    is_regularization: bool = False
    recursive: bool = False
    mask_path: Path | None = None
    default_mask_file: Path | None = None
    media: str = "all"
    caption_extension: str = ".txt"
    skip_empty_caption: bool = True
    default_caption: str = ""
    caption_prefix: str = ""
    trigger_word: str = ""
    shuffle_tags: bool = False
    cache_shuffle_num: int = 0
    cache_shuffle_delimiter: str = ", "
    keep_first: int = 0
    resolutions: tuple = (64,)
    frame_buckets: tuple = (1, 5, 9)


class Bench:
    """A dataset folder, a cache and two encoders; `run` does what a start of the trainer does."""

    def __init__(self, root):
        self.data, self.store = root / "data", CacheStore(root / "cache")
        self.data.mkdir()
        self.vae, self.text = root / "vae.pth", root / "text.pth"
        self.vae.write_text("vae weights")
        self.text.write_text("text weights")
        for number in range(3):
            self.clip(f"clip{number}.mp4", 12 + number, caption=f"clip {number}")
        self.clip("long.mp4", 30, fps=24, caption="clip 0")  # shares a caption
        write_image(self.data / "still.png")
        (self.data / "still.txt").write_text("a still")

    def clip(self, name, frames, fps=16, caption="a clip"):
        path = write_video(self.data / name, frames, fps)
        path.with_suffix(".txt").write_text(caption)
        return path

    def make_encoders(self):
        return [ConvEncoder(self.vae), ByteEncoder(self.text)]

    def manifest(self, *settings, workers=0, **kwargs):
        self.encoders = self.make_encoders()
        kwargs = {"spec": SPEC, "clip_mode": "single_beginning", "workers": workers} | kwargs
        settings = settings or (Settings(path=self.data),)
        return build_manifest(settings, encoders=self.encoders, store=self.store, **kwargs)

    def run(self, *settings, workers=0, batch_size=2, **kwargs):
        manifest = self.manifest(*settings)
        return manifest, self.fill([manifest], workers=workers, batch_size=batch_size, **kwargs)

    def fill(self, manifests, workers=0, batch_size=2, **kwargs):
        return precache(
            manifests, self.encoders, self.store, device=CPU, workers=workers, batch_size=batch_size, **kwargs
        )

    def counts(self, **kwargs):
        """What one start encodes, an encoder each: (clips, captions)."""
        self.run(**kwargs)
        return tuple(len(encoder.items) for encoder in self.encoders)


def precache_on_ranks(bench, manifests, encoders, **kwargs):
    """The reports of as many ranks as there are sets of encoders, on threads."""
    barrier, folder = threading.Barrier(len(encoders), timeout=60), bench.store.root / "jobs" / "test"

    def rank(number):
        with Crew(folder, number, len(encoders)) as crew:
            return precache(
                manifests, encoders[number], bench.store, device=CPU, workers=0, batch_size=2, crew=crew,
                barrier=barrier.wait, **kwargs,
            )  # fmt: skip

    with ThreadPoolExecutor(len(encoders)) as pool:
        return list(pool.map(rank, range(len(encoders))))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_a_first_start_encodes_every_clip_and_distinct_caption_once(bench):
    manifest, report = bench.run(workers=2)
    assert (report.made, report.failed) == ({"latents": (5, 0), "text": (5, 0)}, {})  # 4 captions and the empty one
    assert sorted(bench.encoders[1].items) == ["", "a still", "clip 0", "clip 1", "clip 2"]
    assert bench.encoders[0].batches == [2, 2, 1]  # the videos of one shape, then what is smaller: the image
    assert [encoder.loads for encoder in bench.encoders] == [1, 1] and not any(e.loaded for e in bench.encoders)
    assert sorted(len(pixels) for pixels in bench.encoders[0].items) == [1, 9, 9, 9, 9]

    assert [entry.name for entry in manifest.entries] == [
        "clip0.mp4",
        "clip1.mp4",
        "clip2.mp4",
        "long.mp4",
        "still.png",
    ]
    for entry in manifest.entries:
        latents = bench.store.read("latents", entry.media_keys[0])["latents"]
        assert latents.shape == (16, (entry.bucket.frames + 3) // 4, 8, 8)
        assert bench.store.has("text", entry.text_keys[0])
    assert bench.store.read("text", manifest.empty_text_key)["text"].shape == (1, 8)
    assert manifest.entries[0].text_keys == manifest.entries[3].text_keys


def test_workers_deliver_the_same_latents_as_decoding_here(bench, tmp_path):
    manifest, _ = bench.run(workers=2)
    here = CacheStore(tmp_path / "other")
    precache([manifest], bench.encoders, here, device=CPU, workers=0, batch_size=1)
    for entry in manifest.entries:
        ours, theirs = (store.read("latents", entry.media_keys[0])["latents"] for store in (bench.store, here))
        assert torch.equal(ours, theirs)


def test_nothing_is_done_twice(bench):
    assert bench.counts() == (5, 5)
    assert bench.counts() == (0, 0)
    assert [encoder.loads for encoder in bench.encoders] == [0, 0]


def test_an_edited_caption_is_one_text_and_no_latents(bench):
    bench.run()
    (bench.data / "clip1.txt").write_text("another caption")
    assert bench.counts() == (0, 1)


def test_an_added_clip_is_one_latent(bench):
    bench.run()
    bench.clip("new.mp4", 20, caption="clip 1")
    assert bench.counts() == (1, 0)


def test_renaming_moving_and_repeating_cost_nothing(bench):
    bench.run()
    bench.data.rename(bench.data.parent / "moved")
    bench.data = bench.data.parent / "moved"
    (bench.data / "clip1.mp4").rename(bench.data / "renamed.mp4")
    (bench.data / "clip1.txt").rename(bench.data / "renamed.txt")
    _, report = bench.run(Settings(path=bench.data, num_repeats=7.0))
    assert report.made == {"latents": (0, 5), "text": (0, 5)}


def test_another_vae_encodes_all_latents_and_no_text(bench):
    bench.run()
    bench.vae.write_text("another vae")
    assert bench.counts() == (5, 0)
    bench.text.write_text("another text encoder")
    assert bench.counts() == (0, 5)


def test_changed_bytes_and_other_shapes_encode_what_they_touch(bench):
    bench.run()
    bench.clip("clip0.mp4", 25, caption="clip 0")
    assert bench.counts() == (1, 0)
    _, report = bench.run(Settings(path=bench.data, frame_buckets=(1, 5)))
    assert report.made == {"latents": (4, 1), "text": (0, 5)}  # the still and the captions stay


def test_regenerate_makes_everything_anew(bench):
    bench.run()
    manifest = bench.manifest(regenerate=True)
    report = bench.fill([manifest], regenerate=True)
    assert report.made == {"latents": (5, 0), "text": (5, 0)}


def test_the_clip_in_the_cache_is_the_one_that_was_chosen(bench):
    manifest = bench.manifest(clip_mode="single_middle")
    bench.fill([manifest])
    by_name = {entry.name: entry for entry in manifest.entries}
    assert by_name["long.mp4"].bucket == Bucket(64, 64, 9)
    numbers = [frame_numbers(pixels) for pixels in bench.encoders[0].items]
    # 30 frames at 24 fps are 20 at 16; (20 - 9) // 2 = 5, so the clip shows 5/16 s to 13/16 s
    assert [int(i / 16 * 24) for i in range(5, 14)] in numbers


@pytest.mark.parametrize("regenerate", [False, True])
def test_ranks_share_the_work_through_the_folder_alone(bench, regenerate):
    if regenerate:
        bench.run()
    manifest = bench.manifest(regenerate=regenerate)
    encoders = [[ConvEncoder(bench.vae), ByteEncoder(bench.text)] for _ in range(3)]
    reports = precache_on_ranks(bench, [manifest], encoders, regenerate=regenerate)
    assert sum(len(pair[0].items) for pair in encoders) == 5
    assert sorted(caption for pair in encoders for caption in pair[1].items) == [
        "",
        "a still",
        "clip 0",
        "clip 1",
        "clip 2",
    ]
    assert [report.made for report in reports] == [{"latents": (5, 0), "text": (5, 0)}] * 3
    assert bench.counts() == (0, 0)
    assert not list((bench.store.root / "claims").iterdir())


def test_train_and_eval_share_what_is_equal(bench, tmp_path):
    held_out = tmp_path / "eval"
    held_out.mkdir()
    (held_out / "copy.mp4").write_bytes((bench.data / "clip0.mp4").read_bytes())
    (held_out / "copy.txt").write_text("clip 2")
    train, evals = bench.manifest(), bench.manifest(Settings(path=held_out))
    report = bench.fill([train, evals])
    assert report.made == {"latents": (5, 0), "text": (5, 0)}
    assert overlap(train, evals) == [f"{held_out / 'copy.mp4'} is also a training file: {bench.data / 'clip0.mp4'}"]
    assert overlap(train, train) and not overlap(evals, Manifest([], [], [], {}, {}, ""))


def test_a_manifest_survives_the_disk(bench, tmp_path):
    (bench.data / "notes.pdf").write_text("x")
    settings = Settings(path=bench.data, num_repeats=1.5, weight=0.5, is_regularization=True)
    manifest = bench.manifest(settings, clip_mode="single_middle")
    assert {entry.weight for entry in manifest.entries} == {0.5}
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    assert (manifest.counts["latents"], manifest.counts["text"]) == ((5, 0), (5, 0))
    assert [str(item) for item in manifest.skipped] == ["notes.pdf: is not a media file (.pdf)"]


def test_sample_ids_follow_content_captions_and_shape_but_no_encoder(bench):
    def ids(manifest):
        return [entry.sample_id for entry in manifest.entries]

    before = ids(bench.manifest())
    assert len(set(before)) == 5
    other_use = bench.manifest(Settings(path=bench.data, weight=0.5, is_regularization=True))
    assert ids(other_use) == before and other_use.jobs == bench.manifest().jobs
    bench.vae.write_text("another vae")
    assert ids(bench.manifest()) == before
    (bench.data / "clip1.txt").write_text("another caption")
    after = ids(bench.manifest())
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, True, True]
    assert not set(before) & set(ids(bench.manifest(Settings(path=bench.data, resolutions=(96,)))))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_nothing_left_lists_the_first_reasons(bench):
    with pytest.raises(ValueError, match=r"nothing to train on in .*left out:\n  clip0\.mp4: 12 frames at 16 fps; the"):
        bench.manifest(Settings(path=bench.data, frame_buckets=(57,), size_buckets=((64, 64, 57),)))
    empty = bench.data / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no media files in"):
        bench.manifest(Settings(path=empty))


def test_bad_media_are_all_listed_or_left_out(bench):
    for name in ("bad1.mp4", "bad2.jpg"):
        (bench.data / name).write_bytes(b"nonsense")
        (bench.data / name).with_suffix(".txt").write_text("x")
    with pytest.raises(ValueError, match="2 media files cannot be used") as caught:
        bench.manifest()
    assert "bad1.mp4: FFmpeg cannot make sense" in str(caught.value) and "bad2.jpg: is not an" in str(caught.value)
    manifest = bench.manifest(skip_bad_media=True)
    assert len(manifest.entries) == 5 and [item.path.name for item in manifest.skipped] == ["bad1.mp4", "bad2.jpg"]


def spoil(path):
    """Damage that the scan cannot see: the first two frames and the table of frames stay as they are."""
    with av.open(str(path)) as container:
        spans = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    for start, size in spans[2:]:
        content[start : start + size] = b"\xff" * size
    path.write_bytes(content)


def test_a_clip_that_breaks_while_decoding_is_named_after_all_others_are_done(bench):
    spoil(bench.clip("spoilt.mp4", 30, caption="clip 0"))
    with pytest.raises(ValueError, match=r"1 clip cannot be decoded .skip_bad_media = true") as caught:
        bench.run(workers=1)
    assert str(bench.data / "spoilt.mp4") in str(caught.value)
    assert len(bench.encoders[0].items) == 5 and not bench.encoders[0].loaded

    manifest, report = bench.run(workers=1, skip_bad_media=True)
    [(key, skipped)] = report.failed.items()
    assert report.made == {"latents": (0, 5), "text": (5, 0)} and skipped.path.name == "spoilt.mp4"
    remaining = manifest.without(report.failed)
    assert len(remaining.entries) == 5 and remaining.skipped[-1] == skipped
    assert key not in {key for entry in remaining.entries for key in entry.media_keys}


def test_an_encoder_that_gives_nan_stops_the_run_and_is_unloaded(bench):
    manifest = bench.manifest()
    bench.encoders[0].conv.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"clip0\.mp4: encoding gave NaN or infinity in 'latents'"):
        bench.fill([manifest], workers=1)
    assert not bench.encoders[0].loaded


def test_a_lost_entry_is_found_before_training_starts(bench, monkeypatch):
    manifest = bench.manifest()
    monkeypatch.setattr(bench.store, "write", lambda *args: None)
    with pytest.raises(RuntimeError, match=r"missing from the cache .* do all nodes see the same cache folder"):
        bench.fill([manifest])


def test_a_worker_that_dies_or_hangs_costs_its_item_alone():
    items = ["a", "dies", "b", "hangs", "c", "raises", "d"]
    with WorkerPool(die_or_hang, workers=2, timeout_s=2.0, timeout_key="some_timeout_s") as pool:
        outcomes = list(pool.run(items, ahead=4))
        processes = [worker.process for worker in pool._workers]
    assert [outcome.item for outcome in outcomes] == items
    errors = {outcome.item: outcome.error for outcome in outcomes if outcome.error}
    assert isinstance(errors["dies"], WorkerLost)
    assert "dies: the worker process was killed by SIGKILL" in str(errors["dies"])
    assert str(errors["hangs"]) == "hangs: no progress for 2 s; raise some_timeout_s if it is only slow"
    assert isinstance(errors["raises"], KeyError)
    assert len(errors) == 3 and not any(process.is_alive() for process in processes)


def test_decoding_ahead_never_overwrites_what_is_still_held(tmp_path):
    """Each item stays intact until `held` more were asked for, through sizes that share one ring of memory."""
    videos = [write_video(tmp_path / f"{i}.mp4", 12 + i) for i in range(3)]
    sizes = [Bucket(64, 48, 9), Bucket(32, 32, 5)]
    jobs = [PixelJob(str(i), videos[i % 3], True, i % 3 / SPEC.fps, SPEC.fps, sizes[i % 2]) for i in range(24)]
    held = []
    for item in decoded_clips(jobs, workers=2, held=3, timeout_s=60):
        held = [*held, item][-3:]
        sleep(0.02)  # time for the workers to run as far ahead as they may
        for old in held:
            first = int(old.job.start * 16)
            assert frame_numbers(old.pixels) == list(range(first, first + old.job.bucket.frames))
    assert held[-1].job is jobs[-1]


def test_workers_stay_free_of_torch():
    code = "import sys, utils.data.decode_pool, utils.data.scan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
