"""What a run's folder tells of how it was made, without secrets."""

import json
import sys

import pytest

from tests.helpers.configs import RUN, folder, load  # noqa: F401 (a fixture)
from utils.train.record import write_record

pytestmark = pytest.mark.usefixtures("folder")


def test_each_start_is_a_line_of_the_record_and_none_holds_a_secret(tmp_path, monkeypatch):
    loaded = load(RUN + "[monitoring]\nenable_wandb = true\nwandb_api_key = 'verysecret'\n")
    for word in ("--set=monitoring.wandb_api_key='verysecret'", "monitoring.wandb_api_key=verysecret"):
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", "run.toml", "--set", word])
        write_record(loaded, tmp_path, {"data_digest": {"train": "a1"}})
    text = (tmp_path / "run.json").read_text()
    assert "verysecret" not in text
    first, second = json.loads(text)
    assert first["command"].startswith("train.py --config run.toml --set ")
    assert first["data_digest"] == {"train": "a1"}
    assert {"reelpipe", "versions", "git", "config_digest", "python"} < second.keys()
