"""A checkpoint is whole or absent, readable by any number of stages, and says why it cannot be used."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.data.stat_index import hash_file
from utils.train import checkpoint, run_folder
from utils.train.checkpoint import CheckpointError, Part
from utils.train.optimizers import build_optimizer
from utils.train.state import TrainState


def trained(names="abcd", seed=0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(3, 2, generator=generator)) for name in names}


def stepped(parameters: dict[str, nn.Parameter], steps: int = 2) -> torch.optim.Optimizer:
    optimizer = build_optimizer("adamw", list(parameters.items()), lr=0.1)
    for _ in range(steps):
        for parameter in parameters.values():
            parameter.grad = parameter.detach().sin()
        optimizer.step()
    return optimizer


def save(run_dir, step=7, parameters=None, keep_last=None, **more):
    parameters = trained() if parameters is None else parameters
    return checkpoint.save(
        run_dir,
        TrainState(step, 10 * step),
        epochs_done=2,
        course={"order": "x"},
        meters={"epoch_loss_sum": 1.5},
        parts={"": Part(parameters, stepped(parameters))},
        stage=0,
        data_rank=0,
        keep_last=keep_last,
        **more,
    )


def test_each_file_is_told_of_before_it_is_written_and_read(tmp_path):
    told = []
    save(tmp_path, note=told.append)
    names = ("weights_00.safetensors", "optimizer_00.pt")
    assert told == [f"{what} {name}" for name in names for what in ("writing", "hashing")]


def test_what_was_saved_comes_back(tmp_path):
    parameters = trained()
    folder = save(tmp_path, parameters=parameters)
    assert folder == tmp_path / "global_step7"
    assert (tmp_path / "latest").read_text() == "global_step7\n"
    assert not list(tmp_path.glob("tmp-*"))
    fresh = trained(seed=5)
    optimizer = build_optimizer("adamw", list(fresh.items()), lr=0.1)
    loaded = checkpoint.load(folder, {"": Part(fresh, optimizer)})
    assert loaded.state == TrainState(7, 70)
    assert (loaded.epochs_done, loaded.course, loaded.meters) == (2, {"order": "x"}, {"epoch_loss_sum": 1.5})
    assert all(torch.equal(fresh[name], parameters[name]) for name in parameters)
    again = stepped(fresh, 0)
    for parameters_of in (fresh, parameters):
        for parameter in parameters_of.values():
            parameter.grad = parameter.detach().cos()
    optimizer.step()
    assert not all(torch.equal(fresh[n], parameters[n]) for n in fresh)
    assert again is not optimizer


def test_two_stages_load_into_one_and_one_into_two(tmp_path, monkeypatch):
    """The format knows names, not stages."""
    whole = trained()
    folder = save(tmp_path, parameters=whole)
    other_stage = json.dumps({"": list("ab")})
    monkeypatch.setattr(checkpoint.dist, "gather_text", lambda told: [other_stage, told])
    half = {name: nn.Parameter(torch.zeros(3, 2)) for name in "cd"}
    optimizer = build_optimizer("adamw", list(half.items()), lr=0.1)
    checkpoint.load(folder, {"": Part(half, optimizer)})
    assert all(torch.equal(half[name], whole[name]) for name in half)
    assert len(optimizer.state) == 2
    # the same content as two stages would have written it
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["weights_00.safetensors"]["tensors"] == list("abcd")


@pytest.mark.parametrize("harm", ["manifest.json", "weights_00.safetensors", "optimizer_00.pt", "state.json"])
def test_an_incomplete_checkpoint_is_passed_over(tmp_path, harm):
    save(tmp_path, 3)
    newer = save(tmp_path, 5)
    (newer / harm).unlink()
    assert checkpoint.find(tmp_path) == tmp_path / "global_step3"
    with (tmp_path / "global_step3" / "state.json").open("a") as file:
        file.write(" ")  # another size than the manifest says
    with pytest.raises(CheckpointError, match=r"found: global_step3 \(incomplete\), global_step5 \(incomplete\)"):
        checkpoint.find(tmp_path)


def test_changed_content_of_the_same_size_is_found_at_load(tmp_path):
    folder = save(tmp_path)
    data = bytearray((folder / "weights_00.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights_00.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights_00.safetensors is damaged"):
        checkpoint.load(folder, {"": Part(trained(), None)})


def test_other_tensors_than_were_saved(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing, first e; rank, exclude_modules"):
        checkpoint.load(folder, {"": Part(trained("abcde"), None)})
    with pytest.raises(CheckpointError, match=r"1 missing, first e, 2 not trained now, first c; rank, exclude_modules"):
        checkpoint.load(folder, {"": Part(trained("abe"), None)})
    wrong = {**trained(), "a": nn.Parameter(torch.zeros(4, 2))}
    with pytest.raises(CheckpointError, match=r"a is \[3, 2\], this run's is \[4, 2\]"):
        checkpoint.load(folder, {"": Part(wrong, None)})


def test_a_dora_does_not_go_on_as_a_lora(tmp_path):
    """Its matrices have the same names, so it would, without its magnitudes."""
    lora = ["to_q.lora_A.default.weight", "to_q.lora_B.default.weight"]
    folder = save(tmp_path, parameters=trained([*lora, "to_q.lora_magnitude_vector.default.weight"]))
    with pytest.raises(CheckpointError, match=r"1 not trained now, first to_q\.lora_magnitude.*the kind of adapter"):
        checkpoint.load(folder, {"": Part(trained(lora), None)})


def test_changes_are_told_and_nothing_else():
    """Over JSON, which has no tuples; what an older version did not write is not known to have changed."""
    saved = json.loads(json.dumps({"alpha": 8.0, "batch": ((512, 4), (1024, 1)), "fuse_adapters": [["a", 1.0, ""]]}))
    now = {"alpha": 4.0, "batch": ((512, 4), (1024, 1)), "fuse_adapters": [], "new": 1}
    told = ["alpha 8.0 -> 4.0", "fuse_adapters [['a', 1.0, '']] -> []"]
    assert checkpoint.course_changes(saved, now) == told


def test_old_ones_are_deleted_once_a_newer_one_is_whole(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step10", "global_step11", "latest"]


def test_a_full_disk_leaves_earlier_ones_and_training_goes_on(tmp_path, monkeypatch, caplog):
    save(tmp_path, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert save(tmp_path, 5, keep_last=1) is None
    assert "checkpoint at step 5 not written: need 0.1 GiB, 0.0 GiB free" in caplog.text
    assert "training goes on" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "latest"]
    assert checkpoint.find(tmp_path).name == "global_step3"


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise OSError(28, "No space left on device")

    save(tmp_path, 3)
    monkeypatch.setattr(torch, "save", broken)
    assert save(tmp_path, 5) is None
    assert "No space left on device" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step3", "latest"]


def test_leftovers_of_a_crash_are_cleared(tmp_path):
    (tmp_path / "tmp-global_step3").mkdir()
    (tmp_path / "tmp-global_step3" / "weights_00.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "latest"]


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    folder = save(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    torch.save({"state": Evil(), "shapes": {}}, folder / "optimizer_00.pt")
    told = manifest["files"]["optimizer_00.pt"]
    told["bytes"] = (folder / "optimizer_00.pt").stat().st_size
    told["blake2b"] = hash_file(folder / "optimizer_00.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    parameters = trained()
    optimizer = build_optimizer("adamw", list(parameters.items()), lr=0.1)
    with pytest.raises(Exception, match=r"weights_only|Weights only|Unsupported"):
        checkpoint.load(folder, {"": Part(parameters, optimizer)})


class TestWhichCheckpoint:
    def test_the_newest_run_that_has_one(self, tmp_path):
        old, new, empty = (tmp_path / f"2026010{i}_00-00-00" for i in (1, 2, 3))
        for folder in (old, new, empty, tmp_path / "cache"):
            folder.mkdir()
        save(old, 9)
        save(new, 3)
        save(new, 4)
        assert run_folder.find_checkpoint(tmp_path, "") == new / "global_step4"
        assert run_folder.find_checkpoint(tmp_path, old.name) == old / "global_step9"
        assert run_folder.find_checkpoint(tmp_path, str(new)) == new / "global_step4"
        assert run_folder.find_checkpoint(tmp_path, f"{new.name}/global_step3") == new / "global_step3"

    def test_a_folder_of_weights_is_explained(self, tmp_path):
        run = tmp_path / "20260101_00-00-00"
        (run / "epoch2").mkdir(parents=True)
        with pytest.raises(CheckpointError, match=r"epoch2 hold weights only: .* set \[adapter\] init_from_existing"):
            run_folder.find_checkpoint(tmp_path, run.name)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"no runs in"):
            run_folder.find_checkpoint(tmp_path / "absent", "")
        (tmp_path / "20260101_00-00-00").mkdir()
        with pytest.raises(CheckpointError, match=r"no such run in .*; newest runs: 20260101_00-00-00"):
            run_folder.find_checkpoint(tmp_path, "20250101_00-00-00")

    def test_two_starts_in_one_second(self, tmp_path):
        folders = {run_folder.new_run_folder(tmp_path) for _ in range(3)}
        assert len(folders) == 3
        assert all(run_folder.RUN_NAME.fullmatch(folder.name) for folder in folders)
