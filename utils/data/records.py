"""The nouns of the data path, frozen: MediaFile, Clip, Bucket, Entry."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Any, Literal, NamedTuple

TEXT = "text"  # kind of the encoder that reads captions; every other kind but the next is made of a clip's pixels
MASK = "mask"  # kind of what is made of loss masks


class Bucket(NamedTuple):
    """One tensor shape; every sample of a step has the same."""

    width: int  # px
    height: int  # px
    frames: int  # 1 is an image

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


class Mask(NamedTuple):
    """The file that says where a clip's loss counts: white is trained, black is not. An image stands for all frames."""

    path: Path
    content_hash: str  # of the file's bytes, hex
    is_video: bool
    frames: int
    fps: Fraction
    duration: Fraction  # s
    clock: bool = False  # a video whose first moment is not where its header says, as "clock" in `MediaFile.special`


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
    weight: float = 1.0  # what it counts in the loss, as its index file says
    # what decoding does beyond the ordinary: "pq", "hlg", "wide", "icc", "alpha", "mirrored", "clock", by +
    special: str = ""
    mask: Mask | None = None


class Fill(NamedTuple):
    """How the frames of a file that is shorter than its bucket are made to last."""

    how: Literal["loop", "pad"]  # from the first frame again, or the last one held
    frames: int  # that the file has at the clip's rate

    def number(self, index: int) -> int:
        """The frame of the file that stands at `index` of the clip."""
        return index % self.frames if self.how == "loop" else min(index, self.frames - 1)


class Framing(NamedTuple):
    """How a picture is brought to the shape of its bucket, where that is not by covering it and keeping the middle."""

    across: Fraction = Fraction(1, 2)  # share of what is cut off, or of the padding, that lies left of what stays
    down: Fraction = Fraction(1, 2)  # the same above it
    flip: bool = False  # mirrored in the end, so that left is right
    pad: bool = False  # fitted inside, with black around it; else it covers the bucket, and what stands out is cut off

    def row(self) -> list[str | bool]:
        """As JSON can hold it."""
        return [str(self.across), str(self.down), self.flip, self.pad]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> "Framing":
        across, down, flip, pad = row
        return cls(Fraction(across), Fraction(down), flip, pad)

    def stored(self, turns: int) -> tuple[Fraction, Fraction]:
        """`across` and `down` of a picture that `turns` quarter turns counter-clockwise would bring upright."""
        across, down = self.across, self.down
        for _ in range(turns % 4):
            across, down = 1 - down, across
        return across, down


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
    framing: Framing | None = None  # None: scaled to cover the bucket, and the middle kept
    framings: tuple[Framing | None, ...] = ()  # further ones, for the uses to take in turn as well

    def each_turn(self) -> tuple["Clip", ...]:
        """What is encoded: one clip for each start in each framing.

        Both change from one use to the next, so that few uses see many of them; every pair has its turn.
        """
        if not self.turns and not self.framings:
            return (self,)
        starts, framings = (self.start, *self.turns), (self.framing, *self.framings)
        whole = lcm(len(starts), len(framings))  # uses after which the same pairs would come again
        return tuple(
            replace(
                self,
                start=starts[(turn + turn // whole) % len(starts)],
                framing=framings[turn % len(framings)],
                turns=(),
                framings=(),
            )
            for turn in range(len(starts) * len(framings))
        )


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
    weight: float = 1.0  # what it counts in the loss: its own times that of its [[directory]]
    mask_keys: tuple[str, ...] = ()  # the cache's key of the loss mask, one a turn; none where all of it counts
    mask: str = ""  # for people: the path of the mask's file

    def media(self) -> Iterator[tuple[str, str]]:
        """(kind, key) of everything encoded of its pixels."""
        return zip(self.media_kinds * self.num_turns, self.media_keys, strict=True)

    def media_of(self, turn: int) -> Iterator[tuple[str, str]]:
        """(kind, key) of what use number `turn` (from 0) reads."""
        first = turn % self.num_turns * len(self.media_kinds)
        return zip(self.media_kinds, self.media_keys[first : first + len(self.media_kinds)], strict=True)

    def mask_of(self, turn: int) -> Iterator[tuple[str, str]]:
        """(kind, key) of the mask of use number `turn`, where there is one."""
        if self.mask_keys:
            yield MASK, self.mask_keys[turn % len(self.mask_keys)]

    def of_turns(self, turns: Sequence[int]) -> "Entry":
        """The same sample, whose uses take these of its turns alone."""
        size = len(self.media_kinds)
        media = [key for turn in turns for key in self.media_keys[turn * size : (turn + 1) * size]]
        masks = tuple(self.mask_keys[turn] for turn in turns) if self.mask_keys else ()
        return replace(self, media_keys=tuple(media), mask_keys=masks)

    def lit(self, black: Container[str]) -> "Entry":
        """Without the turns of which the mask is one of these, all black; itself where no turn would be left."""
        turns = [turn for turn, key in enumerate(self.mask_keys) if key not in black]
        return self.of_turns(turns) if 0 < len(turns) < len(self.mask_keys) else self

    def is_free_of(self, keys: Container[str]) -> bool:
        """Whether the sample needs none of these entries of the cache, captions aside."""
        return not any(key in keys for key in (*self.media_keys, *self.mask_keys))

    @property
    def num_turns(self) -> int:
        """What its uses take in turn: starts, crops, mirror images."""
        return len(self.media_keys) // len(self.media_kinds) if self.media_kinds else max(1, len(self.mask_keys))
