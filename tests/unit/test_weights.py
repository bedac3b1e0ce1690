import json
import re

import pytest
import torch
from safetensors.torch import save_file

from models.weights import KeyMap, WeightReader, load_pth, read_header, weight_files

NAMES = KeyMap({"layer.{}": "blocks.{}.linear"})
TENSORS = {f"layer.{i}.weight": torch.arange(6.0).view(2, 3) + i for i in range(6)}
EXPECTED = {f"blocks.{i}.linear.weight": (2, 3) for i in range(6)}


def write_shards(folder, count=3, index=True):
    names, files, weight_map = list(TENSORS), [], {}
    for number in range(count):
        file = folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number::count]
        save_file({name: TENSORS[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def reader(folder):
    return WeightReader(weight_files(folder, "model"), NAMES, what="transformer")


def test_reads_shards_under_skeleton_names(tmp_path):
    write_shards(tmp_path)
    weights = reader(tmp_path)
    weights.check(EXPECTED)
    assert weights.names() == set(EXPECTED)
    for i in range(6):
        assert torch.equal(weights.read(f"blocks.{i}.linear.weight"), TENSORS[f"layer.{i}.weight"])


def test_prefixes_of_single_files_are_stripped(tmp_path):
    for prefix in ("model.diffusion_model.", "diffusion_model."):
        file = tmp_path / "model.safetensors"
        save_file({prefix + name: tensor for name, tensor in TENSORS.items()}, file)
        WeightReader([file], NAMES).check(EXPECTED)


def test_reads_pth_without_running_code(tmp_path):
    torch.save(TENSORS, tmp_path / "model.pth")
    weights = WeightReader([tmp_path / "model.pth"], NAMES)
    weights.check(EXPECTED)
    assert torch.equal(weights.read("blocks.5.linear.weight"), TENSORS["layer.5.weight"])


class Evil:
    def __reduce__(self):
        return (print, ("pwned",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"layer": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: truncated, or not a file of plain tensors"):
        load_pth(tmp_path / "evil.pth")
    assert "pwned" not in capsys.readouterr().out


def test_old_pth_that_cannot_be_mapped(tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_pth(tmp_path / "old.pth").keys() == TENSORS.keys()


@pytest.mark.parametrize("index", [True, False])
def test_an_absent_shard_is_named(tmp_path, index):
    files = write_shards(tmp_path, index=index)
    files[1].unlink()
    with pytest.raises(ValueError) as error:
        reader(tmp_path).check(EXPECTED)
    assert str(error.value) == (
        f"transformer {tmp_path}: shard 2 of 3, model-00002-of-00003.safetensors: it does not exist; "
        "2 tensors missing, first layer.1.weight. Download the named files again."
    )


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.0])
def test_a_truncated_shard_is_named_before_anything_is_read(tmp_path, keep):
    files = write_shards(tmp_path)
    data = files[2].read_bytes()
    files[2].write_bytes(data[: int(len(data) * keep) - (keep == 1)])  # one byte short counts too
    cause = rf"shard 3 of 3, model-00003\S+: truncated, .*{len(files[2].read_bytes())} .*bytes"
    with pytest.raises(ValueError, match=rf"{tmp_path}: {cause}.*; 2 tensors missing, first layer\.2\.weight\. Down"):
        reader(tmp_path).check(EXPECTED)


def test_a_truncated_pth_is_named(tmp_path):
    torch.save(TENSORS, tmp_path / "model.pth")
    data = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"file, model\.pth: truncated, or not .*; 6 tensors missing"):
        WeightReader([tmp_path / "model.pth"], NAMES).check(EXPECTED)


def check_message(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        WeightReader([tmp_path / "model.safetensors"], NAMES, what="transformer").check(EXPECTED)
    return str(error.value)


def test_all_faults_in_one_message(tmp_path):
    tensors = dict(TENSORS, **{"layer.3.weight": torch.zeros(3, 3), "other.weight": torch.zeros(1)})
    del tensors["layer.0.weight"]
    message = check_message(tmp_path, tensors)
    assert "1 tensor missing, first layer.0.weight" in message
    assert "1 tensor unexpected, first other.weight" in message
    assert "1 tensor mis-shaped, first layer.3.weight is [3, 3] and should be [2, 3]" in message
    assert str(tmp_path / "model.safetensors") in message


def test_the_hint_is_what_the_caller_makes_of_names_and_metadata(tmp_path):
    def identify(shapes, metadata):
        return f"this looks like {metadata['kind']} of {shapes['model.diffusion_model.a.weight']}"

    file = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.a.weight": torch.zeros(4, 1)}, file, {"kind": "a stone"})
    with pytest.raises(ValueError, match=r"Hint: this looks like a stone of \(4, 1\)\.$"):
        WeightReader([file], NAMES, identify=identify).check(EXPECTED)
    with pytest.raises(ValueError, match=r"Hint: the config\.json beside the files"):
        WeightReader([file], NAMES, identify=lambda shapes, metadata: None).check(EXPECTED)


def test_dtypes_are_those_that_read_gives(tmp_path):
    tensors = {"layer.0.weight": torch.zeros(2, 3).bfloat16(), "x": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        weights = WeightReader([tmp_path / name], NAMES)
        assert weights.dtypes() == {"blocks.0.linear.weight": torch.bfloat16, "x": torch.uint8}
        assert {name: weights.read(name).dtype for name in weights.names()} == weights.dtypes()


def test_hint_for_a_part_of_a_model(tmp_path):
    assert "a part of the model only" in check_message(tmp_path, {"layer.0.weight": torch.zeros(2, 3)})


def test_a_tensor_stored_twice(tmp_path):
    save_file(TENSORS, tmp_path / "model-a.safetensors")
    save_file(TENSORS, tmp_path / "model-b.safetensors")
    with pytest.raises(ValueError, match=r"stored twice, as layer\.0\.weight in .*model-a.*model-b"):
        reader(tmp_path)


def test_missing_names_are_spelt_as_the_files_spell_them(tmp_path):
    save_file({"blocks.0.linear.weight": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"5 tensors missing, first blocks\.1\.linear\.weight"):
        reader(tmp_path).check(EXPECTED)


def test_a_damaged_index_is_named(tmp_path):
    write_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(index))):
        weight_files(tmp_path, "model")


def test_text_with_a_safetensors_name(tmp_path):
    (tmp_path / "x.safetensors").write_text("404: the file is not there any more")
    with pytest.raises(ValueError, match="no safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_header_gives_shapes_and_metadata(tmp_path):
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(())}, tmp_path / "x", {"rank": "4"})
    assert read_header(tmp_path / "x") == ({"a": (2, 3), "b": ()}, {"rank": "4"})
