"""Checks of the keys that say how many clips go through the model at once."""

from collections.abc import Iterator

from utils.config.messages import shown
from utils.config.schema import RunConfig
from utils.config.source import Location


def batch_errors(run: RunConfig) -> Iterator[tuple[Location, str]]:
    """Sizes that were written beside `max_tokens_per_gpu`, which decides them: where, and what is wrong."""
    if run.max_tokens_per_gpu is None:
        return
    for key in ("micro_batch_size_per_gpu", "image_micro_batch_size_per_gpu"):
        if (value := getattr(run, key)) is not None:
            text = f"{key} = {shown(value)} and max_tokens_per_gpu = {run.max_tokens_per_gpu} both say how many clips"
            yield (key,), f"{text} go through the model at once; remove one of them"
