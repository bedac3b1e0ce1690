"""What could end a run hours later, tried within seconds before anything is encoded."""

import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as torch_dist
import torch.nn.functional as F

from models.base import ModelFamily
from utils import dist
from utils.config.load import config_digest
from utils.data.room import free_memory
from utils.monitor.console import short_bytes
from utils.train.build import EngineSettings, cut_model
from utils.train.setup import Job, engine_settings

MEETING_S = 120.0  # NCCL takes tens of seconds to connect many GPUs for the first time
SHARED_S = 30.0  # network file systems may remember for so long that a file is not there
HEAD_DIM = 128  # of the attention that is tried: that of every released Wan
MOMENTS = 2  # float32 numbers that Adam keeps of each trained one


class Check(NamedTuple):
    """One thing that was tried, on all ranks."""

    name: str
    wrong: tuple[str, ...]  # messages; none when all is well


def preflight(job: Job) -> list[Check]:
    """Every quick check, on all ranks together; the same list on each of them.

    Whether weights are complete, and formats and settings fit, `read_config` has found out by now.
    """
    config, told = job.config, f"{socket.gethostname()} (rank {dist.rank()})"
    folders = {"output_dir": config.output_dir, "cache_dir": config.cache_dir}
    settings = engine_settings(config)
    stages = [each for expert in job.family.experts().values() for each in stage_sizes(expert, settings)]
    job.activity.begin("the checks before the start")
    return [
        _agreed("all ranks reach each other", within(MEETING_S, meet, told)),
        Check("all ranks have the same config", tuple(differing(config_digest(job.loaded), told))),
        Check("all ranks share the folders", tuple(unshared(folders, told))),
        _agreed(f"{_word(job.family.compute_dtype)} and attention run here", _attention(job.family)),
        _agreed("the disk has room for a checkpoint", list(_room(stages, config.output_dir))),
        _agreed("the memory has room for the weights", list(_memory(stages[: config.pipeline_stages]))),
    ]


def require(checks: Sequence[Check]) -> None:
    """Raises `ValueError` with all that is wrong."""
    if wrong := [message for check in checks for message in check.wrong]:
        raise ValueError("\n".join(wrong))


def _agreed(name: str, wrong: Sequence[str]) -> Check:
    """What any rank found wrong, on all of them, each message once."""
    of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps(list(wrong)))]
    return Check(name, tuple(dict.fromkeys(message for messages in of_ranks for message in messages)))


# --- ranks ------------------------------------------------------------------------------------------------------------


def within(seconds: float, action: Callable[[], str | None], told: str) -> list[str]:
    """What `action` says is wrong; or that it did not end in time, which is how a network says so.

    Args:
        told: who we are, for the message.
    """
    said: list[str | None] = []

    def run() -> None:
        try:
            said.append(action())
        except (RuntimeError, ValueError) as error:
            said.append(str(error).splitlines()[0])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    before = (dist.rank() - 1) % dist.world_size()
    silent = f"nothing came from rank {before} within {seconds:g} s"
    wrong = [silent] if not said else [text for text in said if text]
    mend = "look at the firewall, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, and try NCCL_P2P_DISABLE=1"
    return [f"{told}: ranks do not reach each other: {text}; {mend}" for text in wrong]


def meet() -> str | None:
    """A number from each rank to the next, round all of them, and a sum over all. What is wrong, if anything."""
    ranks, rank, device = dist.world_size(), dist.rank(), dist.device()
    if ranks == 1 or not torch_dist.is_initialized():
        return None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a thread has a current device of its own
    mine, heard = (torch.full((1,), float(rank), device=device) for _ in range(2))
    exchange = [
        torch_dist.P2POp(torch_dist.isend, mine, (rank + 1) % ranks),
        torch_dist.P2POp(torch_dist.irecv, heard, (rank - 1) % ranks),
    ]
    for work in torch_dist.batch_isend_irecv(exchange):
        work.wait()
    total = mine.clone()
    torch_dist.all_reduce(total)
    if (int(heard.item()), int(total.item())) != ((rank - 1) % ranks, ranks * (ranks - 1) // 2):
        return f"rank {(rank - 1) % ranks} sent {heard.item():g}, and all together make {total.item():g}"
    return None


def differing(digest: str, told: str) -> Iterator[str]:
    """Ranks that were given another config than rank 0: nodes with copies of the file that are not equal."""
    of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([digest, told]))]
    others = [who for its, who in of_ranks if its != of_ranks[0][0]]
    if others:
        yield (
            f"--config: {', '.join(others)} read other settings than {of_ranks[0][1]}: all ranks must be given the "
            "same run and dataset TOML, and the same --set; copy the files, or start from a shared folder"
        )


