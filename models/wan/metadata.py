"""What the header of a saved file tells: base model, expert, modelspec's fields and those of kohya's trainers."""

from collections.abc import Mapping

from models.adapters import TITLES
from models.wan.variants import Architecture, Variant, size_name

DORA_NORM = "reelpipe.dora_norm"  # "base": dora_scale is for the norm of the weight that nothing was added to
TIMESTEPS = 1000  # modelspec counts timesteps as the official scheduler does

# repository that runs the model, by the first word of a variant's title
_IMPLEMENTATIONS = {"Wan2.1": "https://github.com/Wan-Video/Wan2.1", "Wan2.2": "https://github.com/Wan-Video/Wan2.2"}
# musubi-tuner's module that reads a kind back (its networks/ folder)
_MUSUBI_MODULES = {"lora": "networks.lora_wan", "dora": "networks.lora_wan", "lokr": "networks.lokr"}
# ours -> the same under the name that viewers of kohya's files look for
_SAME_FOR_KOHYA = {"step": "ss_steps", "epoch": "ss_epoch", "base_model": "ss_sd_model_name"}


def architecture_id(variant: Variant, sizes: Architecture, kind: str = "") -> str:
    """`wan2.1-t2v-14b/lora`: modelspec's id of an architecture, which Wan's makers never chose."""
    words = [*variant.title.split(), *([] if _tells_size(variant) else [size_name(sizes)])]
    model = "-".join("-".join(words).lower().split())
    return f"{model}/{kind}" if kind else model


def _tells_size(variant: Variant) -> bool:
    return variant.title.endswith(("14B", "5B"))


def of_model(
    given: Mapping[str, str], variant: Variant, sizes: Architecture, suffix: str = "", kind: str = ""
) -> dict[str, str]:
    """`given`, and what the family knows. No dates: equal runs make equal files.

    The modelspec fields are those of https://github.com/Stability-AI/ModelSpec, version 1.0.0.

    Args:
        suffix: of the expert's files (`_high_noise`), or nothing.
        kind: of the adapter, as `models.adapters.KINDS` has it, or nothing for a whole model.
    """
    base = given.get("base_model", f"{variant.title} {size_name(sizes)}")
    told = {
        "base_model": base,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture_id(variant, sizes, kind),
        "modelspec.implementation": _IMPLEMENTATIONS.get(variant.title.split()[0], _IMPLEMENTATIONS["Wan2.1"]),
        "modelspec.title": f"{base} {TITLES[kind]}" if kind else base,
    }
    if variant.boundary is not None:
        told["boundary"] = f"{variant.boundary:g}"
        if suffix:
            told["expert"] = suffix.removeprefix("_").removesuffix("_noise")
            told["modelspec.timestep_range"] = _timestep_range(variant.boundary, told["expert"])
    return {**told, **given}


def _timestep_range(boundary: float, expert: str) -> str:
    middle = round(boundary * TIMESTEPS)
    return f"{middle},{TIMESTEPS}" if expert == "high" else f"0,{middle}"


def for_kohya(told: Mapping[str, str], kind: str, rank: int, alpha: float) -> dict[str, str]:
    """`told`, and the `ss_` fields that musubi-tuner writes and viewers of LoRA files look for."""
    own = {ours: told[key] for key, ours in _SAME_FOR_KOHYA.items() if key in told}
    return {
        **told,
        **own,
        "ss_network_module": _MUSUBI_MODULES[kind],
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": "wan",  # musubi-tuner's name of the architecture
    }
