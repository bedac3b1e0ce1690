"""Configs that are refused, and the exact words of every complaint."""

from pathlib import Path

import pytest

from tests.helpers.configs import DATASET, RUN, complaints, folder, top  # noqa: F401
from utils.config.load import ConfigError, load_config
from utils.config.source import key_lines

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("epoch = 5", "unknown key 'epoch' = 5; did you mean 'epochs'?"),
        ("zzz = [1]", "unknown key 'zzz' = [1]; remove it"),
        ("rank = 16", "unknown key 'rank' = 16; it belongs in [adapter]"),
        ("lr = 1e-3", "unknown key 'lr' = 0.001; it belongs in [optimizer]"),
        ("min_t = 0.5", "unknown key 'min_t' = 0.5; it belongs in [model]"),
        ("resolutions = [512]", "unknown key 'resolutions' = [512]; it belongs in the dataset TOML"),
        (
            "network_dim = 16",
            "unknown key 'network_dim' = 16; that is musubi-tuner's name: here it is rank in [adapter]",
        ),
        ("seed = 1.5", "seed = 1.5 is not a whole number; write it without quotes and decimal point"),
        ("seed = '1'", "seed = '1' is not a whole number; write it without quotes and decimal point"),
        ("seed = true", "seed = true is not a whole number; write it without quotes and decimal point"),
        ("gradient_clipping = '1'", "gradient_clipping = '1' is not a number; write it without quotes"),
        ("gradient_clipping = inf", "gradient_clipping = inf is not a finite number"),
        ("compile = 1", "compile = 1 is neither true nor false; write one of the two, without quotes"),
        ("cache_dir = 3", "cache_dir = 3 is not a path; put it in quotes"),
        ("cache_dir = ''", "cache_dir = '' is empty; write a path, or remove the key"),
        ("eval_datasets = 'a.toml'", "eval_datasets = 'a.toml' is not a list; put it in [brackets]"),
        ("pipeline_stages = 0", "pipeline_stages = 0 is too small; use 1 or more"),
        ("uncond_fraction = 1.0", "uncond_fraction = 1.0 is too large; use less than 1"),
        ("pseudo_huber_c = 0", "pseudo_huber_c = 0 is too small; use more than 0"),
        ("lr_scheduler = 'cosin'", "lr_scheduler = 'cosin' is not known; use 'constant', 'linear' or 'cosine'"),
        (
            "activation_checkpointing = 'on'",
            "activation_checkpointing = 'on' is not known; use true, false, 'unsloth' or 'offload' "
            "(both keep what is saved in host memory)",
        ),
        (
            "micro_batch_size_per_gpu = [[512]]",
            "micro_batch_size_per_gpu = [[512]] is not a batch size; use a whole number of 1 or more, "
            "or [resolution, batch] pairs: [[512, 4], [1024, 1]]",
        ),
        (
            "partition_split = ['a']",
            "partition_split[0] = 'a' is not a whole number; write it without quotes and decimal point",
        ),
        ("blocks_to_swap = 20", "blocks_to_swap = 20 is not supported yet; remove it"),
        ("huggingface_repo = 'me/it'", "huggingface_repo = 'me/it' is not supported yet; remove it"),
        ("upload_hf_from_epoch = 2", "upload_hf_from_epoch = 2 is not supported yet; remove it"),
        ("huber_delta = 1.0", "huber_delta = 1.0 is not supported yet; use pseudo_huber_c"),
        (
            "resume_from_checkpoint = true",
            "resume_from_checkpoint = true is not supported yet; "
            "remove it and give --resume_from_checkpoint on the command line",
        ),
        (
            "video_clip_mode = 'end'",
            "video_clip_mode = 'end' is not known; use 'single_beginning', 'single_middle', 'head', 'middle', 'chunk', "
            "'slide', 'uniform', 'multiple_overlapping', 'full', 'random_start' or 'spread'",
        ),
        ("frame_sample = 4", "unknown key 'frame_sample' = 4; it belongs in the dataset TOML"),
        (
            "eval_datasets = [{name = 'train', config = 'dataset.toml'}]",
            "eval_datasets[0].name = 'train' cannot name a graph; use a name without slashes that is not 'train'",
        ),
        ("eval_datasets = ['train.toml']", "eval_datasets[0] = 'train.toml': there is no such file"),
    ],
)
def test_a_bad_key_of_the_run(line, message):
    assert f"run.toml:1: {message}" in complaints(run=top(line))


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("rank = 8", "rank = 0", ["run.toml:13: adapter.rank = 0 is too small; use 1 or more"]),
        *(
            (
                "rank = 8",
                f"rank = 8\ninit_from_existing = {value}",
                [
                    f"run.toml:14: adapter.init_from_existing = {value} is not a path; write one path, or one for each "
                    "expert: {high_noise = '...', low_noise = '...'}"
                ],
            )
            for value in ("3", "''", "[]")
        ),
        (
            "rank = 8",
            "",
            ["run.toml:11: adapter.rank is missing; add it (Inner width of the adapter's matrices)"],
        ),
        (
            "'lora'",
            "'loha'",
            [
                "run.toml:12: adapter.type = 'loha' is not known; "
                "use 'lora', 'dora' or 'lokr', or remove [adapter] to train all weights"
            ],
        ),
        (
            "rank = 8",
            "rank = 8\nfuse_adapters = [{path = '', weigth = 1.0}]",
            [
                "run.toml:14: adapter.fuse_adapters[0].path = '' is empty; write a path, or remove the key",
                "run.toml:14: unknown key 'adapter.fuse_adapters[0].weigth' = 1.0; did you mean 'weight'?",
            ],
        ),
        (
            "rank = 8",
            "rank = 8\nfuse_adapters = 'x'",
            ["run.toml:14: adapter.fuse_adapters = 'x' is not a list; put it in [brackets]"],
        ),
        (
            "rank = 8",
            "rank = 8\nfuse_adapters = ['x']",
            ["run.toml:14: adapter.fuse_adapters[0] = 'x' is not a table; write {path = ...}"],
        ),
        (
            "rank = 8",
            "rank = 8\nfactor = 0",
            [
                "run.toml:14: adapter.factor = 0 is not a factor; "
                "use a whole number of 1 or more, or -1 for the most even cut"
            ],
        ),
        (
            "rank = 8",
            "rank = 8\nsave_format = ['comfyui', 'peft']",
            [
                "run.toml:14: adapter.save_format = ['comfyui', 'peft'] is not known; "
                "use 'comfyui', 'diffusers', 'kohya', or a list of them, each once"
            ],
        ),
        (
            "rank = 8",
            "rank = 8\nsave_format = []",
            [
                "run.toml:14: adapter.save_format = [] is not known; "
                "use 'comfyui', 'diffusers', 'kohya', or a list of them, each once"
            ],
        ),
        ("rank = 8", "rank = 8\nlr = 1.0", ["run.toml:14: unknown key 'adapter.lr' = 1.0; it belongs in [optimizer]"]),
        ("lr = 1e-4", "lr = 0", ["run.toml:17: optimizer.lr = 0 is too small; use more than 0"]),
        (
            "lr = 1e-4",
            "lr = 1e-4\nbetas = [0.9, 1.0]",
            ["run.toml:18: optimizer.betas[1] = 1.0 is too large; use less than 1"],
        ),
        (
            "lr = 1e-4",
            "lr = 1e-4\ngradient_release = true",
            ["run.toml:18: optimizer.gradient_release = true is not supported yet; remove it"],
        ),
        (
            "lr = 1e-4",
            "lr = 1e-4\nmap_num_proc = 2",
            [
                "run.toml:18: unknown key 'optimizer.map_num_proc' = 2; "
                "it belongs at the top of the run TOML, above the first [table]"
            ],
        ),
        (
            "lr = 1e-4",
            "learning_rate = 1e-4",
            [
                "run.toml:15: optimizer.lr is missing; add it (Learning rate after warm-up)",
                "run.toml:17: unknown key 'optimizer.learning_rate' = 0.0001; "
                "that is SimpleTuner's name: here it is lr in [optimizer]",
            ],
        ),
        (
            "epochs = 3",
            "",
            ["run.toml: epochs is missing; add it (Passes over the dataset, in total, resumed ones included)"],
        ),
        (
            "[adapter]",
            "[adaptor]",
            ["run.toml:11: unknown key 'adaptor' = {type = 'lora', rank = 8}; did you mean 'adapter'?"],
        ),
        ("'stand_in'", "'flux'", ["run.toml:8: [model] type = 'flux' is not known; use one of: stand_in, wan"]),
        ("type = 'stand_in'", "", ["run.toml:7: model.type is missing; write type = 'wan'"]),
        ("ckpt_path = 'weights'", "ckpt_path = 3", ["run.toml:9: model.ckpt_path = 3 is not a path; put it in quotes"]),
        (
            "ckpt_path = 'weights'",
            "ckpt_path = 'a'\ntimestep_sample_methd = 'uniform'",
            [
                "run.toml:10: unknown key 'model.timestep_sample_methd' = 'uniform'; "
                "did you mean 'timestep_sample_method'?"
            ],
        ),
        ("'dataset.toml'", "'nowhere.toml'", ["run.toml:2: dataset = 'nowhere.toml': there is no such file"]),
    ],
)
def test_a_bad_table_or_file(old, new, messages):
    assert complaints(run=RUN.replace(old, new)) == messages


