"""Console: the arithmetic, tables that fit 80 columns, one live line, and progress with and without a terminal."""

import io

import pytest
from rich.console import Console

from utils.monitor.console import (
    BucketRow,
    EpochRow,
    LiveLine,
    StageRow,
    StepReport,
    bucket_table,
    cache_summary,
    closing_panel,
    counted,
    duration,
    epoch_arithmetic_banner,
    live_text,
    short_bytes,
    short_count,
    show,
    skipped_table,
    stage_table,
    warning_table,
)
from utils.monitor.progress import CacheProgress, progress_line


def screen(width: int = 80, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, force_terminal=terminal, color_system=None)


def shown(renderable, width: int = 80) -> str:
    console = screen(width)
    show(console, renderable)
    return console.file.getvalue()


def test_banner_of_one_bucket_is_one_line_of_arithmetic():
    row = EpochRow(clips=118, repeats=1, micro_batch=1, steps=14, carried_over=6)
    assert epoch_arithmetic_banner([row], 4, 2) == (
        "1 epoch = 118 clips x 1 repeat / (1 micro x 4 GAS x 2 DP) = 14 steps + 6 carried over"
    )
    assert epoch_arithmetic_banner([row], 4, 2, width=80).splitlines() == [
        "1 epoch = 118 clips x 1 repeat / (1 micro x 4 GAS x 2 DP)",
        "        = 14 steps + 6 carried over",
    ]


def test_banner_without_a_remainder_does_not_speak_of_one():
    assert epoch_arithmetic_banner([EpochRow(1, 2, 2, 1, 0)], 1, 1) == (
        "1 epoch = 1 clip x 2 repeats / (2 micro x 1 GAS x 1 DP) = 1 step"
    )


def test_banner_of_several_batch_sizes_has_a_total_and_a_line_each():
    rows = [EpochRow(80, 1, 1, 10, 0), EpochRow(56, 5, 4, 8, 24), EpochRow(38, 1, 1, 4, 6)]
    assert epoch_arithmetic_banner(rows, 4, 2).splitlines() == [
        "1 epoch = 22 steps + 30 carried over",
        "  118 clips in 2 buckets x 1 repeat / (1 micro x 4 GAS x 2 DP) = 14 steps + 6 carried over",
        "  56 clips x 5 repeats / (4 micro x 4 GAS x 2 DP) = 8 steps + 24 carried over",
    ]


TABLES = {
    "stages": stage_table([StageRow(0, 0, 16, 720_000_000, 11_200_000, 1_490_000_000, (0, 1))]),
    "buckets": bucket_table([BucketRow("1280x720x81", 38, 8, 4, 6, 75600)]),
    "loads": bucket_table(
        [BucketRow("1280x720x1", 1200, 128, 40, 64, 3600, 64), BucketRow("832x480x81", 1, 1, 1, 0, 9)]
    ),
    "skipped": skipped_table([("long_name_" * 9 + ".mp4", "60 frames at 24 fps = 40 frames at 16 fps " * 2)]),
    "warnings": warning_table([("long_name_" * 9 + ".mp4", "scene cut", "another scene begins " * 6)]),
}


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_tables_fit_80_columns_and_lose_nothing(table):
    text = shown(table)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text


def test_the_stages_of_two_experts_fit_80_columns_with_their_names_unbroken():
    rows = [
        StageRow(stage, 0, 21, 7_144_245_792, 76_700_000, 14_721_000_000, (stage,), name, 14_475_000_000)
        for stage in range(2)
        for name in ("high_noise", "low_noise")
    ]
    lines = shown(stage_table(rows)).splitlines()
    assert all(len(line) <= 80 for line in lines) and len(lines) == 3 + len(rows)
    assert [line.split()[1] for line in lines[3:]] == ["high_noise", "low_noise"] * 2
    assert lines[3].split()[-3:] == ["13.5", "GiB", "0"], "on the host, and the ranks"


