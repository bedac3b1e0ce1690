"""One optimizer step of ours against a bare PyTorch loop over diffusers' model, same micro-batches, paired.

    python tests/bench/step_overhead.py [--pairs 7]

Both train the same LoRA with AdamW and clipping, on all cores. Rows go to tests/bench/RESULTS.md by hand.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

MICRO_BATCHES = 2
SIZES = {"dim": 512, "layers": 8, "ffn_dim": 2048, "heads": 4}
LATENTS = (16, 2, 20, 24)  # C, T, H, W: 240 tokens
RANK, CLIP, LR = 16, 1.0, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, help="measured pairs, after one of warm-up")
    pairs = parser.parse_args().pairs
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29611")
    import torch

    from tests.bench.common import machine_line
    from tests.helpers.tiny import tiny_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tiny_checkpoint(Path(folder), layout="diffusers", **SIZES)
        batches = make_batches(checkpoint)
        ours, bare = our_step(checkpoint), bare_step(checkpoint)
        rows = []
        for pair in range(pairs + 1):
            # the order alternates, so that a drift of the machine's speed favours neither
            for name, step in [("ours", ours), ("bare", bare)][:: 1 if pair % 2 else -1]:
                started = time.perf_counter()
                step(batches)
                rows.append((pair, name, time.perf_counter() - started))
    times = {name: [t for pair, n, t in rows if n == name and pair] for name in ("ours", "bare")}
    ratios = [a / b for a, b in zip(times["ours"], times["bare"], strict=True)]
    print(machine_line(torch))
    print(f"bare {statistics.median(times['bare']):.3f} s a step, ours {statistics.median(times['ours']):.3f} s")
    print(f"ours / bare: median {statistics.median(ratios):.4f}, {min(ratios):.4f} to {max(ratios):.4f}, {pairs} pairs")


def make_batches(checkpoint: Path) -> list:
    import torch

    from models.base import Draw

    family = make_family(checkpoint)
    samples = [{"latents": torch.randn(LATENTS), "text": torch.randn(20, 64)} for _ in range(MICRO_BATCHES)]
    return [family.micro_batch([sample], [Draw(0.5, i)]) for i, sample in enumerate(samples)]


def make_family(checkpoint: Path):
    from models.wan.family import WanFamily

    return WanFamily(WanFamily.Config(type="wan", ckpt_path=str(checkpoint), dtype="float32"))


def our_step(checkpoint: Path):
    import torch

    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine
    from utils.train.engine import init_distributed

    init_distributed()
    settings = EngineSettings(
        stages=1,
        micro_batches=MICRO_BATCHES,
        optimizer=OptimizerSettings("adamw", LR),
        adapter=AdapterSettings(RANK, RANK),
        gradient_clipping=CLIP,
    )
    engine = build_engine(make_family(checkpoint), settings, torch.device("cpu")).engine
    return lambda batches: engine.train_step(iter(batches))


def bare_step(checkpoint: Path):
    import torch
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig, inject_adapter_in_model

    model = WanTransformer3DModel.from_pretrained(checkpoint / "transformer")
    model.requires_grad_(False)
    targets = [n for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, torch.nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets), model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)

    def step(batches: list) -> None:
        for batch in batches:
            x_t, t, text = batch.inputs
            text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
            prediction = model(x_t, timestep=t * 1000, encoder_hidden_states=text, return_dict=False)[0]
            ((prediction - batch.target[0]).square().mean() / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
