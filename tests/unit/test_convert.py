"""`python -m models.convert`: what it writes, what it tells, and what it refuses."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from models.convert.__main__ import main, parser
from models.convert.adapters import reduce_rank
from models.wan.adapter_formats import FORMATS, format_of
from tests.helpers.adapters import (
    KINDS,
    adapted_weights,
    comfyui_weight,
    metadata_of,
    plain_pipeline,
    random_adapter,
)
from tests.helpers.models import DATA, TRANSFORMER_FILE, wan_variant
from tests.helpers.quantised import FORMS, scaled_tensors

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def family():
    return wan_variant("wan_t2v")


@pytest.fixture
def run(capsys):
    """A command's exit code, output and error."""

    def command(*words):
        code = main([str(word) for word in words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return command


def adapter(family, folder, name="lora", formats=(), seed=0):
    """The files of a random adapter, and the weights that it makes."""
    kind, shape = KINDS[name]
    tensors = random_adapter(family, kind, shape, seed)
    files = family.save_adapter(tensors, folder, metadata_of(shape), formats)
    return files, adapted_weights(family, tensors, shape.alpha / shape.rank)


def same_weights(family, file, expected, atol=1e-6):
    for module, weight in adapted_weights(family, family.load_adapter(file)).items():
        torch.testing.assert_close(weight, expected[module], rtol=0, atol=atol)


ABLE = {name: [f for f in FORMATS if f != "diffusers" or not name.startswith("lokr")] for name in KINDS}


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [(name, source, target) for name, able in ABLE.items() for source in able for target in able if source != target],
)
def test_lora_between_all_formats(tmp_path, family, run, name, source, target):
    [file], expected = adapter(family, tmp_path, name, (source,))
    code, out, _ = run("lora", file, tmp_path / "out.safetensors", "--to", target, "--base", DATA / "wan_t2v")
    assert code == 0 and "30 modules" in out
    same_weights(family, tmp_path / "out.safetensors", expected)
    assert format_of(load_file(tmp_path / "out.safetensors")) == target


def test_lora_there_and_back_is_the_same_file(tmp_path, family, run):
    [file], _ = adapter(family, tmp_path)
    run("lora", file, tmp_path / "kohya.safetensors", "--to", "kohya")
    run("lora", tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "--to", "comfyui")
    first, back = load_file(file), load_file(tmp_path / "back.safetensors")
    assert first.keys() == back.keys() and all(torch.equal(first[key], back[key]) for key in first)


def test_a_dora_needs_the_base_to_change_its_form(tmp_path, family, run):
    [file], _ = adapter(family, tmp_path, "dora")
    code, _, error = run("lora", file, tmp_path / "out.safetensors", "--to", "diffusers")
    assert code == 2 and "takes the model's weights" in error and not (tmp_path / "out.safetensors").exists()
    assert run("lora", file, tmp_path / "out.safetensors", "--to", "kohya")[0] == 0, "the same form, other names"


def merge_words(base, out, *adapters):
    words = ["merge", "--base", base, "--out", out]
    for file, weight in adapters:
        words += ["--lora", file] if weight is None else ["--lora", file, "--weight", weight]
    return words


@pytest.mark.parametrize("variant", ["wan_t2v", "wan_i2v", "wan22_t2v_low"])
@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_merge_is_the_sum(tmp_path, run, variant, layout):
    family = wan_variant(variant)
    [one], first = adapter(family, tmp_path / "a", "lora", ("kohya",), seed=1)
    [two], second = adapter(family, tmp_path / "b", "lokr", ("comfyui",), seed=2)
    out = tmp_path / "merged"
    code, told, _ = run(*merge_words(DATA / variant, out, (one, None), (two, 0.5)), "--layout", layout)
    assert code == 0 and "2 adapters" in told
    weights, merged = family.open_weights(), wan_variant(variant, out).open_weights()
    assert merged.names() == weights.names()
    for name in weights.names():
        module, base = name.removesuffix(".weight"), weights.read(name)
        expected = first[module] + 0.5 * (second[module] - base) if module in first else base
        torch.testing.assert_close(merged.read(name), expected, rtol=0, atol=1e-6)
    if layout == "diffusers":
        told = WanTransformer3DModel.from_pretrained(out, output_loading_info=True)[1]
        assert not any(told.values())
    else:
        config = json.loads((DATA / variant / "config.json").read_text())
        assert json.loads((out / "config.json").read_text()) == config


def test_merge_of_a_dora(tmp_path, family, run):
    [file], expected = adapter(family, tmp_path, "dora", ("diffusers",))
    assert run(*merge_words(DATA / "wan_t2v", tmp_path / "out", (file, None)))[0] == 0
    merged = wan_variant("wan_t2v", tmp_path / "out").open_weights()
    for module, weight in expected.items():
        torch.testing.assert_close(merged.read(f"{module}.weight"), weight, rtol=0, atol=1e-6)


def test_merge_of_a_dora_counts_from_what_was_merged_before(tmp_path, family, run):
    """As ComfyUI does, whose dora_scale is over the norms of the weight that it finds."""
    files = [adapter(family, tmp_path / kind, kind, seed=seed)[0][0] for seed, kind in enumerate(("lora", "dora"))]
    assert run(*merge_words(DATA / "wan_t2v", tmp_path / "out", *((file, None) for file in files)))[0] == 0
    weights, merged = family.open_weights(), wan_variant("wan_t2v", tmp_path / "out").open_weights()
    for module in family.lora_targets(family.build_skeleton()):
        expected, key = weights.read(f"{module}.weight"), FORMATS["comfyui"].spell(module)
        for file in files:
            expected = comfyui_weight(load_file(file), key, expected)
        torch.testing.assert_close(merged.read(f"{module}.weight"), expected, rtol=0, atol=1e-6)


def test_merge_rounds_once_and_keeps_other_dtypes(tmp_path, family, run):
    base = {name: tensor.bfloat16() for name, tensor in load_file(DATA / "wan_t2v" / TRANSFORMER_FILE).items()}
    base["head.modulation"] = base["head.modulation"].float()
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((DATA / "wan_t2v" / "config.json").read_text())
    [file], expected = adapter(wan_variant("wan_t2v", tmp_path / "base"), tmp_path)
    assert run(*merge_words(tmp_path / "base" / "model.safetensors", tmp_path / "out", (file, None)))[0] == 0
    merged = load_file(tmp_path / "out" / TRANSFORMER_FILE)
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in base.items()}
    assert torch.equal(merged["blocks.1.ffn.0.weight"], expected["blocks.1.ffn.net.0.proj"].bfloat16())
    words = merge_words(tmp_path / "base", tmp_path / "out", (file, None))
    assert run(*words, "--dtype", "float16", "--force")[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / TRANSFORMER_FILE).values()} == {torch.float16}


