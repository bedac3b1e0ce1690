"""Whole starts of train.py: what the cache re-encodes, a toy family by one registry line, a full fine-tune."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.launch import run_ranks
from tests.helpers.tiny import tiny_checkpoint
from tests.pipeline.test_resume import write_inputs

RUN = {"pipeline_stages": "1", "gradient_accumulation_steps": "1", "max_steps": "2", "eval_every_n_steps": "2"}


def settings(**changed: str) -> list[str]:
    return [word for key, value in {**RUN, **changed}.items() for word in ("--set", f"{key}={value}")]


def count_encodes(folder: Path) -> tuple[int, int]:
    """Latents and captions that a start with --cache_only encodes."""
    import train
    from utils.train.setup import join, prepare_data, read_config

    job = read_config(train.parse_arguments(["--config", str(folder / "config.toml"), "--cache_only", *settings()]))
    join(job)
    made = prepare_data(job).report.made
    return made["latents"].encoded, made["text"].encoded


def cache_worker(folder: Path, _: None) -> dict[str, tuple[int, int]]:
    counts = {"first": count_encodes(folder), "second": count_encodes(folder)}
    clip = sorted((folder / "train").glob("*.mp4"))[0]
    clip.with_suffix(".txt").write_text("another caption")
    counts["caption edited"] = count_encodes(folder)
    shutil.copy(sorted((folder / "spare").glob("*.mp4"))[0], folder / "train" / "added.mp4")
    (folder / "train" / "added.txt").write_text("another caption")
    counts["clip added"] = count_encodes(folder)
    clip.rename(clip.with_name("renamed.mp4"))
    clip.with_suffix(".txt").rename(clip.with_name("renamed.txt"))
    counts["clip renamed"] = count_encodes(folder)
    shutil.copy(folder / "other" / "official" / "Wan2.1_VAE.pth", folder / "official" / "Wan2.1_VAE.pth")
    counts["another VAE"] = count_encodes(folder)
    return counts


@pytest.mark.end_to_end
def test_what_is_encoded_again(tmp_path):
    write_inputs(tmp_path)
    tiny_checkpoint(tmp_path)
    tiny_checkpoint(tmp_path / "other", seed=1)
    (tmp_path / "spare").mkdir()
    clip = sorted((tmp_path / "train").glob("*.mp4"))[0]
    clip.with_suffix(".txt").unlink()
    clip.rename(tmp_path / "spare" / clip.name)
    counts = run_ranks("tests.end_to_end.test_starts:cache_worker", 1, tmp_path)[0]
    clips = 9  # 6 for training, 3 held out
    assert counts["first"] == (clips, clips + 1), "each clip, each caption, and the empty caption"
    assert counts["second"] == (0, 0)
    assert counts["caption edited"] == (0, 1)
    assert counts["clip added"] == (1, 0), "its caption is known already"
    assert counts["clip renamed"] == (0, 0), "names mean nothing to the cache"
    assert counts["another VAE"] == (clips + 1, 0)


def toy_worker(folder: Path, _: None) -> dict[str, dict]:
    import models
    import train

    models.FAMILIES["toy"] = "tests.helpers.toy:ToyFamily"  # the registry line
    (folder / "stills.toml").write_text("stills = true\n" + (folder / "dataset.toml").read_text())
    budget = {"max_tokens_per_gpu": str(2 * 64 * 64 * 5), "dataset": f"'{folder}/stills.toml'"}
    for name, sets in {"lora": {}, "full": budget}.items():
        text = (folder / "config.toml").read_text()
        head, _, rest = text.partition("[model]")
        optimizer = "[optimizer]" + rest.partition("[optimizer]")[2]
        adapter = "[adapter]\ntype = 'lora'\nrank = 2\n" if name == "lora" else ""
        (folder / f"{name}.toml").write_text(f"{head}[model]\ntype = 'toy'\n{adapter}{optimizer}")
        changed = {"output_dir": f"'{folder}/{name}'", "max_steps": "6", "optimizer.lr": "0.02", **sets}
        for _ in range(2 if name == "lora" else 1):
            assert train.main(["--config", str(folder / f"{name}.toml"), *settings(**changed)]) == 0
    return {}


def assert_same_run(one: Path, other: Path) -> None:
    """Two starts of one config: all that is written is equal, but for times, and whole checkpoints by their hashes."""
    from tests.pipeline.test_resume import metrics

    files = [{path.relative_to(run): path for path in run.rglob("*") if path.is_file()} for run in (one, other)]
    apart = {"logs", "metrics.jsonl", "manifest.json"}  # compared below, or full of times
    same = [
        {name: path for name, path in of.items() if not apart & set(name.parts) and ".tfevents." not in name.name}
        for of in files
    ]
    assert same[0].keys() == same[1].keys()
    assert {Path("run.json"), Path("config.toml"), Path("step6/toy.safetensors")} < same[0].keys()
    differing = [str(name) for name in same[0] if same[0][name].read_bytes() != same[1][name].read_bytes()]
    # torch.save's archives hold the name of their folder; the library that the toy saves with shuffles its metadata
    assert [name for name in differing if not name.endswith((".pt", "toy.safetensors"))] == []
    a, b = (load_file(run / "step6" / "toy.safetensors") for run in (one, other))
    assert all(a[name].equal(b[name]) for name in a.keys() | b.keys())
    assert metrics(str(one)) == metrics(str(other))


@pytest.mark.end_to_end
def test_a_toy_family_trains_by_one_registry_line(tmp_path):
    from tests.pipeline.test_resume import metrics

    write_inputs(tmp_path)
    (tmp_path / "official").mkdir()
    run_ranks("tests.end_to_end.test_starts:toy_worker", 1, tmp_path)
    for name, tensors in {"lora": 16, "full": 20}.items():
        run, *again = [p for p in (tmp_path / name).iterdir() if p.name != "cache"]
        for other in again:
            assert_same_run(run, other)
        assert len(load_file(run / "step6" / "toy.safetensors")) == tensors
        losses = [line["held_out/loss"] for line in metrics(str(run)) if "held_out/loss" in line]
        assert losses[-1] < losses[0]
        seen = [0, *(line["examples"] for line in metrics(str(run)) if "train/loss" in line)]
        # 6 videos, and with their stills 7 images, 1.5 times an epoch: by tokens 2 clips of 5 frames, or 10 images
        assert {after - before for before, after in pairwise(seen)} == ({2, 10} if name == "full" else {1})


def full_worker(folder: Path, _: None) -> dict:
    import train

    text = (folder / "config.toml").read_text()
    head, _, rest = text.partition("[adapter]")
    (folder / "full.toml").write_text(head + "[optimizer]" + rest.partition("[optimizer]")[2])
    changed = {"pipeline_stages": "2", "optimizer.lr": "1e-2", "output_dir": f"'{folder}/full'"}
    assert train.main(["--config", str(folder / "full.toml"), *settings(**changed)]) == 0
    return {}


@pytest.mark.end_to_end
def test_a_fully_trained_model_is_a_checkpoint_again(tmp_path):
    from models.wan.family import WanFamily

    write_inputs(tmp_path)
    tiny_checkpoint(tmp_path)
    run_ranks("tests.end_to_end.test_starts:full_worker", 2, tmp_path)
    (run,) = [p for p in (tmp_path / "full").iterdir() if p.name != "cache"]

    def family(**paths: str) -> WanFamily:
        return WanFamily(WanFamily.Config(type="wan", ckpt_path=str(tmp_path / "official"), dtype="float32", **paths))

    base, trained = family().open_weights(), family(transformer_path=str(run / "step2")).open_weights()
    assert base.names() == trained.names()
    changed = [name for name in base.names() if not base.read(name).equal(trained.read(name))]
    assert len(changed) > 0.9 * len(base.names())
