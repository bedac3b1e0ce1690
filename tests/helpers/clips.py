"""A clip of a real file, as scanning and cutting would give it."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from utils.data.media import probe
from utils.data.records import Bucket, Clip, MediaFile
from utils.data.stat_index import hash_file

SMALL = Bucket(64, 48, 9)


def clip_of(path: Path, bucket: Bucket = SMALL, captions: tuple[str, ...] = ("a clip",), **changed) -> Clip:
    held = probe(path)
    fps = Fraction(16) if held.is_video else Fraction(0)
    media = MediaFile(path, hash_file(path), *held[:6], captions, special=held.special)
    return replace(Clip(media, bucket, Fraction(0), fps, 0), **changed)
