"""Advice on sizes, which says what the buckets then are."""

import pytest

from tests.helpers.configs import DATASET, SPEC, folder, load  # noqa: F401 (a fixture)
from utils.config.rules import advice
from utils.data.buckets import bucket_table

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("asked", "multiple", "told"),
    [
        ("[[80, 48]]", 32, "[80, 48], and clips will be of 64x64 px"),
        ("[40]", 16, "40, and clips will be of 32x32 px"),
        ("[[832, 480], [720, 720]]", 32, None),  # 720 to 704 is the usual rounding
        ("[[1280, 24]]", 16, "[1280, 24], and clips will be of 1280x32 px"),
    ],
)
def test_sizes_that_rounding_changes_much_are_told(asked, multiple, told):
    loaded = load(dataset=DATASET.replace("[64]", asked, 1))
    spec = SPEC._replace(pixel_multiple=multiple)
    said = [line for line in advice(loaded, spec) if "resolutions" in line]
    mend = f": sides of this model are multiples of {multiple}; write sizes that are, to choose them yourself"
    assert said == ([f"dataset.toml:1: resolutions has {told}{mend}"] if told else [])
    if told:  # what is told is what is done
        [(_, sizes)] = bucket_table(loaded.dataset.directory[0], spec).areas
        assert f"{sizes[0][0]}x{sizes[0][1]} px" in told


def test_sizes_of_aspect_ratio_buckets_were_not_written_by_anybody():
    loaded = load(dataset="enable_ar_bucket = true\n" + DATASET.replace("[64]", "[[80, 48]]", 1))
    assert [line for line in advice(loaded, SPEC._replace(pixel_multiple=32)) if "resolutions" in line] == []
