"""Every Wan through the engine: the official code's numbers, and training as diffusers' own model does it."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from models.base import Draw, MicroBatch
from models.flow_match import seeded_noise
from tests.helpers.golden import golden, golden_batch, golden_gradients, largest_error
from tests.helpers.launch import gather_results, relative_error, run_ranks
from tests.helpers.models import IN_CHANNELS, VARIANTS, diffusers_tensors, wan_variant

STAGES = (1, 2, 3)
GLOBAL_BATCH, MICRO_BATCHES, STEPS = 4, 2, 3
# lr and clip are such that clipping is active in every step, which the reference asserts
TRAINING = {
    "wan_i2v": {"settings": {}, "frames": (3, 2, 2), "lr": 2.0, "clip": 0.05},
    "wan22_ti2v": {"settings": {"i2v_fraction": 0.5}, "frames": (3, 2, 1), "lr": 2.0, "clip": 0.05},
}
# a step's four samples; below 0.5 is image to video. Some micro-batches of two mix both tasks, others have one.
CHOICES = ((0.1, 0.9, 0.7, 0.8), (0.6, 0.2, 0.3, 0.4), (0.1, 0.2, 0.6, 0.7))
LOW = [{"name": "wan_i2v", "dtype": "bfloat16", "adapter": adapter} for adapter in (True, False)]


def micro_batch(family, name: str, step: int, slots: range) -> MicroBatch:
    samples, draws = [], []
    for slot in slots:
        seed = 100 * step + 10 * slot
        shape = (48 if name == "wan22_ti2v" else 16, TRAINING[name]["frames"][step], 4, 6)
        parts = {"latents": shape, "condition": shape, "text": (2 + slot, 32), "image": (257, 1280)}
        samples.append({key: seeded_noise(part, seed + i) for i, (key, part) in enumerate(parts.items())})
        draws.append(Draw((slot + 0.5) / GLOBAL_BATCH, seed, CHOICES[step][slot]))
    return family.micro_batch(samples, draws)


class OfficialSinusoid(torch.nn.Module):
    """diffusers makes the timestep's angles in float32, the official code in float64: at t near 1000 that is 1e-5."""

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        angles = t.double()[:, None] * 10000 ** -(torch.arange(32, dtype=torch.float64) / 32)
        return torch.cat([angles.cos(), angles.sin()], dim=1).float()


