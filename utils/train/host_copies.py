"""Copies of tensors in host memory that stay as they are while training goes on; the memory is kept for the next."""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from utils import dist
from utils.data.room import free_memory
from utils.train.optimizers import map_tensors
from utils.train.parking import aligned, groups, tensor_bytes

T = TypeVar("T")

SHARE = 0.8  # of the free host memory that copies may take


class HostCopies:
    """Page-locked memory where the tensors come from a GPU: the copy is then as fast as the bus."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []

    def of(self, value: T) -> T | None:
        """`value`, nested dicts and lists, with each tensor in it copied. None where the host has no room.

        The copies are those of the last call, with other content: be done with them.
        """
        tensors: list[Tensor] = []
        map_tensors(value, lambda tensor: tensors.append(tensor) or tensor)
        pinned = any(tensor.device.type == "cuda" for tensor in tensors)
        if not self._make_room([tensor_bytes(tensor) for tensor in tensors], pinned):
            return None
        places = self._places(tensors)
        copied = map_tensors(value, lambda tensor: _fill(*next(places), tensor))
        if pinned:
            torch.cuda.current_stream().synchronize()
        return copied

    def _make_room(self, sizes: list[int], pinned: bool) -> bool:
        wanted = [sum(aligned(sizes[i]) for i in group) for group in groups(sizes)]
        if wanted == [chunk.numel() for chunk in self._chunks]:
            return True
        self._chunks = []  # before the new ones are made: there may be no room for both
        if sum(wanted) > SHARE * free_memory() / dist.ranks_here():
            return False
        try:
            self._chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in wanted]
        except RuntimeError:  # not so much of it can be page-locked
            self._chunks = []
        return bool(self._chunks) or not wanted

    def _places(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Room for each tensor in the chunks, and the same room with a storage of its own: torch.save writes all of a
        storage."""
        for chunk, group in zip(self._chunks, groups([tensor_bytes(t) for t in tensors]), strict=True):
            memory, start = memoryview(chunk.numpy()), 0
            for tensor in (tensors[i] for i in group):
                size = tensor_bytes(tensor)
                if size:
                    rooms = (
                        chunk[start : start + size],
                        torch.frombuffer(memory[start : start + size], dtype=torch.uint8),
                    )
                    into, alone = (room.view(tensor.dtype).view(tensor.shape) for room in rooms)
                    yield into, alone
                else:  # which `frombuffer` refuses
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    yield empty, empty
                start += aligned(size)


def _fill(into: Tensor, alone: Tensor, tensor: Tensor) -> Tensor:
    into.copy_(tensor.detach(), non_blocking=True)
    return alone
