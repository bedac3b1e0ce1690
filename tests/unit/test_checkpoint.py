"""A checkpoint is whole or absent, readable by any number of stages, and says why it cannot be used."""

import json
import logging
import os

import pytest
import torch
from torch import nn

from tests.helpers.checkpoints import optimizer_of, save, stepped, trained
from utils import dist
from utils.data.stat_index import hash_file
from utils.train import checkpoint, checkpoint_read, run_folder
from utils.train.checkpoint import CheckpointError, Part
from utils.train.optimizers import build_optimizer
from utils.train.state import TrainState


def test_what_was_saved_comes_back(tmp_path):
    parameters = trained()
    folder = save(tmp_path, parameters=parameters)
    assert folder == tmp_path / "global_step7"
    assert (tmp_path / "latest").read_text() == "global_step7\n"
    assert not list(tmp_path.glob("tmp-*"))
    fresh = trained(seed=5)
    optimizer = build_optimizer("adamw", list(fresh.items()), lr=0.1)
    loaded = checkpoint_read.load(folder, {"": Part(fresh, optimizer)})
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
    monkeypatch.setattr(
        dist, "gather_text", lambda told: [other_stage if told.startswith("{") else told, told] if told else ["", ""]
    )
    half = {name: nn.Parameter(torch.zeros(3, 2)) for name in "cd"}
    optimizer = build_optimizer("adamw", list(half.items()), lr=0.1)
    checkpoint_read.load(folder, {"": Part(half, optimizer)})
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


def test_damage_in_a_file_that_no_rank_reads_is_told_and_does_no_harm(tmp_path, caplog):
    folder = save(tmp_path)
    with (folder / "optimizer_00.pt").open("r+b") as file:
        file.seek(100)
        file.write(b"damaged")
    assert checkpoint_read.verify(folder) == [
        f"{folder / 'optimizer_00.pt'} is damaged: its content is not what was written"
    ]
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "hash_file", lambda path: read.append(path.name) or hash_file(path))
        patch.setattr(checkpoint_read, "Beside", lambda action, _: action())
        checkpoint_read.load(folder, {"": Part(trained(), None)})  # --reset_optimizer
    assert read == ["state.json", "weights_00.safetensors", "optimizer_00.pt"]
    assert "optimizer_00.pt is damaged: its content is not what was written; this start does not need it" in caplog.text
    parameters = trained()
    with pytest.raises(CheckpointError, match=r"optimizer_00.pt is damaged"):
        checkpoint_read.load(folder, {"": Part(parameters, optimizer_of(parameters))})