def test_tables_hold_their_values():
    stages = shown(TABLES["stages"])
    assert all(cell in stages for cell in ("0-16", "720 M", "11.2 M", "1.39 GiB", "0, 1"))
    assert "ranks" not in shown(stage_table([StageRow(0, 0, 1, 1, 1, 1)]))
    buckets = shown(TABLES["buckets"])
    assert all(cell in buckets for cell in ("1280x720x81", "38", "75 600", "carried over"))
    assert "64 x 3 600 = 230 400" in shown(TABLES["loads"])


def test_warnings_that_all_clips_have_do_not_hide_the_others():
    rows = [(f"{i}.mp4", "enlarged", "blurs") for i in range(20)] + [("z.mp4", "scene cut", "split it")]
    text = shown(warning_table(rows, max_rows=3))
    assert "Warnings: enlarged 20, scene cut 1" in text
    assert text.index("split it") < text.index("0.mp4") < text.index("and 18 more")
    assert "all are listed in warnings.jsonl" in text


def test_skipped_table_takes_names_as_they_are_and_says_what_it_leaves_out():
    rows = [("[I2V] a.mp4", "no caption"), *[(f"{i}.mp4", "unreadable") for i in range(9)]]
    text = shown(skipped_table(rows, max_rows=3))
    assert "[I2V] a.mp4" in text
    assert "Skipped: 10 files" in text
    assert "... and 7 more" in text
    assert "1.mp4" in text
    assert "2.mp4" not in text


def test_control_characters_in_a_name_do_not_reach_the_terminal():
    name = "red\x1b[31m\x9b0m\t.mp4"
    for renderable in (skipped_table([(name, f"is like {name}\n")]), f"note: {name}\nsecond line"):
        text = shown(renderable)
        assert "red?[31m?0m?.mp4" in text
        assert all(sign.isprintable() or sign == "\n" for sign in text)


def test_cache_summary_says_when_nothing_was_encoded():
    assert cache_summary(0, 18) == "0 of 18 clips to encode: everything was in the cache"
    assert cache_summary(3, 18, elapsed_s=12.3) == "3 of 18 clips encoded in 12s, 15 were in the cache"
    assert cache_summary(17, 18, "caption") == "17 of 18 captions encoded, 1 was in the cache"
    assert cache_summary(1, 1) == "1 of 1 clip encoded"


def test_closing_lines_never_break_a_path_or_a_command():
    path, command = "/runs/" + "deep/" * 30 + "adapter.safetensors", "deepspeed " + "--flag value " * 12
    lines = shown(closing_panel({"run": "/runs/1", "LoRA": path}, {"go on": command})).splitlines()
    assert f"  LoRA  {path}" in lines
    assert f"    {command}".rstrip() in [line.rstrip() for line in lines]


REPORT = StepReport(120, 4000, 3, 0.09123, 2e-5, 1.8312, 4.37, 0.412, 7100)


def test_live_line_drops_the_least_needed_fields_first():
    whole = live_text(REPORT)
    assert whole == ("step 120/4000  epoch 3  loss 0.0912  lr 2e-05  grad 0.41  1.83 s/step  4.37 samples/s  ETA 1h58m")
    for width in (80, 60, 40):
        line = live_text(REPORT, width)
        assert len(line) <= width
        assert line.startswith("step 120/4000")
        assert "loss 0.0912" in line
    assert "grad" in live_text(REPORT, 80)
    assert live_text(REPORT, 5) == "step 120/4000"


def test_live_line_leaves_out_what_is_not_known():
    line = live_text(StepReport(1, 10, 1, float("nan"), 1e-4, 1.0, 1.0))
    assert "loss nan" in line
    assert "grad" not in line
    assert "ETA" not in line


def report(step: int) -> StepReport:
    return StepReport(step, 7, 1, 0.5, 1e-4, 1.0, 4.0)


