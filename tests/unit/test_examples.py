"""Every example TOML loads as it is shipped, with every switched-off line switched on, and misses no key."""

import re
from pathlib import Path

import pytest

from models import family_class
from models.base import MediaSpec
from utils.config.dataset_schema import DirectoryConfig
from utils.config.fields import Refused
from utils.config.load import load_config, load_dataset
from utils.config.rules import advice, check_rules
from utils.config.schema import AdapterConfig, MonitoringConfig, OptimizerConfig, RunConfig

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
WAN = MediaSpec(fps=16, pixel_multiple=16, frame_stride=4, images=True)
I2V = WAN._replace(images=False)
TI2V = WAN._replace(fps=24, pixel_multiple=32)
# file -> processes that its head line starts, and what its model asks of clips
RUNS = {
    "main_example": (1, WAN),
    "quickstart": (2, WAN),
    "wan_1_3b_full_finetune": (2, WAN),
    "wan_1_3b_lora": (1, WAN),
    "wan_14b_lora_pp4": (4, WAN),
    "wan_i2v_14b_lora": (4, I2V),
    "wan_flf2v_14b_lora": (4, I2V),
    "wan22_t2v_a14b_lora": (4, WAN),
    "wan22_i2v_a14b_lora": (4, I2V),
    "wan22_both_experts_lora": (4, WAN),
    "wan22_ti2v_5b_lora": (1, TI2V),
}
DATASETS = ("dataset", "dataset_i2v", "quickstart_dataset", "quickstart_eval")
# switched-off key -> the line that it goes with
COMPANIONS = dict.fromkeys(("switch_every", "high_noise_share"), "expert = 'both'")
SWITCHED_OFF = re.compile(r"#(\w+) = ")  # "#key", while "# text" is a comment
KEY = re.compile(r"#?(\w+) = ")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def keys_by_table(text):
    """The keys of a TOML, switched off or not, under the table they stand in."""
    found, table = {}, ""
    for line in text.splitlines():
        table = line.strip("[]") if line.startswith("[") else table
        if match := KEY.match(line):
            found.setdefault(table, set()).add(match[1])
    return found


def switched_on(text):
    """Copies of `text`, each with one switched-off line on, in place of the same key's other lines in that table."""
    lines = text.splitlines()
    starts = [0, *(number for number, line in enumerate(lines) if line.startswith("[")), len(lines)]
    for number, line in enumerate(lines):
        if match := SWITCHED_OFF.match(line):
            start = max(at for at in starts if at <= number)
            end = min(at for at in starts if at > number)
            rivals = {at for at in range(start, end) if lines[at].startswith(f"{match[1]} = ")}
            kept = [row for at, row in enumerate(lines) if at not in rivals | {number}]
            companion = COMPANIONS.get(match[1])
            place = start + 1 if start else 0
            kept[place:place] = [line[1:], *([companion] if companion and companion not in lines else [])]
            yield match[1], "\n".join(kept)


def honoured(schema):
    """The keys of a schema apart from tables, without those that are only known in order to be refused."""
    tables = {"adapter", "optimizer", "monitoring", "directory"}
    return {
        name
        for name, info in schema.model_fields.items()
        if name not in tables and not any(isinstance(part, Refused) for part in info.metadata)
    }


def test_the_lists_above_are_all_there_is():
    assert {path.stem for path in EXAMPLES.glob("*.toml")} == {*RUNS, *DATASETS}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_and_keeps_the_rules(name):
    (processes, spec), text = RUNS[name], (EXAMPLES / f"{name}.toml").read_text()
    assert f"--num_gpus={processes} train.py --deepspeed --config examples/{name}.toml" in text
    loaded = load_config(EXAMPLES / f"{name}.toml")
    assert check_rules(loaded, processes, spec) == []
    assert loaded.notices + advice(loaded, spec) == []


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_loads(name):
    assert load_dataset(EXAMPLES / f"{name}.toml").directory


@pytest.mark.parametrize("name", RUNS)
def test_every_switched_off_line_of_a_run_is_right(name, tmp_path):
    for key, text in switched_on((EXAMPLES / f"{name}.toml").read_text()):
        if "my_eval.toml" in text and key == "eval_datasets":
            text = text.replace("my_eval.toml", "examples/quickstart_eval.toml")
        (tmp_path / f"{key}.toml").write_text(text)
        load_config(tmp_path / f"{key}.toml")


@pytest.mark.parametrize("name", DATASETS)
def test_every_switched_off_line_of_a_dataset_is_right(name, tmp_path):
    for key, text in switched_on((EXAMPLES / f"{name}.toml").read_text()):
        (tmp_path / f"{key}.toml").write_text(text)
        load_dataset(tmp_path / f"{key}.toml")


def test_the_main_example_shows_every_key():
    shown = keys_by_table((EXAMPLES / "main_example.toml").read_text())
    without_effect = {"reentrant_activation_checkpointing", "disable_block_swap_for_eval"}
    assert shown[""] == honoured(RunConfig) - without_effect
    assert shown["model"] == set(family_class("wan").Config.model_fields)
    assert shown["adapter"] == honoured(AdapterConfig)
    assert shown["optimizer"] == honoured(OptimizerConfig)
    assert shown["monitoring"] == honoured(MonitoringConfig)


def test_the_dataset_example_shows_every_key():
    shown = keys_by_table((EXAMPLES / "dataset.toml").read_text())
    assert shown[""] | shown["directory"] == honoured(DirectoryConfig)


def test_defaults_shown_in_the_main_example_are_the_defaults():
    text = (EXAMPLES / "main_example.toml").read_text()
    for key in ("seed", "eval_seed", "lr_scheduler", "partition_method", "caching_batch_size", "steps_per_print"):
        assert f"#{key} = {RunConfig.model_fields[key].default!r}" in text
    for key in ("i2v_fraction", "min_t", "max_t", "text_max_length", "save_layout"):
        assert f"#{key} = {family_class('wan').Config.model_fields[key].default!r}" in text