def test_force_replaces_a_transformer_and_nothing_else(tmp_path, family, run):
    """What is merged into often lies beside the text encoder and the VAE."""
    base = shutil.copytree(DATA / "wan_t2v", tmp_path / "base")
    vae = tmp_path / "mixed" / "Wan2.1_VAE.pth"
    vae.parent.mkdir()
    vae.touch()
    (tmp_path / "tmp-base").mkdir()
    [file], _ = adapter(family, tmp_path / "lora")
    before = sorted(tmp_path.rglob("*"))
    cases = {
        base: "which is read; name another folder",
        tmp_path: "which is read",
        file.parent: "which is read",
        vae.parent: "holds Wan2.1_VAE.pth, which is no part of a transformer",
        tmp_path / "wan.safetensors": "is a file's name; name a folder",
        file: "is a file's name",
    }
    for out, message in cases.items():
        code, _, error = run(*merge_words(base, out, (file, None)), "--force")
        assert code == 2 and message in error, (out, error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("form", FORMS)
def test_merge_into_scaled_fp8(tmp_path, family, run, form):
    """Scales are applied and the sum is bfloat16: ComfyUI's fp8_scaled files are many people's only copy."""
    native = load_file(DATA / "wan_t2v" / TRANSFORMER_FILE)
    stored, header, dequantised = scaled_tensors(native, form)
    save_file(stored, tmp_path / "base.safetensors", metadata=header or None)
    (tmp_path / "config.json").write_text((DATA / "wan_t2v" / "config.json").read_text())
    [file], expected = adapter(family, tmp_path / "lora")
    assert run(*merge_words(tmp_path / "base.safetensors", tmp_path / "out", (file, None)))[0] == 0
    merged = load_file(tmp_path / "out" / TRANSFORMER_FILE)
    name, skeleton = "blocks.1.ffn.0.weight", "blocks.1.ffn.net.0.proj"
    change = expected[skeleton] - native[name]
    torch.testing.assert_close(merged[name].float(), dequantised[name] + change, rtol=2**-8, atol=1e-6)
    assert merged[name].dtype == torch.bfloat16 and merged.keys() == native.keys()


def test_merge_leaves_nothing_behind_when_it_fails(tmp_path, family, run, monkeypatch):
    [file], _ = adapter(family, tmp_path / "lora")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("models.wan.export.write_tensors", full)
    code, _, error = run(*merge_words(DATA / "wan_t2v", tmp_path / "out", (file, None)))
    assert code == 2 and "No space left" in error
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_full_rank_is_exact_and_a_lower_one_the_best(scale):
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(size, generator=generator) for size in ((8, 40), (24, 8)))
    whole = (scale * up.double() @ down.double()).numpy()
    for rank in range(1, 10):
        done = reduce_rank(down, up, rank, scale=scale)
        assert done.down.shape[0] == done.up.shape[1] == min(rank, 8)
        left, values, right = torch.linalg.svd(torch.from_numpy(whole), full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(done.up @ done.down, best, rtol=0, atol=1e-12)
        assert done.kept / done.whole == pytest.approx(float(values[:rank].square().sum() / values.square().sum()))


def test_dynamic_takes_the_lowest_rank_that_keeps_the_share():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])  # norms of the first n: 4, 5, 5.385, 5.477
    down, up = torch.eye(4), torch.diag(values)
    ranks = {share: reduce_rank(down, up, 4, share).down.shape[0] for share in (0.5, 0.74, 0.9, 0.95, 0.99, 1.0)}
    assert ranks == {0.5: 1, 0.74: 2, 0.9: 2, 0.95: 3, 0.99: 4, 1.0: 4}
    assert reduce_rank(down, up, 2, 0.99).down.shape[0] == 2, "never above --rank"
    assert reduce_rank(down, torch.zeros(4, 4), 4, 0.99).down.shape[0] == 1, "a module that changes nothing"