def test_without_a_terminal_a_plain_line_comes_every_few_steps_and_at_the_end():
    console = screen()
    with LiveLine(console, steps_per_print=3) as live:
        for step in range(1, 8):
            live.update(report(step))
            live.note("evaluating")
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 3/7", "step 6/7", "step 7/7"]
    assert "\x1b" not in console.file.getvalue()


def test_on_a_terminal_the_line_is_replaced_and_stays_at_the_end():
    console = screen(terminal=True)
    with LiveLine(console) as live:
        for step in range(1, 8):
            live.update(report(step))
        show(console, "checkpoint saved")
    text = console.file.getvalue()
    assert "\x1b[2K" in text  # erased in place
    assert text.index("checkpoint saved") < text.rindex("step 7/7")


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_show_nothing(terminal):
    console = screen(terminal=terminal)
    with LiveLine(console, enabled=False) as live, CacheProgress(console, enabled=False) as progress:
        live.update(report(7))
        live.note("evaluating")
        progress.start(3, "latents")
        progress.advance(3)
    assert console.file.getvalue() == ""


def test_progress_without_a_terminal_is_a_line_now_and_then():
    console, now = screen(), [0.0]
    progress = CacheProgress(console, clock=lambda: now[0])
    progress.start(100, "latents")
    for i in range(30):
        now[0] += 1.0
        progress.advance(1, f"{i}.mp4")
    progress.done()
    assert console.file.getvalue().splitlines() == [
        "latents: 100 items",
        "latents: 10 of 100  1/s  ETA 1m30s  9.mp4",
        "latents: 20 of 100  1/s  ETA 1m20s  19.mp4",
        "latents: 30 of 100  1/s  ETA 1m10s  29.mp4",
    ]


def test_slow_items_are_each_told():
    console, now = screen(), [0.0]
    progress = CacheProgress(console, clock=lambda: now[0])
    progress.start(3, "latents")
    for i in range(2):
        now[0] += 25.0
        progress.advance(1, f"{i}.mp4")
    assert "latents: 1 of 3  25 s each  ETA 50s  0.mp4" in console.file.getvalue()
    assert "latents: 2 of 3" in console.file.getvalue()


def test_nothing_to_encode_is_no_progress():
    console = screen()
    progress = CacheProgress(console)
    progress.start(0, "latents")
    progress.done()
    assert console.file.getvalue() == ""


def test_the_bar_takes_one_line_of_a_terminal():
    console = screen(terminal=True)
    with CacheProgress(console) as progress:
        progress.start(4, "latents")
        progress.advance(2, "[I2V] " + "x" * 200 + ".mp4")
        progress._bar.refresh()
        (line,) = [part for part in console.file.getvalue().split("\x1b[2K") if "2/4" in part][:1]
    assert "[I2V] xxx" in line
    assert len(line.strip("\r\n")) <= 80


def test_progress_line_at_the_start_and_the_end():
    assert progress_line("text", 0, 5, 0.0) == "text: 0 of 5"
    assert progress_line("text", 5, 5, 2.0) == "text: 5 of 5  2.5/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (12.4, "12s"), (200, "3m20s"), (7100, "1h58m"), (187200, "2d4h"), (3600, "1h0m")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_units():
    counts = [counted(1, "process"), counted(2, "process"), counted(75600, "token"), counted(0.5, "repeat")]
    assert counts == ["1 process", "2 processes", "75 600 tokens", "0.5 repeats"]
    assert [short_count(n) for n in (999, 12_345, 87_000_000, 14_288_000_000)] == ["999", "12.3 k", "87 M", "14.3 B"]
    assert [short_bytes(n) for n in (100, 2048, 3 * 2**20, 2834678415)] == ["100 B", "2 KiB", "3 MiB", "2.64 GiB"]
    assert [short_bytes(n << 30) for n in (999, 1000, 1023, 2048, 2**30)] == [
        "999 GiB",
        "1000 GiB",
        "1023 GiB",
        "2 TiB",
        "1048576 TiB",
    ]
