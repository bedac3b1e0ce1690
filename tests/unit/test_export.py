"""Saved files appear whole or not at all, are readable by others, and a full disk does not end a training."""

import errno
import os
import stat

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from models.weights import write_safetensors
from tests.helpers.disks import CountedDisk, failing, killing
from utils.train.export import Model, clear_saved, export


class Family:
    """Writes one file, or fails as a full disk does."""

    title, full = "a model", False

    def save_full(self, tensors, folder, metadata):
        write_safetensors(folder / "model.safetensors", tensors, metadata)
        if self.full:
            raise OSError(28, "No space left on device")


def save(family, folder, disk=None, values=(0.0, 1.0, 2.0)):
    trained = {"w": nn.Parameter(torch.tensor(values))}
    settings = {"disk": disk, "is_adapter": False, "dtype": None, "stage": 0, "data_rank": 0, "metadata": {"step": "1"}}
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


def value_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return file.get_tensor("w").tolist()


def calls_of_a_save(folder):
    save(Family(), folder / "step1")
    save(Family(), folder / "step1", disk := CountedDisk())
    return disk.calls


def test_every_file_is_on_the_disk_before_it_takes_its_place(tmp_path):
    assert calls_of_a_save(tmp_path) == ["sync", "sync", "sync", "rename", "rename", "sync", "remove"]


def test_a_disk_that_fails_at_any_call_leaves_one_of_the_two(tmp_path, caplog):
    (tmp_path / "counted").mkdir()
    for number, _ in enumerate(calls_of_a_save(tmp_path / "counted")):
        for lasting in (False, True):
            run_dir = tmp_path / f"{number}{lasting}"
            run_dir.mkdir()
            save(Family(), run_dir / "step1")
            saved = save(Family(), run_dir / "step1", failing(number, errno.EIO, lasting), values=(7.0,))
            assert "Input/output error" in caplog.text
            caplog.clear()
            clear_saved(run_dir)  # what the next start does
            assert sorted(path.name for path in run_dir.iterdir()) == ["step1"], (number, lasting)
            if saved is not None:
                assert value_in(run_dir / "step1") == [7.0]
            else:
                assert value_in(run_dir / "step1") == [0.0, 1.0, 2.0], (number, lasting)


def test_a_process_that_is_killed_at_any_call_leaves_one_of_the_two(tmp_path):
    (tmp_path / "counted").mkdir()
    values = []
    for number, _ in enumerate(calls_of_a_save(tmp_path / "counted")):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        save(Family(), run_dir / "step1")
        child = os.fork()
        if child == 0:
            save(Family(), run_dir / "step1", killing(number), values=(7.0,))
            os._exit(0)
        assert os.waitpid(child, 0)[1] != 0
        assert clear_saved(run_dir)
        assert sorted(path.name for path in run_dir.iterdir()) == ["step1"]
        values.append(value_in(run_dir / "step1"))
    assert values == [[0.0, 1.0, 2.0]] * 4 + [[7.0]] * 3, "the new one from the first rename on"


def test_files_have_the_rights_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


def test_equal_content_makes_equal_files(tmp_path):
    told, tensors = {f"key {n}": 'é "\n' * n for n in range(8)}, {"w": torch.arange(3.0), "b": torch.ones(2).bfloat16()}
    for name in "abcd":
        write_safetensors(tmp_path / name, tensors, told)
    (content,) = {(tmp_path / name).read_bytes() for name in "abcd"}
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.metadata() == told
        assert all(file.get_tensor(name).equal(tensor) for name, tensor in tensors.items())
    assert list(told) == sorted(told)
    assert content.index(b"key 0") < content.index(b"key 7")


def test_what_the_library_says_of_a_failed_write_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("models.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(1)})


def test_numbers_that_the_saved_dtype_cannot_hold_are_refused(tmp_path, caplog):
    settings = {"is_adapter": False, "stage": 0, "data_rank": 0, "metadata": {}, "extras": lambda folder: None}
    model = Model(Family(), {"a": nn.Parameter(torch.ones(2)), "w": nn.Parameter(torch.tensor([1.0, 7e4]))})
    assert export([model], tmp_path / "step1", dtype=torch.float16, **settings) is None
    assert "w is not finite in torch.float16; set save_dtype = 'bfloat16' or 'float32'; training goes on" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert export([model], tmp_path / "step1", dtype=torch.bfloat16, **settings) is not None