def test_a_run_without_a_model_table():
    run = RUN.replace("[model]\ntype = 'stand_in'\nckpt_path = 'weights'\n", "")
    assert complaints(run=run) == ["run.toml: [model] is missing; add it with type = 'wan' and the weights' paths"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "target_frames = [1, 25]",
            "unknown key 'target_frames' = [1, 25]; "
            "that is musubi-tuner's name: here it is frame_buckets, whole numbers of frames",
        ),
        (
            "caption_ext = '.txt'",
            "unknown key 'caption_ext' = '.txt'; that is ai-toolkit's name: here it is caption_extension",
        ),
        (
            "folder_path = 'x'",
            "unknown key 'folder_path' = 'x'; "
            "that is ai-toolkit's name: here it is path in a [[directory]] of the dataset TOML",
        ),
        ("frame_bucket = [1]", "unknown key 'frame_bucket' = [1]; did you mean 'frame_buckets'?"),
        ("path = 'x'", "unknown key 'path' = 'x'; it belongs in a [[directory]] of the dataset TOML"),
        (
            "skip_bad_media = true",
            "unknown key 'skip_bad_media' = true; it belongs at the top of the run TOML, above the first [table]",
        ),
        (
            "frame_extraction = 'head'",
            "unknown key 'frame_extraction' = 'head'; "
            "that is musubi-tuner's name: here it is video_clip_mode, with the same names",
        ),
        (
            "short_clips = 'stretch'",
            "short_clips = 'stretch' is not known; use 'skip', 'loop', 'pad' or 'smaller_bucket'",
        ),
        (
            "fps = 'source'",
            "fps = 'source' is no frame rate; use 'model', 'native', or the frames a second that the files really "
            "have, without quotes, 1 to 1000",
        ),
        (
            "fps = 100000",
            "fps = 100000 is no frame rate; use 'model', 'native', or the frames a second that the files really have, "
            "without quotes, 1 to 1000",
        ),
        (
            "ar_buckets = ['1:1']",
            "ar_buckets = ['1:1'] is not a list of aspect ratios; "
            "use width/height: [1.0, 1.78], or [width, height] pairs: [[832, 480]]",
        ),
        (
            "size_buckets = [[512, 512]]",
            "size_buckets = [[512, 512]] is not a list of buckets; "
            "use [width, height, frames] triples: [[832, 480, 81]]",
        ),
        ("cache_shuffle_num = -1", "cache_shuffle_num = -1 is too small; use 0 or more"),
        (
            "cache_shuffle_delimiter = ''",
            "cache_shuffle_delimiter = '' is empty; write what parts one tag from the next, such as ', '",
        ),
        (
            "caption_extension = 'txt'",
            "caption_extension = 'txt' is not how a file's name ends; write it with its dot: '.txt'",
        ),
        ("online_captions = true", "online_captions = true is not supported yet; remove it"),
        ("num_repeats = 0", "num_repeats = 0 is too small; use more than 0"),
    ],
)
def test_a_bad_key_of_the_dataset(line, message):
    assert complaints(dataset=top(line, run=DATASET)) == [f"dataset.toml:1: {message}"]


