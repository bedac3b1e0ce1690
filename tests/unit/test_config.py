"""Configs that are taken: defaults, inheritance, diffusion-pipe's own keys, overrides, secrets, the resolved copy."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import toml

from tests.helpers.configs import (  # noqa: F401
    DATASET,
    RUN,
    SPEC,
    complaints,
    folder,
    load,
    top,
)
from utils.config.load import (
    ConfigError,
    config_digest,
    load_config,
    load_dataset,
    redacted_text,
    resolved_dataset_toml,
    resolved_toml,
)
from utils.config.rules import check_rules

pytestmark = pytest.mark.usefixtures("folder")


def test_a_small_config_resolves_with_defaults():
    loaded = load()
    run = loaded.run
    assert (run.output_dir, run.cache_dir, run.epochs) == (Path("runs"), Path("runs/cache"), 3)
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.dtype) == (8, 8, "float32")
    assert (run.optimizer.lr, run.optimizer.weight_decay, run.optimizer.arguments) == (1e-4, None, {})
    assert (run.seed, run.eval_before_first_step, run.gradient_clipping) == (42, True, 1.0)
    assert (loaded.family_name, loaded.model.ckpt_path) == ("stand_in", Path("weights"))
    assert loaded.dataset.directory[0].resolutions == (64,)
    assert (loaded.notices, loaded.eval_datasets) == ([], {})
    assert check_rules(loaded, 1, SPEC) == []


def test_settings_are_frozen_and_pickle():
    loaded = load()
    with pytest.raises(ValueError, match="frozen"):
        loaded.run.epochs = 4
    again = pickle.loads(pickle.dumps((loaded.run, loaded.dataset)))
    assert again == (loaded.run, loaded.dataset)
    error = pickle.loads(pickle.dumps(ConfigError(["a", "b"])))
    assert (str(error), error.messages) == ("a\nb", ("a", "b"))


def test_directories_inherit_the_top_level_and_override_it():
    text = """\
resolutions = [512]
frame_buckets = [33]
num_repeats = 2
caption_prefix = 'sks, '
[[directory]]
path = '/data/a'
[[directory]]
path = 'b'
resolutions = [[832, 480]]
num_repeats = 0.5
skip_empty_caption = false
"""
    first, second = load(dataset=text).dataset.directory
    assert (first.path, first.resolutions, first.num_repeats, first.skip_empty_caption) == (
        Path("/data/a"),
        (512,),
        2.0,
        True,
    )
    assert (second.path, second.resolutions, second.num_repeats, second.skip_empty_caption) == (
        Path("b"),
        ((832, 480),),
        0.5,
        False,
    )
    assert first.frame_buckets == second.frame_buckets == (1, 33)  # 1 need not be written
    assert second.caption_prefix == "sks, "


def test_a_home_directory_is_expanded():
    assert load(dataset=DATASET.replace("'clips'", "'~/clips'")).dataset.directory[0].path == Path.home() / "clips"


def test_eval_datasets_as_tables_and_as_paths():
    loaded = load(top("eval_datasets = [{name = 'held out', config = 'e1.toml'}]"), e1=DATASET)
    assert list(loaded.eval_datasets) == ["held out"]
    loaded = load(top("eval_datasets = ['e1.toml', 'e2.toml']"), e1=DATASET, e2=DATASET)
    assert list(loaded.eval_datasets) == ["e1", "e2"]
    assert [(item.name, item.config) for item in loaded.run.eval_datasets] == [
        ("e1", Path("e1.toml")),
        ("e2", Path("e2.toml")),
    ]


def test_optimizer_takes_any_further_key():
    optimizer = load(RUN + "betas = [0.9, 0.99]\nd_coef = 2.0\nweight_decay = 0\n").run.optimizer
    assert optimizer.arguments == {"betas": (0.9, 0.99), "d_coef": 2.0}
    assert optimizer.weight_decay == 0


@pytest.mark.parametrize(
    ("lines", "bucket", "evaluating", "expected"),
    [
        ([], (512, 512, 81), False, 1),
        (["micro_batch_size_per_gpu = 3"], (512, 512, 81), False, 3),
        (["micro_batch_size_per_gpu = 3"], (512, 512, 1), True, 3),
        (["micro_batch_size_per_gpu = [[512, 4], [1024, 1]]"], (832, 480, 33), False, 4),
        (["micro_batch_size_per_gpu = [[512, 4], [1024, 1]]"], (1280, 720, 33), False, 1),
        (["micro_batch_size_per_gpu = [[512, 4], [1024, 1]]"], (768, 768, 33), False, 4),  # a tie: the smaller side
        (["image_micro_batch_size_per_gpu = 8"], (512, 512, 1), False, 8),
        (["image_micro_batch_size_per_gpu = 8"], (512, 512, 33), False, 1),
        (["image_micro_batch_size_per_gpu = 8"], (512, 512, 1), True, 1),  # evaluation falls back on evaluation
        (["eval_micro_batch_size_per_gpu = 2"], (512, 512, 1), True, 2),
        (["image_eval_micro_batch_size_per_gpu = 5"], (512, 512, 1), True, 5),
        (["eval_image_micro_batch_size_per_gpu = 5"], (512, 512, 1), True, 5),
        (["max_tokens_per_gpu = 4096"], (512, 512, 1), False, 4),
        (["max_tokens_per_gpu = 4095"], (512, 512, 1), True, 3),
        (["max_tokens_per_gpu = 4096"], (512, 512, 81), False, 1),  # more than the budget: one at a time
        (["max_tokens_per_gpu = 43008"], (512, 512, 81), False, 2),
        (["max_tokens_per_gpu = 4096", "eval_micro_batch_size_per_gpu = 2"], (512, 512, 1), True, 2),
        (["max_tokens_per_gpu = 4096", "image_eval_micro_batch_size_per_gpu = 2"], (512, 512, 1), True, 2),
        (["max_tokens_per_gpu = 43008", "image_eval_micro_batch_size_per_gpu = 2"], (512, 512, 81), True, 2),
    ],
)
def test_batch_size_of_a_bucket(lines, bucket, evaluating, expected):
    run = load(top(*lines) if lines else RUN).run
    width, height, frames = bucket
    tokens = (width // 16) * (height // 16) * (frames // 4 + 1)
    assert run.micro_batch_size(*bucket, tokens, evaluating=evaluating) == expected


def test_a_budget_of_tokens_leaves_no_batch_size_behind():
    run = load(top("max_tokens_per_gpu = 4096")).run
    assert (run.micro_batch_size_per_gpu, run.image_micro_batch_size_per_gpu) == (None, None)
    assert load().run.micro_batch_size_per_gpu == 1


DIFFUSION_PIPE = """\
output_dir = '/data/runs/wan'
dataset = 'dataset.toml'
epochs = 1000
max_steps = 5000
micro_batch_size_per_gpu = 1
image_micro_batch_size_per_gpu = 4
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 100
lr_scheduler = 'linear'
blocks_to_swap = 0
pseudo_huber_c = 0.5
eval_every_n_epochs = 1
eval_every_n_steps = 100
eval_every_n_examples = 1000
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
image_eval_micro_batch_size_per_gpu = 4
eval_gradient_accumulation_steps = 1
disable_block_swap_for_eval = true
save_every_n_epochs = 2
save_every_n_steps = 100
save_every_n_examples = 1000
checkpoint_every_n_minutes = 120
activation_checkpointing = 'unsloth'
reentrant_activation_checkpointing = true
partition_method = 'parameters'
save_dtype = 'bfloat16'
caching_batch_size = 1
map_num_proc = 32
compile = true
steps_per_print = 1
logging_steps = 1
uncond_fraction = 0.1
video_clip_mode = 'single_beginning'
x_axis_examples = true
resume_from_checkpoint = false

