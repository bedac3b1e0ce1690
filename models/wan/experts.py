"""Which expert of Wan2.2 A14B is trained, over which timesteps, and how two experts take turns."""

import math
from fractions import Fraction
from typing import get_args

from models import flow_match
from models.json_files import read_table
from models.wan.config import WanModelConfig
from models.wan.layouts import EXPERT_FOLDERS, Expert, TransformerFiles, expert_folders
from models.wan.variants import T2V_A14B, Architecture, Variant

EXPERTS: tuple[Expert, ...] = get_args(Expert)
NAMES: dict[Expert, str] = {expert: f"{expert}_noise" for expert in EXPERTS}  # in file names and log lines
OTHER_SIZES = (1536, 3072)  # widths of released models that are no experts
SHARE_DECIMALS = 6  # of a computed share: more would hang on the last bit of a machine's library

Range = tuple[float, float]


def settle(
    config: WanModelConfig, transformer: TransformerFiles, variant: Variant, sizes: Architecture
) -> tuple[Variant, Expert | None]:
    """The variant with its boundary, and whose weights these are, from the key, the path and the range of t.

    Returns:
        The expert is None for a model that has none, and for `expert = "both"`.

    Raises:
        ValueError: they contradict each other, or nothing tells; or the model has no experts and one was asked for.
    """
    pair = len(expert_folders(config.ckpt_path)) > 1
    is_t2v = variant.model_type == T2V_A14B.model_type
    if is_t2v and _may_be_expert(config, transformer, sizes, pair):
        variant = T2V_A14B
    if variant.boundary is None:
        if config.expert:
            named = " by its name" if is_t2v and sizes.dim not in OTHER_SIZES else ""
            raise ValueError(
                f"[model] expert = '{config.expert}' is for Wan2.2 A14B, and {transformer.location} is "
                f"{variant.title}{named}, which has no experts; remove expert{', or rename it' if named else ''}"
            )
        return variant, None
    variant = variant._replace(boundary=_told_boundary(transformer) or variant.boundary)
    if config.expert == "both":
        return variant, None
    expert = config.expert or transformer.expert or _range_expert(config, variant)
    if expert is None:
        raise ValueError(_undecided(config, transformer, variant))
    high, low = EXPERT_FOLDERS[1]
    if expert == "low" and transformer.key == "ckpt_path" and transformer.files[0].parent.name == high:
        raise ValueError(
            f"[model] ckpt_path = '{config.ckpt_path}' has {high} only, which is the high-noise expert, and "
            f"the low-noise one is {low}; download it there"
        )
    fits = _range_of(config, variant, expert) is not None
    if not fits or transformer.expert not in (None, expert):
        raise ValueError(_contradiction(config, transformer, variant))
    return variant, expert


def _may_be_expert(config: WanModelConfig, transformer: TransformerFiles, sizes: Architecture, pair: bool) -> bool:
    """Whether tensors that Wan2.1 T2V and Wan2.2 T2V-A14B have alike are the latter's."""
    if sizes.dim in OTHER_SIZES:
        return False
    return bool(transformer.expert) or (bool(config.expert or pair) and not _names_wan21(transformer))


def _names_wan21(transformer: TransformerFiles) -> bool:
    names = "/".join(transformer.location.absolute().parts[-2:]).lower()
    return any(mark in names for mark in ("wan2.1", "wan2_1", "wan21"))


def _told_boundary(transformer: TransformerFiles) -> float | None:
    """`boundary_ratio` of diffusers' model_index.json, which goes before the table: it is what inference will use."""
    if transformer.pipeline is None:
        return None
    try:
        told = read_table(transformer.pipeline).get("boundary_ratio")
    except ValueError as error:
        raise ValueError(f"{transformer.pipeline} is not valid JSON ({error}); download it again") from error
    if told is None:
        return None
    if not isinstance(told, float) or not 0 < told < 1:
        raise ValueError(f"{transformer.pipeline}: boundary_ratio = {told} is not between 0 and 1; download it again")
    return told


def _side(variant: Variant, expert: Expert) -> Range:
    """The timesteps of an expert, 1 is noise."""
    assert variant.boundary is not None, "asked of a model that has no experts"
    return (variant.boundary, 1.0) if expert == "high" else (0.0, variant.boundary)


def _range_expert(config: WanModelConfig, variant: Variant) -> Expert | None:
    """The expert whose side holds the whole of [min_t, max_t]."""
    sides = {expert: _side(variant, expert) for expert in EXPERTS}
    return next((e for e, (low, high) in sides.items() if low <= config.min_t and config.max_t <= high), None)


