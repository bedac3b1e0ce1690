"""Rules across tables and files, and advice, in their exact words."""

from pathlib import Path

import pytest

from tests.helpers.configs import DATASET, RUN, SPEC, folder, load, top  # noqa: F401
from utils.config.load import ConfigError
from utils.config.rules import advice, check_paths, check_rules, require

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("lines", "world_size", "message"),
    [
        (
            ["pipeline_stages = 3"],
            8,
            "run.toml:1: pipeline_stages = 3 does not divide the 8 processes started; use 1, 2, 4 or 8",
        ),
        (["pipeline_stages = 2"], 1, "run.toml:1: pipeline_stages = 2 does not divide the one process started; use 1"),
        (
            ["partition_method = 'manual'", "pipeline_stages = 4"],
            4,
            "run.toml:1: partition_method = 'manual' needs partition_split: "
            "3 rising layer numbers of 1 or more for pipeline_stages = 4",
        ),
        (
            ["partition_split = [8, 4]", "partition_method = 'manual'", "pipeline_stages = 3"],
            3,
            "run.toml:1: partition_split = [8, 4] does not fit; "
            "give 2 rising layer numbers of 1 or more for pipeline_stages = 3",
        ),
        (
            ["partition_split = [0]", "partition_method = 'manual'", "pipeline_stages = 2"],
            2,
            "run.toml:1: partition_split = [0] does not fit; "
            "give 1 rising layer number of 1 or more for pipeline_stages = 2",
        ),
        (
            ["partition_split = [8]", "pipeline_stages = 2"],
            2,
            "run.toml:1: partition_split = [8] has no effect with partition_method = 'parameters'; "
            "set partition_method = 'manual' or remove it",
        ),
        (
            ["eval_datasets = [{name = 'a', config = './dataset.toml'}]"],
            1,
            "run.toml:1: eval_datasets[0].config = 'dataset.toml' is the training dataset; "
            "name one with clips that are not trained on",
        ),
        (
            ["eval_datasets = [{name = 'a', config = 'eval.toml'}, {name = 'a', config = 'eval.toml'}]"],
            1,
            "run.toml:1: eval_datasets has the name 'a' twice; give each its own: {name = '...', config = '...'}",
        ),
    ],
)
def test_rules_of_the_run(lines, world_size, message):
    assert check_rules(load(top(*lines), eval=DATASET), world_size, SPEC) == [message]


def test_batches_are_of_so_many_clips_or_of_so_many_tokens():
    lines = ("max_tokens_per_gpu = 4096", "micro_batch_size_per_gpu = 1", "image_micro_batch_size_per_gpu = [[512, 4]]")
    ends = "and max_tokens_per_gpu = 4096 both say how many clips go through the model at once; remove one of them"
    assert check_rules(load(top(*lines)), 1, SPEC) == [
        f"run.toml:2: micro_batch_size_per_gpu = 1 {ends}",
        f"run.toml:3: image_micro_batch_size_per_gpu = [[512, 4]] {ends}",
    ]
    evaluation = ("eval_micro_batch_size_per_gpu = 2", "image_eval_micro_batch_size_per_gpu = 4")
    assert check_rules(load(top(lines[0], *evaluation)), 1, SPEC) == []


def test_a_manual_split_that_fits():
    loaded = load(top("partition_split = [4, 8]", "partition_method = 'manual'", "pipeline_stages = 3"))
    assert check_rules(loaded, 6, SPEC) == []


def test_something_must_be_saved():
    assert check_rules(load(RUN.replace("save_every_n_epochs = 1\n", "")), 1) == [
        "run.toml: nothing would be saved before the end of training; "
        "set save_every_n_epochs or save_every_n_steps or save_every_n_examples"
    ]


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_weights_that_are_trained_are_kept_in_what_they_are_used_in(stored):
    run = RUN.replace("ckpt_path", f"transformer_dtype = '{stored}'\nckpt_path")
    whole = run.replace("[adapter]\ntype = 'lora'\nrank = 8\n", "")
    assert check_rules(load(run), 1) == []
    assert check_rules(load(whole), 1) == [
        f"run.toml:9: model.transformer_dtype = '{stored}' is for frozen weights, and without [adapter] none are "
        "frozen; remove it or add [adapter]"
    ]
    told = check_rules(load(whole.replace("ckpt_path", f"dtype = '{stored}'\nckpt_path")), 1)
    assert told == ([] if stored == "float32" else [f"run.toml:10: model.dtype = 'float16' {NO_OPTIMIZER}"])


NO_OPTIMIZER = "cannot hold what an optimizer counts with: weights become NaN; use 'bfloat16' or 'float32'"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_adapter_is_not_trained_in_float16(dtype):
    """Adam's eps is 0 in it: the first step, in which every lora_A has a gradient of zero, would make it NaN."""
    told = check_rules(load(RUN.replace("rank = 8", f"rank = 8\ndtype = '{dtype}'")), 1)
    assert told == ([f"run.toml:14: adapter.dtype = 'float16' {NO_OPTIMIZER}"] if dtype == "float16" else [])


