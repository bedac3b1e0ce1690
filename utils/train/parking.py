"""Frozen weights of a model that waits for its turn: a copy in host memory, and nothing on the device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from utils.monitor.console import short_bytes

# One allocation holds many weights: torch rounds pinned memory up to a power of two, which for a weight of
# 13824 x 5120 in bfloat16 (135 MiB) would waste nearly half.
CHUNK_BYTES = 1 << 30
ALIGNMENT = 256  # bytes; what CUDA gives a tensor of its own


class Parking:
    """Keeps frozen parameters either on the device or in host memory.

    They do not change, so the host's copy is made once, at the first `park`, and kept for good: going back is one copy
    from host to device, and parking again costs nothing. A parked parameter is its host copy: whoever runs the model
    then hears of two devices.

    Args:
        parameters: of this rank's stage; those that are trained stay where they are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._frozen = [p for p in parameters if not p.requires_grad]
        self._copies: list[Tensor] = []
        self._device = self._frozen[0].device if self._frozen else torch.device("cpu")
        self.parked = False

    def park(self) -> None:
        """Give the device its memory back. Nothing where it is parked already.

        Raises:
            ValueError: the host has too little memory for the copy.
        """
        if self.parked:
            return
        if not self._copies:
            self._copies = _to_host(self._frozen, pinned=self._device.type == "cuda")
        for parameter, copy in zip(self._frozen, self._copies, strict=True):
            parameter.data = copy
        self.parked = True

    def wake(self) -> None:
        """Bring the weights back, bit for bit. Nothing where they are there already."""
        if not self.parked:
            return
        for parameter, copy in zip(self._frozen, self._copies, strict=True):
            # a copy on a CPU too: there the two ways must not differ, for the tests to mean something
            parameter.data = copy.to(self._device, non_blocking=True, copy=True)
        self.parked = False


def _to_host(weights: Sequence[Tensor], pinned: bool) -> list[Tensor]:
    """A copy of each in host memory, many in one allocation."""
    copies: list[Tensor] = []
    for group in groups([tensor_bytes(weight) for weight in weights]):
        room = sum(aligned(tensor_bytes(weights[i])) for i in group)
        try:
            chunk = torch.empty(room, dtype=torch.uint8, pin_memory=pinned)
        except RuntimeError as error:
            total = short_bytes(sum(map(tensor_bytes, weights)))
            raise ValueError(
                f"the host has no room for the {total} of frozen weights that wait there while another expert "
                f"trains ({str(error).splitlines()[0]}); train one expert after the other, use more pipeline_stages, "
                "or allow more locked memory (ulimit -l)"
            ) from error
        start = 0
        for weight in (weights[i] for i in group):
            copy = chunk[start : start + tensor_bytes(weight)].view(weight.dtype).view(weight.shape)
            copies.append(copy.copy_(weight.detach()))
            start += aligned(tensor_bytes(weight))
    return copies


def groups(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in order, as many to a group as fit a chunk; what is larger than a chunk is a group of its own."""
    groups: list[list[int]] = []
    used = CHUNK_BYTES + 1
    for index, size in enumerate(sizes):
        if used + aligned(size) > CHUNK_BYTES:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += aligned(size)
    return groups


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()
