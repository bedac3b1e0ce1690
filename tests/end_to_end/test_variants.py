"""The example TOML of every variant trains two steps on tiny weights, cut into two stages, and its LoRA loads back."""

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.helpers.launch import ROOT, run_ranks
from tests.helpers.tiny import tiny_checkpoint
from tests.pipeline.test_resume import write_inputs

pytestmark = pytest.mark.end_to_end

# example -> tiny variant, layout, what the files that come out end in
EXAMPLES = {
    "wan_1_3b_lora": ("t2v", "official", [""]),
    "wan_14b_lora_pp4": ("t2v", "diffusers", [""]),
    "wan_i2v_14b_lora": ("i2v", "official", [""]),
    "wan_flf2v_14b_lora": ("flf2v", "diffusers", [""]),
    "wan22_t2v_a14b_lora": ("t2v-a14b", "diffusers", ["_high_noise"]),
    "wan22_i2v_a14b_lora": ("i2v-a14b", "official", ["_high_noise"]),
    "wan22_both_experts_lora": ("t2v-a14b", "official", ["_high_noise", "_low_noise"]),
    "wan22_ti2v_5b_lora": ("ti2v", "official", [""]),
}
# sides are multiples of 32, as TI2V-5B wants them
DATASET = """
resolutions = [[96, 64]]
frame_buckets = [9]
[[directory]]
path = '{folder}/train'
"""
# What the paths and the machine ask for; all else is as the example has it.
SETS = {
    "pipeline_stages": "2",
    "gradient_accumulation_steps": "2",
    "max_steps": "2",
    "map_num_proc": "1",
    "model.dtype": "'float32'",
    "adapter.rank": "4",
    "warmup_steps": "0",
}
SHARED = {"wan22_both_experts_lora": {"model.switch_every": "1", "model.high_noise_share": "0.5"}}


def train_all(folder: Path, arguments: dict) -> dict:
    import train

    for name, checkpoint in arguments.items():
        changed = {
            **SETS,
            **SHARED.get(name, {}),
            "output_dir": f"'{folder / name}'",
            "cache_dir": f"'{folder / 'cache'}'",
            "dataset": f"'{folder / 'clips.toml'}'",
            "model.ckpt_path": f"'{checkpoint}'",
        }
        sets = [word for key, value in changed.items() for word in ("--set", f"{key}={value}")]
        assert train.main(["--config", str(ROOT / "examples" / f"{name}.toml"), *sets]) == 0
    return {}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("variants")
    write_inputs(folder)
    (folder / "clips.toml").write_text(DATASET.format(folder=folder))
    checkpoints = {
        name: str(tiny_checkpoint(folder / variant, layout, variant=variant, dim=48, heads=2, layers=3))
        for name, (variant, layout, _) in EXAMPLES.items()
    }
    run_ranks("tests.end_to_end.test_variants:train_all", 2, folder, checkpoints)
    return folder, checkpoints


def test_no_example_is_left_out():
    runs = {path.stem for path in (ROOT / "examples").glob("wan*.toml")}
    assert runs - {"wan_1_3b_full_finetune"} == set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_variant_trains_and_its_lora_loads_back(name, trained):
    from models.wan.family import WanFamily

    (folder, checkpoints), (variant, _, endings) = trained, EXAMPLES[name]
    (run,) = (path for path in (folder / name).iterdir() if path.name != "cache")
    files = sorted(path.name for path in (run / "step2").glob("*.safetensors"))
    assert files == [f"adapter_model{ending}.safetensors" for ending in endings]
    expert = {"expert": "both" if len(endings) > 1 else "high"} if "a14b" in variant else {}
    family = WanFamily(WanFamily.Config(ckpt_path=checkpoints[name], dtype="float32", **expert))
    for file in files:
        loaded = family.load_adapter(run / "step2" / file)
        modules = {key.partition(".lora_")[0] for key in loaded}
        assert modules == set(family.lora_targets(family.build_skeleton()))
        moved = [key for key, tensor in loaded.items() if key.endswith(".lora_B.weight") and tensor.abs().max() > 0]
        assert len(moved) == len(modules), "every matrix learns"
        with safe_open(run / "step2" / file, framework="pt") as reader:
            told = reader.metadata()
        assert told["base_model"].startswith(family.title.split(" both")[0].split(" high")[0].rsplit(" custom")[0])
