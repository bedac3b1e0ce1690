"""Which Wan a `[model]` table names, and every file of it, or all that is wrong with it at once."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from models.wan import variants
from models.wan.config import WanModelConfig
from models.wan.experts import settle
from models.wan.identify import hint_for
from models.wan.keymaps import TRANSFORMER
from models.wan.layouts import Expert, TransformerFiles, WanFiles, find_files, find_transformer
from models.wan.storage import keeps_scale
from models.wan.variants import Architecture, Variant
from models.weights import WeightReader


class Checkpoint(NamedTuple):
    """What was found; with any `problems` there are no `files`."""

    sizes: Architecture
    variant: Variant  # with the boundary that this checkpoint has
    expert: Expert | None  # of a model that has two
    reader: WeightReader  # of the transformer, not yet held against the sizes
    files: WanFiles | None
    problems: list[str]  # a line each


def open_transformer(config: WanModelConfig, files: Sequence[Path]) -> WeightReader:
    """The transformer's tensors under the skeleton's names, from headers alone."""
    return WeightReader(
        files,
        TRANSFORMER,
        what="transformer",
        keeps_scale=partial(keeps_scale, config),
        identify=hint_for("transformer_path"),
    )


def look_up(config: WanModelConfig) -> Checkpoint:
    """Find the transformer, tell from it which Wan it is, and find what that one needs besides.

    Raises:
        ValueError: nothing told which Wan it is. A line for that and for all else that is wrong.
    """
    problems: list[str] = []
    variant = sizes = expert = reader = None
    transformer = find_transformer(config, problems)
    if transformer:
        try:
            reader = open_transformer(config, transformer.files)
            sizes, variant = _identify(transformer, reader)
            variant, expert = settle(config, transformer, variant, sizes)
        except ValueError as error:
            problems.append(str(error))
    if variant and config.i2v_fraction and not variant.first_frame_clean:
        problems.append(
            f"[model] i2v_fraction = {config.i2v_fraction:g} is for Wan2.2 TI2V-5B, and this is {variant.title}; "
            "remove i2v_fraction"
        )
    files = find_files(config, transformer, variant, problems)
    if not (sizes and variant and reader):
        raise ValueError("\n".join(problems))
    return Checkpoint(sizes, variant, expert, reader, files, problems)


def _identify(transformer: TransformerFiles, reader: WeightReader) -> tuple[Architecture, Variant]:
    try:
        shown = variants.sizes_from_shapes(reader.shapes())
        sizes = variants.architecture(_told_sizes(transformer, shown), reader.shapes())
        return sizes, variants.detect(sizes, reader.stored_names())
    except ValueError as error:
        told = reader.guess() or error  # of another kind of file, sizes that are missing say nothing
        raise ValueError("; ".join([f"transformer {reader.location}: {told}", *reader.broken])) from error


def _told_sizes(transformer: TransformerFiles, shown: Mapping[str, Any]) -> dict[str, Any]:
    """What the config.json tells of this transformer.

    Raises:
        ValueError: it lies beside the tensors and has other channels. Other sizes come up tensor by tensor.
    """
    if transformer.config is None:
        return {}
    told = variants.read_config(transformer.config)
    if not transformer.config_is_own:
        # that of ckpt_path may be for another size, or another variant of the same size
        same = told.get("dim") == shown.get("dim")
        return {size: value for size, value in told.items() if same and size not in shown}
    for channels in ("in_dim", "out_dim"):
        if told.get(channels, shown.get(channels)) != shown.get(channels, told.get(channels)):
            raise ValueError(
                f"{transformer.config} has {channels} = {told[channels]} and the tensors have {shown[channels]}: one "
                "of the two belongs to another model; download both again"
            )
    return told