@lru_cache
def reference(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Weights before and after, and losses: diffusers' model, torch's SGD and clipping, no pipeline."""
    from diffusers import WanTransformer3DModel

    image = {"image_dim": 1280, "added_kv_proj_dim": 48} if name == "wan_i2v" else {}
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=IN_CHANNELS[name],
        out_channels=48 if name == "wan22_ti2v" else 16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=96,
        num_layers=3,
        **image,
    )
    start = diffusers_tensors(name)
    model.load_state_dict(start)
    model.condition_embedder.timesteps_proj = OfficialSinusoid()
    training = TRAINING[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=training["lr"])
    family = wan_variant(name, **training["settings"])
    losses = []
    for step in range(STEPS):
        batch = micro_batch(family, name, step, range(GLOBAL_BATCH))
        x_t, t, text, *image = batch.inputs
        t = t.double() * 1000
        if t.ndim == 2:  # one a token, as the official code has it
            t = t.repeat_interleave(x_t[0, 0, 0].numel() // 4, dim=1)
        text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        prediction = model(x_t, t, text, *image, return_dict=False)[0]
        error = (prediction - batch.target[0]).square()
        given = [t.ndim == 2 and choice < 0.5 for choice in CHOICES[step]]
        loss = torch.stack([e[:, int(first) :].mean() for e, first in zip(error, given, strict=True)]).mean()
        loss.backward()
        losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training["clip"])
        assert norm > training["clip"], f"step {step}: norm {norm}"
        optimizer.step()
        optimizer.zero_grad()
    return start, {key: p.detach() for key, p in model.named_parameters()}, losses


def build(family, stages: int, lr: float, clip: float, micro_batches: int, adapter: bool = False):
    from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings, build_engine

    settings = EngineSettings(
        stages=stages,
        micro_batches=micro_batches,
        optimizer=OptimizerSettings("sgd", lr),
        adapter=AdapterSettings(4, 2.0) if adapter else None,
        gradient_clipping=clip,
        checkpointing=micro_batches > 1,
    )
    return build_engine(family, settings, torch.device("cpu"))


def golden_step(name: str, stages: int) -> dict:
    """Prediction, loss and this stage's gradients of the golden batch."""
    from models.wan.family import WanFamily

    predictions, gradients = [], {}

    class Recording(WanFamily):
        def loss(self, prediction, target):
            predictions.append(prediction.detach())
            return super().loss(prediction, target)

    built = build(Recording(wan_variant(name)._config), stages, lr=0.1, clip=0.0, micro_batches=1)
    for key, parameter in built.trained.items():
        parameter.register_post_accumulate_grad_hook(
            lambda p, key=key: gradients.__setitem__(key, p.grad.detach().clone())
        )
    loss = built.engine.train_step(iter([golden_batch(name)]))
    assert set(gradients) == set(built.trained)
    wanted = golden_gradients(name)
    return {
        "prediction": predictions,
        "loss": loss,
        "gradients": {key: gradient for key, gradient in gradients.items() if key in wanted},
        "without": [key for key, gradient in gradients.items() if not (gradient.isfinite().all() and gradient.any())],
    }


def train(name: str, stages: int, dtype: str = "float32", adapter: bool = False) -> dict:
    training = TRAINING[name]
    family = wan_variant(name, dtype=dtype, **training["settings"])
    lr, clip = (20.0, 0.002) if adapter else (training["lr"], training["clip"])
    built = build(family, stages, lr, clip, MICRO_BATCHES, adapter)
    size, losses, norms = GLOBAL_BATCH // MICRO_BATCHES, [], []
    for step in range(STEPS):
        slots = [range(m * size, (m + 1) * size) for m in range(MICRO_BATCHES)]
        losses.append(built.engine.train_step(iter([micro_batch(family, name, step, part) for part in slots])))
        norms.append(built.engine.grad_norm)
    assert min(norms) > clip, norms
    return {"weights": {key: p.detach().clone() for key, p in built.trained.items()}, "losses": losses}


def work(folder: Path, stages: int) -> dict:
    """On every rank."""
    from utils.train.engine import init_distributed

    init_distributed()
    return {
        "golden": {name: golden_step(name, stages) for name in VARIANTS if stages != 2},
        "trained": {name: train(name, stages) for name in TRAINING},
        "low": [train(stages=stages, **case) for case in LOW],
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Results of all ranks, by the number of stages."""
    launched = {}

    def of(stages: int) -> list[dict]:
        if stages not in launched:
            folder = tmp_path_factory.mktemp("ranks")
            launched[stages] = run_ranks("tests.pipeline.test_wan_variants:work", stages, folder, stages)
        return launched[stages]

    return of


@pytest.mark.pipeline
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_official_numbers(name, stages, ran):
    parts, told = [part["golden"][name] for part in ran(stages)], golden(name)
    (prediction,) = [prediction for part in parts for prediction in part["prediction"]]
    assert largest_error(prediction, told["dit.out"]) < 1e-5
    assert all(part["loss"] == pytest.approx(told["dit.loss"].item(), rel=1e-5) for part in parts)
    found, wanted = gather_results([part["gradients"] for part in parts]), golden_gradients(name)
    assert set(found) == set(wanted)
    assert max(largest_error(found[key], wanted[key]) for key in wanted) < 1e-4
    assert [key for part in parts for key in part["without"]] == []


@pytest.mark.pipeline
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", TRAINING)
def test_training_equals_a_plain_loop(name, stages, ran):
    parts, (start, wanted, losses) = [part["trained"][name] for part in ran(stages)], reference(name)
    got = gather_results([part["weights"] for part in parts])
    assert set(got) == set(wanted)
    # what training changed, as one vector: next to the weights themselves an error would look small
    change, expected = (torch.cat([(w[key] - start[key]).flatten() for key in wanted]) for w in (got, wanted))
    assert relative_error(change, expected) < 1e-5
    assert max(relative_error(got[key], wanted[key]) for key in wanted) < 5e-5
    assert all(part["losses"] == pytest.approx(losses, rel=1e-5) for part in parts)


@pytest.mark.pipeline
@pytest.mark.parametrize("stages", STAGES[1:])
def test_in_bfloat16_the_cut_changes_no_bit(stages, ran):
    for index in range(len(LOW)):
        whole, cut = (gather_results([part["low"][index]["weights"] for part in ran(s)]) for s in (1, stages))
        assert set(whole) == set(cut)
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
        assert ran(1)[0]["low"][index]["losses"] == ran(stages)[0]["low"][index]["losses"]
