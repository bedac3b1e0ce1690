"""`--plan`: everything is told without weights, nothing is encoded, and looking twice costs nothing."""

import json
import logging
import os
import re

import numpy as np
import pytest
from rich.console import Console

import train
from tests.helpers.media import write_frames, write_image, write_video
from tests.unit.test_report import Reader
from utils.config.load import ConfigError
from utils.data.cache import write_whole
from utils.data.listing import Skipped
from utils.data.pace import PACE_FILE, Pace
from utils.train import preview as plan
from utils.train import preview_page

RUN = """\
output_dir = 'runs'
dataset = 'dataset.toml'
eval_datasets = [{name = 'held_out', config = 'eval.toml'}]
epochs = 3
gradient_accumulation_steps = 2
pipeline_stages = 2
save_every_n_epochs = 1
map_num_proc = 2
video_clip_mode = 'single_middle'  # the frames of the helper's videos begin nearly black

[model]
type = 'wan'
ckpt_path = '/nowhere/Wan2.1-T2V-1.3B'

[optimizer]
type = 'adamw'
lr = 1e-4
"""
DATASET = "resolutions = [64]\nframe_buckets = [1, 5, 9]\n[[directory]]\npath = '{}'\n"
PAGE = "sheet/page.html"
STILL = os.fsdecode(b"still\xe9.png")  # no UTF-8: lists and page must do without


def clip(folder, name, frames, caption="a grey clip <b>", **kwargs):
    path = write_video(folder / name, frames, **{"grain": True, **kwargs})
    path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three good clips and an image, what is left out, what is warned of, and one clip held out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    clips, held_out = tmp_path / "clips", tmp_path / "eval"
    clips.mkdir()
    held_out.mkdir()
    for number in range(3):
        clip(clips, f"clip{number}.mp4", 40 + number)
    clip(clips, "short.mp4", 3)
    write_image(clips / STILL)
    (clips / STILL).with_suffix(".txt").write_text("a still")
    write_image(clips / "uncaptioned.png")
    (clips / "broken.mp4").write_bytes(b"no video")
    (clips / "broken.txt").write_text("x")
    (held_out / "copy.mp4").write_bytes((clips / "clip0.mp4").read_bytes())
    (held_out / "copy.txt").write_text("held out")
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "dataset.toml").write_text(DATASET.format(clips))
    (tmp_path / "eval.toml").write_text(DATASET.format(held_out))
    return tmp_path


@pytest.fixture
def quiet():
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def survey_of(*words):
    survey = plan.begin(train.parse_arguments(["--config", "run.toml", "--plan", *words]))
    survey.workers = 0  # starting processes takes longer than the work
    plan.explore(survey, Counting())
    return survey


class Counting:
    """Progress that remembers what it was started for."""

    def __init__(self):
        self.labels = []

    def start(self, total, label):
        self.labels.append(label)

    def advance(self, n, name): ...

    def done(self): ...


def test_a_plan_without_weights_tells_it_all(folder, capfd, quiet):
    assert train.main(["--config", "run.toml", "--plan", "--html", PAGE]) == 1, "the start would stop"
    told = capfd.readouterr().out
    assert "plan for Wan2.1 T2V at 16 frames a second, on 2 ranks (2 pipeline stages x 1 data rank" in told
    assert "by the name of [model] ckpt_path = '/nowhere/Wan2.1-T2V-1.3B', whose weights are absent" in told
    assert "64x64x9" in told and "64x64x1" in told
    assert "1 epoch = 4 clips in 2 buckets x 1 repeat / (1 micro x 2 GAS x 1 DP) = 1 step + 2 carried over" in told
    assert "warning: the start will stop at 1 file that cannot be read" in told
    assert "held_out: 1 clip held out (64x64x9: 1)" in told
    assert "copy.mp4" in told and "also a training file" in told
    left_out = [json.loads(line) for line in (folder / "runs/plan/skipped.jsonl").read_text().splitlines()]
    assert {row["path"].rpartition("/")[2] for row in left_out} == {"short.mp4", "uncaptioned.png", "broken.mp4"}
    assert all(row["dataset"] == "train" and row["reason"] for row in left_out)
    warned = [json.loads(line) for line in (folder / "runs/plan/warnings.jsonl").read_text().splitlines()]
    assert ("held_out", "train and eval") in [(row["dataset"], row["kind"]) for row in warned]

    read = Reader((folder / PAGE).read_text(encoding="utf-8"))
    assert len(read.all("article")) == len(read.all("img")) == 5
    assert len(read.all("tr", **{"data-item": "row"})) == 3
    assert read.texts.count("a grey clip <b>") == 3
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["cache", "plan"], "nothing was begun"
    assert not list((folder / "runs/cache").rglob("*.safetensors"))


def test_files_are_read_and_looked_at_once(folder):
    first, second = Counting(), Counting()
    for progress in (first, second):
        survey = plan.begin(train.parse_arguments(["--config", "run.toml", "--plan"]))
        survey.workers = 0
        plan.explore(survey, progress)
        assert len(survey.measured) == 5
    assert set(first.labels) == {"reading media files", "looking at clips"}
    assert second.labels == ["reading media files"], "the broken file alone: it may have been mended"


