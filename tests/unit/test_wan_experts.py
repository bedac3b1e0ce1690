"""The experts of Wan2.2 A14B: which one, over which timesteps, and how two take turns."""

import json
import pickle
import shutil
from fractions import Fraction

import pytest
import torch

from models import flow_match
from models.base import Draw
from models.wan.config import WanModelConfig
from models.wan.experts import expert_of_step, high_noise_share
from models.wan.variants import T2V_A14B, VARIANTS
from tests.helpers.layouts import comfyui, diffusers_pair, official, official_pair, write_transformer
from tests.helpers.models import DATA, TRANSFORMER_FILE, WAN_T2V, wan_family

# shared design notes, semantics 2.2: boundary, sampling -> share of draws above the boundary by shift
SHIFTS = (1, 2, 3, 5, 8, 12)
SHARES = {
    (0.875, "uniform"): (0.125, 0.222, 0.300, 0.417, 0.533, 0.632),
    (0.875, "logit_normal"): (0.026, 0.105, 0.198, 0.368, 0.553, 0.705),
    (0.9, "uniform"): (0.100, 0.182, 0.250, 0.357, 0.471, 0.571),
    (0.9, "logit_normal"): (0.014, 0.066, 0.136, 0.278, 0.453, 0.613),
}


@pytest.fixture(scope="module")
def t2v(tmp_path_factory):
    """A folder with both experts of Wan2.2 T2V-A14B."""
    return official_pair(tmp_path_factory.mktemp("t2v") / "Wan2.2-T2V-A14B", "wan22_t2v_low")


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    return official_pair(tmp_path_factory.mktemp("i2v") / "Wan2.2-I2V-A14B", "wan22_i2v_low")


def refusal(folder=None, **settings):
    with pytest.raises(ValueError) as error:
        wan_family(folder, **settings)
    return str(error.value)


def wan_config(**settings):
    return WanModelConfig(ckpt_path="x", expert="both", **settings)


def timesteps(family, *quantiles):
    sample = {"latents": torch.zeros(16, 3, 4, 6), "text": torch.zeros(1, 32), "condition": torch.zeros(16, 3, 4, 6)}
    return family.micro_batch([sample] * len(quantiles), [Draw(q, 1) for q in quantiles]).inputs[1].tolist()


