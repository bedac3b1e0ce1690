"""The checks before the start, on real ranks: what each finds, and that all ranks know of it."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import forked
from tests.helpers.models import VARIANTS, random_inputs, wan_variant
from tests.helpers.tiny import tiny_checkpoint
from utils.data.records import Bucket
from utils.train import preflight
from utils.train.estimate import Held, Load

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]

RANKS = 2


def worker(folder: Path) -> dict[str, object]:
    from utils import dist
    from utils.train.engine import init_distributed

    init_distributed()
    rank = dist.rank()
    told = f"node{rank} (rank {rank})"
    one, own = folder / "one", folder / f"of{min(rank, 1)}"
    found: dict[str, object] = {
        "fine": preflight.within(60, preflight.meet, told),
        "same": list(preflight.differing("a", told)),
        "differing": list(preflight.differing("ab"[rank == 1], told)),
        "shared": list(preflight.unshared({"output_dir": one, "cache_dir": one / "cache"}, told, 20)),
        "unshared": list(preflight.unshared({"output_dir": one, "cache_dir": own}, told, 0.3)),
        "no folder": list(preflight.unshared({"output_dir": Path("/proc/none")}, told, 0.3)),
        "one found": preflight._agreed("x", ["rank 1's words"] if rank == 1 else []).wrong,
    }
    found["left"] = [str(path) for path in folder.rglob(".shared-*")]
    dist.barrier()
    started = time.monotonic()
    lost = threading.Event()
    found["silent"] = preflight.within(0.2, lambda: lost.wait(20) and None, told)
    found["waited"] = time.monotonic() - started
    lost.set()
    return found


def test_what_ranks_find_out_of_each_other(told):
    for rank, found in enumerate(told["ranks"]):
        assert (found["fine"], found["same"], found["shared"], found["left"]) == ([], [], [], [])
        (config,) = found["differing"]
        assert "node1 (rank 1) read other settings than node0 (rank 0)" in config and "copy the files" in config
        (folder,) = found["unshared"]
        assert folder.startswith("cache_dir = '") and "output_dir" not in folder
        assert "node1 (rank 1) does not see what node0 (rank 0) writes" in folder
        assert found["no folder"][0].startswith("output_dir = '/proc/none' cannot be written to")
        assert found["one found"] == ("rank 1's words",)
        (silent,) = found["silent"]
        assert f"node{rank} (rank {rank})" in silent and f"from rank {(rank - 1) % RANKS} within 0.2 s" in silent
        assert found["waited"] < 10


@pytest.mark.parametrize("name", VARIANTS)
def test_a_blank_sample_is_what_the_model_reads(name):
    from models.base import Draw

    family = wan_variant(name)
    stride = family.media_spec().latent_stride
    sample = family.blank_sample(6 * stride, 4 * stride, 9)
    batch = family.micro_batch([sample, sample], [Draw(0.3, 1), Draw(0.7, 2)])
    assert [x.shape for x in batch.inputs] == [x.shape for x in random_inputs(name=name)]
    assert all(torch.isfinite(x).all() for x in batch.inputs)


GIB = 2**30
LOAD = Load(Bucket(832, 480, 81), 2)
STAGE = Held(frozen=4 * GIB, trained=GIB, gradients=GIB, state=2 * GIB, activations=40 * GIB)


def test_room_for_a_checkpoint_is_told_before_it_runs_out(tmp_path):
    assert list(preflight._room([STAGE._replace(trained=1, state=1)], tmp_path / "not" / "yet")) == []
    (room,) = preflight._room([STAGE._replace(state=2**60)], tmp_path)
    assert room.startswith(f"output_dir = '{tmp_path}': a checkpoint and a saved model take about 1048576 TiB")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_what_is_certain_is_refused_and_what_is_estimated_is_doubted(on_gpu):
    """8 GiB are certain, 48 with activations; on a CPU what waits in host memory takes from the same."""
    room = preflight.Room(16 * GIB, 16 * GIB, on_gpu)
    assert preflight.too_much(1, STAGE, room) == []
    (doubt,) = preflight.too_full(1, STAGE, LOAD, room)
    assert "stage 1 may run out of memory in steps with micro-batches of 2 clips of 832x480x81" in doubt
    assert "by estimate it takes 48 GiB (4 GiB of frozen weights, 1 GiB trained," in doubt
    assert doubt.endswith(f"{'its GPU' if on_gpu else 'its share of the host' + chr(39) + 's memory'} has 16 GiB free")
    assert list(preflight.too_full(1, STAGE._replace(activations=None), LOAD, room)) == []
    assert list(preflight.too_full(1, STAGE._replace(activations=8 * GIB), LOAD, room)) == []
    (wrong,) = preflight.too_much(1, STAGE._replace(state=11 * GIB), room)
    assert "stage 1 holds 17 GiB before any clip is there" in wrong and "use more pipeline_stages" in wrong
    assert "activations" not in wrong
    parked = STAGE._replace(parked=12 * GIB)
    assert len(preflight.too_much(1, parked, room)) == (not on_gpu)
    assert len(preflight.too_much(1, parked._replace(parked=20 * GIB), room)) == 1
    offloaded = STAGE._replace(activations=GIB, offloaded=20 * GIB)
    (doubt,) = preflight.too_full(1, offloaded, LOAD, room)
    assert ("20 GiB wait in host memory" in doubt) == on_gpu


# --- as a user runs it ------------------------------------------------------------------------------------------------

# starts -> what is set besides
STARTS: dict[str, list[str]] = {
    "fine": [],
    "of a folder that cannot be written to": ["output_dir='/proc/none'"],
}


def starts(folder: Path, _: None) -> dict[str, Any]:
    """What `worker` finds on each rank; then the quickstart with --preflight, on two ranks that are a stage each: how
    each ended, and what rank 0 said."""
    import train

    forked.import_all()
    apart = folder / "apart"
    told: dict[str, Any] = {"ranks": forked.results(RANKS, apart, lambda: worker(apart))}
    for number, (name, settings) in enumerate(STARTS.items()):
        mine = {
            "output_dir": f"'{folder}/runs'",
            "cache_dir": f"'{folder}/cache'",
            "model.ckpt_path": f"'{folder}/official'",
        }
        words = ["--config", "examples/quickstart.toml", "--preflight"]
        for setting in (*(f"{key}={value}" for key, value in mine.items()), *settings):
            words += ["--set", setting]
        logs = folder / f"start_{number}"
        ended = forked.statuses(forked.start(RANKS, logs, lambda words=words: sys.exit(train.main(words))))
        told[name] = ended, (logs / "rank_0.log").read_text()
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("preflight")
    tiny_checkpoint(folder)
    return forked.run_forked("tests.pipeline.test_preflight:starts", folder)


def checks_of(said: str) -> dict[str, str]:
    """Name of a check -> ok, doubt or FAILED."""
    lines = (line.partition(" ") for line in said.splitlines())
    return {rest.strip(): mark for mark, _, rest in lines if mark in ("ok", "doubt", "FAILED")}


CHECKS = [
    "all ranks reach each other",
    "all ranks have the same config",
    "all ranks share the folders",
    "a block of the model runs here in float32",
    "the disk has room for a checkpoint",
    "the memory has room for weights and optimizer",
    "the memory has room for a step, by estimate",
]


def test_where_all_is_well_it_steps_and_ends_with_0(told):
    ended, said = told["fine"]
    assert ended == [0, 0], said
    assert checks_of(said) == dict.fromkeys([*CHECKS, "a step at the largest bucket"], "ok")
    assert "a step with micro-batches of 1 clip of 80x80x17 takes " in said
    assert "peak memory: stage 0 " in said and ", stage 1 " in said
    assert "stage 1, by estimate: 1.46 MiB of frozen weights, 420 KiB trained" in said


def test_what_is_wrong_is_named_and_it_ends_with_1(told):
    ended, said = told["of a folder that cannot be written to"]
    assert ended == [1, 1], said
    wrong = {"all ranks share the folders", "the disk has room for a checkpoint"}  # of /proc are 0 bytes free
    assert checks_of(said) == {name: "FAILED" if name in wrong else "ok" for name in CHECKS}
    assert "output_dir = '/proc/none' cannot be written to (" in said
    assert " s here; peak memory" not in said, "no step was taken"
    assert "Traceback" not in said