def test_steps_are_those_of_the_run(folder, monkeypatch):
    survey = survey_of()
    assert survey.ranks == 2 and survey.steps == survey.plan.first_step(4) == 5
    assert survey_of("--set", "max_steps=3").steps == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    survey = survey_of()
    assert survey.ranks == 4
    assert {row.batch.samples for row in survey.plan.counts()} == {4}


def test_a_budget_of_tokens_is_shown_with_what_it_comes_to(folder, capfd, quiet):
    (folder / "clips/broken.mp4").unlink()
    clip(folder / "eval", "copy.mp4", 50)
    words = ["--config", "run.toml", "--plan", "--set", "max_tokens_per_gpu=40", "--set", "epochs=10"]
    assert train.main(words) == 0, "nothing stops the start"
    told = " ".join(capfd.readouterr().out.split())
    assert "2 x 16 = 32" in told, "an image has 4 x 4 tokens"
    assert "bucket 64x64x9: one sample has 48 tokens, more than max_tokens_per_gpu = 40; its samples go" in told
    assert "(2 micro x 2 GAS x 1 DP)" in told and "(1 micro x 2 GAS x 1 DP)" in told


def test_equal_reasons_are_one_row(folder, capfd, quiet):
    for number in range(7):
        write_image(folder / f"clips/extra{number}.png")
    train.main(["--config", "run.toml", "--plan"])
    told = capfd.readouterr().out
    assert "Skipped: 10 files" in told
    assert "8 files: extra0.png, extra1.png, extra2.png" in told
    assert told.count("is missing; write one") == 1 and "its caption in *.txt is missing" in told


def test_the_cache_is_counted_by_what_differs(folder):
    sizes = plan.cache_size(survey_of())
    latents = 16 * 3 * 8 * 8 * 4
    assert sizes["latents"] == (4, 3 * latents + latents // 3), "the held-out copy has the same key"
    assert sizes["text"][0] == 4, "two captions, that of the copy, and the empty one"


def test_a_full_disk_is_told(folder, monkeypatch):
    survey = survey_of()
    free = plan.shutil.disk_usage(folder)._replace(free=1024)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: free)
    told = plan.cache_lines(survey)
    assert "where 1 KiB are free" in told[0]
    assert told[1].startswith("warning: the cache does not fit")


