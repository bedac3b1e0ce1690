"""Logs: who sees what, what the file keeps, and output captured below Python."""

import io
import logging
import os
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from utils.monitor.logs import (
    OWN_PACKAGES,
    PACKAGES_WITH_HANDLERS,
    QUIET_ENVIRONMENT,
    Forgiving,
    captured_output,
    log_to_file,
    quiet_libraries,
    setup_logging,
)

OURS = logging.getLogger("utils.train.loop")


@pytest.fixture(autouse=True)
def restored_logging():
    packages = (*OWN_PACKAGES, *PACKAGES_WITH_HANDLERS)
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in packages]
    loggers = [logging.getLogger(name) for name in (None, *packages, *names)]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    filters, environment = warnings.filters[:], dict(os.environ)
    yield
    logging.captureWarnings(False)
    for each, handlers, level, propagate in before:
        for handler in set(each.handlers) - set(handlers):
            handler.close()
        each.handlers[:] = handlers
        each.setLevel(level)
        each.propagate = propagate
    warnings.filters[:] = filters
    os.environ.clear()
    os.environ.update(environment)


def console_of(rank: int) -> io.StringIO:
    file = io.StringIO()
    setup_logging(rank, Console(file=file, width=60, highlight=False))
    return file


def test_rank_0_shows_info_without_noise():
    file = console_of(0)
    OURS.info("started")
    OURS.debug("detail")
    assert file.getvalue().split(" ", 1)[1] == "started\n"


def test_other_ranks_show_warnings_with_their_number():
    file = console_of(3)
    OURS.info("started")
    OURS.warning("slow disk")
    assert file.getvalue().split(" ", 1)[1] == "[rank 3] warning: slow disk\n"


@pytest.mark.parametrize(
    ("rank", "package", "level", "shown"),
    [
        (0, "av", logging.INFO, False),
        (0, "av", logging.WARNING, True),
        (1, "av", logging.WARNING, False),
        (0, "DeepSpeed", logging.WARNING, False),
        (0, "DeepSpeed", logging.ERROR, True),
        (1, "torch.distributed", logging.ERROR, True),
    ],
)
def test_libraries_speak_once_and_only_of_trouble(rank, package, level, shown):
    file = console_of(rank)
    quiet_libraries()
    logging.getLogger(package).log(level, "hm")
    assert ("hm" in file.getvalue()) is shown


def test_long_paths_and_brackets_come_out_as_they_are():
    file = console_of(0)
    path = "/data/[I2V]/" + "x" * 100
    OURS.info("saved %s", path)
    assert path in file.getvalue()


def test_tracebacks_are_shown():
    file = console_of(0)
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        OURS.exception("it failed")
    assert "error: it failed" in file.getvalue()
    assert "RuntimeError: boom" in file.getvalue()


def test_the_file_keeps_what_the_console_leaves_out(tmp_path):
    shown = console_of(1)
    path = log_to_file(tmp_path, 1)
    quiet_libraries()
    OURS.debug("detail")
    logging.getLogger("DeepSpeed").warning("accelerator")
    warnings.warn("old thing", DeprecationWarning, stacklevel=1)
    text = path.read_text()
    assert path == tmp_path / "logs" / "rank_1.log"
    assert "DEBUG utils.train.loop: detail" in text
    assert "accelerator" in text
    assert "old thing" in text
    assert shown.getvalue() == ""


def test_setting_up_twice_says_things_once(tmp_path):
    console_of(0)
    file = console_of(0)
    log_to_file(tmp_path, 0)
    path = log_to_file(tmp_path, 0)
    OURS.info("once")
    assert file.getvalue().count("once") == path.read_text().count("once") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_told_once(tmp_path, capsys):
    console_of(0)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.log").symlink_to("/dev/full")
    log_to_file(tmp_path, 0)
    OURS.info("first")
    OURS.info("second")
    assert capsys.readouterr().err.count("cannot write") == 1


def test_a_terminal_that_has_gone_is_no_reason_to_fail():
    reader, writer = os.pipe()
    console = Console(file=Forgiving(os.fdopen(writer, "wb"), "utf-8"))
    console.print("heard")
    assert os.read(reader, 100) == b"heard\n"
    os.close(reader)
    for _ in range(3):
        console.print("step " * 10000)


def test_libraries_lose_their_own_handlers_and_keep_the_users_environment():
    os.environ["TRANSFORMERS_VERBOSITY"] = "debug"
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(logging.StreamHandler())
    logger.propagate = False
    quiet_libraries()
    assert logger.handlers == []
    assert logger.propagate
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert all(name in os.environ for name in QUIET_ENVIRONMENT)


def test_captured_output_takes_children_too_and_gives_the_output_back(tmp_path, capfd):
    log = tmp_path / "rank_0.log"
    with captured_output(log):
        os.write(1, b"from C\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        os.write(2, b"an error\n")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("after\n", "")
    assert sorted(log.read_text().splitlines()) == ["an error", "from C", "from a child"]


def test_captured_output_points_to_the_log_on_an_error(tmp_path, capfd):
    file = console_of(0)
    log = tmp_path / "rank_0.log"
    with pytest.raises(RuntimeError, match="boom"), captured_output(log):
        raise RuntimeError("boom")
    assert str(log) in file.getvalue()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_the_terminal_stays_visible_while_output_is_captured(tmp_path):
    code = (
        "import logging, pathlib, sys\n"
        "from utils.monitor.logs import captured_output, setup_logging, terminal\n"
        "setup_logging(0, terminal())\n"
        "with captured_output(pathlib.Path(sys.argv[1])):\n"
        "    print('hidden')\n"
        "    logging.getLogger('train').info('visible')\n"
    )
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout.split(" ", 1)[1] == "visible\n"
    assert log.read_text() == "hidden\n"
