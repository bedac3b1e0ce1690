"""What the READMEs name is there: files of the tree, links, examples, flags and keys."""

import re
import shlex
from pathlib import Path

import pytest
import toml
import torch
from diffusers import WanTransformer3DModel

import train
from models.convert import __main__ as convert
from models.wan.config import WanModelConfig
from models.wan.storage import Storage
from models.wan.variants import Architecture
from utils.config.dataset_schema import DatasetConfig, DirectoryConfig
from utils.config.fields import Refused
from utils.config.musubi import MusubiDataset
from utils.config.schema import AdapterConfig, MonitoringConfig, OptimizerConfig, RunConfig
from utils.train import cache_tool

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES_README = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
# row of the table of weights -> dim, ffn_dim, heads, layers, channels in and out, width and rows of CLIP's states
SIZES = {
    "T2V 1.3B": [(1536, 8960, 12, 30, 16, 16, 0, 0)],
    "TI2V-5B": [(3072, 14336, 24, 30, 48, 48, 0, 0)],
    "T2V 14B": [(5120, 13824, 40, 40, 16, 16, 0, 0), (5120, 13824, 40, 40, 36, 16, 0, 0)],
    "I2V 14B": [(5120, 13824, 40, 40, 36, 16, 1280, 0), (5120, 13824, 40, 40, 36, 16, 1280, 514)],
}
SCHEMAS = (RunConfig, AdapterConfig, OptimizerConfig, MonitoringConfig, DatasetConfig, DirectoryConfig, WanModelConfig)


def section(title):
    """The text under a heading, up to the next one of its rank."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def listed_paths():
    """The tree's entries as paths from the root; two spaces of indent are one folder."""
    folders, paths = [], []
    for line in blocks(section("The tree"), "")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0]
        for name in names.split(", "):
            folders[depth:] = [name]
            paths.append("".join(folders))
    return paths


def refused(schema):
    return {
        name for name, info in schema.model_fields.items() if any(isinstance(part, Refused) for part in info.metadata)
    }


def test_every_entry_of_the_tree_is_there():
    absent = [path for path in listed_paths() if not (ROOT / path).exists()]
    assert absent == []


def test_every_module_is_in_the_tree():
    modules = {str(path.relative_to(ROOT)) for top in ("models", "utils") for path in (ROOT / top).rglob("*.py")}
    assert {path for path in listed_paths() if path.endswith(".py") and not path.startswith("tests/")} == {
        "train.py",
        *modules,
    }


@pytest.mark.parametrize("readme", ["README.md", "examples/README.md"])
def test_links_lead_somewhere(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert ((ROOT / readme).parent / target).exists(), target


def test_every_example_is_in_its_readme():
    shown = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".toml", ".py", ".sh")}
    rows = [line.split("|")[1] for line in EXAMPLES_README.splitlines() if line.startswith("|")]
    assert shown == set(re.findall(r"`(\w+\.(?:toml|py|sh))`", " ".join(rows)))


def commands():
    """Words after train.py in every command that is shown."""
    for line in "\n".join(blocks(README, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "train.py" in words:
            yield words[words.index("train.py") + 1 :]
        elif words[:2] == ["bash", "examples/quickstart.sh"]:
            yield ["--config", "examples/quickstart.toml", *words[2:]]


def test_train_takes_the_flags_that_are_shown():
    shown = list(commands())
    assert len(shown) >= 8
    for words in shown:
        config = train.parse_arguments(words).config
        assert config.name.startswith("my_") or (ROOT / config).is_file()


def test_convert_takes_the_commands_that_are_shown():
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks(README, "bash")).splitlines()]
    shown = [words[3:] for words in lines if words[:3] == ["python", "-m", "models.convert"]]
    assert {convert.parser().parse_args(words).command for words in shown} == {"lora", "merge", "resize", "inspect"}


def test_cache_tool_takes_the_commands_that_are_shown():
    lines = [shlex.split(line, comments=True) for line in "\n".join(blocks(README, "bash")).splitlines()]
    shown = [words[3:] for words in lines if words[:3] == ["python", "-m", "utils.train.cache_tool"]]
    assert {cache_tool.parser().parse_args(words).command for words in shown} == {"stats", "verify", "gc"}


def test_flags_in_the_text_are_known(capsys):
    for arguments in ("--help", "lora --help", "merge --help", "resize --help"):
        parse = convert.parser().parse_args if " " in arguments else train.parse_arguments
        with pytest.raises(SystemExit):
            parse(arguments.split())
    for command in ("stats", "verify", "gc"):
        with pytest.raises(SystemExit):
            cache_tool.parser().parse_args([command, "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    launchers = {"--num_gpus", "--master_port", "--master_addr", "--hostfile", "--nnodes", "--node_rank"}
    launchers |= {"--include", "--ssh_port", "--no_ssh", "--rdzv_conf"}
    text = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    others = {"--deepspeed", "--logdir", "--version", "--local"}  # hidden, and other programs'; --local-dir of hf
    assert set(re.findall(r"--\w+", text)) <= known | launchers | others


def test_tomls_that_are_shown_have_known_keys():
    model, dataset = (toml.loads(text) for text in blocks(README, "toml"))
    DatasetConfig.model_validate(dataset)
    WanModelConfig.model_validate(model["model"])


def test_what_differs_from_diffusion_pipe_names_every_refused_key():
    text = section("Coming from diffusion-pipe")
    named = set(re.findall(r"`(\w+)", text))
    command_line = {"resume_from_checkpoint", "regenerate_cache"}  # as keys of a TOML they are only misplaced
    absent = {key for schema in SCHEMAS for key in refused(schema)} - command_line - named
    assert absent == set()
    new = text.partition("New keys:")[2]
    known = {key for schema in SCHEMAS for key in schema.model_fields}
    assert set(re.findall(r"`(\w+)`", new)) <= known


@pytest.mark.parametrize("title", SIZES)
def test_the_table_of_weights_is_right(title):
    """Counted from skeletons of the real sizes."""
    (row,) = [line for line in section("Memory").splitlines() if line.startswith(f"| {title}")]
    for dim, ffn_dim, heads, layers, inside, out, image_dim, image_rows in SIZES[title]:
        sizes = Architecture(dim, ffn_dim, heads, layers, 256, inside, out, 4096, 1e-6, image_dim, image_rows)
        with torch.device("meta"):
            skeleton = WanTransformer3DModel(**sizes.diffusers_arguments())
        weights = dict(skeleton.named_parameters())
        assert f"{sum(weight.numel() for weight in weights.values()):,}" in row
        for linear in (torch.bfloat16, torch.float8_e4m3fn):
            storage = Storage(torch.bfloat16, linear, {}, {})
            held = sum(weight.numel() * storage.dtype(name).itemsize for name, weight in weights.items())
            assert f"{held / 2**30:.2f} GiB" in row
        linears = [module for module in skeleton.blocks.modules() if isinstance(module, torch.nn.Linear)]
        lora = sum(32 * (module.in_features + module.out_features) for module in linears)
        assert f"{lora / 1e6:.1f} M parameters, {lora * 16 / 2**30:.2f} GiB" in row


def test_names_with_underscores_are_keys():
    """A key that is renamed must be renamed in the README too."""
    others = {"save_quit", "multiple_overlapping", "adamw_optimi", "high_noise", "low_noise"}
    others |= {"fp8_scaled", "scale_weight", "weight_scale", "comfy_quant", "logit_normal"}
    others |= set(MusubiDataset.model_fields)
    words = set(re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+)+)`", README))
    assert words - {key for schema in SCHEMAS for key in schema.model_fields} <= others