def test_eight_bit_storage_needs_frozen_weights():
    run = RUN.replace("ckpt_path", "transformer_dtype = 'float8'\nckpt_path")
    assert check_rules(load(run), 1) == []
    assert check_rules(load(run.replace("[adapter]\ntype = 'lora'\nrank = 8\n", "")), 1) == [
        "run.toml:9: model.transformer_dtype = 'float8' is for frozen weights, and without [adapter] none are frozen; "
        "remove it or add [adapter]"
    ]


@pytest.mark.parametrize(
    ("dataset", "messages"),
    [
        (
            DATASET.replace("[1, 9]", "[1, 32]"),
            ["dataset.toml:2: frame_buckets has 32 frames, and this model takes 4n+1; use 29 or 33"],
        ),
        (
            DATASET + "frame_buckets = [9, 3]\n",
            ["dataset.toml:6: directory[0].frame_buckets has 3 frames, and this model takes 4n+1; use 1 or 5"],
        ),
        (
            DATASET.replace("[64]", "[8]"),
            ["dataset.toml:1: resolutions has 8: smaller than the smallest bucket, 16x16 px"],
        ),
        (
            DATASET.replace("resolutions = [64]", ""),
            [
                "dataset.toml:4: directory[0].resolutions is missing, and so is size_buckets; "
                "add for instance resolutions = [512]"
            ],
        ),
        (
            top("size_buckets = [[830, 480, 80], [64, 8, 1]]", run=DATASET),
            [
                "dataset.toml:1: size_buckets has [830, 480, 80]: 830 px is no multiple of 16; use 816 or 832",
                "dataset.toml:1: size_buckets has [830, 480, 80]: 80 frames, and this model takes 4n+1; use 77 or 81",
                "dataset.toml:1: size_buckets has [64, 8, 1]: 8 px is no multiple of 16; use 16",
            ],
        ),
        (top("min_ar = 3", run=DATASET), ["dataset.toml:1: min_ar = 3 is above max_ar = 2; swap them"]),
    ],
)
def test_rules_of_the_dataset(dataset, messages):
    dataset += "[[directory]]\npath = 'b'\nresolutions = [64]\n" if "resolutions = [64]" in dataset else ""
    assert check_rules(load(dataset=dataset), 1, SPEC) == messages


@pytest.mark.parametrize(
    ("dataset", "error", "note"),
    [
        (DATASET.replace("frame_buckets = [1, 9]", ""), "directory[0].frame_buckets", None),
        (DATASET.replace("[1, 9]", "[1]"), "frame_buckets", None),
        (top("size_buckets = [[64, 64, 1]]", run=DATASET), "size_buckets", None),
        (DATASET, None, None),  # frame_buckets always has 1
        (top("size_buckets = [[64, 64, 1], [64, 64, 9]]", run=DATASET), None, "size_buckets"),
        (top("size_buckets = [[64, 64, 9]]", run=DATASET), None, None),
    ],
)
def test_buckets_of_images_for_a_model_that_takes_none(dataset, error, note):
    loaded, spec = load(dataset=dataset), SPEC._replace(images=False)
    errors = [line.partition(": ")[2] for line in check_rules(loaded, 1, spec)]
    mend = "has no length for videos, and this model trains on clips of at least 5 frames; add one such as 33"
    assert errors == ([f"{error} {mend}"] if error else [])
    if not errors:
        said = [line.partition(": ")[2] for line in advice(loaded, spec) if "overrules" not in line]
        why = "has 1 frame, for images, and this model skips them: it trains on videos"
        assert said == ([f"{note} {why}"] if note else [])
    assert check_rules(loaded, 1, SPEC) == []


