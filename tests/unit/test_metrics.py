"""Metrics: the same in every place, no duplicates after a resume, and no failure that reaches the training."""

import json
import logging
import math
import os
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from utils.monitor.metrics import (
    LOSS,
    METRICS_FILE,
    MetricsWriter,
    Point,
    WandbSettings,
    WandbSink,
    eval_tag,
    read_metrics,
    tags_at,
    without_secrets,
)


def at(step: int) -> Point:
    return Point(step=step, epoch=1 + step // 10, examples=step * 4)


def write(folder, steps, offset=0.0, **kwargs):
    writer = MetricsWriter(folder, **kwargs)
    for step in steps:
        writer.log(at(step), {LOSS: step + offset})
    writer.close()


def tensorboard(folder, tag=LOSS):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_every_place_holds_the_same(tmp_path):
    write(tmp_path, range(1, 4))
    assert [(r["step"], r[LOSS]) for r in read_metrics(tmp_path / METRICS_FILE)] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert tensorboard(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_was_logged_at_the_last_step(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, tag in ((2, "held_out/loss"), (3, LOSS), (3, "again/loss")):
        writer.log(at(step), {tag: 1.0})
    writer.close()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 4, "tor')
    found = tags_at(tmp_path / METRICS_FILE, 3)
    assert {LOSS, "again/loss"} <= found
    assert "held_out/loss" not in found
    assert not tags_at(tmp_path / METRICS_FILE, 7)


def test_a_line_stands_alone_and_says_when(tmp_path):
    write(tmp_path, [12])
    record = json.loads((tmp_path / METRICS_FILE).read_text())
    assert {k: record[k] for k in ("step", "epoch", "examples", LOSS)} == {
        "step": 12,
        "epoch": 2,
        "examples": 48,
        LOSS: 12.0,
    }
    assert record["time"] > 1.6e9


def test_the_axis_can_be_examples(tmp_path):
    write(tmp_path, [1, 2], x_axis_examples=True)
    assert [step for step, _ in tensorboard(tmp_path)] == [4, 8]


@pytest.mark.parametrize("x_axis_examples", [False, True])
def test_resume_leaves_neither_duplicates_nor_gaps(tmp_path, x_axis_examples):
    write(tmp_path, range(1, 8), x_axis_examples=x_axis_examples)
    write(tmp_path, range(6, 10), offset=0.5, resume_step=5, x_axis_examples=x_axis_examples)
    expected = [(s, float(s)) for s in range(1, 6)] + [(s, s + 0.5) for s in range(6, 10)]
    assert [(r["step"], r[LOSS]) for r in read_metrics(tmp_path / METRICS_FILE)] == expected
    scale = 4 if x_axis_examples else 1
    assert tensorboard(tmp_path) == [(s * scale, v) for s, v in expected]
    assert sorted(p.name for p in tmp_path.iterdir() if "events" not in p.name) == [METRICS_FILE]


def test_resume_with_nothing_to_drop_keeps_the_file(tmp_path):
    write(tmp_path, range(1, 4))
    before = (tmp_path / METRICS_FILE).stat().st_ino
    write(tmp_path, [4], resume_step=3)
    assert (tmp_path / METRICS_FILE).stat().st_ino == before
    assert len(read_metrics(tmp_path / METRICS_FILE)) == 4


def test_resume_drops_a_line_that_a_crash_tore(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 3, "epo')
    write(tmp_path, [3], resume_step=2)
    assert [json.loads(line)["step"] for line in (tmp_path / METRICS_FILE).read_text().splitlines()] == [1, 2, 3]


@pytest.mark.parametrize("end", [b"\x80\xff\x00garbage", b'{"step": 4, "\xff', b"\x00" * 40])
def test_what_a_power_cut_left_at_the_end_is_dropped(tmp_path, caplog, end):
    path = tmp_path / METRICS_FILE
    write(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes() + end)
    assert tags_at(path, 3) >= {LOSS} and [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, [4], resume_step=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert caplog.text == ""


def test_a_last_line_that_lacks_only_its_end_does_not_swallow_the_next(tmp_path):
    path = tmp_path / METRICS_FILE
    write(tmp_path, [1, 2, 3])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    write(tmp_path, [4], resume_step=3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_resume_without_a_file_starts_one(tmp_path):
    write(tmp_path, [6], resume_step=5)
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == [6]


def test_values_that_json_cannot_hold_are_strings(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.log(at(1), {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    record = json.loads((tmp_path / METRICS_FILE).read_text(), parse_constant=pytest.fail)
    assert [record[k] for k in "abc"] == ["nan", "inf", "-inf"]
    assert math.isnan(read_metrics(tmp_path / METRICS_FILE)[0]["a"])


def test_other_ranks_write_nothing(tmp_path):
    write(tmp_path / "run", [1], enabled=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_warns_once_and_the_rest_goes_on(tmp_path, caplog):
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    with caplog.at_level(logging.WARNING):
        write(tmp_path, range(1, 5))
    assert [r.message for r in caplog.records if "metrics" in r.message] == [
        "metrics to metrics.jsonl fail (OSError: [Errno 28] No space left on device); training goes on"
    ]
    assert len(tensorboard(tmp_path)) == 4


def test_a_broken_tensorboard_is_tried_again_at_a_flush(tmp_path, caplog):
    writer = MetricsWriter(tmp_path)
    writer.log(at(1), {LOSS: 1.0})
    writer._sinks["TensorBoard"]._writer.file_writer.event_writer.close()  # writing to it now fails
    with caplog.at_level(logging.WARNING):
        for step in (2, 3):
            writer.log(at(step), {LOSS: step})
        writer.flush()
        writer.log(at(4), {LOSS: 4.0})
    writer.close()
    assert len([r for r in caplog.records if "TensorBoard" in r.message]) == 1
    assert [step for step, _ in tensorboard(tmp_path)] == [1, 4]
    assert [r["step"] for r in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4]


def test_eval_tags_are_diffusion_pipes():
    assert eval_tag("eval0") == "eval0/loss"
    assert eval_tag("eval0", 0.1) == "eval0/loss_quantile_0.10"


class FakeWandb:
    """Records what it is told, as the real one would be."""

    Settings = types.SimpleNamespace

    def __init__(self):
        self.inits, self.logged = [], []

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return types.SimpleNamespace(define_metric=lambda *a, **k: None, log=self.logged.append, finish=lambda: None)


def test_wandb_resumes_the_same_run_and_the_key_is_written_nowhere(tmp_path):
    library = FakeWandb()
    settings = WandbSettings("project", "run", "s3cret", {"monitoring": {"wandb_api_key": "s3cret", "x": 1}})
    for _ in range(2):
        sink = WandbSink(settings, tmp_path, library)
        sink.write(at(1), {LOSS: 1.0})
        sink.close()
    first, second = library.inits
    assert first["id"] == second["id"]
    assert first["config"] == {"monitoring": {"x": 1}}
    assert first["settings"].api_key == "s3cret"
    assert library.logged[0] == {LOSS: 1.0, "step": 1, "epoch": 1, "examples": 4}
    assert "s3cret" not in repr(settings)
    assert all("s3cret" not in p.read_text() for p in tmp_path.iterdir())


def test_wandb_without_package_or_key_is_an_error_at_once(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        WandbSettings().check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="WANDB_API_KEY"):
        WandbSettings().check()
    WandbSettings(api_key="k").check()
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbSettings().check()


def test_secrets_are_taken_out_at_any_depth():
    assert without_secrets({"a": {"hf_token": "x", "b": 1}, "wandb_api_key": "y", "lr": 2}) == {"a": {"b": 1}, "lr": 2}
