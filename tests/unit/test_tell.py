"""What the console says of the cache: a line a kind of encoder, in words for people."""

import io
from pathlib import Path

from rich.console import Console

from utils.data.cache import CacheStore
from utils.data.precache import Made, PrecacheReport
from utils.train import tell
from utils.train.prepare import Prepared


def test_the_cache_is_told_kind_by_kind():
    made = {
        "latents": Made(0, 19),
        "condition": Made(19, 0),
        "image": Made(1, 18),
        "text": Made(3, 1),
        "depth": Made(1, 1),
    }
    console = Console(file=io.StringIO(), width=120)
    tell.cache(console, Prepared(CacheStore(Path()), {}, PrecacheReport(made, 1.0, {})), None)
    assert console.file.getvalue().splitlines() == [
        "0 of 19 clips to encode: everything was in the cache",
        "19 of 19 conditions encoded",
        "1 of 19 image states encoded, 18 were in the cache",
        "3 of 4 captions encoded, 1 was in the cache",
        "1 of 2 depth items encoded, 1 was in the cache",
    ]
