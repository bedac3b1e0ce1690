"""What every benchmark prints about where it ran."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from typing import Any


def machine_line(torch: Any) -> str:
    """Date, processor or GPU, cores and versions, for the table in RESULTS.md."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "diffusers"))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return f"{date.today()}  {where}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


def processor() -> str:
    try:
        told = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
        return next(line.split(":", 1)[1].strip() for line in told.splitlines() if line.startswith("Model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown processor"
