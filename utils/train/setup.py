"""From the command line to cached data: config, ranks, datasets, in this order."""

import argparse
import json
import logging
import os
import secrets
import socket
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from models import family_class
from models.base import ModelFamily
from utils import dist
from utils.config.load import ConfigError, LoadedConfig, load_config
from utils.config.rules import check_paths, check_rules, require
from utils.config.schema import RunConfig
from utils.data.crew import PeerLost
from utils.data.pace import record_pace
from utils.data.room import unwritable
from utils.dist_meeting import MEETING_S
from utils.monitor.logs import PATIENCE_S, captured_output, log_to_file, quiet_libraries, setup_logging, terminal
from utils.monitor.metrics import WandbSettings
from utils.monitor.progress import CacheProgress
from utils.train import tell
from utils.train.activity import Activity, Watched
from utils.train.beats import clear_left
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings
from utils.train.engine import init_distributed
from utils.train.experts import check_experts
from utils.train.fuse import Fusion
from utils.train.order import check_order, refuse_other_model
from utils.train.prepare import DEFAULT_WORKERS, Prepared, prepare
from utils.train.run_folder import SEEN_S, find_checkpoint, go_on, is_seen, new_run_folder
from utils.train.run_lock import RunLock
from utils.train.triggers import SignalFiles
from utils.train.watchdog import Watchdog, prepare_folder

logger = logging.getLogger(__name__)

CACHE_ONLY = "cache_only-"  # how folders of starts without a run begin
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Job:
    """What was asked for, checked."""

    flags: argparse.Namespace
    loaded: LoadedConfig
    family: ModelFamily
    console: Console
    notices: list[str]
    resume: Path | None = None  # checkpoint to go on with; it and the folder are known once ranks have met
    run_dir: Path | None = None
    log_file: Path | None = None
    lock: RunLock | None = None  # on the run folder
    activity: Activity = field(default_factory=Activity)  # what this rank is doing

    @property
    def config(self) -> RunConfig:
        return self.loaded.run


def read_config(flags: argparse.Namespace) -> Job:
    """Everything that can be wrong is found here, before anything slow.

    Raises:
        ConfigError: all that is wrong with the files.
    """
    quiet_libraries()
    console = terminal(PATIENCE_S)
    setup_logging(dist.rank(), console)
    share_cores()
    loaded = load_config(flags.config, flags.set)
    absent = check_paths(loaded)
    errors = check_rules(loaded, dist.world_size()) + absent
    family = None
    try:
        arguments = {"pseudo_huber_c": loaded.run.pseudo_huber_c}
        family = family_class(loaded.family_name)(loaded.model, **arguments)
    except (ValueError, OSError) as error:
        if not any("model." in message for message in absent):  # else it is told already
            errors.append(str(error) if str(error).startswith("[model]") else f"[model] {error}")
    if family is None or errors:
        raise ConfigError(errors)
    quiet_libraries()
    for encoder in family.encoders():
        encoder.check()
    notices = require(loaded, dist.world_size(), family.media_spec())
    check_experts(family, engine_settings(loaded.run))
    if loaded.run.adapter:
        family.check_formats(loaded.run.adapter.type, loaded.run.adapter.save_format)
    if loaded.run.monitoring.enable_wandb:
        wandb_settings(loaded).check()
    return Job(flags, loaded, family, console, notices)


def share_cores() -> None:
    """On a CPU, ranks of one machine divide its cores; torch would give all of them to each."""
    if not dist.on_gpu() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.ranks_here()))


def join(job: Job) -> None:
    """Meet the other ranks and agree on the run folder, and on the checkpoint to go on from.

    Rank 0 alone looks for them: ranks that did so at different moments could go on from different checkpoints.

    Raises:
        ValueError: on rank 0; there is nothing to go on from, another start is at work there, or not all ranks see it.
        OSError: on rank 0; the folder cannot be written to.
        PeerLost: the same on the others.
    """
    with captured_output(None):
        init_distributed(partial(tell.waiting, job.console), max(MEETING_S, job.config.stall_timeout_s))
    trouble: Exception | None = None
    if dist.is_main():
        try:
            find_place(job)
        except (ValueError, OSError) as error:
            trouble = error
    mine = [str(job.run_dir or ""), str(job.resume or ""), str(trouble or "")]
    run_dir, resume, refusal = json.loads(dist.text_from_main(json.dumps(mine)))
    if refusal:
        raise trouble or PeerLost(refusal)
    job.run_dir, job.resume = (Path(text) if text else None for text in (run_dir, resume))
    if job.run_dir and not dist.is_main():
        job.lock = RunLock(job.run_dir)
        job.lock.follow(dist.rank())
    if job.resume:
        require_seen(job)
    if job.run_dir:
        job.log_file = log_to_file(job.run_dir, dist.rank())
    if dist.is_main():
        tell.introduce(job.console, job.family, job.config, job.run_dir, job.resume, job.notices)