[model]
type = 'stand_in'
ckpt_path = '/models/Wan2.1-T2V-1.3B'
dtype = 'bfloat16'
transformer_dtype = 'float8'
timestep_sample_method = 'logit_normal'

[adapter]
type = 'lora'
rank = 32
dtype = 'bfloat16'
init_from_existing = '/data/runs/something/epoch50'

[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
gradient_release = false

[monitoring]
enable_wandb = false
wandb_api_key = ''
wandb_tracker_name = ''
wandb_run_name = ''
"""

DIFFUSION_PIPE_DATASET = """\
resolutions = [512]
enable_ar_bucket = true
min_ar = 0.5
max_ar = 2.0
num_ar_buckets = 7
frame_buckets = [1, 33]
cache_shuffle_num = 0
cache_shuffle_delimiter = ', '
skip_empty_caption = false
[[directory]]
path = '/home/anon/data/images/grayscale'
num_repeats = 1
ar_buckets = [[448, 576]]
resolutions = [[448, 576]]
frame_buckets = [1]
[[directory]]
path = '/home/anon/data/videos'
num_repeats = 5
ar_buckets = [1.0, 1.5]
"""


@pytest.mark.parametrize("family", ["stand_in", "wan"])
def test_a_diffusion_pipe_config_runs_unchanged(family):
    loaded = load(DIFFUSION_PIPE.replace("stand_in", family), DIFFUSION_PIPE_DATASET)
    assert check_rules(loaded, 1, SPEC) == []
    assert (loaded.run.activation_checkpointing, loaded.run.adapter.dtype) == ("unsloth", "bfloat16")
    assert loaded.run.optimizer.arguments == {"betas": (0.9, 0.99), "eps": 1e-8}
    assert [item.num_repeats for item in loaded.dataset.directory] == [1, 5]
    assert loaded.notices == [
        "run.toml:27: reentrant_activation_checkpointing = true has no effect here",
        "run.toml:21: disable_block_swap_for_eval = true has no effect here",
    ]


# --- overrides


def test_overrides_replace_and_add():
    loaded = load(
        overrides=["epochs=7", "optimizer.lr=1e-3", "cache_dir = 'elsewhere'", "monitoring.enable_wandb=true"]
    )
    assert (loaded.run.epochs, loaded.run.optimizer.lr, loaded.run.monitoring.enable_wandb) == (7, 1e-3, True)
    assert loaded.run.cache_dir == Path("elsewhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "--set epochs: is not key=value; write for instance --set optimizer.lr=1e-4"),
        ("=3", "--set =3: is not key=value; write for instance --set optimizer.lr=1e-4"),
        (
            "cache_dir=/tmp/x",
            "--set cache_dir=/tmp/x: the value is not TOML; text needs quotes: --set \"cache_dir='/tmp/x'\"",
        ),
        ("epochs.x=1", "--set epochs.x=1: epochs is not a table"),
        *(
            (
                f"monitoring{form}",
                f"--set monitoring{form.replace('abc', chr(39) * 2)}: everybody on the machine can read a command "
                "line, and wandb keeps it; set the environment variable WANDB_API_KEY instead",
            )
            for form in (".wandb_api_key=abc", "={wandb_api_key=abc, enable_wandb=true}")
        ),
        ("epochs=0", "--set: epochs = 0 is too small; use 1 or more"),
        ("epoch=1", "--set: unknown key 'epoch' = 1; did you mean 'epochs'?"),
    ],
)
def test_bad_overrides(override, message):
    assert complaints(overrides=[override]) == [message]


# --- secrets and the resolved copy

SECRET = "wandb_api_key = 'verysecret'"


def test_no_output_holds_the_secret():
    run = RUN + f"[monitoring]\nenable_wandb = true\n{SECRET}  # mine\n"
    loaded = load(run)
    assert loaded.run.monitoring.wandb_api_key.get_secret_value() == "verysecret"
    assert loaded.notices == [
        "run.toml:20: wandb_api_key is safer in the environment variable WANDB_API_KEY; it is not copied on"
    ]
    for output in (resolved_toml(loaded), redacted_text(run), repr(loaded.run), str(loaded.run.model_dump())):
        assert "verysecret" not in output
    assert redacted_text(run) == run.replace("'verysecret'", "''")
    messages = complaints(run=run.replace("'verysecret'", "[1234567]"))
    assert messages == ["run.toml:20: monitoring.wandb_api_key = (hidden) is not text; put it in quotes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("monitoring.wandb_api_key='s3cret' # s", "monitoring.wandb_api_key='' # s"),
        (
            "monitoring = {wandb_api_key = s3cret, enable_wandb = true}",
            "monitoring = {wandb_api_key = '', enable_wandb = true}",
        ),
        ('#wandb_api_key = "s3cret"', "#wandb_api_key = ''"),
        ('"wandb_api_key" = """s3\ncret"""\na = 1', "\"wandb_api_key\" = ''\na = 1"),
        ("wandb_api_key = 's3cret\na = 1", "wandb_api_key = ''\na = 1"),
        ("wandb_run_name = 'wandb_api_key'", "wandb_run_name = 'wandb_api_key'"),
    ],
)
def test_a_secret_is_emptied_wherever_it_stands(text, expected):
    assert redacted_text(text) == expected


def test_the_resolved_copy_loads_to_the_same_settings():
    lines = [
        "eval_datasets = ['eval.toml']",
        "micro_batch_size_per_gpu = [[512, 4], [1024, 1]]",
        "activation_checkpointing = 'unsloth'",
        "checkpoint_every_n_minutes = 30",
    ]
    adapter = "rank = 8\nexclude_modules = ['blocks\\.\\d+\\.ffn', 'a\\x41']"
    run = top(*lines, run=RUN.replace("rank = 8", adapter) + "betas = [0.9, 0.99]\nd = 3\n")
    dataset = top("ar_buckets = [[64, 96]]", "enable_ar_bucket = true", "num_repeats = 3", run=DATASET)
    loaded = load(run, dataset, ["epochs=9"], eval=DATASET)
    resolved = resolved_toml(loaded)
    Path("resolved.toml").write_text(resolved)
    again = load_config(Path("resolved.toml"))
    assert again[:6] == loaded[:6]
    assert resolved_toml(again) == resolved
    assert config_digest(again) == config_digest(loaded) != config_digest(load(run, dataset, eval=DATASET))
    written = toml.loads(resolved)
    assert (written["epochs"], written["seed"], written["adapter"]["alpha"]) == (9, 42, 8)
    assert "blocks_to_swap" not in written
    Path("again.toml").write_text(resolved_dataset_toml(loaded.dataset))
    assert load_dataset(Path("again.toml")) == loaded.dataset


def test_reading_the_schema_brings_no_heavy_library():
    code = "import sys, utils.config.rules; print({'torch', 'av', 'transformers', 'deepspeed'} & sys.modules.keys())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
