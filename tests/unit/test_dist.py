"""Which device a rank takes, seen without a GPU."""

import pytest
import torch

from utils import dist


@pytest.fixture
def two_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return taken


def test_a_rank_takes_the_gpu_of_its_number(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_SIZE", "2")
    dist.claim_device()
    assert two_gpus == [1]
    assert dist.device() == torch.device("cuda", 1)
    assert dist.backend() == "cpu:gloo,cuda:nccl"


@pytest.mark.parametrize("facts", [{"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}])
def test_more_ranks_than_gpus(two_gpus, monkeypatch, facts):
    for name, value in {**facts, "CUDA_VISIBLE_DEVICES": "4,5"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"3 ranks .* 2 GPUs are visible \(CUDA_VISIBLE_DEVICES = 4,5\).*--num_gpus=2"):
        dist.claim_device()
    assert not two_gpus


def test_what_deepspeed_is_kept_off_is_not_used(two_gpus, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    dist.claim_device()
    assert not two_gpus
    assert dist.device() == torch.device("cpu")
    assert dist.backend() == "gloo"
