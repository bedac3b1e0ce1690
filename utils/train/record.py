"""What made a run: versions, command, git state and config, written into its folder without secrets."""

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.load import LoadedConfig, config_digest, resolved_dataset_toml, resolved_toml
from utils.config.source import redacted_text
from utils.version import VERSION

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "av")
ROOT = Path(__file__).resolve().parents[2]


def write_configs(loaded: LoadedConfig, folder: Path) -> None:
    """The resolved run and dataset TOMLs, every default written out."""
    (folder / "config.toml").write_text(resolved_toml(loaded), encoding="utf-8")
    (folder / "dataset.toml").write_text(resolved_dataset_toml(loaded.dataset), encoding="utf-8")
    for name, dataset in loaded.eval_datasets.items():
        (folder / f"eval_{name}.toml").write_text(resolved_dataset_toml(dataset), encoding="utf-8")


def write_record(loaded: LoadedConfig, folder: Path, facts: Mapping[str, Any]) -> None:
    """`run.json`, a line of history for each start: a resumed run keeps what the earlier starts were."""
    path = folder / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    record = {
        "reelpipe": VERSION,
        "command": shlex.join(map(redacted_text, sys.argv)),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git": git_state(),
        "config_digest": config_digest(loaded),
        **facts,
    }
    path.write_text(json.dumps([*starts, record], indent=1) + "\n", encoding="utf-8")


def git_state() -> str:
    """`<commit>`, with `-dirty` where files are changed; empty outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
