"""What a resumed run takes from its checkpoint, and what it says of settings that changed since."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.configs import RUN, folder, load  # noqa: F401 (a fixture)
from utils.data.manifest import Group, Manifest
from utils.data.records import Bucket, Entry
from utils.monitor.meters import Meters
from utils.train import assemble, checkpoint, checkpoint_write
from utils.train.optimizers import build_optimizer
from utils.train.prepare import TRAIN, Prepared
from utils.train.state import TrainState

pytestmark = pytest.mark.usefixtures("folder")
FUSED = RUN.replace("[model]", "fuse_adapters = [{path = 'a', weight = 0.5}]\n[model]")


def config_of(text: str, alpha: float) -> object:
    return load(text.replace("rank = 8", f"rank = 8\nalpha = {alpha}"))


def resumed(
    tmp_path, caplog, before, now, reset_dataloader: bool, orders=({"order": "x"},) * 2, lengths=({}, {})
) -> list[str]:
    """The warnings of a run with the settings `now` that goes on from one with the settings `before`."""
    parameters = {"a": nn.Parameter(torch.zeros(2, 2))}
    optimizer = build_optimizer("sgd", list(parameters.items()), lr=0.1)
    saved = checkpoint_write.save(
        tmp_path,
        TrainState(4, 8),
        epochs_done=1,
        course=orders[0] | assemble.quiet_course(before) | lengths[0],
        meters=Meters().state_dict(),
        parts={"": checkpoint.Part(parameters, optimizer)},
        stage=0,
        data_rank=0,
        keep_last=None,
    )
    flags = SimpleNamespace(reset_optimizer=False, reset_dataloader=reset_dataloader)
    built = SimpleNamespace(trained=parameters, optimizer=optimizer)
    job = SimpleNamespace(flags=flags, loaded=now, resume=saved)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        state = assemble.resume(
            job,
            {"": SimpleNamespace(built=built)},
            orders[1] | assemble.quiet_course(now),
            Meters(),
            lambda state: lengths[1],
        ).state
    assert state == (TrainState(4, 8, 4, 1) if reset_dataloader else TrainState(4, 8))
    return [record.message for record in caplog.records]


@pytest.mark.parametrize("reset_dataloader", [False, True])
def test_weights_that_come_to_mean_something_else_are_told(tmp_path, caplog, reset_dataloader):
    """Another alpha, or another base, and what was trained makes another model; nothing else would show it."""
    before, now = config_of(FUSED, 8), config_of(RUN, 4)
    assert resumed(tmp_path, caplog, before, before, reset_dataloader) == []
    assert resumed(tmp_path, caplog, before, now, reset_dataloader) == [
        "changed since the checkpoint: adapter.alpha 8.0 -> 4.0",
        "changed since the checkpoint: fuse_adapters [['a', 0.5, '']] -> []",
    ]


@pytest.mark.parametrize("reset_dataloader", [False, True])
def test_other_timesteps_and_another_loss_are_told(tmp_path, caplog, reset_dataloader):
    """Nothing that the order hangs on, so nothing is refused; the curves would show it with no reason given."""
    now = config_of(RUN.replace("[model]", "pseudo_huber_c = 0.5\n[model]\nmin_t = 0.25\nsigmoid_scale = 1.5"), 8)
    assert resumed(tmp_path, caplog, config_of(RUN, 8), now, reset_dataloader) == [
        "changed since the checkpoint: pseudo_huber_c None -> 0.5",
        "changed since the checkpoint: model.sigmoid_scale 1.0 -> 1.5",
        "changed since the checkpoint: model.min_t 0.0 -> 0.25",
    ]


def test_another_learning_rate_is_told(tmp_path, caplog):
    """It is taken from the config, as are the rest of the optimizer's settings."""
    now = config_of(
        RUN.replace("[model]", "gradient_clipping = 0.5\nwarmup_steps = 7\n[model]").replace("1e-4", "5e-5"), 8
    )
    assert resumed(tmp_path, caplog, config_of(RUN, 8), now, False) == [
        "changed since the checkpoint: optimizer.lr 0.0001 -> 5e-05",
        "changed since the checkpoint: warmup_steps 0 -> 7",
        "changed since the checkpoint: gradient_clipping 1.0 -> 0.5",
    ]


def held_out(train: Manifest, far: Manifest) -> dict[str, str]:
    return assemble.held_out_course(Prepared(None, {TRAIN: train, "far": far}, None))


def test_another_adapter_another_noise_and_other_held_out_clips_are_told(tmp_path, caplog):
    now = config_of(RUN.replace("[model]", "eval_seed = 7\n[model]").replace("rank = 8", "rank = 8\ndropout = 0.5"), 8)
    held = [held_out(data(), data(*weights)) for weights in ((1.0,), (1.0, 1.0))]
    orders = [{"order": "x", **each} for each in held]
    told = resumed(tmp_path, caplog, config_of(RUN, 8), now, False, orders)
    incomparable = ": evaluations of before and of now cannot be compared"
    assert [line.removeprefix("changed since the checkpoint: ") for line in told if "far" not in line] == [
        "adapter.dropout 0.0 -> 0.5",
        f"eval_seed 42 -> 7{incomparable}",
    ]
    (line,) = [line for line in told if "far" in line]
    assert re.search(r": the clips of eval dataset far \w{6} -> \w{6}" + incomparable, line)
    assert held_out(data(1.0), data(1.0)) == held_out(data(1.0, 1.0), data(1.0)), (
        "of the training data it tells nothing"
    )


