"""Configs that nobody would write: refused with key and line, soon and in little memory, or taken and told alike."""

import json
import os
import random
import time
from pathlib import Path

import pytest
import toml

from tests.helpers.configs import DATASET, RUN, SPEC, folder, load  # noqa: F401
from utils.config.dataset_schema import DirectoryConfig, SharedSettings
from utils.config.load import (
    ConfigError,
    config_digest,
    load_config,
    load_dataset,
    resolved_dataset_toml,
    resolved_toml,
)
from utils.config.musubi import MusubiDataset
from utils.config.rules import advice, check_paths, check_rules
from utils.config.schema import AdapterConfig, MonitoringConfig, OptimizerConfig, RunConfig
from utils.config.source import MAX_BYTES, MAX_DEPTH, read_toml
from utils.train.run_folder import new_run_folder

pytestmark = pytest.mark.usefixtures("folder")

MUSUBI = """\
[general]
resolution = [64, 64]
caption_extension = '.txt'

[[datasets]]
video_directory = 'clips'
target_frames = [1, 9]
"""
WORDS = ["", "x", "wan", "../../x", "~", "~nobody/x", "${HOME}/x", "a b", "é", "\\", "'", '"', "a\nb", "x" * 300]
NUMBERS = [0, 1, 2, 3, 8, 64, -1, 10**12, 0.0, 0.25, 0.5, 1.0, 1.5, 64.0, 1e-5, 1e300, -0.5]
LISTS = [[], [1], [64, 9], [1.5], ["a"], [[64, 64]], [[64, 64, 9]], [[]], [-1], [True], [0.9, 0.99]]
TABLES = [{}, {"x": 1}, {"name": "a", "config": "dataset.toml"}, {"path": "a", "weight": 0.5}]
KNOWN = ["lora", "dora", "lokr", "bfloat16", "float32", "comfyui", "full", "uniform", "random", "pad", "skip", "native"]
KNOWN += ["adamw", "cosine", "unsloth", "manual", "uniform", "stop", "videos", "loop", ".caption", "dataset.toml"]
VALUES = [True, False, *NUMBERS, *WORDS, *KNOWN, *LISTS, *TABLES]
DRAWS = 8  # values tried of each key


