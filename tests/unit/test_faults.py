"""Why a run ended, as files."""

import os

from utils.train.faults import Fault, clear_faults, read_faults, write_fault


def test_the_oldest_comes_first_and_the_first_to_write_wins(tmp_path):
    write_fault(tmp_path, Fault(2, "the cause", "in step 2"))
    os.utime(tmp_path / "errors" / "rank_2.json", (1, 1))
    write_fault(tmp_path, Fault(0, "what came of it"))
    write_fault(tmp_path, Fault(2, "rank 2 is gone", told=False))
    assert [(fault.rank, fault.text) for fault in read_faults(tmp_path)] == [(2, "the cause"), (0, "what came of it")]
    assert sorted(path.name for path in (tmp_path / "errors").iterdir()) == ["rank_0.json", "rank_2.json"]
    clear_faults(tmp_path)
    assert read_faults(tmp_path) == []


def test_damaged_files_and_absent_folders_are_no_error(tmp_path):
    assert read_faults(tmp_path) == []
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "rank_0.json").write_text("{")
    write_fault(tmp_path, Fault(1, "known"))
    assert [fault.text for fault in read_faults(tmp_path)] == ["known"]
    write_fault(tmp_path / "nowhere", Fault(1, "lost"))


def test_words():
    assert Fault(1, "lr is bad", "in step 2").words() == "rank 1 ended first, in step 2: lr is bad"
    assert Fault(1, "rank 1 is gone", "rank 0 missed it", told=False).words() == "rank 1 is gone\n  rank 0 missed it"
