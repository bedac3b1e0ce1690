"""A small config on disk to load, break and hold against the rules, and a family that stands in for a real one."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field

import models
from models.base import MediaSpec
from utils.config.load import ConfigError, load_config

SPEC = MediaSpec(fps=Fraction(16), pixel_multiple=16, frame_stride=4, images=True)

RUN = """\
output_dir = 'runs'
dataset = 'dataset.toml'
epochs = 3
save_every_n_epochs = 1
checkpoint_every_n_epochs = 1

[model]
type = 'stand_in'
ckpt_path = 'weights'

[adapter]
type = 'lora'
rank = 8

[optimizer]
type = 'adamw'
lr = 1e-4
"""

DATASET = """\
resolutions = [64]
frame_buckets = [1, 9]

[[directory]]
path = 'clips'
"""


class StandInConfig(BaseModel):
    """Enough of a `[model]` table to test with, whatever the families of the project look like."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: str
    ckpt_path: Annotated[Path, Field(strict=False)]
    transformer_path: Annotated[Path | None, Field(strict=False)] = None
    transformer_dtype: str | None = None
    dtype: str = "bfloat16"
    expert: str | None = None
    save_layout: str = "official"
    timestep_sample_method: str = "logit_normal"
    sigmoid_scale: float = 1.0
    i2v_fraction: float = 0.0
    min_t: float = Field(0.0, ge=0, le=1)


class StandIn:
    Config = StandInConfig


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a good run and dataset TOML in it, and the family that they name."""
    monkeypatch.setitem(models.FAMILIES, "stand_in", f"{__name__}:StandIn")
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    Path("dataset.toml").write_text(DATASET)
    return tmp_path


def load(run=RUN, dataset=DATASET, overrides=(), **others):
    Path("run.toml").write_text(run)
    Path("dataset.toml").write_text(dataset)
    for name, text in others.items():
        Path(f"{name}.toml").write_text(text)
    return load_config(Path("run.toml"), overrides)


def complaints(**files):
    with pytest.raises(ConfigError) as caught:
        load(**files)
    assert str(caught.value) == "\n".join(caught.value.messages)
    return list(caught.value.messages)


def top(*lines, run=RUN):
    """RUN with lines put in front of its own; the first of them is line 1."""
    return "\n".join(lines) + "\n" + run
