"""What a rank says last: mistakes without a traceback, and nothing where another rank has the story."""

import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.train import errors
from utils.train.activity import Activity, Batch
from utils.train.checkpoint import save_of
from utils.train.engine import init_distributed
from utils.train.kept import read_kept
from utils.train.nonfinite import NonFiniteError
from utils.train.stopping import TooEarly

GONE = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4806")


def said(error, caplog):
    with errors.reported() as outcome:
        raise error
    assert outcome.status == 1
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "ERROR")


@pytest.mark.parametrize("error", [ValueError("rank = 0"), OSError("disk"), NonFiniteError("norm nan")])
def test_what_a_person_can_mend_comes_without_traceback(error, caplog):
    assert said(error, caplog) == str(error)


def test_what_ended_a_run_before_its_first_step_is_named(caplog):
    with caplog.at_level(logging.INFO), errors.reported() as outcome:
        raise TooEarly("stopping before the first step: SIGUSR1 came", 85)
    assert "stopping before the first step: SIGUSR1 came" in caplog.text and outcome.status == 85


def test_a_bug_of_ours_comes_with_its_traceback(caplog):
    assert "Traceback" in said(KeyError("x"), caplog)


class Watched(SimpleNamespace):
    """As much of a watchdog as the last words ask for."""

    def stop(self, *_):
        pass

    record = hush = stop


@pytest.mark.parametrize(
    ("action", "in_a_step", "is_placed"),
    [
        (lambda: read_kept(Path("absent.json")), False, False),
        (lambda: read_kept(Path("absent.json")), True, True),
        (lambda: json.loads("{"), False, True),
        (lambda: save_of({"save": "many"}), False, True),
        (lambda: Path("absent.json").read_text(), False, True),
    ],
    ids=["of ours", "of ours, in a step", "a library's", "of a call from ours", "of the system"],
)
def test_what_names_a_key_or_a_file_needs_no_place(action, in_a_step, is_placed, caplog):
    activity = Activity()
    activity.begin("the checks before the start", (lambda _: Batch("64x64x5", ["a.mp4"])) if in_a_step else None)
    with errors.reported() as outcome:
        outcome.watch(Watched(activity=activity), None)
        action()
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert ("\n  in the checks before the start" in said) == is_placed


def test_a_port_that_another_run_uses_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launcher = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in launcher.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
        with pytest.raises(ValueError, match=f"^port {port} of 127.0.0.1.*is taken.*--master_port={port + 1} "):
            init_distributed()


def test_a_lost_peer_is_one_line_on_rank_0_and_nothing_elsewhere(caplog, monkeypatch):
    assert said(GONE, caplog) == errors.LOST_PEER
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert said(GONE, caplog) == ""
