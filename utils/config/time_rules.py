"""Advice on times: patience that is shorter than what a run may take."""

from collections.abc import Iterator

from utils.config.schema import RunConfig
from utils.config.source import Location

# A step of a large model at 720p, or the first of a bucket that is compiled, takes longer than this.
SHORT_STALL_S = 60.0


def stall_advice(run: RunConfig) -> Iterator[tuple[Location, str]]:
    """A stall timeout that ends runs in which all is well."""
    if 0 < run.stall_timeout_s < SHORT_STALL_S:
        usual = type(run).model_fields["stall_timeout_s"].default
        yield (
            ("stall_timeout_s",),
            f"stall_timeout_s = {run.stall_timeout_s:g} ends the run as soon as a step takes longer than that, or a "
            f"save or the first compiling longer than six times that; {usual:g} is the default, and 0 waits for ever",
        )
