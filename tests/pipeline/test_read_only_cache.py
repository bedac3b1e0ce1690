"""Starts on a cache that can only be read: they train where it has everything, and are refused where not."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.helpers import forked
from tests.helpers.media import write_frames, write_video
from utils.data.black_masks import BLACK_FILE

pytestmark = pytest.mark.pipeline

CONFIG = """
output_dir = '{folder}/runs'
cache_dir = '{folder}/cache'
dataset = '{folder}/dataset.toml'
epochs = 10
max_steps = 2
save_every_n_epochs = 10
map_num_proc = 1
[model]
type = 'toy'
[adapter]
type = 'lora'
rank = 2
[optimizer]
type = 'adamw'
lr = 1e-3
"""
DATASET = """
resolutions = [64]
frame_buckets = [5]
video_clip_mode = 'random_start'
frame_sample = 20
[[directory]]
path = '{folder}/train'
mask_path = '{folder}/masks'
"""
# Shell: its first word is the folder, what follows is the command to start, in a namespace where it may mount.
BOUND = 'mkdir "$0/cache" && mount --bind "$0/cache" "$0/cache" && exec "$@"'
READ_ONLY = ("mount", "-o", "remount,ro,bind")


class Ended(NamedTuple):
    statuses: list[int]
    said: str


def start(folder: Path, name: str, *words: str, ranks: int = 2) -> Ended:
    import models
    import train

    models.FAMILIES["toy"] = "tests.helpers.toy:ToyFamily"
    words = ("--config", str(folder / "config.toml"), *words)
    started = forked.start(ranks, folder / name, lambda: sys.exit(train.main(words)))
    return Ended(forked.statuses(started), "\n".join(rank.log.read_text() for rank in started))


def listed(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder / "cache").rglob("*")}


def starts(folder: Path, _: None) -> dict[str, Ended]:
    forked.import_all()
    told = {"filling": start(folder, "filling", "--cache_only", ranks=1)}
    before = listed(folder)
    subprocess.run([*READ_ONLY, str(folder / "cache")], check=True)
    told["training"] = start(folder, "training")
    told["nothing to do"] = start(folder, "nothing", "--cache_only", ranks=1)
    told["plan"] = start(folder, "plan", "--plan", ranks=1)
    (folder / "train" / "clip0.txt").write_text("another caption")
    told["one more"] = start(folder, "more", ranks=1)
    assert listed(folder) == before
    return told


def can_mount() -> bool:
    try:
        made = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
        return not subprocess.run(made, capture_output=True, check=False).returncode
    except OSError:
        return False


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    if not can_mount():
        pytest.skip("mounts a folder to be read alone, which needs user namespaces")
    folder = tmp_path_factory.mktemp("read_only")
    for name in ("train", "masks"):
        (folder / name).mkdir()
    for number in range(2):
        write_video(folder / "train" / f"clip{number}.mp4", 24 + 2 * number, size=(64, 64), grain=True)
        (folder / "train" / f"clip{number}.txt").write_text(f"caption {number}")
    mask = np.zeros((24, 64, 64, 3), np.uint8)
    mask[20:] = 255  # of the starts 0 to 19 those before 16 see no white
    write_frames(folder / "masks" / "clip0.mov", mask)
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    (folder / "dataset.toml").write_text(DATASET.format(folder=folder))
    inside = ["unshare", "-Urm", "sh", "-c", BOUND, str(folder)]
    return folder, forked.run_forked("tests.pipeline.test_read_only_cache:starts", folder, inside=inside)


def test_what_is_there_is_trained_on(told):
    folder, ended = told
    assert ended["filling"].statuses == [0]
    left_out = "16 crops or starts of 1 clip: left out, since the loss mask is black there"
    assert left_out in " ".join(ended["filling"].said.split())
    assert len((folder / "cache" / BLACK_FILE).read_text().split()) == 16
    training = ended["training"]
    assert training.statuses == [0, 0], training.said
    assert training.said.count("cannot be written to (Read-only file system): everything is there, so it is onl") == 1
    assert left_out in " ".join(training.said.split()) and "Traceback" not in training.said
    run = min((folder / "runs").glob("20*"))
    assert (run / "step2").is_dir() or list(run.glob("epoch*")), "it has trained to its end"
    assert not [path for path in run.iterdir() if path.name.startswith(".jobs")]
    for name in ("nothing to do", "plan"):
        assert ended[name].statuses == [0], ended[name].said


def test_what_must_be_made_is_refused_before_anything_is(told):
    folder, ended = told
    statuses, said = ended["one more"]
    assert statuses == [1] and "Traceback" not in said, said
    refusal = "cannot be written to (Read-only file system), and 1 entry is to be made"
    assert f"cache_dir = '{folder / 'cache'}' {refusal}" in " ".join(said.split())