class TestWhichExpert:
    def test_a_folder_with_two_wants_a_choice(self, t2v):
        message = refusal(t2v)
        assert "high_noise_model (high noise) and low_noise_model (low noise)" in message
        assert message.endswith("Set expert = 'high', 'low' or 'both'")

    @pytest.mark.parametrize(
        ("settings", "suffix", "t_range"),
        [
            ({"expert": "high"}, "_high_noise", (0.875, 1)),
            ({"expert": "low"}, "_low_noise", (0, 0.875)),
            # narrowed from either end; 0 and 1 narrow nothing
            ({"expert": "high", "max_t": 0.95}, "_high_noise", (0.875, 0.95)),
            ({"expert": "high", "min_t": 0.9}, "_high_noise", (0.9, 1)),
            ({"expert": "low", "min_t": 0.5, "max_t": 0.8}, "_low_noise", (0.5, 0.8)),
            ({"expert": "low", "min_t": 0.0, "max_t": 1.0}, "_low_noise", (0, 0.875)),
        ],
    )
    def test_by_the_key(self, t2v, settings, suffix, t_range):
        family = wan_family(t2v, **settings)
        assert (family.expert_suffix, family._t_range) == (suffix, t_range)
        low, high = timesteps(family, 1e-6, 1 - 1e-6)
        assert low >= t_range[0] and high <= t_range[1] and high - low > 0.8 * (t_range[1] - t_range[0])

    @pytest.mark.parametrize(
        ("part", "window", "title"),
        [
            ("high_noise_model", {"min_t": 0.875, "max_t": 1.0}, "Wan2.2 T2V-A14B high noise custom size"),
            ("low_noise_model", {"min_t": 0.0, "max_t": 0.875}, "Wan2.2 T2V-A14B low noise custom size"),
        ],
    )
    def test_a_config_of_diffusion_pipe_runs_as_it_is(self, t2v, part, window, title):
        family = wan_family(t2v, transformer_path=t2v / part, **window)
        assert family.title == title and family._t_range == tuple(window.values())

    def test_by_the_range_where_nothing_else_tells(self, tmp_path):
        """An image-to-video file without CLIP has to be an expert."""
        settings = {"folder": None, **comfyui(tmp_path, "wan22_i2v_low", file="mine.safetensors")}
        settings.pop("ckpt_path")
        message = refusal(**settings)
        assert "is Wan2.2 I2V-A14B, and nothing says which of its two experts" in message
        assert "[0.9, 1]" in message and "Set [model] expert = 'high' or 'low'" in message
        assert wan_family(**settings, min_t=0.9).expert_suffix == "_high_noise"
        assert wan_family(**settings, max_t=0.9).expert_suffix == "_low_noise"
        assert wan_family(**settings, expert="low")._t_range == (0, 0.9)
        assert "nothing says which" in refusal(**settings, min_t=0.5)

    def test_a_text_to_video_file_is_an_expert_if_anything_says_so(self, tmp_path, t2v):
        settings = {"folder": None, **comfyui(tmp_path, "wan_t2v", file="mine.safetensors")}
        settings.pop("ckpt_path")
        assert wan_family(**settings, min_t=0.5).title == "Wan2.1 T2V custom size"
        assert wan_family(**settings, expert="high").title == "Wan2.2 T2V-A14B high noise custom size"
        # beside two experts it is one, unless its name says Wan2.1
        settings["folder"] = t2v
        assert "give vae_path, llm_path and tokenizer_path instead of ckpt_path" in refusal(**settings)
        assert wan_family(**settings, max_t=0.875).expert_suffix == "_low_noise"
        file = settings["transformer_path"].rename(tmp_path / "diffusion_models" / "wan2.1_t2v_14B.safetensors")
        assert wan_family(**{**settings, "transformer_path": file}).title == "Wan2.1 T2V custom size"

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            (
                {"transformer_path": "low_noise_model", "expert": "high"},
                ["low_noise_model' (low noise by its name)", "expert = 'high'", "min_t = 0, max_t = 1"],
            ),
            (
                {"transformer_path": "high_noise_model", "max_t": 0.875},
                ["high_noise_model' (high noise by its name)", "expert not given", "min_t = 0, max_t = 0.875"],
            ),
            ({"expert": "low", "min_t": 0.9}, ["ckpt_path = ", "expert = 'low'", "min_t = 0.9, max_t = 1"]),
            ({"expert": "low", "max_t": 0.9}, ["expert = 'low'", "max_t = 0.9", "low noise [0, 0.875]"]),
            ({"expert": "high", "min_t": 0.8}, ["expert = 'high'", "min_t = 0.8", "high noise is t in [0.875, 1]"]),
            ({"expert": "high", "max_t": 0.5}, ["expert = 'high'", "max_t = 0.5"]),
        ],
    )
    def test_contradictions(self, t2v, settings, parts):
        if "transformer_path" in settings:
            settings = {**settings, "transformer_path": t2v / settings["transformer_path"]}
        message = refusal(t2v, **settings)
        assert "contradict each other" in message and all(part in message for part in parts)

    @pytest.mark.parametrize("shards", [1, 4])
    @pytest.mark.parametrize("settings", [{"expert": "low"}, {"expert": "low", "max_t": 0.875}])
    def test_a_diffusers_folder_without_its_low_noise_part(self, tmp_path, shards, settings):
        """`transformer` alone is the high-noise expert, and must not be trained as the other."""
        folder = diffusers_pair(tmp_path / "pair", "wan22_t2v_low", shards)
        shutil.rmtree(folder / "transformer_2")
        message = refusal(folder, **settings)
        assert "has transformer only, which is the high-noise expert" in message and "is transformer_2;" in message
        assert wan_family(folder, expert="high").expert_suffix == "_high_noise"

    def test_wan21_by_its_name(self, tmp_path):
        """Its tensors could be an expert's; to train them as one is what nobody wants."""
        official(tmp_path / "Wan2.1-T2V-14B", "wan_t2v")
        message = refusal(tmp_path / "Wan2.1-T2V-14B", expert="high")
        assert "is Wan2.1 T2V by its name, which has no experts; remove expert, or rename it" in message

    @pytest.mark.parametrize("name", ["wan_i2v", "wan_flf2v", "wan22_ti2v"])
    def test_models_without_experts(self, tmp_path, name):
        settings = {"folder": None, **comfyui(tmp_path, name)}
        settings.pop("ckpt_path")
        message = refusal(**settings, expert="low")
        assert "expert = 'low' is for Wan2.2 A14B" in message and "has no experts; remove expert" in message

    def test_sizes_that_are_no_expert(self, tmp_path):
        """A file of the width of 1.3B, told by its header alone."""
        tensors = {"patch_embedding.weight": torch.zeros(1536, 16, 1, 2, 2), "head.head.weight": torch.zeros(64, 1536)}
        write_transformer(tmp_path, "wan_t2v")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "dim": 1536, "num_heads": 12}))
        torch.save(tensors, tmp_path / "wan2.2_high_noise.pth")
        message = refusal(WAN_T2V, transformer_path=tmp_path / "wan2.2_high_noise.pth", expert="high")
        assert "wan2.2_high_noise.pth is Wan2.1 T2V, which has no experts; remove expert" in message

    def test_boundary_of_diffusers(self, tmp_path):
        """What inference will use goes before the table."""
        folder = diffusers_pair(tmp_path / "pair", "wan22_t2v_low", boundary=0.85)
        assert wan_family(folder, expert="high")._t_range == (0.85, 1)
        assert wan_family(WAN_T2V, transformer_path=folder / "transformer_2")._t_range == (0, 0.85)
        (folder / "model_index.json").write_text('{"boundary_ratio": null}')
        assert wan_family(folder, expert="low")._t_range == (0, 0.875)
        (folder / "model_index.json").write_text('{"boundary_ratio": 875.0}')
        assert "boundary_ratio = 875.0 is not between 0 and 1" in refusal(folder, expert="low")


