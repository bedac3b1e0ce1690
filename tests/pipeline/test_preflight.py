"""The checks before the start, on real ranks: what each finds, and that all ranks know of it."""

import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.launch import run_ranks
from tests.helpers.models import VARIANTS, random_inputs, wan_variant

pytestmark = [pytest.mark.pipeline, pytest.mark.alone]

RANKS = 2


def worker(folder: Path, _: None) -> dict[str, object]:
    from utils import dist
    from utils.train import preflight
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


@pytest.mark.pipeline
def test_what_ranks_find_out_of_each_other(tmp_path):
    ranks = run_ranks("tests.pipeline.test_preflight:worker", RANKS, tmp_path)
    for rank, found in enumerate(ranks):
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


def test_room_and_memory_are_told_before_they_run_out(tmp_path):
    from utils.train import preflight

    stages = [preflight.Sizes(2**30, 2**20, 2**22), preflight.Sizes(2**60, 2**20, 2**22)]
    assert list(preflight._room(stages[:1], tmp_path / "not" / "yet")) == []
    (memory,) = preflight._memory(stages)
    assert "stage 1 holds 1048576 TiB" in memory and "use more pipeline_stages" in memory
    assert list(preflight._memory([preflight.Sizes(1, 1, 1)])) == []
    (room,) = preflight._room([stages[0]._replace(state=2**60)], tmp_path)
    assert room.startswith(f"output_dir = '{tmp_path}': a checkpoint and a saved model take about 1048576 TiB")


def test_attention_runs_here_and_a_dtype_without_it_is_named():
    from types import SimpleNamespace

    from utils.train import preflight

    for dtype in (torch.float32, torch.bfloat16):
        assert preflight._attention(SimpleNamespace(compute_dtype=dtype)) == []
    (wrong,) = preflight._attention(SimpleNamespace(compute_dtype=torch.float8_e4m3fn))
    assert wrong.startswith("[model] dtype = 'float8_e4m3fn': attention does not run on")