def find_place(job: Job) -> None:
    """On rank 0: the run folder, which is held from then on, and the checkpoint.

    Raises:
        ValueError: as for `join`.
        OSError: the folder cannot be written to.
    """
    flags, output_dir, asked = job.flags, job.config.output_dir, job.flags.resume_from_checkpoint
    if asked is not None and flags.replay:
        job.resume = find_checkpoint(output_dir, asked)  # its folder may be in use
    elif asked is not None:
        job.resume, job.lock = go_on(output_dir, asked, logger.info)
        job.run_dir = job.resume.parent
        SignalFiles(job.run_dir).drop()
    elif not (flags.cache_only or flags.preflight or flags.replay):
        job.run_dir = new_run_folder(output_dir)
        job.lock = RunLock(job.run_dir)
        job.lock.take(logger.info)
    if job.resume:
        try:
            refuse_other_model(job.resume, job.family.title)
        except ValueError:
            let_go(job)
            raise


def require_seen(job: Job) -> None:
    """Wait until all ranks see the checkpoint that rank 0 has found: a network disk may be late. Raises as `join`."""
    assert job.resume is not None, "found by rank 0"
    name = "" if is_seen(job.resume, SEEN_S) else f"{socket.gethostname()} (rank {dist.rank()})"
    if blind := [each for each in dist.gather_text(name) if each]:
        let_go(job)
        refusal = (
            f"{', '.join(blind)} does not see the checkpoint {job.resume}, which rank 0 goes on from, within "
            f"{SEEN_S:g} s: all nodes must share output_dir = '{job.config.output_dir}'; mount it on each of them"
        )
        raise ValueError(refusal) if dist.is_main() else PeerLost(refusal)


def let_go(job: Job) -> None:
    """Of the run folder, before there was anything done in it."""
    if job.lock is not None:
        job.lock.release(dist.is_main(), clean=True)
        job.lock = None


def _can_hold(cache_dir: Path) -> bool:
    """Whether files may be left in the cache, which may be one to be read alone."""
    return not (cache_dir.is_dir() and unwritable(cache_dir))


def watch(job: Job) -> Watchdog:
    """From here on no rank waits for ever: for one that is stuck, or for one that has ended. Every rank calls this."""
    folder = job.run_dir
    if folder is None:  # --cache_only, where other starts may use the cache too
        # process ids repeat: starts in containers, each with a namespace of its own, all have the same few
        name = f"{CACHE_ONLY}{os.getpid()}-{secrets.token_hex(4)}"
        there = job.config.cache_dir if _can_hold(job.config.cache_dir) else job.config.output_dir
        if dist.is_main():
            clear_left(there, CACHE_ONLY)
        folder = Path(dist.text_from_main(str(there / name)))
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        prepare_folder(folder)
    dist.barrier()
    return Watchdog(
        job.activity,
        folder,
        rank=dist.rank(),
        world=dist.world_size(),
        stall_timeout_s=job.config.stall_timeout_s,
        log_file=job.log_file,
        here=dist.peers_here(),
    ).start()


def engine_settings(config: RunConfig) -> EngineSettings:
    """The part of the config that the engine is made of."""
    adapter, optimizer = config.adapter, config.optimizer
    return EngineSettings(
        stages=config.pipeline_stages,
        micro_batches=config.gradient_accumulation_steps,
        optimizer=OptimizerSettings(
            optimizer.type, config.force_constant_lr or optimizer.lr, optimizer.weight_decay, optimizer.arguments
        ),
        adapter=adapter
        and AdapterSettings(
            rank=adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            dtype=DTYPES[adapter.dtype],
            exclude_modules=adapter.exclude_modules,
            init_from_existing=adapter.init_from_existing,
            kind=adapter.type,
            factor=adapter.factor,
            decompose_both=adapter.decompose_both,
        ),
        fuse=tuple(Fusion(entry.path, entry.weight, entry.expert, index) for index, entry in enumerate(config.fused)),
        gradient_clipping=config.gradient_clipping,
        partition_method=config.partition_method,
        partition_split=config.partition_split,
        checkpointing=bool(config.activation_checkpointing),
        offload_checkpoints=isinstance(config.activation_checkpointing, str),
        compile=config.compile,
        seed=config.seed,
    )


def wandb_settings(loaded: LoadedConfig) -> WandbSettings:
    monitoring = loaded.run.monitoring
    return WandbSettings(
        project=monitoring.wandb_tracker_name or "reelpipe",
        run_name=monitoring.wandb_run_name or None,
        api_key=monitoring.wandb_api_key.get_secret_value() or None,
        config={"run": loaded.run.model_dump(mode="json"), "model": loaded.model.model_dump(mode="json")},
    )


def prepare_data(job: Job) -> Prepared:
    """Scan, cache, and tell what came of it."""
    config = job.config
    workers = config.map_num_proc or max(1, min(DEFAULT_WORKERS, (os.cpu_count() or 1) // dist.ranks_here()))
    resume = None if job.flags.reset_dataloader else job.resume
    with CacheProgress(job.console, enabled=dist.is_main()) as progress:
        prepared = prepare(
            job.loaded,
            job.family,
            workers=workers,
            regenerate=job.flags.regenerate_cache,
            progress=Watched(progress, job.activity),
            run_dir=job.run_dir,
            check=lambda train: check_order(config, train, job.family.tokens, resume),
        )
    if dist.is_main():
        seconds, ranks = prepared.report.seconds, dist.world_size()
        record_pace(prepared.store.root, prepared.manifests.values(), seconds, dist.device_name(), ranks)
        tell.cache(job.console, prepared, job.run_dir)
    return prepared
