"""Seconds a step, peak memory and FLOP utilisation of a LoRA step of Wan 1.3B and 14B at 832x480 on one GPU.

    python tests/bench/gpu_step.py [--models 1.3B,14B] [--frames 1,33,81] [--steps 5] [--storage bfloat16]
    python tests/bench/gpu_step.py --smoke          (a tiny model on whatever there is, to see that it runs)

Weights are random, made on the device; the step is the real one: engine, checkpointing of every block, LoRA of rank 32,
AdamW. Model FLOPs count the forward pass and the gradients that a LoRA needs (inputs, not frozen weights); hardware
FLOPs add the recomputed forward pass. Utilisation is against a bf16 matrix product measured in the same run. A case
that does not fit is reported as out of memory and the next one goes on.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

WIDTH, HEIGHT, RANK, TEXT_ROWS = 832, 480, 32, 512
SIZES = {  # dim, ffn_dim, heads, layers
    "tiny": (128, 256, 1, 2),
    "1.3B": (1536, 8960, 12, 30),
    "14B": (5120, 13824, 40, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.3B,14B")
    parser.add_argument("--frames", default="1,33,81")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after two of warm-up")
    parser.add_argument("--storage", default="bfloat16", choices=("bfloat16", "float8"), help="of the frozen base")
    parser.add_argument("--smoke", action="store_true")
    flags = parser.parse_args()
    import torch

    from tests.bench.common import machine_line

    if not torch.cuda.is_available() and not flags.smoke:
        sys.exit("no GPU here; --smoke runs a tiny model on the CPU")
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29612")
    from utils.train.engine import init_distributed

    init_distributed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = matrix_flops(device, 512 if flags.smoke else 8192)
    print(machine_line(torch))
    print(f"bf16 matrix product: {peak / 1e12:.1f} TFLOP/s")
    print("| model | frames | tokens | s / step | peak GiB | model FLOP util. | hardware FLOP util. |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    models = ["tiny"] if flags.smoke else flags.models.split(",")
    for model in models:
        for frames in [1, 5] if flags.smoke else [int(f) for f in flags.frames.split(",")]:
            print(row(model, frames, flags, device, peak), flush=True)


def row(model: str, frames: int, flags: argparse.Namespace, device, peak: float) -> str:
    """One line of the table."""
    import torch

    tokens = ((frames - 1) // 4 + 1) * (HEIGHT // 16) * (WIDTH // 16)
    try:
        seconds, gib = measure(model, frames, flags, device)
    except torch.cuda.OutOfMemoryError:
        return f"| {model} | {frames} | {tokens} | out of memory | | | |"
    finally:
        gc.collect()  # the engine is full of cycles: the next model would find this one still in memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    linear, attention = forward_flops(model, tokens)
    used = 2 * linear + 3 * attention  # attention's backward is twice its forward; frozen Linears need only dX
    hardware = used + linear + attention
    shares = (f"{flops / seconds / peak:.1%}" for flops in (used, hardware))
    return f"| {model} | {frames} | {tokens} | {seconds:.3f} | {gib:.1f} | {' | '.join(shares)} |"


def measure(model: str, frames: int, flags: argparse.Namespace, device) -> tuple[float, float]:
    """Median seconds a step, and peak GiB."""
    import statistics

    import torch

    from models.base import Draw
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine

    family = random_family(model, flags.storage)
    settings = EngineSettings(
        stages=1,
        micro_batches=1,
        optimizer=OptimizerSettings("adamw", 1e-4),
        adapter=AdapterSettings(RANK, RANK),
        checkpointing=True,
    )
    engine = build_engine(family, settings, device).engine
    shape = (16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    sample = {"latents": torch.randn(shape), "text": torch.randn(100, 4096)}
    batch = family.micro_batch([sample], [Draw(0.5, 0)])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(flags.steps + 2):
        started = time.perf_counter()
        engine.train_step(iter([batch]))  # reads the loss and the norm: the device is done when it returns
        if step > 1:
            times.append(time.perf_counter() - started)
    gib = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return statistics.median(times), gib


def random_family(model: str, storage: str):
    """WanFamily of a released size without any file."""
    import torch

    from models.wan import variants
    from models.wan.config import WanModelConfig
    from models.wan.family import WanFamily

    dim, ffn_dim, heads, layers = SIZES[model]

    class RandomWeights:
        def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
            self.shapes = shapes

        def names(self) -> set[str]:
            return set(self.shapes)

        def read(self, name: str) -> torch.Tensor:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            return torch.randn(self.shapes[name], device=device, dtype=torch.bfloat16) * 0.02

    class RandomWan(WanFamily):
        def __init__(self) -> None:
            self._config = WanModelConfig(
                type="wan", ckpt_path=Path("random"), dtype="bfloat16", transformer_dtype=storage
            )
            self._pseudo_huber_c = None
            self._sizes = variants.Architecture(
                dim=dim, ffn_dim=ffn_dim, num_heads=heads, num_layers=layers, freq_dim=256, in_dim=16, out_dim=16,
                text_dim=4096, eps=1e-6,
            )  # fmt: skip

        def open_weights(self) -> RandomWeights:
            return RandomWeights({n: tuple(p.shape) for n, p in self.build_skeleton().named_parameters()})

    return RandomWan()


def forward_flops(model: str, tokens: int) -> tuple[float, float]:
    """FLOPs of one forward pass: of the blocks' Linears, and of attention. The rest is below 1%."""
    dim, ffn_dim, _, layers = SIZES[model]
    per_token = 2 * (4 * dim * dim + 2 * dim * dim + 2 * dim * ffn_dim)  # self q, k, v, o; cross q, o; feed-forward
    text = 2 * 2 * dim * dim * TEXT_ROWS  # cross k, v
    attention = 4 * dim * tokens * (tokens + TEXT_ROWS)
    return layers * (per_token * tokens + text), layers * attention


def matrix_flops(device, size: int) -> float:
    """FLOP/s of a bf16 matrix product, the best of five rounds."""
    import torch

    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
