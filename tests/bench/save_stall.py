"""What a checkpoint costs training: the wait for its copy, the steps beside its writing, and a save that is waited for.

    python tests/bench/save_stall.py [--pairs 7] [--folder DIR]

A full fine-tune with AdamW of a small Wan, so that there is much to write. Steps without and with a save are measured
in turn. Rows go to tests/bench/RESULTS.md by hand.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SIZES = {"dim": 512, "layers": 4, "ffn_dim": 2048, "heads": 4}
LATENTS = (16, 2, 20, 24)  # C, T, H, W: 240 tokens
MICRO_BATCHES, STEPS = 1, 2  # steps that are timed without a save, before each save


class Row(NamedTuple):
    """One pair, in s."""

    without: float  # a step
    begin: float  # until training may go on
    beside: float  # a step while the files are written, the mean of those that were wholly beside it
    steps: int  # such
    written: float  # from the beginning until the checkpoint was there
    waited: float  # a save that training waits for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="measured pairs, after one of warm-up")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    flags = parser.parse_args()
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29613")
    import torch

    from tests.bench.common import machine_line
    from utils.train.checkpoint_write import payload_bytes

    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        built, step = training(Path(folder))
        step()
        saves = Saves(built, Path(folder) / "run")
        rows = [pair(saves, step) for _ in range(flags.pairs + 1)][1:]
    size = payload_bytes([dict(built.trained), list(built.optimizer.state.values())]) / 2**20
    print(machine_line(torch))
    print(f"{size:.0f} MiB to write; a step takes {statistics.median(row.without for row in rows):.3f} s")
    tell("wait for the copy / a save that is waited for", [row.begin / row.waited for row in rows])
    tell("step beside the writing / step without", [row.beside / row.without for row in rows if row.steps])
    for name in ("begin", "written", "waited"):
        tell(f"{name}, s", [getattr(row, name) for row in rows])


def tell(what: str, values: list[float]) -> None:
    told = f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "nothing measured"
    print(f"{what}: {told}, {len(values)} pairs")


def training(folder: Path):
    """What is trained, and a function that takes a step."""
    import torch

    from models.base import Draw
    from models.wan.family import WanFamily
    from tests.helpers.tiny import tiny_checkpoint
    from utils.train.build import EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed

    where = tiny_checkpoint(folder, layout="diffusers", **SIZES)
    family = WanFamily(WanFamily.Config(type="wan", ckpt_path=str(where), dtype="float32"))
    init_distributed()
    settings = EngineSettings(stages=1, micro_batches=MICRO_BATCHES, optimizer=OptimizerSettings("adamw", 1e-5))
    built = build_engine(family, settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    samples = [{"latents": torch.randn(LATENTS), "text": torch.randn(20, 64)} for _ in range(MICRO_BATCHES)]
    batches = [family.micro_batch([sample], [Draw(0.5, i)]) for i, sample in enumerate(samples)]
    return built, lambda: built.engine.train_step(iter(batches))


class Saves:
    """A run folder that is saved to again and again."""

    def __init__(self, built, run_dir: Path) -> None:
        from utils.train.checkpoint import Part
        from utils.train.checkpoint_write import Checkpointer

        run_dir.mkdir()
        self.writer = Checkpointer(run_dir, stage=0, data_rank=0, keep_last=1)
        self.parts = {"": Part(built.trained, built.optimizer)}
        self.number = 0

    def begin(self, *, wait: bool) -> None:
        from utils.train.state import TrainState

        self.number += 1
        told = {"epochs_done": 0, "course": {}, "meters": {}}
        self.writer.begin(TrainState(self.number), told, self.parts, wait=wait)

    def whole(self) -> None:
        self.begin(wait=True)
        self.writer.settle()


def pair(saves: Saves, step) -> Row:
    """Steps, steps beside a save, and a save alone."""
    without = timed(lambda: [step() for _ in range(STEPS)]) / STEPS
    started = time.perf_counter()
    begin, beside, ended = timed(lambda: saves.begin(wait=False)), [], None
    while ended is None:
        taken = timed(step)
        ended = saves.writer.poll()
        if ended is None:  # it was busy all the time
            beside.append(taken)
    written = time.perf_counter() - started
    mean = statistics.fmean(beside) if beside else 0.0
    return Row(without, begin, mean, len(beside), written, timed(saves.whole))


def timed(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
