"""What a run's folder tells of how it was made, without secrets."""

import json
import shlex
import subprocess
import sys

import pytest

from tests.helpers.configs import RUN, folder, load  # noqa: F401 (a fixture)
from utils.train.record import git_state, public, write_configs, write_record

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


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--set=model.ckpt_path='https://me:verysecret@host/wan'", "--set=model.ckpt_path='https://...@host/wan'"),
        ("s3://verysecret@bucket/a", "s3://...@bucket/a"),
        ("https://host/wan?token=verysecret&a=1", "https://host/wan?token=...&a=1"),
        ("https://host/wan?X-Amz-Signature=verysecret", "https://host/wan?X-Amz-Signature=..."),
        ("--password=verysecret", "--password=..."),
        ("x='hf_abcdefghijkl'", "x='...'"),  # HF_TOKEN of the environment
        ("dGhpcyBpcyBh", "..."),  # AWS_SECRET_ACCESS_KEY
        ("--set=epochs=3", "--set=epochs=3"),
        ("--set=dataset='you@host/true.toml'", "--set=dataset='you@host/true.toml'"),
    ],
)
def test_the_command_is_told_without_secrets(word, told):
    environment = {
        "HF_TOKEN": "hf_abcdefghijkl",
        "AWS_SECRET_ACCESS_KEY": "dGhpcyBpcyBh",
        "USE_AUTH": "true",
        "HOME": "/home/epochs",
        "KEYBOARD": "--set=epochs=3",
    }
    assert shlex.split(public(["train.py", word], environment)) == ["train.py", told]


def test_a_whole_run_folder_holds_no_secret(tmp_path, monkeypatch):
    """Of the environment, the config, the command line, and the URL of the git remote."""
    checkout = tmp_path / "checkout"
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://me:verysecret@host/x.git"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "verysecret"], check=True)
    monkeypatch.setattr("utils.train.record.ROOT", checkout)
    for name in ("WANDB_API_KEY", "HF_TOKEN", "GIT_PASSWORD"):
        monkeypatch.setenv(name, "verysecret")
    loaded = load(RUN + "[monitoring]\nenable_wandb = true\nwandb_api_key = 'verysecret'  # verysecret\n")
    words = ["train.py", "--config", "run.toml", "--set", "model.ckpt_path='https://a:verysecret@host/x'"]
    monkeypatch.setattr(sys, "argv", words)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_configs(loaded, run_dir)
    write_record(loaded, run_dir, {})
    assert len(git_state()) == 40
    written = [path.read_text() for path in run_dir.iterdir()]
    assert len(written) == 3 and not any("verysecret" in text for text in written)


@pytest.mark.parametrize("content", [b"", b'[{"reelpipe": "0', b"\x80\xff", b'{"a": 1}'])
def test_a_torn_record_does_not_keep_a_run_from_going_on(tmp_path, content, caplog):
    loaded = load(RUN)
    (tmp_path / "run.json").write_bytes(content)
    write_record(loaded, tmp_path, {})
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1
    assert "run.json is damaged, and begun anew" in caplog.text
    assert (tmp_path / "run.json.damaged").read_bytes() == content
    assert len(list(tmp_path.glob("*run.json*"))) == 2, "nothing is left of the writing"
