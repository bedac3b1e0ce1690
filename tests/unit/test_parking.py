"""A parked model's frozen weights hold nothing but their host copy, and come back bit for bit."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.reductions import StorageWeakRef

from tests.helpers.toy_model import ToyBlock
from utils.train import parking
from utils.train.parking import Parking


def model() -> nn.ModuleDict:
    """Frozen weights of several dtypes and shapes, one of them in eight bits, and a trained one."""
    generator = torch.Generator().manual_seed(0)
    frozen = {
        "matrix": torch.randn(5, 3, generator=generator),
        "low": torch.randn(7, generator=generator).to(torch.bfloat16),
        "eight": torch.randn(4, 4, generator=generator).to(torch.float8_e4m3fn),
        "scale": torch.tensor(0.3),
        "empty": torch.zeros(0, 3),
    }
    held = nn.ParameterDict({name: nn.Parameter(value, requires_grad=False) for name, value in frozen.items()})
    return nn.ModuleDict({"frozen": held, "trained": nn.Linear(3, 3)})


def storages(module: nn.Module) -> list[StorageWeakRef]:
    return [StorageWeakRef(p.untyped_storage()) for p in module.parameters() if p.numel()]


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().clone() for name, p in module.named_parameters()}


def test_what_is_parked_is_gone_and_comes_back():
    module = model()
    before, trained = values(module), [p.data_ptr() for p in module["trained"].parameters()]
    kinds = {name: (p.dtype, p.shape) for name, p in module.named_parameters()}
    place = Parking(module.parameters())
    for _ in range(3):
        awake = storages(module["frozen"])
        place.park()
        assert place.parked
        assert all(reference.expired() for reference in awake)
        assert {name: (p.dtype, p.shape) for name, p in module.named_parameters()} == kinds
        host = storages(module["frozen"])
        place.wake()
        assert not place.parked
        assert not any(reference.expired() for reference in host), "the host's copy is kept for good"
        assert all(torch.equal(value, before[name]) for name, value in values(module).items())
        assert [p.data_ptr() for p in module["trained"].parameters()] == trained


def test_a_copy_is_made_once():
    module = model()
    place = Parking(module.parameters())
    place.park()
    first = {p.untyped_storage().data_ptr() for p in module["frozen"].parameters()}
    place.park()
    place.wake()
    place.wake()
    place.park()
    assert {p.untyped_storage().data_ptr() for p in module["frozen"].parameters()} == first


def test_weights_share_few_allocations(monkeypatch):
    monkeypatch.setattr(parking, "CHUNK_BYTES", 1024)
    filled = [torch.full((count,), float(count)) for count in (60, 80, 90, 600)]
    module = nn.ParameterList([nn.Parameter(value, requires_grad=False) for value in filled])
    place = Parking(module.parameters())
    place.park()
    sizes: dict[int, int] = {}
    for parameter in module:
        storage = parameter.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        assert parameter.eq(len(parameter)).all()
    assert list(sizes.values()) == [256 + 512, 512, 2560], "240 and 320 bytes together, 360, and 2400 by itself"


def test_a_model_that_is_trained_whole_has_nothing_to_park():
    layer = nn.Linear(3, 2)
    before = [p.data_ptr() for p in layer.parameters()]
    place = Parking(layer.parameters())
    place.park()
    assert [p.data_ptr() for p in layer.parameters()] == before


def test_a_host_without_room_is_told(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nlong story")

    module = model()
    monkeypatch.setattr(parking.torch, "empty", full)
    with pytest.raises(ValueError, match=r"for the \d+ B of frozen .* \(CUDA error: out of memory\); train one expert"):
        Parking(module.parameters()).park()


def test_models_that_take_turns_share_what_is_compiled():
    """A weight that comes back is another tensor, and compiling a block of 14B takes half a minute."""
    torch.compiler.reset()
    counter, x = CompileCounter(), torch.ones(1, 2, 8)
    blocks = [ToyBlock(8).requires_grad_(False) for _ in range(2)]
    places = [Parking(block.parameters()) for block in blocks]
    boundary = (x, torch.ones(1, 2, 3), torch.ones(3))
    wanted = [block(boundary)[0].clone() for block in blocks]
    for block in blocks:
        block.compile(backend=counter, dynamic=False)
    places[1].park()
    for turn in (0, 1, 0, 1, 1, 0):
        places[1 - turn].park()
        places[turn].wake()
        assert torch.equal(blocks[turn](boundary)[0], wanted[turn])
    assert counter.frame_count == 1