def _range_of(config: WanModelConfig, variant: Variant, expert: Expert) -> Range | None:
    """The expert's side, narrowed by min_t and max_t; None where one of them lies outside. 0 and 1 narrow nothing."""
    low, high = _side(variant, expert)
    outside = not (config.min_t == 0 or low <= config.min_t) or not (config.max_t == 1 or config.max_t <= high)
    narrowed = max(low, config.min_t), min(high, config.max_t)
    return None if outside or narrowed[0] >= narrowed[1] else narrowed


def t_range(config: WanModelConfig, variant: Variant, expert: Expert | None) -> Range:
    """The timesteps to train on. `settle` has seen to it that they are some."""
    found = _range_of(config, variant, expert) if expert else (config.min_t, config.max_t)
    assert found is not None, "settle refuses a range that does not fit"
    return found


def _sides_in_words(variant: Variant) -> str:
    high, low = (f"[{a:g}, {b:g}]" for a, b in (_side(variant, expert) for expert in EXPERTS))
    return f"high noise is t in {high}, low noise {low}"


def _undecided(config: WanModelConfig, transformer: TransformerFiles, variant: Variant) -> str:
    other = "; if it is a Wan2.1 model, give vae_path, llm_path and tokenizer_path instead of ckpt_path"
    return (
        f"{transformer.location} is {variant.title}, and nothing says which of its two experts: not its name, not "
        f"min_t = {config.min_t:g} and max_t = {config.max_t:g} ({_sides_in_words(variant)}). Set [model] expert = "
        f"'high' or 'low'{other if variant.model_type == T2V_A14B.model_type else ''}"
    )


def _contradiction(config: WanModelConfig, transformer: TransformerFiles, variant: Variant) -> str:
    path = f"{transformer.key} = '{getattr(config, transformer.key)}'"
    told = f"{transformer.expert} noise by its name" if transformer.expert else "no expert by its name"
    key = f"expert = '{config.expert}'" if config.expert else "expert not given"
    return (
        f"[model] {path} ({told}), {key} and min_t = {config.min_t:g}, max_t = {config.max_t:g} contradict each other: "
        f"of {variant.title}, {_sides_in_words(variant)}. Make them agree; without min_t and max_t the expert's whole "
        "side is trained"
    )


def alone(config: WanModelConfig, variant: Variant, expert: Expert) -> WanModelConfig:
    """The settings of one expert of `expert = "both"`: its side of [min_t, max_t].

    Raises:
        ValueError: that side is empty.
    """
    low, high = _side(variant, expert)
    narrowed = max(low, config.min_t), min(high, config.max_t)
    if narrowed[0] >= narrowed[1]:
        raise ValueError(
            f"[model] expert = 'both': min_t = {config.min_t:g} and max_t = {config.max_t:g} leave nothing to the "
            f"{expert}-noise expert ({_sides_in_words(variant)}); set expert = "
            f"'{'low' if expert == 'high' else 'high'}'"
        )
    own = {"expert": expert, "min_t": narrowed[0], "max_t": narrowed[1], "switch_every": 1, "high_noise_share": None}
    return config.model_copy(update=own)


def high_noise_share(config: WanModelConfig, variant: Variant) -> Fraction:
    """The exact share of steps for the high-noise expert: as the user writes it, else the probability that a timestep
    lies above the boundary.

    Raises:
        ValueError: one expert would get less than a millionth of the steps.
    """
    if config.high_noise_share is not None:
        return Fraction(str(config.high_noise_share))
    assert variant.boundary is not None and not config.flux_shift, "the config refuses flux_shift"
    share = flow_match.share_above(
        variant.boundary,
        config.timestep_sample_method,
        config.sigmoid_scale,
        config.shift or 1.0,
        config.min_t,
        config.max_t,
    )
    exact = Fraction(round(share, SHARE_DECIMALS)).limit_denominator(10**SHARE_DECIMALS)
    if not 0 < exact < 1:
        raise ValueError(
            f"[model] with these timesteps {share:.1e} of the steps are the high-noise expert's; set high_noise_share, "
            "another shift, or train one expert"
        )
    return exact


def expert_of_step(step: int, switch_every: int, share: Fraction) -> Expert:
    """Blocks of `switch_every` steps, of which the high-noise expert takes `share`, spread evenly: among the first n
    blocks floor(n * share) are its own."""
    block = step // switch_every
    return "high" if math.floor((block + 1) * share) > math.floor(block * share) else "low"
