"""The tiny checkpoint maker and the example data: reproducible, the same in every layout, readable by the libraries."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file
from transformers import AutoTokenizer

from models.base import ClipEnds
from models.wan.family import WanFamily
from models.wan.keymaps import TRANSFORMER
from models.wan.text import WanTextEncoder
from models.wan.vae import WanVAEEncoder
from tests.helpers.tiny import SCRIPT, tiny_checkpoint, tiny_wan

DATA = SCRIPT.parent / "data"
SMALL = {"dim": 48, "heads": 2, "layers": 3, "ffn_dim": 64, "text_dim": 32}
CPU = torch.device("cpu")
PARTS = {
    "official": ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"),
    "diffusers": ("vae", "text_encoder", "tokenizer"),
}


# variant -> what it is, keys of [model] that it needs, and what diffusers runs it with
VARIANTS = {
    "t2v": ("Wan2.1 T2V", {}, "WanPipeline"),
    "i2v": ("Wan2.1 I2V", {}, "WanImageToVideoPipeline"),
    "flf2v": ("Wan2.1 FLF2V", {}, "WanImageToVideoPipeline"),
    "t2v-a14b": ("Wan2.2 T2V-A14B low noise", {"expert": "low"}, "WanPipeline"),
    "i2v-a14b": ("Wan2.2 I2V-A14B low noise", {"expert": "low"}, "WanImageToVideoPipeline"),
    "ti2v": ("Wan2.2 TI2V-5B", {}, "WanPipeline"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {layout: tiny_checkpoint(root, layout, **SMALL) for layout in PARTS}


def hashes(folder):
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path, folders):
    torch.rand(7)  # global state has no say
    again = hashes(tiny_checkpoint(tmp_path / "again", **SMALL))
    assert again == hashes(folders["official"])
    other = hashes(tiny_checkpoint(tmp_path / "other", seed=1, **SMALL))
    weights = [name for name in again if name.endswith((".pth", ".safetensors"))]
    assert len(weights) == 3 and all(again[name] != other[name] for name in weights)


def test_both_layouts_hold_the_same_weights(folders):
    official = load_file(folders["official"] / "diffusion_pytorch_model.safetensors")
    diffusers = load_file(folders["diffusers"] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {TRANSFORMER.to_skeleton(name) for name in official} == set(diffusers)
    for name, tensor in official.items():
        assert torch.equal(tensor, diffusers[TRANSFORMER.to_skeleton(name)])

    frames = torch.randint(0, 256, (5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    entries = []
    for layout, (vae, text, tokenizer) in PARTS.items():
        root = folders[layout]
        encoders = (
            (WanVAEEncoder(root / vae, torch.float32), frames),
            (WanTextEncoder(root / text, root / tokenizer, torch.bfloat16), "a rabbit yawns"),
        )
        for encoder, item in encoders:
            encoder.load(CPU)
            entries.append(encoder.encode([item])[0])
    for one, other in ((entries[0], entries[2]), (entries[1], entries[3])):
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name])


def test_the_lists_above_are_all_there_is():
    assert set(tiny_wan().VARIANTS) == set(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_the_same_in_both_layouts(tmp_path, variant):
    """By its weights, by what its encoders make of one clip, and to diffusers."""
    title, keys, pipeline = VARIANTS[variant]
    frames = torch.randint(0, 256, (5, 32, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = {"pixels": frames, "ends": ClipEnds(frames[[0, -1]], 5), "caption": "a rabbit yawns"}
    seen = []
    for layout in PARTS:
        folder = tiny_checkpoint(tmp_path, layout, variant=variant, **SMALL)
        family = WanFamily(WanFamily.Config(ckpt_path=folder, dtype="float32", **keys))
        assert family.title == f"{title} custom size"
        reader = family.open_weights()
        tensors = {name: reader.read(name) for name in reader.names()}
        for encoder in family.encoders():
            encoder.load(CPU)
            tensors |= encoder.encode([items[encoder.reads]])[0]
        seen.append(tensors)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in seen[0].items())

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "diffusers", local_files_only=True)
    assert type(loaded).__name__ == pipeline
    trained = loaded.transformer_2 if keys else loaded.transformer
    assert all(torch.equal(tensor, seen[0][name]) for name, tensor in trained.named_parameters())
    assert loaded.config.boundary_ratio == ({"t2v-a14b": 0.875, "i2v-a14b": 0.9}.get(variant))
    assert loaded.config.expand_timesteps == (variant == "ti2v")


def test_latents_have_about_zero_mean_and_unit_spread(folders):
    encoder = WanVAEEncoder(folders["official"] / "Wan2.1_VAE.pth", torch.float32)
    encoder.load(CPU)
    soft = torch.nn.functional.interpolate(
        torch.rand((3, 3, 3, 4, 6), generator=torch.Generator().manual_seed(1)), (9, 64, 96), mode="trilinear"
    )
    items = (soft * 255).to(torch.uint8).permute(0, 2, 3, 4, 1)
    latents = torch.stack([entry["latents"] for entry in encoder.encode(list(items))])
    assert abs(latents.mean()) < 0.5 and 0.5 < latents.std() < 1.5


def test_shards_add_up(tmp_path, folders):
    sharded = tiny_checkpoint(tmp_path, shards=3, **SMALL)
    files = sorted(sharded.glob("diffusion_pytorch_model-*-of-00003.safetensors"))
    assert len(files) == 3 and (sharded / "diffusion_pytorch_model.safetensors.index.json").is_file()
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(folders["official"] / "diffusion_pytorch_model.safetensors")
    assert merged.keys() == whole.keys() and all(torch.equal(merged[name], whole[name]) for name in whole)


def test_diffusers_and_transformers_read_it(folders):
    pipeline = WanPipeline.from_pretrained(folders["diffusers"], local_files_only=True)
    frames = pipeline("a rabbit", height=32, width=48, num_frames=5, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 5, 32, 48, 3)
    tokenizer = AutoTokenizer.from_pretrained(folders["official"] / "google" / "umt5-xxl", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer("a rabbit").input_ids[-1] == 1 and tokenizer("").input_ids == [1]


def test_a_folder_is_never_overwritten(tmp_path, folders):
    write, sizes = tiny_wan().write_checkpoint, tiny_wan().Sizes(**SMALL)
    assert write(folders["official"], sizes=sizes) is False
    with pytest.raises(ValueError, match="holds something else"):
        write(folders["official"], sizes=sizes, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        write(tmp_path, sizes=sizes)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt"]


@pytest.mark.parametrize(
    ("sizes", "word"),
    [({"dim": 50, "heads": 4}, "dim 50 / heads 4"), ({"text_dim": 30}, "text_dim"), ({"layers": 0}, "1 or more")],
)
def test_sizes_that_cannot_be_are_refused_and_leave_nothing(tmp_path, sizes, word):
    with pytest.raises(ValueError, match=word):
        tiny_wan().write_checkpoint(tmp_path / "x", sizes=tiny_wan().Sizes(**sizes))
    assert not list(tmp_path.iterdir())


def test_the_script_runs_from_anywhere(tmp_path):
    command = [sys.executable, str(SCRIPT), "here", "--variant", "i2v-a14b", "--layers", "2", "--dim", "48"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "here: written" and (tmp_path / "here" / "low_noise_model" / "config.json").is_file()


def test_example_data_has_captions_credits_and_a_real_holdout():
    media = [file for file in DATA.glob("*/*") if file.suffix in (".mp4", ".jpg")]
    train, held_out = ([file for file in media if file.parent.name == part] for part in ("train", "eval"))
    assert sum(file.suffix == ".mp4" for file in train) >= 8 and sum(file.suffix == ".jpg" for file in train) >= 4
    assert sum(file.suffix == ".mp4" for file in held_out) == 2
    credits = (DATA / "CREDITS.md").read_text(encoding="utf-8")
    for file in media:
        assert len(file.with_suffix(".txt").read_text(encoding="utf-8").split()) > 8
        assert f"`{Path(file.parent.name) / file.name}`" in credits
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in media}
    assert len(digests) == len(media)
    assert sum(file.stat().st_size for file in media) < 3_000_000
