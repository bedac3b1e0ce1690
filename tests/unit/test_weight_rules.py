"""What clips count in the loss, and sets that hold the adapter: which keys go together, in their exact words."""

from pathlib import Path

import pytest

from tests.helpers.configs import DATASET, RUN, SPEC, folder, load, top  # noqa: F401 (a fixture)
from utils.config.rules import advice, check_paths, check_rules

pytestmark = pytest.mark.usefixtures("folder")

HELD = DATASET + "[[directory]]\npath = 'kept'\nis_regularization = true\nweight = 0.5\n"


def test_a_regularization_set_holds_an_adapter_beside_clips_to_learn_from():
    head, _, rest = RUN.partition("[adapter]")
    whole = head + "[optimizer]" + rest.partition("[optimizer]")[2]
    assert check_rules(load(dataset=HELD), 1, SPEC) == []
    assert check_rules(load(run=whole, dataset=HELD), 1, SPEC) == [
        "dataset.toml:8: directory[1].is_regularization = true holds an adapter to what the model predicts without it, "
        "and there is no [adapter]; add [adapter], or remove the key"
    ]
    assert check_rules(load(dataset=DATASET + "is_regularization = true\n"), 1, SPEC) == [
        "dataset.toml:6: directory[0].is_regularization = true, as on every [[directory]], leaves no clips to learn "
        "from; add a [[directory]] of those, or remove the key"
    ]


def test_weights_and_regularization_mean_nothing_in_an_eval_dataset():
    run = top("eval_datasets = ['eval.toml']", "eval_every_n_epochs = 1")
    assert advice(load(run=run, eval=HELD), SPEC) == [
        f"eval.toml:{line}: directory[1].{key} has no effect in an eval dataset: held-out clips are all measured alike"
        for line, key in ((9, "weight = 0.5"), (8, "is_regularization = true"))
    ]
    assert check_rules(load(run=run, eval=HELD), 1, SPEC) == []


def test_masks_named_where_none_can_lie():
    Path("m.png").touch()
    for name in ("clips", "masks"):
        Path(name).mkdir(exist_ok=True)

    def said(*lines):
        return [told for told in check_paths(load(dataset=DATASET + "\n".join(lines)), weights=False) if "mask" in told]

    assert said("mask_path = 'masks'", "default_mask_file = 'm.png'") == []
    assert said("mask_path = 'm.png'", "default_mask_file = 'masks'") == [
        "dataset.toml:6: directory[0].mask_path = 'm.png' is a file; name the folder that holds the masks, or make it "
        "default_mask_file, the mask of all",
        "dataset.toml:7: directory[0].default_mask_file = 'masks' is a folder; name an image or a video, or make it "
        "mask_path",
    ]
    assert said("mask_path = 'clips'") == [
        "dataset.toml:6: directory[0].mask_path = 'clips' is the folder of the clips; put the masks into one of their "
        "own"
    ]
