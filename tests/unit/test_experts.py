"""What is decided about experts without training any: paths, turns, whose batches, what is told and kept."""

import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.helpers.toy import ToyFamily
from tests.helpers.toy_experts import RANGES, SHARES, ToyExpert, ToyExperts
from utils.data.dataset import CachedDataset
from utils.data.loader import StepLoader
from utils.data.plan import BatchShape, EpochPlan
from utils.data.records import Bucket, Entry
from utils.monitor.console import StageRow, StepReport, live_text, stage_table
from utils.train import checkpoint_read, checkpoint_write, experts
from utils.train.build import AdapterSettings, EngineSettings, OptimizerSettings
from utils.train.checkpoint import CheckpointError, Part
from utils.train.evaluate import EvalResult, Evaluation
from utils.train.experts import check_experts, turns
from utils.train.optimizers import build_optimizer
from utils.train.state import TrainState


def settings(existing: object = None) -> EngineSettings:
    adapter = AdapterSettings(2, 2, init_from_existing=existing)
    return EngineSettings(1, 1, OptimizerSettings("sgd", 0.1), adapter=adapter)


class TestStartingAdapters:
    def test_an_unknown_expert_is_named(self):
        with pytest.raises(ValueError, match=r"init_from_existing names middle; its keys must be among early, late"):
            check_experts(ToyExperts(), settings({"middle": Path("x"), "late": Path("y")}))
        with pytest.raises(ValueError, match=r"init_from_existing names late; this run trains one model: give it one"):
            check_experts(ToyFamily(), settings({"late": Path("y")}))

    def test_each_expert_reads_its_own(self, tmp_path):
        """One may be left out; a folder that another run of both wrote serves both."""
        read = []

        class Expert(ToyExpert):
            def load_adapter(self, path, weights=None):
                read.append((self.name, path))
                raise ValueError("enough")

        class Family(ToyExperts):
            def experts(self):
                return {name: Expert(name) for name in SHARES}

        with pytest.raises(ValueError, match="enough"):
            check_experts(Family(), settings({"late": tmp_path / "a"}))
        with pytest.raises(ValueError, match="enough"):
            check_experts(Family(), settings(tmp_path))
        assert read == [("late", tmp_path / "a"), ("early", tmp_path)]

    def test_one_file_is_no_start_for_two(self, tmp_path):
        """It would be the wrong expert's for one of them, and its keys fit both."""
        file = tmp_path / "adapter_model_high_noise.safetensors"
        file.touch()
        with pytest.raises(ValueError, match=r"is one file.*give each its own, \{early = '...', late = '...'\}"):
            check_experts(ToyExperts(), settings(file))


class TestOneOnTheDevice:
    """The order of what is done, as there may be room for one."""

    @pytest.fixture
    def done(self, monkeypatch):
        done = []

        def build(family, *_):
            done.append(f"read {family.name}")
            park, wake = (partial(done.append, f"{what} {family.name}") for what in ("park", "wake"))
            module = SimpleNamespace(parking=SimpleNamespace(park=park, wake=wake))
            return SimpleNamespace(engine=SimpleNamespace(module=module))

        monkeypatch.setattr(experts, "build_engine", build)
        return done

    def test_one_is_parked_before_another_comes(self, done):
        built = experts.build_experts(ToyExperts(), settings(), torch.device("cpu"))
        assert done == ["read early", "park early", "read late"]
        done.clear()
        assert built.awake_first == ["late", "early"]
        taken = [built.at(step).family.name for step in range(4)]
        assert taken == ["early", "late", "early", "early"]
        turns_taken = ["park late", "wake early", "park early", "wake late", "park late", "wake early"]
        assert done == turns_taken, "nothing moves while a turn lasts"
        assert built.awake_first == ["early", "late"]

    def test_one_model_never_waits(self, done):
        class Alone(ToyExpert):
            def experts(self):
                return {"": self}

        built = experts.build_experts(Alone("only"), settings(), torch.device("cpu"))
        assert [built.at(step).family.name for step in range(3)] == ["only"] * 3
        assert built.awake_first == [""]
        assert done == ["read only"]


def test_turns_are_told_and_only_where_there_are_any():
    assert turns(ToyFamily()) == {}
    told = turns(ToyExperts(ToyExperts.Config(switch_every=3)))
    assert told == {"turns of the experts": "3 early, 3 late, 9 early, 3 late, 9 early, 3 late, ..."}


class Memory:
    def read(self, kind, key):
        return {"latents": torch.zeros(16, 1, 2, 2)} if kind == "latents" else {"text": torch.zeros(2, 3)}


