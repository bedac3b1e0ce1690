"""Reelpipe: train Wan video models. `deepspeed --num_gpus=N train.py --deepspeed --config X.toml`"""

import signal

if __name__ == "__main__":  # first of all: a scheduler's warning waits until there is a handler, instead of killing
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.train.signals import MODES, StopSignals  # brings nothing but the standard library


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """diffusion-pipe's command line; the launcher adds `--local_rank` and `--deepspeed`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="TOML", help="the run; see examples/")
    parser.add_argument(
        "--resume_from_checkpoint",
        nargs="?",
        const="",
        metavar="RUN",
        help="go on with the newest run, or with the named run folder, or with RUN/global_stepN",
    )
    parser.add_argument("--cache_only", action="store_true", help="encode the datasets and stop")
    parser.add_argument("--plan", action="store_true", help="count, look at the clips, tell and stop; needs no weights")
    parser.add_argument("--preflight", action="store_true", help="check everything, try steps on made-up clips, stop")
    parser.add_argument("--html", type=Path, metavar="FILE", help="with --plan: a contact sheet of all clips")
    parser.add_argument("--regenerate_cache", action="store_true", help="encode again what is in the cache already")
    parser.add_argument("--trust_cache", action="store_true", help="accepted; the cache only ever reads what changed")
    parser.add_argument("--reset_dataloader", action="store_true", help="on resume, start the data from its beginning")
    parser.add_argument(
        "--reset_optimizer", "--reset_optimizer_params", action="store_true", help="on resume, a fresh optimizer"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, e.g. --set optimizer.lr=1e-4"
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run a step that was kept in <run>/nonfinite/")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.html and not flags.plan:
        parser.error("--html goes with --plan")
    if len(modes := [f"--{mode}" for mode in MODES if getattr(flags, mode)]) > 1:
        parser.error(f"{' and '.join(modes)} do different things; give one of them")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole of a training, in order. Returns the exit status."""
    with StopSignals() as signals:  # first: a scheduler's warning may come while libraries load
        flags = parse_arguments(arguments)
        signals.mode = next((mode for mode in MODES if getattr(flags, mode)), "train")
        if os.environ.get("RANK", "0") == "0":
            sys.stdout.write("Reelpipe: loading libraries\n")
            sys.stdout.flush()
        return start(flags, signals)


def start(flags: argparse.Namespace, signals: StopSignals) -> int:
    """What was asked for, from here on with every mistake told."""
    # imported here: --help must not wait for torch
    from utils import dist
    from utils.train.assemble import build_run
    from utils.train.errors import reported
    from utils.train.loop import train
    from utils.train.preflight import preflight, require
    from utils.train.preview import preview
    from utils.train.rehearsal import rehearse
    from utils.train.replay import replay
    from utils.train.setup import join, prepare_data, read_config, watch
    from utils.train.stopping import exit_status
    from utils.train.tell import goodbye

    with reported(signals) as outcome:
        if flags.plan:
            signals.interrupt()
            return preview(flags)
        job = read_config(flags)
        signals.limit(job.config.requeue_exit_code, job.config.max_runtime_minutes)
        join(job)
        watchdog = watch(job)
        outcome.watch(watchdog, job.loaded, job.lock)
        signals.interrupt(watchdog.meeting_place)
        if flags.replay:
            replay(job)
            return 0
        if flags.preflight:
            outcome.status = rehearse(job)
            return outcome.status
        require(preflight(job))
        data = prepare_data(job)
        if not flags.cache_only:
            run = build_run(job, data)
            run.signals = signals
            finished = train(run)
            goodbye(job.console, job.config, run, finished)
            outcome.status = exit_status(run.asked, job.config.requeue_exit_code, finished)
            dist.barrier()  # launchers end all ranks as soon as one has left with another status than 0
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