def test_without_a_family_buckets_are_not_held_against_it():
    assert check_rules(load(dataset=DATASET.replace("9", "8")), 1) == []


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            top("eval_every_n_steps = 5"),
            "run.toml:1: eval_every_n_steps is set and eval_datasets is not: nothing will be evaluated",
        ),
        (
            top("eval_datasets = ['eval.toml']"),
            "run.toml:1: eval_datasets will be evaluated only before the first step: "
            "set eval_every_n_epochs or eval_every_n_steps or eval_every_n_examples",
        ),
        (
            RUN.replace("checkpoint_every_n_epochs = 1\n", ""),
            "run.toml: no checkpoint_every_n_epochs or checkpoint_every_n_minutes is set: "
            "if the run is killed, it cannot be resumed",
        ),
        (
            top("checkpoint_every_n_minutes = 5"),
            "run.toml:6: checkpoint_every_n_epochs and checkpoint_every_n_minutes are both set: "
            "a checkpoint is written at either",
        ),
        (
            top("force_constant_lr = 1e-5", "lr_scheduler = 'linear'"),
            "run.toml:1: force_constant_lr = 1e-05 overrules lr_scheduler = 'linear' and warmup_steps = 0",
        ),
        (
            top("warmup_steps = 10", "max_steps = 10"),
            "run.toml:1: warmup_steps = 10 is not below max_steps = 10: the full learning rate is never reached",
        ),
        (
            top("gradient_accumulation_steps = 1", "pipeline_stages = 4"),
            "run.toml:1: gradient_accumulation_steps = 1 with pipeline_stages = 4 leaves the devices idle "
            "75% of the time; 8 would make it 27%",
        ),
        (
            RUN.replace("[adapter]", "dtype = 'float16'\n\n[adapter]"),
            "run.toml:11: dtype = 'float16' trains without loss scaling, so small gradients are lost; use 'bfloat16'",
        ),
        (
            RUN.replace("ckpt_path", "save_layout = 'diffusers'\nckpt_path"),
            "run.toml:9: model.save_layout = 'diffusers' has no effect with [adapter], which has save_format",
        ),
        (
            RUN.replace("ckpt_path", "timestep_sample_method = 'uniform'\nsigmoid_scale = 1.5\nckpt_path"),
            "run.toml:10: model.sigmoid_scale = 1.5 has no effect with timestep_sample_method = 'uniform'",
        ),
        (
            RUN + "weigth_decay = 0.1\n",
            "run.toml:18: optimizer.weigth_decay goes to adamw as it is; was weight_decay meant?",
        ),
    ],
)
def test_advice(run, message):
    assert advice(load(run, eval=DATASET)) == [message]
    assert advice(load()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ar_buckets = [1.0]", "dataset.toml:1: ar_buckets has no effect without enable_ar_bucket = true"),
        (
            "size_buckets = [[64, 64, 9]]",
            "dataset.toml:1: size_buckets overrules resolutions, aspect ratios and frame_buckets",
        ),
    ],
)
def test_advice_on_the_dataset(line, message):
    assert advice(load(dataset=top(line, run=DATASET))) == [message]


def test_many_resolutions_repeat_the_dataset():
    assert advice(load(dataset=DATASET.replace("[64]", "[64, 80, 96, 112]"))) == [
        "dataset.toml:1: resolutions has 4 entries: every clip is encoded and trained 4 times an epoch"
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "'lora'\nrank = 8",
            "'lokr'\nrank = 8\ndropout = 0.1",
            "run.toml:14: adapter.dropout = 0.1 is for type = 'lora' or 'dora', and type is 'lokr'; remove it",
        ),
        (
            "rank = 8",
            "rank = 8\nfactor = 4",
            "run.toml:14: adapter.factor = 4 is for type = 'lokr', and type is 'lora'; remove it",
        ),
        (
            "'lora'\nrank = 8",
            "'dora'\nrank = 8\ndecompose_both = true",
            "run.toml:14: adapter.decompose_both = true is for type = 'lokr', and type is 'dora'; remove it",
        ),
    ],
)
def test_keys_of_another_type_of_adapter(old, new, message):
    assert RUN.replace(old, new) != RUN
    assert check_rules(load(RUN.replace(old, new)), 1, SPEC) == [message]


@pytest.mark.parametrize(
    "keys", ["type = 'lokr'\nfactor = 4\ndropout = 0.0\ndecompose_both = true", "type = 'dora'\ndropout = 0.1"]
)
def test_keys_that_fit_their_type_of_adapter(keys):
    assert check_rules(load(RUN.replace("type = 'lora'", keys)), 1, SPEC) == []


def test_adapters_to_merge_stand_in_one_place_and_exist():
    Path("there").touch()
    entries = "fuse_adapters = [{path = 'there', weight = -0.5}, {path = '/gone'}]"
    at_the_top, in_the_table = top(entries), RUN.replace("rank = 8", f"rank = 8\n{entries}")
    both = in_the_table.replace("output_dir", f"{entries}\noutput_dir", 1)
    for text, key in ((at_the_top, "fuse_adapters"), (in_the_table, "adapter.fuse_adapters")):
        loaded = load(text)
        assert [(str(entry.path), entry.weight) for entry in loaded.run.fused] == [("there", -0.5), ("/gone", 1.0)]
        assert [m for m in check_paths(loaded) if f"{key}[1].path = '/gone' does not exist" in m]
        assert not [m for m in check_paths(loaded) if "[0]" in m and "fuse" in m]
        assert check_rules(loaded, 1, SPEC) == []
    [message] = check_rules(load(both), 1, SPEC)
    assert message.endswith(
        "adapter.fuse_adapters and fuse_adapters at the top are one key; put all entries into one of them"
    )


