"""The benchmark of large datasets still runs, on a small one."""

import json

from tests.bench import scan


def test_a_second_start_goes_through_all_stages(tmp_path, capsys):
    scan.make_dataset(tmp_path, "whole", 60, 2)
    for role in scan.ROLES:
        scan.play(role, tmp_path, "whole", None)
        rows = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert rows[-1][0] == "first micro-batch" and all(seconds >= 0 and peak > 0 for _, seconds, _, peak in rows)
    scan.tell("title", {"whole": [rows], "half": [rows]}, 30)
    assert "per 100k" in capsys.readouterr().out


def test_entries_without_files(capsys):
    scan.many_entries(2000)
    assert "resume in epoch 6" in capsys.readouterr().out
