"""Rank facts, and the few agreements that ranks make with each other."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

# A collective that waits longer than this has lost a peer. Caching has its own barrier, which may wait for hours.
COLLECTIVE_TIMEOUT = timedelta(hours=12)


def rank() -> int:
    """This process's place among all, from the launcher; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int:
    """Ranks on this machine: torchrun and DeepSpeed's launcher each have a name for it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def node() -> int:
    """This machine's place among all: torchrun and DeepSpeed's launcher each have a name for it; 0 without one."""
    return int(os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or 0)


def peers_here() -> range:
    """The ranks of this machine, this one among them; all where the launcher does not say."""
    first = rank() - local_rank()
    return range(first, first + ranks_here()) if ranks_here() > local_rank() else range(world_size())


def is_main() -> bool:
    return rank() == 0


def on_gpu() -> bool:
    """Whether this run uses GPUs. DS_ACCELERATOR=cpu keeps it off them: DeepSpeed would put its part on the CPU."""
    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def device() -> torch.device:
    """The accelerator that the launcher gave this rank, or the CPU."""
    return torch.device("cuda", local_rank()) if on_gpu() else torch.device("cpu")


def device_name() -> str:
    """The accelerator in words, or `CPU`."""
    return torch.cuda.get_device_name() if on_gpu() else "CPU"


def claim_device() -> None:
    """Make this rank's GPU the current one, where GPUs are used.

    Raises:
        ValueError: more ranks were started on this machine than it has GPUs; the same on each of them.
    """
    if not on_gpu():
        return
    wanted, gpus = max(ranks_here(), local_rank() + 1), torch.cuda.device_count()
    if wanted > gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = f" (CUDA_VISIBLE_DEVICES = {visible})" if visible is not None else ""
        raise ValueError(
            f"{wanted} ranks were started on this machine, and {gpus} GPU{'s are' if gpus > 1 else ' is'} "
            f"visible{seen}: each rank needs its own; start with --num_gpus={gpus}"
        )
    torch.cuda.set_device(local_rank())


def backend() -> str:
    """gloo beside nccl on GPUs, so that host values can be agreed on without touching a stream."""
    return "cpu:gloo,cuda:nccl" if on_gpu() else "gloo"


def barrier() -> None:
    if dist.is_initialized():
        agree_on_max(0)


def agree_on_max(value: int) -> int:
    """The largest of all ranks' values, on the host."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=_host_group())
    return int(shared.item())


def join_flags(value: int) -> int:
    """The bits that any rank has set, on every rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.int64)
    dist.all_reduce(shared, op=dist.ReduceOp.BOR, group=_host_group())
    return int(shared.item())


def join_flags_later(value: int) -> Callable[[], int]:
    """As `join_flags`, beside other work: what is returned waits until all ranks have asked, and gives the bits."""
    if not dist.is_initialized():
        return lambda: value
    shared = torch.tensor([value], dtype=torch.int64)
    work = dist.all_reduce(shared, op=dist.ReduceOp.BOR, group=_host_group(), async_op=True)

    def answer() -> int:
        work.wait()
        return int(shared.item())

    return answer


def from_main(value: int) -> int:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(shared, src=0, group=_host_group())
    return int(shared.item())


def text_from_main(text: str) -> str:
    """Rank 0's string, on every rank."""
    if not dist.is_initialized():
        return text
    data = text.encode()
    length = from_main(len(data))
    shared = torch.zeros(length, dtype=torch.uint8)
    if is_main():
        shared = torch.frombuffer(bytearray(data), dtype=torch.uint8).clone() if data else shared
    dist.broadcast(shared, src=0, group=_host_group())
    return bytes(shared.tolist()).decode()


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Element-wise sum of a CPU tensor over all ranks; `values` is changed in place."""
    if dist.is_initialized():
        dist.all_reduce(values, group=_host_group())
    return values


def gather_text(text: str) -> Sequence[str]:
    """Every rank's string, on every rank, in rank order."""
    if not dist.is_initialized():
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    longest = agree_on_max(len(data))
    padded = torch.zeros(longest + 8, dtype=torch.uint8)
    padded[:8] = torch.tensor(list(len(data).to_bytes(8, "little")), dtype=torch.uint8)
    padded[8 : 8 + len(data)] = data
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded, group=_host_group())
    lengths = [int.from_bytes(bytes(part[:8].tolist()), "little") for part in parts]
    return [bytes(part[8 : 8 + length].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]


_groups: dict[int, dist.ProcessGroup] = {}


def _host_group() -> dist.ProcessGroup | None:
    """A gloo group over all ranks: agreements must work while a GPU stream is busy or stuck."""
    if dist.get_backend() == "gloo":
        return None
    key = id(dist.group.WORLD)
    if key not in _groups:
        _groups[key] = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return _groups[key]
