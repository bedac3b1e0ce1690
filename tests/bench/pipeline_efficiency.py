"""Throughput of two stages against the 1F1B ideal m / (m + p - 1), and bytes sent between stages.

    python tests/bench/pipeline_efficiency.py [--pairs 5]

Two ranks with one core each. A pair is: both ranks run the whole model over all micro-batches at the same time (so
two cores do two steps: what perfect scaling would give), then both run one pipelined step. The ideal pipeline takes
half the time of the former, times (m + p - 1) / m.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

STAGES, MICRO_BATCHES = 2, 8
SIZES = {"dim": 512, "layers": 8, "ffn_dim": 2048, "heads": 4}
LATENTS = (16, 3, 24, 32)  # C, T, H, W: 576 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one of warm-up")
    pairs = parser.parse_args().pairs
    import torch

    from tests.bench.common import machine_line
    from tests.helpers.launch import run_ranks
    from tests.helpers.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder), layout="diffusers", **SIZES)
        arguments = {"checkpoint": str(checkpoint), "pairs": pairs}
        parts = run_ranks("tests.bench.pipeline_efficiency:measure", STAGES, Path(folder) / "ranks", arguments)
    ideal = MICRO_BATCHES / (MICRO_BATCHES + STAGES - 1)
    # a step is over when its last rank is
    alone, piped = ([max(times) for times in zip(*(p[key] for p in parts), strict=True)] for key in ("alone", "piped"))
    shares = [(a / STAGES) / b for a, b in zip(alone, piped, strict=True)]
    print(machine_line(torch))
    print(f"{STAGES} stages, {MICRO_BATCHES} micro-batches, ideal {ideal:.3f} of perfect scaling")
    print(f"measured {statistics.median(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}")
    print(f"of the ideal: {statistics.median(shares) / ideal:.3f}")
    sent, hidden = sum(p["bytes"] for p in parts) / MICRO_BATCHES, 2 * parts[0]["hidden"]
    print(f"sent a micro-batch: {sent:.0f} bytes, hidden states both ways {hidden}: {100 * (sent / hidden - 1):+.2f}%")


def measure(folder: Path, arguments: dict) -> dict:
    """On every rank."""
    import torch

    from models.base import Draw
    from models.wan.family import WanFamily
    from tests.helpers.models import materialise
    from utils import dist
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine, prepare_skeleton
    from utils.train.engine import init_distributed

    init_distributed()
    family = WanFamily(WanFamily.Config(type="wan", ckpt_path=arguments["checkpoint"], dtype="float32"))
    settings = EngineSettings(
        stages=STAGES,
        micro_batches=MICRO_BATCHES,
        optimizer=OptimizerSettings("adamw", 1e-4),
        adapter=AdapterSettings(16, 16),
        checkpointing=False,
    )
    engine = build_engine(family, settings, torch.device("cpu")).engine
    whole = materialise(prepare_skeleton(family, settings.adapter), family)
    layers = family.pipeline_layers(whole)
    samples = [{"latents": torch.randn(LATENTS), "text": torch.randn(20, 64)} for _ in range(MICRO_BATCHES)]
    batches = [family.micro_batch([sample], [Draw(0.5, i)]) for i, sample in enumerate(samples)]

    def alone() -> None:
        for batch in batches:
            x = batch.inputs
            for layer in layers:
                x = layer(x)
            (family.loss(x, batch.target).mean() / MICRO_BATCHES).backward()

    times: dict = {"alone": [], "piped": []}
    for pair in range(arguments["pairs"] + 1):
        for name, step in (("alone", alone), ("piped", lambda: engine.train_step(iter(batches)))):
            dist.barrier()
            started = time.perf_counter()
            step()
            if pair:
                times[name].append(time.perf_counter() - started)
    engine.bytes_sent = 0
    engine.train_step(iter(batches))
    tokens = LATENTS[1] * (LATENTS[2] // 2) * (LATENTS[3] // 2)
    return {**times, "bytes": engine.bytes_sent, "hidden": tokens * SIZES["dim"] * 4}


if __name__ == "__main__":
    main()