@pytest.mark.parametrize("form", FORMATS)
def test_resize_keeps_the_format(tmp_path, family, run, form):
    [file], expected = adapter(family, tmp_path, "lora", (form,))
    out = tmp_path / "small.safetensors"
    code, told, _ = run("resize", file, out, "--rank", 4)
    assert code == 0 and "rank 4 made 4, 100.00% of the Frobenius norm kept" in told
    same_weights(family, out, expected, atol=2e-6)
    assert run("resize", file, out, "--rank", 2, "--force")[0] == 0
    stored = load_file(out)
    key = FORMATS[form].spell("blocks.0.attn1.to_q")
    assert stored[f"{key}{FORMATS[form].parts['.lora_A.weight']}"].shape == (2, 48)
    with safe_open(out, "pt") as opened:
        assert (opened.metadata()["rank"], opened.metadata()["reelpipe.resized_from"]) == ("2", "4")


@pytest.mark.parametrize("form", FORMATS)
def test_ranks_that_differ_load_as_they_should(tmp_path, family, run, form):
    [file], _ = adapter(family, tmp_path, "lora", (form,))
    code, told, _ = run("resize", file, tmp_path / "small.safetensors", "--rank", 4, "--dynamic", 0.93)
    assert code == 0 and "rank 4 made 3 to 4, " in told
    small = family.load_adapter(tmp_path / "small.safetensors")
    assert len({tensor.shape[0] for name, tensor in small.items() if "lora_A" in name}) > 1
    code, _, error = run("lora", tmp_path / "small.safetensors", tmp_path / "d.safetensors", "--to", "diffusers")
    assert code == 0, error
    expected = adapted_weights(family, small)
    same_weights(family, tmp_path / "d.safetensors", expected)
    pipeline = plain_pipeline(family)
    pipeline.load_lora_weights(str(tmp_path / "d.safetensors"))
    for module, weight in expected.items():
        layer = pipeline.transformer.get_submodule(module)
        layer.merge()
        torch.testing.assert_close(layer.get_base_layer().weight.data, weight, rtol=0, atol=1e-6)


def test_inspect_an_adapter(tmp_path, family, run):
    [file], _ = adapter(family, tmp_path, "lora", ("kohya",))
    code, out, _ = run("inspect", file)
    lines = {line.split()[0]: line for line in out.splitlines()[1:] if not line.startswith("  header")}
    assert code == 0 and out.splitlines()[0] == str(file)
    assert "a LoRA for Wan (kohya's names)" in lines["what"]
    assert "LoRA, kohya format" in lines["adapter"]
    assert "4, alpha 2.5, scale 0.625" in lines["rank"]
    assert "30 in 3 blocks: attn1.to_k," in lines["modules"]
    assert "48 wide, which is none of the released" in lines["fits"]
    assert "ss_network_dim = 4" in out and "modelspec.architecture = wan2.1-t2v-custom-size/lora" in out