def unshared(folders: Mapping[str, Path], told: str, seconds: float = SHARED_S) -> Iterator[str]:
    """Ranks that do not see what rank 0 writes to one of `folders`, by their key."""
    if dist.world_size() == 1:
        return
    name = dist.text_from_main(f".shared-{secrets.token_hex(6)}")
    fault = ""
    try:
        if dist.is_main():
            fault = _leave_tokens(folders, name)
        dist.barrier()
        missing = [] if dist.is_main() else _not_seen(folders, name, seconds)
        of_ranks = [json.loads(text) for text in dist.gather_text(json.dumps([told, missing, fault]))]
    finally:
        if dist.is_main():
            for folder in folders.values():
                (folder / name).unlink(missing_ok=True)
    if of_ranks[0][2]:
        yield of_ranks[0][2]
        return
    for key, folder in folders.items():
        if blind := [who for who, keys, _ in of_ranks if key in keys]:
            yield (
                f"{key} = '{folder}': {', '.join(blind)} does not see what {of_ranks[0][0]} writes there: all nodes "
                "must share this folder; mount it on each of them, or name one that they share"
            )


def _leave_tokens(folders: Mapping[str, Path], name: str) -> str:
    for key, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            return f"{key} = '{folder}' cannot be written to ({error.strerror}); name a folder of yours"
    return ""


def _not_seen(folders: Mapping[str, Path], name: str, seconds: float) -> list[str]:
    deadline, missing = time.monotonic() + seconds, list(folders)
    while missing:
        missing = [key for key in missing if not _holds(folders[key], name)]
        if time.monotonic() > deadline:
            break
        time.sleep(0.05 if missing else 0)
    return missing


def _holds(folder: Path, name: str) -> bool:
    try:
        return name in os.listdir(folder)  # a listing asks the server anew where a look-up may be remembered
    except OSError:
        return False


# --- this machine -----------------------------------------------------------------------------------------------------


def _attention(family: ModelFamily) -> list[str]:
    """Whether the model's attention, which is torch's, runs forward and backward in the dtype of the matrix products.

    A call that runs in float16 may still overflow; that shows in training, step by step.
    """
    dtype, device = family.compute_dtype, dist.device()
    try:
        q, k, v = (torch.full((1, 2, 16, HEAD_DIM), 0.1, dtype=dtype, device=device).requires_grad_() for _ in "qkv")
        F.scaled_dot_product_attention(q, k, v).float().sum().backward()
        fine = all(x.grad is not None and bool(x.grad.isfinite().all()) for x in (q, k, v))
        return (
            []
            if fine
            else [f"[model] dtype = '{_word(dtype)}': attention gives no finite numbers on {dist.device_name()}"]
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        mend = "choose another dtype, or install a torch that is built for this device"
        return [f"[model] dtype = '{_word(dtype)}': attention does not run on {dist.device_name()} ({reason}); {mend}"]


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Sizes(NamedTuple):
    """Of one stage, bytes."""

    weights: int
    trained: int
    state: int  # gradients and the optimizer's moments


def stage_sizes(family: ModelFamily, settings: EngineSettings) -> list[Sizes]:
    """What each stage holds for certain; activations, which depend on the clips, come on top."""
    cut = cut_model(family, settings)
    found = []
    for first, end in zip(cut.bounds, cut.bounds[1:], strict=False):
        held = {id(p): p for layer in cut.layers[first:end] for p in layer.parameters()}.values()
        trained = [p for p in held if p.requires_grad]
        found.append(
            Sizes(
                sum(p.numel() * p.element_size() for p in held),
                sum(p.numel() * p.element_size() for p in trained),
                sum(p.numel() * (p.element_size() + 4 * MOMENTS) for p in trained),
            )
        )
    return found


def _room(stages: Sequence[Sizes], folder: Path) -> Iterator[str]:
    """Whether a checkpoint and what is saved beside it fit on the disk. Rank 0 looks: the folder is shared."""
    if not dist.is_main():
        return
    need = sum(2 * each.trained + each.state for each in stages)
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if need > free:
        yield (
            f"output_dir = '{folder}': a checkpoint and a saved model take about {short_bytes(need)}, and "
            f"{short_bytes(free)} are free; make room, or name a folder on another disk"
        )


def _memory(stages: Sequence[Sizes]) -> Iterator[str]:
    """Whether this rank's device holds the largest stage with nothing else on it. An optimizer of fewer bits needs
    less than is counted here, so that only the weights and gradients of what is trained can be refused."""
    on_gpu = dist.on_gpu()
    free = torch.cuda.mem_get_info()[0] if on_gpu else free_memory() // dist.ranks_here()
    number, need = max(enumerate(each.weights + each.trained for each in stages), key=lambda pair: pair[1])
    if need > free:
        where = "its GPU" if on_gpu else "its share of the host's memory"
        yield (
            f"{socket.gethostname()}: stage {number} holds {short_bytes(need)} of weights and gradients, and "
            f"{where} has {short_bytes(free)} free; use more pipeline_stages, transformer_dtype = 'float8', or end "
            "what else runs there"
        )
