"""What cache entries and samples are called."""

from collections.abc import Sequence
from typing import Any

from models.base import Encoder, MediaSpec
from utils.data.cache import CacheStore, FingerprintIndex, encoded
from utils.data.masks import MASK_VERSION, MaskJob, Strides
from utils.data.media_types import DECODE_VERSION, picture_box
from utils.data.records import MASK, TEXT, Clip

_MOMENTS = ("start", "fps", "source_fps", "fill")  # of a recipe: what an image as a mask has nothing of


class Keys:
    """Names by content: equal bytes, frames, shape and encoder give equal names, wherever the files lie.

    Args:
        encoders: any number that look at a clip, and at most one that reads captions; its kind is `TEXT`.
    """

    def __init__(self, encoders: Sequence[Encoder], fingerprints: FingerprintIndex) -> None:
        self._fingerprints: dict[str, str] = {}  # as JSON, by kind, in the encoders' order
        for encoder in encoders:
            assert encoder.kind not in self._fingerprints, f"two encoders of kind {encoder.kind!r}"
            assert (encoder.kind == TEXT) == (encoder.reads == "caption"), f"{encoder.kind} reads {encoder.reads}"
            self._fingerprints[encoder.kind] = encoded(fingerprints.resolve(encoder.fingerprint()))
        self.kinds = tuple(self._fingerprints)
        self.media_kinds = tuple(kind for kind in self.kinds if kind != TEXT)

    def media(self, clip: Clip) -> tuple[str, ...]:
        """One key for each of `media_kinds`, of the clip's `start` alone."""
        recipe = encoded(_recipe(clip))
        return tuple(
            CacheStore.key_of(kind, {"clip": recipe, "encoder": self._fingerprints[kind]}) for kind in self.media_kinds
        )

    def text(self, caption: str) -> str:
        return CacheStore.key_of(TEXT, {"caption": encoded(caption), "encoder": self._fingerprints[TEXT]})

    @staticmethod
    def mask(clip: Clip, spec: MediaSpec) -> MaskJob | None:
        """What makes the loss mask of the clip's `start` alone, under its key; None where all of it counts.

        Clips that are cut out alike share it: of an image the moments do not matter, and of the media only the shape.
        """
        mask, (width, height, _) = clip.media.mask, clip.bucket
        box = picture_box((clip.media.width, clip.media.height), (width, height), clip.framing)
        if mask is None and box == (0, 0, width, height):
            return None
        strides = Strides(spec.frame_stride, spec.latent_stride)
        recipe = {"version": MASK_VERSION, "box": box, "strides": strides, "bucket": clip.bucket}
        if mask:
            shared = ("special",) if mask.is_video else ("special", *_MOMENTS)
            recipe |= {key: value for key, value in _recipe(clip).items() if key not in shared}
            recipe["media"] = mask.content_hash
            if mask.clock:
                recipe["clock"] = True
        return MaskJob.of(CacheStore.key(MASK, recipe), clip, box, strides)

    @staticmethod
    def sample(clip: Clip) -> str:
        """Free of the encoders, so that another VAE or text encoder draws the same noise for the same sample."""
        turns: dict[str, Any] = {"turns": [str(start) for start in clip.turns]} if clip.turns else {}
        if clip.framings:
            turns["framings"] = [framing and framing.row() for framing in clip.framings]
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
    if clip.media.special:
        recipe["special"] = clip.media.special
    if clip.fill:
        recipe["fill"] = list(clip.fill)
    if clip.framing:
        recipe["framing"] = clip.framing.row()
    return recipe
