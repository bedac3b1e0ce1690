"""What made a run: versions, command, git state and config, written into its folder without secrets."""

import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.load import LoadedConfig, config_digest, resolved_dataset_toml, resolved_toml
from utils.config.source import redacted_text
from utils.train.disk import Disk
from utils.version import VERSION

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "av")
ROOT = Path(__file__).resolve().parents[2]

logger = logging.getLogger(__name__)

HIDDEN = "..."
MIN_SECRET = 8  # letters; shorter values of the environment, "true" for instance, may stand anywhere
_SECRET_WORD = r"(?:api_?key|token|secret|passw(?:or)?d|credentials?|signature)"
_SECRET_NAME = re.compile(rf"(?:{_SECRET_WORD}|_key|_pat|_auth)$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"""(\b[a-z][a-z0-9+.-]*://)[^/\s'"@]+@""", re.IGNORECASE)
_PARAMETER = re.compile(rf"""(\b[\w-]*{_SECRET_WORD}=)[^&\s'"]+""", re.IGNORECASE)


def write_configs(loaded: LoadedConfig, folder: Path) -> None:
    """The resolved run and dataset TOMLs, every default written out."""
    (folder / "config.toml").write_text(resolved_toml(loaded), encoding="utf-8")
    (folder / "dataset.toml").write_text(resolved_dataset_toml(loaded.dataset), encoding="utf-8")
    for name, dataset in loaded.eval_datasets.items():
        (folder / f"eval_{name}.toml").write_text(resolved_dataset_toml(dataset), encoding="utf-8")


def public(words: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command line as it may be written down: without secrets of the config, credentials in URLs, values of options
    and URL parameters that are called secret, and values of environment variables that are, wherever they stand."""
    secrets = {value for name, value in environment.items() if _SECRET_NAME.search(name) and len(value) >= MIN_SECRET}
    told = []
    for word in map(redacted_text, words):
        for value in sorted(secrets, key=len, reverse=True):
            word = word.replace(value, HIDDEN)
        word = _CREDENTIALS.sub(rf"\1{HIDDEN}@", word)
        told.append(_PARAMETER.sub(rf"\1{HIDDEN}", word))
    return shlex.join(told)


def write_record(loaded: LoadedConfig, folder: Path, facts: Mapping[str, Any]) -> None:
    """`run.json`, a line of history for each start: a resumed run keeps what the earlier starts were."""
    path = folder / "run.json"
    starts = _starts_of(path)
    record = {
        "reelpipe": VERSION,
        "command": public(sys.argv, os.environ),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": git_state(),
        "config_digest": config_digest(loaded),
        **facts,
    }
    staged = path.with_name(f"tmp-{path.name}")
    staged.write_text(json.dumps([*starts, record], indent=1) + "\n", encoding="utf-8")
    disk = Disk()
    disk.sync(staged)
    disk.rename(staged, path)


def _starts_of(path: Path) -> list[Any]:
    """What earlier starts were; where that cannot be read it is told, kept under another name, and none."""
    if not path.is_file():
        return []
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(starts, list):
            return starts
    except ValueError:
        pass
    damaged = path.with_name(f"{path.name}.damaged")
    os.replace(path, damaged)
    logger.warning("%s is damaged, and begun anew: what earlier starts were is no longer known, see %s", path, damaged)
    return []


def git_state() -> str:
    """`<commit>`, with `-dirty` where files are changed; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
