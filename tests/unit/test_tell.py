"""What the console says of the cache, a line a kind of encoder in words for people, and how a run is gone on with."""

import io
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from utils.data.cache import CacheStore
from utils.data.manifest import Group
from utils.data.precache import Made, PrecacheReport
from utils.train import tell
from utils.train.prepare import Prepared


def test_the_cache_is_told_kind_by_kind():
    made = {
        "latents": Made(0, 19),
        "condition": Made(19, 0),
        "image": Made(1, 18),
        "text": Made(3, 1),
        "depth": Made(1, 1),
    }
    console = Console(file=io.StringIO(), width=120)
    tell.cache(console, Prepared(CacheStore(Path()), {}, PrecacheReport(made, 1.0, {})), None)
    assert console.file.getvalue().splitlines() == [
        "0 of 19 clips to encode: everything was in the cache",
        "19 of 19 conditions encoded",
        "1 of 19 image states encoded, 18 were in the cache",
        "3 of 4 captions encoded, 1 was in the cache",
        "1 of 2 depth items encoded, 1 was in the cache",
    ]


def test_what_directories_are_for_is_told_where_it_is_out_of_the_ordinary():
    console = Console(file=io.StringIO(), width=200)
    tell.sets(console, [Group(Path("a"), 2), Group(Path("b"), 1, 0.5), Group(Path("c"), 1, 2, True)])
    held = "a regularization set: on its clips the adapter is held to what the model predicts without it"
    assert console.file.getvalue().splitlines() == [
        "note: b: its clips count 0.5 times in the loss",
        f"note: c: {held}; its clips count 2 times in the loss",
    ]


@pytest.mark.parametrize(
    ("max_steps", "finished", "label"),
    [(None, True, "(raise epochs first):"), (9, True, "(raise epochs and max_steps first):"), (9, False, "go on:")],
)
def test_the_last_lines_name_what_ended_the_run(max_steps, finished, label):
    console = Console(file=io.StringIO(), width=120)
    state = SimpleNamespace(step=9)
    run = SimpleNamespace(
        run_dir=Path("runs/one"), saved=None, checkpointed=None, experts={}, state=state, last_checkpoint=9
    )
    config = SimpleNamespace(max_steps=max_steps, adapter=None, output_dir=Path("runs"))
    tell.goodbye(console, config, run, finished)
    assert "--resume_from_checkpoint one" in console.file.getvalue()
    assert label in console.file.getvalue() and "no checkpoint" not in console.file.getvalue()
    run.last_checkpoint = -1
    tell.goodbye(console, config, run, finished)
    assert ("Done, but there is no checkpoint of the last step" in console.file.getvalue()) == finished


def test_a_run_is_named_so_that_it_is_found_again(tmp_path):
    runs, elsewhere = tmp_path / "runs", tmp_path / "my runs" / "one"
    for folder in (runs, elsewhere):
        folder.mkdir(parents=True)
    assert shlex.split(tell.resume_name(runs, elsewhere)) == [str(elsewhere)]
    (tmp_path / "link").symlink_to(elsewhere)
    assert tell.resume_name(runs, tmp_path / "link") == str(tmp_path / "link")
    (runs / "one").symlink_to(elsewhere)
    assert tell.resume_name(runs, runs / "one") == tell.resume_name(runs, elsewhere) == "one"


def test_the_command_to_go_on_is_the_one_that_started():
    words = ["--config", "my run.toml", "--set", "dataset='/a b/c.toml'", "--set=x='$HOME`'", "--cache_only"]
    command = tell.start_command(4, words)
    assert shlex.split(command) == ["deepspeed", "--num_gpus=4", "train.py", "--deepspeed", *words[:-1]]
    assert """--set "dataset='/a b/c.toml'" """ in command, "as a person would write it"
    by_torchrun = shlex.split(tell.start_command(4, words, by_torchrun=True))
    assert by_torchrun == ["torchrun", "--nproc_per_node=4", "train.py", *words[:-1]]
    several = tell.start_command(4, words, nodes=2)
    assert "on 2 nodes" in several and "deepspeed --num_gpus" not in several