@pytest.mark.parametrize("start", [0, 4])
def test_batches_are_made_by_the_expert_whose_turn_the_step_is(start):
    """Also those that are read ahead, and after a start in the middle."""
    family = ToyExperts(ToyExperts.Config(switch_every=2))
    bucket = Bucket(16, 16, 1)
    entries = [Entry(f"e{i}", f"e{i}", bucket, 0, ("latents",), (str(i),), (str(i),)) for i in range(4)]
    whole = CachedDataset(family, Memory(), entries, "", seed=0)
    of = {name: whole.made_by(expert) for name, expert in family.experts().items()}
    plan = EpochPlan(entries, [1.0], lambda _: BatchShape(2, 2, 1), seed=0)
    loader = StepLoader(lambda step: of[family.expert_at(step)], plan, 0, start, ahead=5)
    seen = []
    try:
        for step in range(start, 12):
            times = torch.cat([batch.inputs[1] for batch in loader.next_step()])
            low, high = RANGES[family.expert_at(step)]
            assert ((times > low) & (times < high)).all(), step
            seen.append(family.expert_at(step))
    finally:
        loader.close()
    assert set(seen) == set(SHARES)


class TestEvaluation:
    def results(self, **losses):
        return {name: EvalResult(loss, {0.5: loss}, 3, {}, loss) for name, loss in losses.items()}

    def test_the_mean_is_over_the_whole_range_of_timesteps(self):
        found = Evaluation(self.results(early=1.0, late=5.0), SHARES)
        assert found.scalars("held") == {
            "held/loss": 0.75 * 1.0 + 0.25 * 5.0,
            "held_early/loss": 1.0,
            "held_early/loss_quantile_0.50": 1.0,
            "held_late/loss": 5.0,
            "held_late/loss_quantile_0.50": 5.0,
        }

    def test_one_model_has_the_tags_it_always_had(self):
        found = Evaluation(self.results(**{"": 0.1}), ToyFamily().expert_shares())
        assert found.scalars("held") == {"held/loss": 0.1, "held/loss_quantile_0.50": 0.1}


class TestCheckpoint:
    """Two experts train tensors of the same names."""

    def part(self, value: float) -> Part:
        trained = {"a": nn.Parameter(torch.full((2, 2), value))}
        optimizer = build_optimizer("adamw", list(trained.items()), lr=0.1)
        trained["a"].grad = torch.full((2, 2), value)
        optimizer.step()
        return Part(trained, optimizer)

    def save(self, folder: Path, parts: dict[str, Part]) -> Path:
        rest = {"stage": 0, "data_rank": 0, "keep_last": None, "course": {}, "meters": {}}
        return checkpoint_write.save(folder, TrainState(3, 6), epochs_done=0, parts=parts, **rest)

    def test_each_gets_its_own_back(self, tmp_path):
        saved, fresh = ({"early": self.part(a), "late": self.part(b)} for a, b in ((1.0, 2.0), (0.0, 0.0)))
        folder = self.save(tmp_path, saved)
        names = sorted(path.name for path in folder.iterdir())
        assert names == [
            "manifest.json",
            *(f"optimizer_{name}_00.pt" for name in SHARES),
            "state.json",
            *(f"weights_{name}_00.safetensors" for name in SHARES),
        ]
        checkpoint_read.load(folder, fresh)
        for name in SHARES:
            assert torch.equal(fresh[name].trained["a"], saved[name].trained["a"])
            states = [next(iter(part[name].optimizer.state.values())) for part in (fresh, saved)]
            assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
        assert not torch.equal(fresh["early"].trained["a"], fresh["late"].trained["a"])

    def test_other_experts_than_were_saved(self, tmp_path):
        one, both = {"": self.part(1.0)}, {"early": self.part(1.0), "late": self.part(2.0)}
        (tmp_path / "both").mkdir()
        (tmp_path / "one").mkdir()
        with pytest.raises(CheckpointError, match=r"holds the experts early, late, and this run trains one model"):
            checkpoint_read.load(self.save(tmp_path / "both", both), one)
        with pytest.raises(CheckpointError, match=r"holds one model, and this run trains the experts early, late"):
            checkpoint_read.load(self.save(tmp_path / "one", one), both)

    def test_one_model_is_written_as_it_was_before_there_were_experts(self, tmp_path):
        folder = self.save(tmp_path, {"": self.part(1.0)})
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["format"] == 1
        assert set(manifest["files"]) == {"weights_00.safetensors", "optimizer_00.pt", "state.json"}
        assert set(manifest["files"]["weights_00.safetensors"]) == {"bytes", "blake2b", "tensors"}


class TestTold:
    def shown(self, rows: list[StageRow]) -> str:
        console = Console(width=140, record=True, file=io.StringIO())
        console.print(stage_table(rows))
        return console.export_text()

    def test_each_expert_has_a_row_that_says_what_waits_on_the_host(self):
        rows = [StageRow(0, 0, 9, 10, 2, 3 << 30, (0,), name, 2 << 30) for name in SHARES]
        text = self.shown(rows)
        assert "host memory" in text
        for name in SHARES:
            (line,) = [line for line in text.splitlines() if name in line]
            assert "3 GiB" in line
            assert "2 GiB" in line
        alone = self.shown([StageRow(0, 0, 9, 10, 2, 3 << 30, (0,))])
        assert "expert" not in alone
        assert "host" not in alone

    def test_the_line_says_whose_turn_it_was(self):
        report = StepReport(3, 8, 1, 0.5, 1e-4, 1.0, 4.0, expert="late")
        assert "  late  " in live_text(report)
        assert "late" not in live_text(StepReport(3, 8, 1, 0.5, 1e-4, 1.0, 4.0))
