"""What a rank says last: mistakes without a traceback, and nothing where another rank has the story."""

import pytest

from utils.train import errors
from utils.train.engine import NonFiniteError

GONE = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4806")


def said(error, caplog):
    with errors.reported() as outcome:
        raise error
    assert outcome.status == 1
    return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "ERROR")


@pytest.mark.parametrize("error", [ValueError("rank = 0"), OSError("disk"), NonFiniteError("norm nan")])
def test_what_a_person_can_mend_comes_without_traceback(error, caplog):
    assert said(error, caplog) == str(error)


def test_a_bug_of_ours_comes_with_its_traceback(caplog):
    assert "Traceback" in said(KeyError("x"), caplog)


def test_a_lost_peer_is_one_line_on_rank_0_and_nothing_elsewhere(caplog, monkeypatch):
    assert said(GONE, caplog) == errors.LOST_PEER
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    assert said(GONE, caplog) == ""