class TestShare:
    @pytest.mark.parametrize(("boundary", "sampling"), SHARES)
    def test_against_the_table(self, boundary, sampling):
        shares = [flow_match.share_above(boundary, sampling, shift=shift) for shift in SHIFTS]
        assert shares == pytest.approx(SHARES[boundary, sampling], abs=6e-4)

    @pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.95)])
    @pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
    def test_it_is_the_share_of_what_is_drawn(self, sampling, window):
        quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
        drawn = flow_match.timestep(quantiles, sampling, 0.8, 3.0, *window)
        share = flow_match.share_above(0.875, sampling, 0.8, 3.0, *window)
        assert share == pytest.approx((drawn > 0.875).double().mean().item(), abs=2e-5)

    def test_outside_the_window(self):
        assert flow_match.share_above(0.9, "uniform", max_t=0.8) == 0
        assert flow_match.share_above(0.9, "uniform", min_t=0.95) == 1


class TestTurns:
    @pytest.mark.parametrize("share", [Fraction(1, 5), Fraction(1, 2), Fraction("0.3"), Fraction(368, 1000)])
    @pytest.mark.parametrize("switch_every", [1, 3])
    def test_share_of_steps(self, share, switch_every):
        """Never more than one block away from the share, and never a change inside a block."""
        taken = [expert_of_step(step, switch_every, share) == "high" for step in range(200 * switch_every)]
        blocks = taken[::switch_every]
        assert taken == [block for block in blocks for _ in range(switch_every)]
        for count in range(201):
            assert 0 <= count * share - sum(blocks[:count]) < 1
        assert sum(blocks) == int(200 * share)

    def test_pattern(self):
        """Written down: a third of the blocks, each the last of its three."""
        pattern = ["low", "low", "high"] * 4
        assert [expert_of_step(step, 1, Fraction(1, 3)) for step in range(12)] == pattern

    def test_exactness(self):
        """0.1 in binary is a little above a tenth, which would put a turn one step early some day."""
        assert high_noise_share(wan_config(high_noise_share=0.1), T2V_A14B) == Fraction(1, 10)
        computed = high_noise_share(wan_config(shift=3.0, timestep_sample_method="uniform"), T2V_A14B)
        assert computed == Fraction(3, 10)

    def test_a_share_of_nothing(self):
        with pytest.raises(ValueError, match="of the steps are the high-noise expert's; set high_noise_share"):
            high_noise_share(wan_config(shift=0.001), T2V_A14B)

    @pytest.mark.parametrize("pair", ["t2v", "i2v"])
    def test_a_family_of_two(self, request, pair):
        folder = request.getfixturevalue(pair)
        family = wan_family(folder, expert="both", switch_every=2, shift=5.0)
        title, boundary = {"t2v": ("Wan2.2 T2V-A14B", 0.875), "i2v": ("Wan2.2 I2V-A14B", 0.9)}[pair]
        experts = family.experts()
        assert list(experts) == ["high_noise", "low_noise"]
        assert family.title == f"{title} both experts custom size" and family.expert_suffix == ""
        assert [expert.title for expert in experts.values()] == [
            f"{title} high noise custom size",
            f"{title} low noise custom size",
        ]
        assert [expert.expert_suffix for expert in experts.values()] == ["_high_noise", "_low_noise"]
        assert [expert._t_range for expert in experts.values()] == [(boundary, 1), (0, boundary)]
        assert all(expert.experts() == {"": expert} and expert.expert_at(7) == "" for expert in experts.values())
        shares = family.expert_shares()
        assert shares["high_noise"] == pytest.approx(SHARES[boundary, "logit_normal"][3], abs=6e-4)
        assert sum(shares.values()) == 1
        name = "patch_embedding.weight"
        high, low = (expert.open_weights().read(name) for expert in experts.values())
        assert torch.equal(high, low + 1) and torch.equal(family.open_weights().read(name), high)
        turns = [family.expert_at(step) for step in range(100)]
        assert turns[::2] == turns[1::2] and turns.count("high_noise") == 2 * int(50 * shares["high_noise"])
        again = pickle.loads(pickle.dumps(family))
        assert [again.expert_at(step) for step in range(100)] == turns

    def test_one_model_has_no_turns(self):
        family = wan_family()
        assert family.experts() == {"": family} and family.expert_at(5) == "" and family.expert_shares() == {"": 1.0}

    def test_window_over_both_sides(self, t2v):
        family = wan_family(t2v, expert="both", min_t=0.1, max_t=0.95, timestep_sample_method="uniform")
        assert [expert._t_range for expert in family.experts().values()] == [(0.875, 0.95), (0.1, 0.875)]
        assert family.expert_shares()["high_noise"] == pytest.approx(0.075 / 0.85, abs=1e-6)

    def test_window_that_leaves_one_nothing(self, t2v):
        assert "leave nothing to the low-noise expert" in refusal(t2v, expert="both", min_t=0.875)
        message = refusal(t2v, expert="both", max_t=0.5)
        assert "leave nothing to the high-noise expert" in message and message.endswith("set expert = 'low'")

    def test_two_that_are_no_pair(self, tmp_path):
        folder = official_pair(tmp_path / "wan", "wan22_t2v_low")
        shutil.copy(DATA / "wan22_i2v_low" / TRANSFORMER_FILE, folder / "low_noise_model")
        shutil.copy(DATA / "wan22_i2v_low" / "config.json", folder / "low_noise_model")
        assert "two transformers that are no pair: Wan2.2 T2V-A14B high noise custom size and Wan2.2 I2V" in refusal(
            folder, expert="both"
        )

    def test_both_of_one(self, tmp_path):
        folder = official(tmp_path / "wan", "wan_t2v")["ckpt_path"]
        message = refusal(folder, expert="both")
        assert "does not hold the two transformers that expert = 'both' needs" in message
        assert "high_noise_model and low_noise_model or transformer and transformer_2" in message


def test_boundaries_of_the_table():
    assert {row.title: row.boundary for row in (*VARIANTS, T2V_A14B) if row.boundary} == {
        "Wan2.2 I2V-A14B": 0.9,
        "Wan2.2 T2V-A14B": 0.875,
    }