def text_of(value) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {text_of(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return toml.dumps({"x": value}).partition(" = ")[2].strip()


def with_key(text: str, table: str, key: str, value) -> tuple[str, int]:
    """`text` with the key set in its table, in place of its own line where it has one, and the line it stands on."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip() == table) + 1 if table else 0
    rest = range(start, len(lines))
    end = next((n for n in rest if lines[n].startswith("[")), len(lines))
    at = next((number for number in range(start, end) if lines[number].startswith(f"{key} =")), None)
    written = f"{key} = {text_of(value)}"
    lines = [*lines[:start], written, *lines[start:]] if at is None else [*lines[:at], written, *lines[at + 1 :]]
    return "\n".join(lines) + "\n", (start if at is None else at) + 1


def assert_round_trip(loaded) -> None:
    Path("again.toml").write_text(resolved_toml(loaded), encoding="utf-8")
    again = load_config(Path("again.toml"))
    assert (again.run, again.model) == (loaded.run, loaded.model)
    Path("dataset_again.toml").write_text(resolved_dataset_toml(loaded.dataset), encoding="utf-8")
    assert load_dataset(Path("dataset_again.toml")) == loaded.dataset
    assert config_digest(again) == config_digest(loaded)


RUN_KEYS = [
    *[("", key) for key in RunConfig.model_fields if key not in ("adapter", "optimizer", "monitoring")],
    *[("[adapter]", key) for key in AdapterConfig.model_fields],
    *[("[optimizer]", key) for key in OptimizerConfig.model_fields],
    *[("[monitoring]", key) for key in MonitoringConfig.model_fields],
]


def tried(kind: str, key: str) -> list:
    return random.Random(f"{kind}.{key}").sample(VALUES, DRAWS)


def check(file: str, key: str, line: int, make) -> int:
    """One config: 1 where it is taken. `make` loads it."""
    try:
        loaded = make()
    except ConfigError as error:
        named = [message for message in error.messages if key in message]
        assert named, f"{key} is not named: {error}"
        assert any(message.startswith(f"{file}:{line}: ") for message in named), (line, named)
        assert all(len(message) < 600 and message.isprintable() for message in error.messages), error
        return 0
    check_rules(loaded, 1, SPEC), check_paths(loaded), advice(loaded, SPEC)
    if key == "wandb_api_key":
        assert "wandb_api_key" not in resolved_toml(loaded)
    else:
        assert_round_trip(loaded)
    return 1


def test_every_key_of_a_run():
    taken = 0
    for table, key in RUN_KEYS:
        base = f"{RUN}\n[monitoring]\n"
        for value in tried("run", key):
            text, line = with_key(base, table, key, value)
            taken += check("run.toml", key, line, lambda text=text: load(text))
    assert taken > 40, "a test of refusals alone would not try the round trip"


def test_every_key_of_a_dataset():
    taken = 0
    for table, key in [
        *[("", key) for key in SharedSettings.model_fields],
        *[("[[directory]]", key) for key in DirectoryConfig.model_fields],
    ]:
        for value in tried("dataset", key):
            text, line = with_key(DATASET, table, key, value)
            taken += check("dataset.toml", key, line, lambda text=text: load(dataset=text))
    assert taken > 60


def test_every_key_of_musubis():
    taken = 0
    for key in MusubiDataset.model_fields:
        for value in tried("musubi", key):
            text, line = with_key(MUSUBI, "[[datasets]]", key, value)
            if key.endswith(("_directory", "_file")) and key != "video_directory":
                continue  # a second source: the message names the table
            taken += check("dataset.toml", key, line, lambda text=text: load(dataset=text))
    assert taken > 10


def mangled(text: str, draw: random.Random) -> bytes:
    """One edit or a few of the sort that keyboards, editors and copying make."""
    content = bytearray(text.encode())
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(content))
        to = at + draw.choice([0, 1, 1, 3, 30])
        odd = [bytes([byte]) for byte in b"\0\xff\r\n[]{}'=.,#\\"] + [b'"', "é".encode()]
        odd += [b"[[directory]]\n", b"'''", b'"""', b"1e999", b"\xef\xbb\xbf", b"-", b"1979-05-27", b"x = {a = 1}\n"]
        way = draw.randrange(4)
        content[at:to] = [b"", draw.choice(odd), bytes(content[at:to]) * 2, bytes(reversed(content[at:to]))][way]
    return bytes(content)


@pytest.mark.parametrize("kind", ["run", "dataset", "musubi"])
def test_mangled_files(kind):
    draw, taken = random.Random(kind), 0
    good = {"run": RUN, "dataset": DATASET, "musubi": MUSUBI}[kind]
    Path("run.toml").write_text(RUN)
    Path("dataset.toml").write_text(DATASET if kind == "run" else good)
    target = Path("run.toml" if kind == "run" else "dataset.toml")
    for _ in range(100):
        target.write_bytes(mangled(good, draw))
        try:
            loaded = load_config(Path("run.toml"))
        except ConfigError as error:
            assert all(message.isprintable() for message in error.messages)
            continue
        taken += 1
        assert_round_trip(loaded)
        check_rules(loaded, 1, SPEC), check_paths(loaded)
    assert 2 < taken < 60


BOMBS = {
    "of 10 MB": b"# " + b"x" * 10_000_000,
    "of a million keys": b"".join(b"k%d=1\n" % number for number in range(1_000_000)),
    "of all the keys that fit": b"".join(b"k%d=1\n" % number for number in range(40_000)),
    "of near misses": b"".join(b"save_every_n_%d=1\n" % number for number in range(20_000)),
    "of deep lists": b"a = " + b"[" * 100_000,
    "of deep tables": b"a = " + b"{a = " * 50_000,
    "of a deep header": b"[" + b".".join([b"a"] * 100_000) + b"]",
    "of a deep key": b"a." * 200_000 + b" = 1",
    "of inline tables": b"a = [" + b"{a=1}," * 60_000 + b"]",
    "of a long list": b"frame_buckets = [" + b"1," * 200_000 + b"]",
    "of a long number": b"seed = " + b"9" * 400_000,
    "of quotes": b"a = " + b"'" * 400_000,
    "of open fences": b"a = '''" + b"\n" * 400_000,
    "of spaces in a header": b"[" + b" " * 400_000 + b"x",
    "of secrets": b"wandb_api_key='''" * 20_000,
    "of NUL bytes": b"epochs = 1\n" + bytes(400_000),
    "of other line ends": b"epochs = 1\repochs = 2\r",
    "in UTF-16": "epochs = 1".encode("utf-16"),
    "in Latin-1": "output_dir = 'é'".encode("latin-1"),
    "of a character beyond Unicode": b'output_dir = "\\UFFFFFFFF"',
    "of half a character": b'output_dir = "\\uD800"',
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_are_no_configs(name):
    where = "dataset.toml" if len(name) % 2 else "run.toml"
    Path(where).write_bytes(BOMBS[name])
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(Path("run.toml"))
    assert time.process_time() - started < 8
    assert all(where in message for message in caught.value.messages)
    assert len(str(caught.value)) < 20_000 and str(caught.value).replace("\n", "").isprintable()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match="is no file; name a TOML file"):
            load_config(path)


def test_line_ends_and_byte_order_marks_of_windows():
    Path("run.toml").write_bytes(b"\xef\xbb\xbf" + RUN.replace("\n", "\r\n").encode())
    assert load_config(Path("run.toml")).run == load().run


def test_lines_are_counted_as_editors_do():
    """U+2028 and the like end a line for Python, and for no parser of TOML."""
    with pytest.raises(ConfigError, match=r"^run\.toml:6: unknown key 'epoch'"):
        load("# a\u2028b\x85c\n" + RUN.replace("save_every_n_epochs = 1", "save_every_n_epochs = 1\nepoch = 1"))


def test_depth_that_a_config_has_is_taken(tmp_path):
    Path("a.toml").write_text("a = " + "[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH)
    assert read_toml(Path("a.toml"), "x").data["a"]
    assert (
        1000 * len("[[directory]]\npath = '/data/somewhere/deep/inside/a/disk/of/clips'\nnum_repeats = 2\n") < MAX_BYTES
    )


@pytest.mark.parametrize(
    "override", ["a=" + "[" * 5000, "." * 5000 + "=1", 'seed="\\UFFFFFFFF"', "a.b.c.d=1", "=1", "[=1"]
)
def test_odd_overrides(override):
    with pytest.raises(ConfigError):
        load(overrides=[override])


@pytest.mark.parametrize("name", ["../../x", "/x", "..\\x", "a\x00b", "a\nb", "x" * 300, "", "train", "\x1b[31m"])
def test_a_name_of_a_held_out_set_stays_in_its_folder(name):
    with pytest.raises(ConfigError, match=r"run\.toml:1: .*name"):
        load(f"eval_datasets = [{{name = {text_of(name)}, config = 'e.toml'}}]\n{RUN}", e=DATASET)


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("${HOME}/runs", "variable"),
        ("~nobody-of-that-name/runs", "home folder"),
        ("a\x00b", "control character"),
        ("a\x1b[31mb", "control character"),
        ("x" * 300, "too long"),
        ("x/" * 3000, "too long"),
        ("", "is empty"),
    ],
)
def test_paths_that_no_file_has(path, told):
    with pytest.raises(ConfigError, match=rf"^run\.toml:1: output_dir = .*{told}[^\n]*$"):
        load(RUN.replace("'runs'", text_of(path)))
    with pytest.raises(ConfigError, match=rf"^run\.toml:2: dataset = .*{told}[^\n]*$"):
        load(RUN.replace("'dataset.toml'", text_of(path)))
    with pytest.raises(ConfigError, match=rf"dataset\.toml:5: directory\[0\]\.path = .*{told}"):
        load(dataset=DATASET.replace("'clips'", text_of(path)))


def test_a_run_folder_is_in_its_output_dir(tmp_path):
    assert new_run_folder(tmp_path / "runs").parent == tmp_path / "runs"