def test_time_is_told_where_it_was_measured(folder):
    survey = survey_of()
    assert "known once the first clips are encoded" in plan.cache_lines(survey)[0]
    pixels = 3 * 64 * 64 * 9 + 64 * 64
    write_whole(folder / "runs/cache" / PACE_FILE, json.dumps(Pace(pixels // 90, 1.0, "CPU", 2)._asdict()).encode())
    (line,) = plan.cache_lines(survey)
    assert "All of it would take about 1m30s at the pace measured here (2 ranks with CPU" in line


def test_what_would_stop_the_start_is_told(folder):
    twice = "the start will stop at 1 file in both training and eval data"
    assert plan.refusals(survey_of()) == ["the start will stop at 1 file that cannot be read", twice]
    survey = survey_of("--set", "skip_bad_media=true")
    assert plan.stops(survey) == [twice]
    assert plan.refusals(survey)[1] == "the start will go on without 1 file that cannot be read"
    (folder / "clips/broken.mp4").unlink()
    clip(folder / "eval", "copy.mp4", 50)
    survey = survey_of("--set", "epochs=1")
    (unused,) = plan.refusals(survey)
    assert unused.startswith("bucket 64x64x1 does not fill one batch") and plan.stops(survey) == []
    (never,) = plan.stops(survey_of("--set", "gradient_accumulation_steps=50"))
    assert never.startswith("no bucket fills a single batch")
    (folder / "eval/copy.mp4").unlink()
    assert plan.stops(survey_of()) == ["the start will stop: nothing is left in held_out to evaluate"]
    for path in (*(folder / "clips").iterdir(), *(folder / "eval").iterdir()):
        path.unlink()
    survey = survey_of()
    assert plan.refusals(survey) == [
        "the start will stop: nothing is left in held_out to evaluate",
        f"nothing to train on: there are no media files in {folder / 'clips'}",
    ]
    console = Console(record=True, width=150)
    plan.conclude(console, survey)
    assert "no warnings" not in console.export_text()  # where there is nothing that could have had one
    assert preview_page.report_of(survey, Counting()).buckets == []


def test_a_clip_that_cannot_be_decoded_is_left_out(folder):
    path = folder / "clips/clip1.mp4"
    content = path.read_bytes()
    middle = content.index(b"mdat") + 400
    path.write_bytes(content[:middle] + bytes(len(content) - middle - 2000) + content[-2000:])
    survey = survey_of()
    assert "clip1.mp4" in [item.path.name for _, item in survey.skipped]
    assert "clip1.mp4" not in [clip.media.path.name for _, clip in survey.clips]


def test_mistakes_in_the_files_are_found_and_weights_are_not_asked_for(folder):
    (folder / "dataset.toml").write_text(DATASET.format("absent").replace("[1, 5, 9]", "[1, 6]"))
    with pytest.raises(ConfigError) as caught:
        survey_of()
    assert len(caught.value.messages) == 2
    assert not any("ckpt_path" in message for message in caught.value.messages)


def test_a_page_holds_so_many_clips_those_with_warnings_first(folder, monkeypatch):
    monkeypatch.setattr(preview_page, "MOST_CARDS", 2)
    report = preview_page.report_of(survey_of(), Counting())
    assert len(report.cards) == 2
    assert "copy.mp4" in [card.name.partition(" @ ")[0] for card in report.cards]
    assert any("3 clips without warnings are not shown" in note for note in report.notes)


def test_a_page_says_what_it_has_no_room_for(folder, monkeypatch):
    monkeypatch.setattr(preview_page, "MOST_CARDS", 0)
    monkeypatch.setattr(preview_page, "MOST_LEFT_OUT", 1)
    survey = survey_of()
    survey.skipped += [("train", Skipped(folder / f"{number}.mp4", "is too short", bad=False)) for number in range(4)]
    report = preview_page.report_of(survey, Counting())
    assert not report.cards and len(report.left_out) == 1
    warned, more = len({finding.path for finding in survey.findings}), len(survey.skipped) - 1
    assert any(f"clips, {warned} of them with warnings, are not shown" in note for note in report.notes)
    assert any(f"{more} more files that are left out stand in {survey.folder}" in note for note in report.notes)


def test_html_goes_with_plan(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", "run.toml", "--html", "page.html"])
    with pytest.raises(SystemExit):
        train.parse_arguments(["--config", "run.toml", "--plan", "--cache_only"])
    assert "--html goes with --plan" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_told_before_anything_is_read(folder, quiet):
    for place, complaint in {folder: "is a folder; name the", folder / "run.toml/a.html": "cannot be made"}.items():
        flags = train.parse_arguments(["--config", str(folder / "run.toml"), "--plan", "--html", str(place)])
        with pytest.raises(ValueError, match=f"--html .*{complaint}"):
            plan.preview(flags)
    assert not (folder / "runs").exists()


def test_uses_under_a_black_mask_are_left_out_of_the_plan(folder, capfd, quiet):
    """Of clip2, 42 frames long: the second time what is black is known."""
    masks = folder / "masks"
    masks.mkdir()
    pixels = np.zeros((42, 48, 64, 3), np.uint8)
    pixels[-2:] = 255
    write_frames(masks / "clip2.mov", pixels)
    text = (folder / "dataset.toml").read_text()
    moving = "video_clip_mode = 'random_start'\nframe_sample = 100\n"
    (folder / "dataset.toml").write_text(f"{moving}{text}mask_path = '{masks}'\n")
    for _ in range(2):
        train.main(["--config", "run.toml", "--plan"])
        told = " ".join(capfd.readouterr().out.split())
        found = re.search(r"(\d+) crops or starts of 1 clip: left out, since the loss mask is black there", told)
        assert found and int(found[1]) == 42 - 9 + 1 - 2, told


def test_masks_are_counted(folder, capfd, quiet):
    """Two clips have images of equal content, one a video; that of another file does not fit."""
    masks = folder / "masks"
    masks.mkdir()
    for name in ("clip0.png", "clip1.png"):
        write_image(masks / name, colour=(255, 255, 255))
    write_video(masks / "clip2.mkv", 42)
    write_image(masks / "still\xe9.png")  # of another name
    write_image(masks / "short.png", (64, 64))
    text = (folder / "dataset.toml").read_text()
    (folder / "dataset.toml").write_text(f"{text}mask_path = '{masks}'\n")
    train.main(["--config", "run.toml", "--plan"])
    told = " ".join(capfd.readouterr().out.split())
    assert "loss masks: 3 of 5 clips have one" in told
    assert "1 of 4 files has no mask in" in told and "1 mask has no clip of that name: still\xe9.png" in told
    assert ", 2 masks 384 B, " in told, "two of the images are one"
    skipped = [json.loads(line) for line in (folder / "runs/plan/skipped.jsonl").read_text().splitlines()]
    assert any("short.png is 64x64, and the file itself 64x48" in row["reason"] for row in skipped)

    black = [write_image(masks / f"clip{number}.png", colour=(0, 0, 0)) for number in range(2)]
    for _ in range(2):  # when it is found out, and when it is remembered
        assert train.main(["--config", "run.toml", "--plan", "--set", "skip_bad_media=true"]) == 0
        told = " ".join(capfd.readouterr().out.split())
        assert "loss masks: 1 of 3 clips have one" in told
        skipped = [json.loads(line) for line in (folder / "runs/plan/skipped.jsonl").read_text().splitlines()]
        for path in black:  # of equal bytes
            [reason] = [row["reason"] for row in skipped if row["path"] == str(path)]
            assert reason.startswith(f"as the mask of {path.stem}.mp4: the mask is black"), "what a start would find"
