"""Dtypes that cannot be trained, or not well."""

from collections.abc import Iterator

from utils.config.load import LoadedConfig
from utils.config.messages import dotted
from utils.config.source import Location


def precision_errors(loaded: LoadedConfig) -> Iterator[tuple[Location, str]]:
    """What is trained in float16. Adam's eps of 1e-8 is 0 there, so that a gradient of zero, which every lora_A has in
    the first step, makes a weight 0 / 0; and the square of a gradient above 256 is infinite, for good."""
    adapter = loaded.run.adapter
    trained: Location = ("adapter", "dtype") if adapter else ("model", "dtype")
    if getattr(adapter or loaded.model, "dtype", None) == "float16":
        text = f"{dotted(trained)} = 'float16' cannot hold what an optimizer counts with: weights become NaN"
        yield trained, f"{text}; use 'bfloat16' or 'float32'"


def precision_advice(loaded: LoadedConfig) -> Iterator[tuple[Location, str]]:
    if getattr(loaded.model, "dtype", None) == "float16":
        yield (
            ("model", "dtype"),
            "dtype = 'float16' trains without loss scaling, so small gradients are lost; use 'bfloat16'",
        )