def test_a_bad_key_of_a_directory_names_its_own_line():
    text = DATASET + "[[directory]]\npath = 'b'\nresolutions = [0]\ncontrol_path = 'masks'\nweight = 0\n"
    assert complaints(dataset=text) == [
        "dataset.toml:8: directory[1].resolutions = [0] is not a list of resolutions; "
        "use sides of a square in pixels: [512], or [width, height] pairs: [[832, 480]]",
        "dataset.toml:9: directory[1].control_path = 'masks' is not supported yet; remove it",
        "dataset.toml:10: directory[1].weight = 0 is no weight; use a number above 0, or remove the [[directory]] to "
        "train without it",
    ]


def test_a_dataset_without_folders():
    assert complaints(dataset="resolutions = [64]\n") == [
        "dataset.toml: directory is missing; add it (One or more folders, each begun with [[directory]] and its path)"
    ]
    assert complaints(dataset="directory = []\n") == [
        "dataset.toml:1: directory = [] is empty; add a [[directory]] with a path"
    ]
    [told] = complaints(dataset="[directory]\npath = 'a'\n")
    assert told == "dataset.toml:1: [directory] is one table, and not a list of them; write [[directory]]"


def test_every_error_of_every_file_in_one_go():
    run = """\
eval_datasets = [
    {name = 'one', config = 'eval.toml'},  # a comment with a ] in it
    {name = 'two', config = 'gone.toml'},
]
dataset = 'dataset.toml'
epochs = 'ten'
bogus = 1
save_every_n_epochs = 1
[model]
type = 'stand_in'
ckpt_path = 1
[optimizer]
type = 'adamw'
"""
    assert complaints(run=run, dataset="resolution = 64\n" + DATASET, eval="zzz = 1\n" + DATASET) == [
        "run.toml: output_dir is missing; add it (Every start makes a run folder in here, named by its UTC time)",
        "run.toml:6: epochs = 'ten' is not a whole number; write it without quotes and decimal point",
        "run.toml:7: unknown key 'bogus' = 1; remove it",
        "run.toml:11: model.ckpt_path = 1 is not a path; put it in quotes",
        "run.toml:12: optimizer.lr is missing; add it (Learning rate after warm-up)",
        "dataset.toml:1: unknown key 'resolution' = 64; that is musubi-tuner's name: here it is resolutions, a list",
        "eval.toml:1: unknown key 'zzz' = 1; remove it",
        "run.toml:1: eval_datasets[1] = 'gone.toml': there is no such file",
    ]