def test_changed_content_of_the_same_size_is_found_at_load(tmp_path):
    folder = save(tmp_path)
    data = bytearray((folder / "weights_00.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights_00.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights_00.safetensors is damaged"):
        checkpoint_read.load(folder, {"": Part(trained(), None)})


def test_other_tensors_than_were_saved(tmp_path):
    folder = save(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing, first e; rank, exclude_modules"):
        checkpoint_read.load(folder, {"": Part(trained("abcde"), None)})
    with pytest.raises(CheckpointError, match=r"1 missing, first e, 2 not trained now, first c; rank, exclude_modules"):
        checkpoint_read.load(folder, {"": Part(trained("abe"), None)})
    wrong = {**trained(), "a": nn.Parameter(torch.zeros(4, 2))}
    with pytest.raises(CheckpointError, match=r"a is \[3, 2\], this run's is \[4, 2\]"):
        checkpoint_read.load(folder, {"": Part(wrong, None)})


def test_a_dora_does_not_go_on_as_a_lora(tmp_path):
    """Its matrices have the same names, so it would, without its magnitudes."""
    lora = ["to_q.lora_A.default.weight", "to_q.lora_B.default.weight"]
    folder = save(tmp_path, parameters=trained([*lora, "to_q.lora_magnitude_vector.default.weight"]))
    with pytest.raises(CheckpointError, match=r"1 not trained now, first to_q\.lora_magnitude.*the kind of adapter"):
        checkpoint_read.load(folder, {"": Part(trained(lora), None)})


def test_changes_are_told_and_nothing_else():
    """Over JSON, which has no tuples; what an older version did not write is not known to have changed."""
    saved = {"alpha": 8.0, "batch": ((512, 4), (1024, 1)), "fuse_adapters": [["a", 1.0, ""]], "weight": ["1", "0.5"]}
    saved = json.loads(json.dumps(saved))
    now = {"alpha": 4.0, "batch": ((512, 4), (1024, 1)), "fuse_adapters": [], "new": 1, "weight": ["1", "3"]}
    told = ["alpha 8.0 -> 4.0", "fuse_adapters [['a', 1.0, '']] -> []", "weight [1, 0.5] -> [1, 3]"]
    assert checkpoint.course_changes(saved, now) == told


def test_a_damaged_state_is_told_before_anything_slow_with_what_else_there_is(tmp_path):
    """Its course is read at the start, long before the tensors are."""
    save(tmp_path, 3)
    folder = save(tmp_path, 5)
    content = bytearray((folder / "state.json").read_bytes())
    for place, byte in ((0, 0x20), (5, 0xFF)):
        (folder / "state.json").write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"state.json is damaged: .*; name another one .*/global_step3$"):
            checkpoint.read_course(folder)
    (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no global_step5 that is complete"):
        checkpoint.read_course(folder)
    assert checkpoint.read_course(tmp_path / "global_step3") == {"order": "x"}


@pytest.mark.parametrize("save_number", ['"many"', "null", "1e999", "[1]"])
def test_a_manifest_of_nonsense_is_passed_over(tmp_path, save_number):
    older, newer = save(tmp_path, 3), save(tmp_path, 5)
    manifest = newer / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"save": 2', f'"save": {save_number}'))
    (tmp_path / "latest").write_bytes(b"\x80\xff")
    assert checkpoint.find(tmp_path) == older


def test_a_run_that_may_be_at_work_is_left_alone(tmp_path):
    """--replay reads a checkpoint of it."""
    folder = save(tmp_path, 5)
    (tmp_path / "tmp-global_step6").mkdir()
    checkpoint_read.load(folder, {"": Part(trained(), None)}, is_ours=False)
    assert (tmp_path / "tmp-global_step6").exists()


def test_old_ones_are_deleted_once_a_newer_one_is_whole(tmp_path):
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step10", "global_step11", "latest"]


def test_leftovers_of_a_crash_are_cleared(tmp_path):
    (tmp_path / "tmp-global_step3").mkdir()
    (tmp_path / "tmp-global_step3" / "weights_00.safetensors").write_bytes(b"half")
    save(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "latest"]


def test_a_start_says_what_it_passes_over_and_clears_it(tmp_path, caplog):
    folder = save(tmp_path, 5)
    for name in ("tmp-global_step6", "tmp-old-global_step4"):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step7").mkdir()
    with caplog.at_level(logging.INFO):
        assert checkpoint.find(tmp_path) == folder
        checkpoint_read.load(folder, {"": Part(trained(), None)})
    assert "global_step7 is not complete, and passed over" in caplog.text
    assert "removed what a save that was cut short had left: tmp-global_step6, tmp-old-global_step4" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["global_step5", "global_step7", "latest"]


def test_a_save_that_lacks_only_its_last_rename_is_taken(tmp_path):
    save(tmp_path, 5)
    newer = save(tmp_path, 6)
    os.replace(newer, tmp_path / "tmp-global_step6")
    (tmp_path / "latest").write_text("global_step5\n")
    assert checkpoint.find(tmp_path) == newer
    (newer / "state.json").unlink()
    os.replace(newer, tmp_path / "tmp-global_step6")
    assert checkpoint.find(tmp_path).name == "global_step5", "what is not whole stays where it is"


def test_the_newest_is_the_last_save_whatever_its_step(tmp_path):
    """Killed between the rename and the pointer, or gone back to an earlier step: the saves are counted."""
    save(tmp_path, 12)
    (tmp_path / "latest").write_text("global_step12\n")
    later = save(tmp_path, 8)
    (tmp_path / "latest").write_text("global_step12\n")
    assert checkpoint.find(tmp_path) == later
    assert checkpoint.save_of(checkpoint.manifest_of(later)) == 2


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
        checkpoint_read.load(folder, {"": Part(parameters, optimizer)})


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
