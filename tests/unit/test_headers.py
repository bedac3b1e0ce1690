"""Headers that lie, and files that are something else: refused from the header alone, with the file's name."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from models.headers import ForeignFileError, load_pth, open_header
from models.weights import WeightReader

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(file, header, data=24, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    file.write_bytes(size.to_bytes(8, "little") + content + bytes(data))
    return file


def test_a_header_as_the_library_writes_it(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.zeros(()),
        "c": torch.zeros(0, 4),
        "d": torch.zeros(5, dtype=torch.float8_e4m3fn),
        "e": torch.zeros(7, dtype=torch.uint8),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"rank": "4"})
    header = open_header(tmp_path / "x.safetensors")
    assert header.metadata == {"rank": "4"}
    assert {name: tuple(info) for name, info in header.tensors.items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
    }


def test_formats_of_less_than_a_byte_are_known_and_have_no_dtype(tmp_path):
    header = {"a": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    assert open_header(write(tmp_path / "x", header, data=4)).tensors["a"] == ((2, 4), None)


def two(start, end):
    return {"a": GOOD, "b": {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": GOOD}, 23, r"truncated, \d+ of \d+ bytes"),
        ({"a": GOOD}, 25, "damaged, 1 bytes after its last tensor"),
        (two(20, 30), 30, r"b overlaps the tensor before it, bytes 20 to 30"),
        (two(0, 24), 24, "overlaps the tensor before it"),
        (two(25, 30), 30, "b leaves a gap before it"),
        ({"a": {**GOOD, "shape": [2, 4]}}, 24, r"a: shape \[2, 4\] of F32 is not 24 bytes"),
        ({"a": {**GOOD, "shape": [1 << 40, 1 << 40]}}, 24, "is not 24 bytes"),
        ({"a": {**GOOD, "shape": [-2, -3]}}, 24, r"shape \[-2, -3\] is none"),
        ({"a": {**GOOD, "shape": [2.0, 3]}}, 24, "is none"),
        ({"a": {**GOOD, "shape": [True, 6]}}, 24, "is none"),
        ({"a": {**GOOD, "shape": "23"}}, 24, "is none"),
        ({"a": {**GOOD, "shape": [1] * 65}}, 24, "is none"),
        ({"a": {**GOOD, "data_offsets": [24, 0]}}, 24, r"data_offsets \[24, 0\] are no range"),
        ({"a": {**GOOD, "data_offsets": [0]}}, 24, "are no range"),
        ({"a": {**GOOD, "data_offsets": [0, 1 << 70]}}, 24, "are no range"),
        ({"a": {**GOOD, "dtype": "F31"}}, 24, "dtype F31 is unknown"),
        ({"a": {"dtype": "F32"}}, 24, "shape None is none"),
        ({"a": [1, 2]}, 24, "a: no description"),
        ({"a\0b": GOOD}, 24, r"a tensor is named 'a\\x00b'"),
        ({"a" * 5000: GOOD}, 24, "a tensor is named 'aaa"),
        ({"a": GOOD, "__metadata__": {"x": 1}}, 24, "__metadata__ is not a table of strings"),
        ({"a": GOOD, "__metadata__": ["x"]}, 24, "__metadata__ is not a table of strings"),
        ([GOOD], 24, "no table of tensors"),
        (b'{"a": 1, "a": 2}', 24, "a key stands in it twice"),
        (b"[" * 100_000, 24, "damaged safetensors header"),
        (b"\xff\xfe{}", 24, "damaged safetensors header"),
    ],
)  # fmt: skip
def test_headers_that_lie(tmp_path, header, data, message):
    file = write(tmp_path / "bad.safetensors", header, data)
    started = time.monotonic()
    with pytest.raises(ValueError, match=message) as error:
        open_header(file)
    assert str(error.value).startswith(f"{file}: ") and len(str(error.value)) < 400
    assert time.monotonic() - started < 1
    assert "bad.safetensors" in WeightReader([file]).broken[0]


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_lengths_that_lie(tmp_path, length):
    with pytest.raises(ValueError, match=r"bad: truncated, or no safetensors file \(\d+ bytes\)"):
        open_header(write(tmp_path / "bad", {"a": GOOD}, length=length))


@pytest.mark.parametrize("size", [0, 3, 8])
def test_files_too_short_for_a_header(tmp_path, size):
    (tmp_path / "short").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=r"short: truncated, or no safetensors file"):
        open_header(tmp_path / "short")


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"GGUF\x03\0\0\0", "this is a GGUF file, whatever its name"),
        (b"<!DOCTYPE html><html>", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs's note of a file"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_other_kinds_of_file_are_told_by_how_they_begin(tmp_path, suffix, start, told):
    file = tmp_path / f"wan{suffix}"
    file.write_bytes(start + bytes(200))
    with pytest.raises(ForeignFileError) as error:
        WeightReader([file], what="transformer")  # to download it again would not help, so it is no broken file
    assert str(error.value).startswith(f"transformer {file}: ") and told in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pth_file_under_another_name(tmp_path, zipped):
    torch.save({"a": torch.zeros(1)}, tmp_path / "wan.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ForeignFileError, match=r"wan\.safetensors: this is a file of torch\.save.*rename it"):
        open_header(tmp_path / "wan.safetensors")
    (tmp_path / "wan.safetensors").rename(tmp_path / "wan.pth")
    assert load_pth(tmp_path / "wan.pth").keys() == {"a"}


@pytest.mark.parametrize("length", [640, 640 + 2**16])
def test_a_header_whose_length_reads_like_a_pickle(tmp_path, length):
    """b"\x80\x02" begins a pickle, and a header of 640 bytes."""
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"note": ""}}
    header["__metadata__"]["note"] = "-" * (length - len(json.dumps(header)))
    file = tmp_path / "a.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + json.dumps(header).encode() + bytes(4))
    assert file.read_bytes().startswith(b"\x80\x02") and open_header(file).tensors["x"].shape == (1,)


def test_a_safetensors_file_under_another_name(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "wan.pth")
    with pytest.raises(ForeignFileError, match=r"wan\.pth: this is a safetensors file; rename it"):
        load_pth(tmp_path / "wan.pth")
