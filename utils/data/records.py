"""The nouns of the data path, frozen: MediaFile, Clip, Bucket, Entry."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal, NamedTuple

TEXT = "text"  # kind of the encoder that reads captions; every other kind is made of a clip's pixels


class Bucket(NamedTuple):
    """One tensor shape; every sample of a step has the same."""

    width: int  # px
    height: int  # px
    frames: int  # 1 is an image

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True, slots=True)
class MediaFile:
    """One file as probed. Images have frames == 1, fps == 0 and is_video False."""

    path: Path
    content_hash: str  # of the file's bytes, hex
    width: int  # px, after the rotation flag
    height: int  # px, after the rotation flag
    frames: int  # as counted or told by the container
    fps: Fraction  # average rate of the source
    duration: Fraction  # s
    is_video: bool
    captions: tuple[str, ...]  # empty where there is none
    offset: Fraction = Fraction(0)  # s; where the part that may be used begins: `frames` and `duration` are the part's


class Fill(NamedTuple):
    """How the frames of a file that is shorter than its bucket are made to last."""

    how: Literal["loop", "pad"]  # from the first frame again, or the last one held
    frames: int  # that the file has at the clip's rate

    def number(self, index: int) -> int:
        """The frame of the file that stands at `index` of the clip."""
        return index % self.frames if self.how == "loop" else min(index, self.frames - 1)


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames chosen from one file, and the shape they are brought to. `times` is not stored: frame i shows the moment
    start + i / fps."""

    media: MediaFile
    bucket: Bucket
    start: Fraction  # s
    fps: Fraction  # target rate; 0 for an image
    group: int  # index of the [[directory]] it comes from
    source_fps: Fraction = Fraction(0)  # the file's frame k is on show from k / source_fps on; 0: its time stamps tell
    fill: Fill | None = None
    turns: tuple[Fraction, ...] = ()  # further starts, s: the uses of the sample take `start` and these in turn

    def each_turn(self) -> tuple["Clip", ...]:
        """What is encoded: one clip a start."""
        if not self.turns:
            return (self,)
        return tuple(replace(self, start=start, turns=()) for start in (self.start, *self.turns))


@dataclass(frozen=True, slots=True)
class Entry:
    """One trainable sample: what the cache holds for it and where it belongs."""

    sample_id: str  # stable name: equal content, frames, shape and captions give equal ids; seeds derive from it
    name: str  # for people: the file's name, with the start where a file gives several clips
    bucket: Bucket
    group: int  # index of the [[directory]]
    media_kinds: tuple[str, ...]  # what is encoded of its pixels; all entries share this one tuple
    media_keys: tuple[str, ...]  # the cache's key of each; a further set of them for each further turn
    text_keys: tuple[str, ...]  # one a caption; a draw picks one; none where no encoder reads captions

    def media(self) -> Iterator[tuple[str, str]]:
        """(kind, key) of everything encoded of its pixels."""
        return zip(self.media_kinds * self._turns(), self.media_keys, strict=True)

    def media_of(self, turn: int) -> Iterator[tuple[str, str]]:
        """(kind, key) of what use number `turn` (from 0) reads."""
        first = turn % self._turns() * len(self.media_kinds)
        return zip(self.media_kinds, self.media_keys[first : first + len(self.media_kinds)], strict=True)

    def _turns(self) -> int:
        return len(self.media_keys) // len(self.media_kinds) if self.media_kinds else 1