# --- files that are no TOML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\na = 2\n", "run.toml:2: is not valid TOML: a = 2: this key is there twice; remove one of them"),
        ("[x]\na = 1\n[x]\n", "run.toml:3: is not valid TOML: [x]: this table is there twice; merge the two"),
        ("a = 1\nb = 'c\n", "run.toml:2: is not valid TOML: b = 'c: a quote is not closed"),
        ("a = \n", "run.toml:1: is not valid TOML: a =: nothing stands after the ="),
        ("a = ten\n", "run.toml:1: is not valid TOML: a = ten: text needs quotes, and a list its closing bracket"),
        (
            "a = [1, 2.5]\n",
            "run.toml:1: is not valid TOML: a = [1, 2.5]: "
            "a list mixes kinds of values; write all of its items alike: [1.0, 2.5]",
        ),
        (
            "a = ['x', {b = 1}]\n",
            "run.toml:1: is not valid TOML: a = ['x', {b = 1}]: "
            "a list mixes kinds of values; write all of its items alike: [1.0, 2.5]",
        ),
        (
            "a = ['x', {b = 1, c = 2}]\n",
            "run.toml: is not valid TOML: a list mixes kinds of values; write all of its items alike",
        ),
        (
            "wandb_api_key = verysecret\n",
            "run.toml:1: is not valid TOML: wandb_api_key = '': text needs quotes, and a list its closing bracket",
        ),
    ],
)
def test_a_syntax_error_names_file_and_line(text, message):
    assert complaints(run=text) == [message]


def test_files_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"^--config = 'no\.toml': there is no such file$"):
        load_config(Path("no.toml"))
    Path("latin.toml").write_bytes("a = 1\nb = 'ä'\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^latin\.toml:2: is not UTF-8 text; save the file as UTF-8$"):
        load_config(Path("latin.toml"))
    Path("big.toml").write_bytes(b"#" * 1_000_001)
    with pytest.raises(ConfigError, match=r"1,000,001 bytes is too large for a TOML file; is this the right file\?$"):
        load_config(Path("big.toml"))
    Path("folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"^--config = 'folder\.toml': cannot be read \(Is a directory\)$"):
        load_config(Path("folder.toml"))
    assert "in double quotes a \\ begins an escape; write" in complaints(run='a = "C:\\dir"\n')[0]


def test_a_byte_order_mark_is_no_error():
    Path("run.toml").write_bytes(b"\xef\xbb\xbf" + RUN.encode())
    assert load_config(Path("run.toml")).run.epochs == 3


def test_lines_of_keys_through_multi_line_values():
    text = "a = [\n 'x = 1', # ]\n [2],\n]\nb = '''\nc = 3\n'''\n[t] # note\nd.e = 4\n[[u]]\nf = 1\n[[u]]\nf = 2\n"
    assert key_lines(text) == {
        ("a",): 1,
        ("b",): 5,
        ("t",): 8,
        ("t", "d", "e"): 9,
        ("u", 0): 10,
        ("u", 0, "f"): 11,
        ("u", 1): 12,
        ("u", 1, "f"): 13,
    }
