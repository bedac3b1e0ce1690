"""Saved files appear whole or not at all, are readable by others, and a full disk does not end a training."""

import os
import stat

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from models.weights import write_safetensors
from utils.train.export import Model, export


class Family:
    """Writes one file, or fails as a full disk does."""

    title, full = "a model", False

    def save_full(self, tensors, folder, metadata):
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        if self.full:
            raise OSError(28, "No space left on device")


def save(family, folder):
    trained = {"w": nn.Parameter(torch.arange(3.0))}
    settings = {"is_adapter": False, "dtype": None, "stage": 0, "data_rank": 0, "metadata": {"step": "1"}}
    return export(
        [Model(family, trained)], folder, **settings, extras=lambda folder: (folder / "config.toml").write_text("")
    )


def test_a_save_leaves_the_folder_alone(tmp_path):
    assert save(Family(), tmp_path / "step1") == tmp_path / "step1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step1"]
    assert sorted(path.name for path in (tmp_path / "step1").iterdir()) == ["config.toml", "model.safetensors"]


def test_a_full_disk_keeps_what_was_there_and_is_told(tmp_path, caplog):
    family = Family()
    save(family, tmp_path / "step1")
    family.full = True
    assert save(family, tmp_path / "step1") is None
    assert "No space left on device" in caplog.text
    assert (tmp_path / "step1" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step1"]


def test_files_have_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_what_the_library_says_of_a_failed_write_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
