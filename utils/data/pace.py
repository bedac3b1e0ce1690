"""How fast a cache was filled, remembered beside it, so that a plan can tell how long it would take."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from utils.data.cache import write_whole
from utils.data.manifest import Manifest
from utils.data.records import MASK, TEXT, Bucket

PACE_FILE = "pace.json"  # in the cache's root


class Pace(NamedTuple):
    """One filling of the cache, loading of encoders and captions included."""

    pixels: int  # of all frames that encoders were given
    seconds: float
    device: str
    ranks: int


def pixels_of(buckets: Iterable[Bucket]) -> int:
    """What encoding takes time over; one bucket for each clip and encoder."""
    return sum(width * height * frames for width, height, frames in buckets)


def record_pace(root: Path, manifests: Iterable[Manifest], seconds: float, device: str, ranks: int) -> None:
    """Remember how long the jobs of `manifests` took, unless more was measured before: of few clips most of the time
    is loading."""
    jobs = {(kind, job.key): job for each in manifests for kind, jobs in each.jobs.items() for job in jobs}
    encoded = (job.bucket for (kind, _), job in jobs.items() if kind not in (TEXT, MASK))
    pace = Pace(pixels_of(encoded), seconds, device, ranks)
    known = read_pace(root)
    if pace.pixels and (known is None or known.device != device or known.pixels <= pace.pixels):
        write_whole(root / PACE_FILE, json.dumps(pace._asdict()).encode())


def read_pace(root: Path) -> Pace | None:
    """The last filling that counts; None where nothing was measured, or the file is damaged."""
    try:
        pace = Pace(**json.loads((root / PACE_FILE).read_bytes()))
        return pace if pace.pixels > 0 and pace.seconds > 0 else None
    except (OSError, ValueError, TypeError):
        return None
