"""A large dataset for benchmarks that a start has seen before: small files, remembered probes, a full cache."""

import tempfile
from pathlib import Path
from time import sleep

ROOT = Path(__file__).resolve().parents[2]

ASPECTS = [(640, 360), (480, 480), (360, 640)]  # of the sources, in turn
RUN = """
output_dir = '{folder}/runs'
cache_dir = '{folder}/cache'
dataset = '{folder}/{name}.toml'
epochs = 10
save_every_n_epochs = 1
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 4
video_clip_mode = 'uniform'
[model]
type = 'wan'
ckpt_path = '{checkpoint}'
dtype = 'float32'
[adapter]
type = 'lora'
rank = 2
[optimizer]
type = 'adamw'
lr = 1e-4
"""
DATA = """
resolutions = [32]
enable_ar_bucket = true
ar_buckets = [0.5, 1.0, 2.0]
frame_buckets = [5]
frame_sample = {clips}
[[directory]]
path = '{folder}/{name}'
"""


def make_dataset(folder: Path, name: str, files: int, clips: int) -> None:
    """Files, captions, remembered probes and a full cache."""
    from tests.helpers.media import write_video
    from utils.data.cutting import PROBES_FILE
    from utils.data.scan import describe
    from utils.data.stat_index import StatIndex

    data = folder / name
    data.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        seen = [describe(write_video(Path(scratch) / f"{w}.mp4", 60, 24, (w, h))) for w, h in ASPECTS]
    index = StatIndex(folder / "cache" / PROBES_FILE)
    for number in range(files):
        path = data / f"clip_{number:07d}.mp4"
        path.write_bytes(b"%d" % number)
        caption = f"A clip of number {number}, which has a caption of about as many words as people write, in one line."
        path.with_suffix(".txt").write_text(caption)
        version, _, *held = seen[number % len(seen)]
        index.put(path, [version, f"{number:032x}", *held])
    checkpoint = ROOT / "tests" / "data" / "wan_t2v"
    (folder / f"{name}_run.toml").write_text(RUN.format(folder=folder, name=name, checkpoint=checkpoint))
    (folder / f"{name}.toml").write_text(DATA.format(folder=folder, name=name, clips=clips))
    fill_cache(folder, name)


def fill_cache(folder: Path, name: str) -> None:
    """A first start: an entry for everything that it would encode; not synced, as this takes most of the time."""
    import torch

    from utils.data.cache import CacheStore

    sleep(2.5)  # a start does not remember what was written a moment ago
    loaded, family, store = opened(folder, name)
    manifest = scanned(loaded, family, store)
    with tempfile.TemporaryDirectory() as scratch:
        models = CacheStore(Path(scratch))
        contents = {}
        for kind, jobs in manifest.jobs.items():
            (store.root / kind).mkdir(exist_ok=True)
            for two in range(256):
                (store.root / kind / f"{two:02x}").mkdir(exist_ok=True)
            for job in jobs:
                shape = getattr(job, "bucket", None)
                if (kind, shape) not in contents:
                    tensor = torch.zeros(16, 2, shape.height // 8, shape.width // 8) if shape else torch.zeros(9, 32)
                    models.write(kind, "00", {kind: tensor.bfloat16()}, {"name": str(shape), "encoder": "bench"})
                    contents[kind, shape] = models.path(kind, "00").read_bytes()
                store.path(kind, job.key).write_bytes(contents[kind, shape])


def opened(folder, name):
    """Config, family and cache."""
    from models import family_class
    from utils.config.load import load_config
    from utils.train.prepare import open_cache

    loaded = load_config(folder / f"{name}_run.toml", ())
    return loaded, family_class(loaded.family_name)(loaded.model), open_cache(loaded.run.cache_dir)


def scanned(loaded, family, store):
    from utils.data.workers import Silent
    from utils.train.prepare import TRAIN, scan

    options = {"workers": 2, "regenerate": False, "progress": Silent()}
    return scan(loaded, family, family.encoders(), store, **options)[TRAIN]
