"""What is remembered of a file counts for no other bytes than those that were looked at."""

import os

import pytest

from utils.data.stat_index import StatIndex


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "clip.bmp"
    path.write_bytes(b"one")
    return path


def remembered(file, value):
    index = StatIndex(file.parent / "index.jsonl")
    assert index.get(file) is None
    index.put(file, value)
    assert index.get(file) == value
    return StatIndex(file.parent / "index.jsonl")


def test_of_other_bytes_under_the_same_time_of_modification_nothing_is_known(file):
    told = file.stat()
    index = remembered(file, "one")
    file.write_bytes(b"two")
    os.utime(file, ns=(told.st_atime_ns, told.st_mtime_ns))  # as unpacking an archive does
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (told.st_size, told.st_mtime_ns)
    assert index.get(file) is None


def test_a_file_that_changes_while_it_is_looked_at_is_looked_at_again(file):
    index = StatIndex(file.parent / "index.jsonl")
    assert index.get(file) is None
    content = file.read_bytes()
    file.write_bytes(b"the whole of it")  # a copy that was under way
    index.put(file, content.decode())
    assert index.get(file) is None


def test_what_an_earlier_release_remembered_is_looked_at_anew(file):
    told = file.stat()
    line = f'["{file}",[{told.st_size},{told.st_mtime_ns},{told.st_ino}],"one"]'
    (file.parent / "index.jsonl").write_text(line)
    assert StatIndex(file.parent / "index.jsonl").get(file) is None