def test_another_length_is_told_where_the_learning_rate_hangs_on_it(tmp_path, caplog):
    plan = SimpleNamespace(first_step=lambda epoch: 4 * (epoch - 1))
    texts = {key: RUN.replace("[model]", f"lr_scheduler = '{key}'\n[model]") for key in ("constant", "cosine")}
    short, long = ({key: load(text.replace("epochs = 3", f"epochs = {n}", 1)).run for key, text in texts.items()}
                   for n in (3, 5))  # fmt: skip
    states = TrainState(4, 8), TrainState(4, 8, 4, 1)
    of = assemble.length_course
    assert [of(short["constant"], plan, state) for state in states] == [{}, {}]
    assert [of(short["cosine"], plan, state) for state in states] == [{"total steps": 12}] * 2
    lengths = [of(each["cosine"], plan, states[0]) for each in (short, long)]
    assert resumed(tmp_path, caplog, config_of(RUN, 8), config_of(RUN, 8), False, lengths=lengths) == [
        "changed since the checkpoint: total steps 12 -> 20: the learning rate, which goes down until then, is another "
        "one from here on"
    ]


def test_a_model_that_has_moved_and_one_that_older_versions_did_not_note_are_unchanged(tmp_path, caplog):
    Path("elsewhere").mkdir()
    moved = config_of(RUN.replace("'weights'", "'elsewhere'\ntransformer_path = 'elsewhere'"), 8)
    assert resumed(tmp_path, caplog, config_of(RUN, 8), moved, False) == []
    saved = {"alpha": 8.0}  # of a version that kept no [model]
    assert checkpoint.course_changes(saved, assemble.quiet_course(moved)) == []


def data(*weights: float, held: bool = False) -> Manifest:
    """Two directories, the clips of the second with `weights`."""
    groups = [Group(Path("a"), 1), Group(Path("b"), 1, 0.5, held)]
    entries = [Entry(f"s{i}", f"{i}.mp4", Bucket(64, 64, 1), 1, (), (), (), w) for i, w in enumerate(weights)]
    return Manifest([Entry("s", "a.mp4", Bucket(64, 64, 1), 0, (), (), ()), *entries], groups, [], {}, {}, "")


def test_what_clips_count_may_change_and_is_told(tmp_path, caplog):
    plain = {"weight": ["1", "0.5"], "regularization sets": [], "loss masks": "none"}
    course = assemble.data_course(data())
    assert re.fullmatch(r"\w{6}", course.pop("clips and captions")) and course == plain
    both = [assemble.data_course(each) for each in (data(0.5, 2.0), data(2.0, 0.5))]
    (_, one), (_, other) = (course["weight"] for course in both)
    assert one.startswith("0.5 to 2 (") and other.startswith("0.5 to 2 (") and one != other, "told apart"
    before, now = assemble.data_course(data(1.5, 1.5)), assemble.data_course(data(2.0, 2.0, held=True))
    config = config_of(RUN, 8)
    assert resumed(tmp_path, caplog, config, config, False, ({"order": "x"} | before, {"order": "x"} | now)) == [
        "changed since the checkpoint: weight [1, 1.5] -> [1, 2]",
        "changed since the checkpoint: regularization sets [] -> [directory[1]]",
    ]
    orders = {"order": "x", "seed": 1} | before, {"order": "y", "seed": 2} | now
    with pytest.raises(checkpoint.CheckpointError, match=r": seed 1 -> 2 changed, and with it the order"):
        resumed(tmp_path, caplog, config, config, False, orders)


def test_other_clips_are_told(tmp_path, caplog):
    """As many as before in each bucket, so the order cannot show it: flipped, say, or under another caption."""
    before, now = data(1.0, 1.0), data(1.0, 1.0)
    now.entries[2] = replace(now.entries[2], sample_id="mirrored")
    swapped = replace(before, entries=before.entries[::-1])
    config, orders = config_of(RUN, 8), [assemble.data_course(each) | {"order": "x"} for each in (before, now, swapped)]
    assert resumed(tmp_path, caplog, config, config, False, (orders[0], orders[0])) == []
    for other in orders[1:]:
        told = resumed(tmp_path, caplog, config, config, False, (orders[0], other))
        wanted = r"changed since the checkpoint: the clips or their captions are others \(\w{6} -> \w{6}\): a file, .*"
        assert re.fullmatch(wanted, told[0]) and "flip, crop or captions" in told[0], told


def test_other_masks_are_told(tmp_path, caplog):
    def masked(*keys: str) -> dict:
        manifest = data(1.0, 1.0)
        manifest.entries[1:] = [replace(e, mask_keys=(k,)) for e, k in zip(manifest.entries[1:], keys, strict=False)]
        return assemble.data_course(manifest) | {"order": "x"}

    config = config_of(RUN, 8)
    assert masked("a", "b") == masked("a", "b") and masked()["loss masks"] == "none"
    [told] = resumed(tmp_path, caplog, config, config, False, (masked("a", "b"), masked("a", "c")))
    assert re.fullmatch(
        r"changed since the checkpoint: loss masks 2 of 3 clips \(\w{6}\) -> 2 of 3 clips \(\w{6}\)", told
    )


def test_a_refused_order_is_not_blamed_on_what_does_not_decide_it(tmp_path, caplog):
    before, now = config_of(RUN, 8), config_of(RUN.replace("[model]", "[model]\nmin_t = 0.25"), 8)
    orders = {"order": "x", "seed": 1}, {"order": "y", "seed": 2}
    with pytest.raises(checkpoint.CheckpointError, match=r": seed 1 -> 2 changed, and with it the order"):
        resumed(tmp_path, caplog, before, now, False, orders)