def test_one_format_or_several():
    for value, formats in (("'kohya'", ("kohya",)), ("['diffusers', 'comfyui']", ("diffusers", "comfyui"))):
        text = RUN.replace("rank = 8", f"rank = 8\nsave_format = {value}")
        assert load(text).run.adapter.save_format == formats
    assert load(RUN).run.adapter.save_format == ("comfyui",)


def test_two_experts_are_trained_by_adapters_only():
    run = RUN.replace("ckpt_path", "expert = 'both'\nckpt_path")
    assert check_rules(load(run), 1) == []
    whole = run.replace("[adapter]\ntype = 'lora'\nrank = 8\n", "")
    assert check_rules(load(whole), 1) == [
        "run.toml:9: model.expert = 'both' is for [adapter]: of two models trained whole, neither could wait in host "
        "memory; add [adapter], or train expert = 'high' and then expert = 'low'"
    ]
    assert check_rules(load(whole.replace("both", "high")), 1) == []


def test_a_starting_adapter_for_each_expert_is_looked_for():
    run = RUN.replace("rank = 8", "rank = 8\ninit_from_existing = {high = '/gone/lora', low = 'there'}")
    Path("there").touch()
    loaded = load(run)
    assert loaded.run.adapter.init_from_existing == {"high": Path("/gone/lora"), "low": Path("there")}
    assert [line for line in check_paths(loaded) if "init_from_existing" in line] == [
        "run.toml:14: adapter.init_from_existing.high = '/gone/lora' does not exist"
    ]


def test_all_missing_paths_are_named_with_their_keys():
    Path("file").touch()
    run = RUN.replace("rank = 8", "rank = 8\ninit_from_existing = '/gone/lora'").replace("'runs'", "'file'")
    loaded = load(run, DATASET + "[[directory]]\npath = 'file'\nmask_path = 'masks'\ndefault_mask_file = 'file'\n")
    expected = [
        "run.toml:1: output_dir = 'file' is a file; name a folder",
        "run.toml:14: adapter.init_from_existing = '/gone/lora' does not exist",
        f"run.toml:9: model.ckpt_path = 'weights' does not exist (seen from {Path.cwd()})",
        f"dataset.toml:5: directory[0].path = 'clips' does not exist (seen from {Path.cwd()})",
        f"dataset.toml:8: directory[1].mask_path = 'masks' does not exist (seen from {Path.cwd()})",
        "dataset.toml:7: directory[1].path = 'file' is a file; "
        "name a folder, or a file that ends in .csv, .jsonl, .tar",
    ]
    assert check_paths(loaded) == expected
    with pytest.raises(ConfigError) as caught:
        require(loaded, 1, SPEC)
    assert list(caught.value.messages) == expected


def test_an_index_or_an_archive_may_stand_in_a_folders_place():
    for name in ("clips.jsonl", "CLIPS.CSV", "clips.tar"):
        Path(name).touch()
        assert not [line for line in check_paths(load(dataset=DATASET.replace("clips", name))) if "directory" in line]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("keep_first = 2", "keep_first = 2 has no effect without cache_shuffle_num"),
        ("shuffle_tags = true", "shuffle_tags = true shuffles each caption once, for good"),
        ("default_caption = 'x'\nskip_empty_caption = false", "skip_empty_caption = false has no effect with default"),
        ("cache_shuffle_num = 2\nkeep_first = 1", None),
    ],
)
def test_caption_keys_that_do_nothing(line, message):
    said = advice(load(dataset=f"{line}\n{DATASET}"))
    assert len(said) == bool(message) and all(f": {message}" in text for text in said)


def test_recursive_does_nothing_for_an_index():
    said = advice(load(dataset="recursive = true\n" + DATASET.replace("clips", "clips.csv")))
    assert said == ["dataset.toml:1: recursive = true has no effect on a .csv file"]


def test_require_returns_what_is_worth_saying():
    Path("weights").mkdir()
    Path("clips").mkdir()
    loaded = load(top("disable_block_swap_for_eval = true", "eval_every_n_steps = 5"))
    assert require(loaded, 1, SPEC) == [
        "run.toml:1: disable_block_swap_for_eval = true has no effect here",
        "run.toml:2: eval_every_n_steps is set and eval_datasets is not: nothing will be evaluated",
    ]


@pytest.mark.parametrize(("frames", "idle"), [("[1]", True), ("[1, 9]", False)])
def test_image_to_video_needs_videos(frames, idle):
    loaded = load(RUN.replace("[model]", "[model]\ni2v_fraction = 0.5"), DATASET.replace("[1, 9]", frames))
    said = [line for line in advice(loaded) if "i2v_fraction" in line]
    text = "model.i2v_fraction = 0.5 has no effect where all buckets are for images; add a length to frame_buckets"
    assert said == ([f"run.toml:8: {text}"] if idle else [])