@pytest.mark.parametrize(
    ("width", "with_images", "fits"),
    [
        (1536, False, "Wan2.1 T2V 1.3B"),
        (3072, False, "Wan2.2 TI2V-5B"),
        (5120, False, "Wan2.2 T2V-A14B and I2V-A14B"),
        (5120, True, "Wan2.1 I2V 14B"),
    ],
)
def test_inspect_tells_what_an_adapter_fits(tmp_path, run, width, with_images, fits):
    modules = ["self_attn.q"] + (["cross_attn.k_img"] if with_images else [])
    shapes = {".lora_A.weight": (1, width), ".lora_B.weight": (width, 1)}
    tensors = {f"blocks.0.{m}{part}": torch.zeros(shape) for m in modules for part, shape in shapes.items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert fits in run("inspect", tmp_path / "lora.safetensors")[1]


def test_inspect_a_folder(run):
    code, out, _ = run("inspect", DATA / "wan_i2v")
    assert code == 0
    assert "a Wan2.1 I2V transformer (48 wide, official names)" in out and "float32 (" in out
    assert "CLIP weights (official names)" in out


def test_inspect_tells_of_files_that_cannot_be_read(tmp_path, run):
    (tmp_path / "half.safetensors").write_bytes((DATA / "wan_t2v" / TRANSFORMER_FILE).read_bytes()[:-10])
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    code, out, _ = run("inspect", tmp_path)
    assert code == 0 and "truncated" in out and "nothing that is known here" in out
    assert run("inspect", tmp_path / "half.safetensors")[0] == 2


def test_refusals(tmp_path, family, run):
    [file], _ = adapter(family, tmp_path / "t2v")
    [lokr], _ = adapter(family, tmp_path / "lokr", "lokr")
    [image], _ = adapter(wan_variant("wan_i2v"), tmp_path / "i2v")
    out, base = tmp_path / "out.safetensors", DATA / "wan_t2v"
    adapter(family, tmp_path / "both", "lora", ("kohya",))
    (tmp_path / "two").mkdir()
    for expert in ("high", "low"):
        (tmp_path / "two" / f"{expert}_noise_model").mkdir()
    cases = {
        ("lora", tmp_path / "nowhere", out, "--to", "kohya"): "no LoRA at",
        ("lora", file, tmp_path / "out.pt", "--to", "kohya"): "must be a file that ends in .safetensors",
        ("lora", lokr, out, "--to", "diffusers"): "cannot hold a LoKr",
        ("lora", DATA / "wan_t2v" / TRANSFORMER_FILE, out, "--to", "kohya"): "looks like a model",
        ("lora", file, file, "--to", "kohya"): "is there already",
        ("resize", lokr, out, "--rank", 2): "is a LoKr; only a LoRA can be resized",
        ("resize", file, out, "--rank", 0): "--rank = 0 must be 1 or more",
        ("resize", file, out, "--rank", 2, "--dynamic", 1.5): "--dynamic = 1.5 must lie in (0, 1]",
        ("resize", file, out, "--rank", 2, "--device", "nonsense"): "--device = 'nonsense'",
        tuple(merge_words(base, tmp_path / "m", (image, None))): "made for Wan2.1 image to video",
        tuple(
            merge_words(tmp_path / "two", tmp_path / "m", (file, None))
        ): "holds the transformers of Wan2.2 A14B in folders: name",
        tuple(merge_words(tmp_path / "nowhere", tmp_path / "m", (file, None))): "does not exist",
        tuple(merge_words(base, tmp_path / "t2v", (file, None))): "is there already",
        tuple(merge_words(file, tmp_path / "m", (file, None))): "neither a config.json nor the tensors tell",
        ("inspect", tmp_path / "nowhere"): "does not exist",
    }
    for words, message in cases.items():
        code, told, error = run(*words)
        assert (code, told) == (2, "") and message in error and error.count("\n") == 1, (words, error)
    assert not out.exists() and not (tmp_path / "m").exists()


def test_the_command_line_itself(tmp_path, family):
    [file], _ = adapter(family, tmp_path)
    command = [sys.executable, "-m", "models.convert"]
    ran = subprocess.run([*command, "inspect", str(file)], capture_output=True, text=True, check=True)
    assert "LoRA, comfyui format" in ran.stdout
    assert subprocess.run([*command, "inspect", str(tmp_path / "nowhere")], check=False).returncode == 2


def test_the_readmes_commands_are_taken():
    shown = re.findall(r"^python -m models\.convert (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 4
    for line in shown:
        parser().parse_args(shlex.split(line, comments=True))


def test_usage(capsys):
    for words in (["merge", "--weight", "1"], ["frobnicate"], []):
        with pytest.raises(SystemExit, match="2"):
            main(words)
    assert "--weight must follow the --lora that it is for" in capsys.readouterr().err
    for name in ("lora", "merge", "resize", "inspect"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f"models.convert {name} [-h]" in capsys.readouterr().out
