"""What cache entries and samples are called."""

from collections.abc import Mapping, Sequence
from typing import Any

from models.base import Encoder
from utils.data.cache import CacheStore, FingerprintIndex
from utils.data.media_types import DECODE_VERSION
from utils.data.records import TEXT, Clip


class Keys:
    """Names by content: equal bytes, frames, shape and encoder give equal names, wherever the files lie.

    Args:
        encoders: any number that look at a clip, and at most one that reads captions; its kind is `TEXT`.
    """

    def __init__(self, encoders: Sequence[Encoder], fingerprints: FingerprintIndex) -> None:
        self._fingerprints: dict[str, Mapping[str, Any]] = {}  # by kind, in the encoders' order
        for encoder in encoders:
            assert encoder.kind not in self._fingerprints, f"two encoders of kind {encoder.kind!r}"
            assert (encoder.kind == TEXT) == (encoder.reads == "caption"), f"{encoder.kind} reads {encoder.reads}"
            self._fingerprints[encoder.kind] = fingerprints.resolve(encoder.fingerprint())
        self.kinds = tuple(self._fingerprints)
        self.media_kinds = tuple(kind for kind in self.kinds if kind != TEXT)

    def media(self, clip: Clip) -> tuple[str, ...]:
        """One key for each of `media_kinds`, of the clip's `start` alone."""
        recipe = _recipe(clip)
        return tuple(
            CacheStore.key(kind, {"clip": recipe, "encoder": self._fingerprints[kind]}) for kind in self.media_kinds
        )

    def text(self, caption: str) -> str:
        return CacheStore.key(TEXT, {"caption": caption, "encoder": self._fingerprints[TEXT]})

    @staticmethod
    def sample(clip: Clip) -> str:
        """Free of the encoders, so that another VAE or text encoder draws the same noise for the same sample."""
        turns = {"turns": [str(start) for start in clip.turns]} if clip.turns else {}
        return CacheStore.key("sample", {"clip": _recipe(clip), "captions": clip.media.captions, **turns})


def _recipe(clip: Clip) -> dict[str, Any]:
    """All that decides a clip's pixels. What was added since the first release stands in it only where it is used."""
    recipe = {
        "media": clip.media.content_hash,
        "start": str(clip.start),
        "fps": str(clip.fps),
        "bucket": list(clip.bucket),
        "decode": DECODE_VERSION,
    }
    if clip.source_fps:
        recipe["source_fps"] = str(clip.source_fps)
    if clip.fill:
        recipe["fill"] = list(clip.fill)
    return recipe
