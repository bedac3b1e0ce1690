"""Reads videos through PyAV: counts frames, finds the ones that a clip shows, and decodes no more than it must."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, count, islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from utils.data import tags
from utils.data.colour import ordinary
from utils.data.media_types import MediaError, Probe, cover_size, picture_box
from utils.data.records import Framing

# FFmpeg opens these whatever the suffix says; they are pictures, terminal art or play lists that name other files.
_NOT_VIDEO = frozenset(["image2", "tty", "concat", "hls", "dash"])
_SEEK_LEADS_S = (0, 10)
_COARSE = Fraction(1, 4)  # of a frame's time, for a tick: half of it would be as good as the next frame


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    with path.open("rb") as file:
        if file.read(8) == b"ffconcat":  # FFmpeg would open what it names before anything else is known of it
            raise MediaError(path, "is a play list that names other files, and no video")
    # Only files: a play list that calls itself clip.mp4 must not reach out to the network.
    options = {"protocol_whitelist": "file"}
    with av.open(str(path), options=options, metadata_errors="replace") as container:
        name = container.format.name
        if name in _NOT_VIDEO or name.endswith("_pipe"):
            raise MediaError(path, f"is not a video, whatever its name says (FFmpeg takes it for {name!r})")
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise MediaError(path, "has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise MediaError(path, "is coded in a way that this FFmpeg cannot decode")
        tags.require_readable(path, stream)
        # FFmpeg's frame threads have dead-locked beside other thread pools; workers are processes, one thread each.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


# --- probing ----------------------------------------------------------------------------------------------------------


def probe_video(path: Path) -> Probe:
    """Frame count, exact rate and shown size; decodes one frame to know that it can be decoded."""
    with _opened(path) as (container, stream):
        told = _from_table(path, container, stream)
        frames, span = told or _count_packets(path, container, stream)
        rate = stream.average_rate or stream.guessed_rate
        seen = _first_frame(path, container, stream) if told else None  # to open it again takes a third of the time
    if seen is None:  # anew: counting has run to the file's end
        with _opened(path) as (container, stream):
            seen = _first_frame(path, container, stream)
    width, height, special = seen
    if rate and (not span or abs(frames / rate - span) <= Fraction(3, 2) / rate):
        return Probe(width, height, frames, rate, frames / rate, True, special)
    if not span:
        raise MediaError(path, "tells neither its frame rate nor its duration")
    # The header's rate does not explain the time stamps: a variable rate, or a header that lies. Time stamps decide.
    return Probe(width, height, frames, frames / span, span, True, special)


def _first_frame(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, int, str]:
    """Width and height in px as shown, and what its pixels need beyond the ordinary."""
    origin, begun = _begin(path, container, stream)
    frame = next(tags.decoded(container, stream, begun), None)
    if frame is None:
        raise MediaError(path, "no frame of it can be decoded")
    special = tags.special_of(stream, frame)
    if origin != (stream.start_time or 0) or not _grace(stream):  # the first release took other frames of these
        special = f"{special}+clock" if special else "clock"
    return *tags.shown_size(frame, stream), special


def _from_table(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction | None] | None:
    """Number of frames on show, and their time span in s where the container tells it; None where it has no table."""
    if stream.frames > path.stat().st_size:
        raise MediaError(path, f"its header tells of {stream.frames:,} frames, and it has not even as many bytes")
    entries = stream.index_entries
    if "mp4" in container.format.name and 0 < stream.frames <= len(entries):
        # mp4 and mov keep an exact table of every frame; reading it costs nothing.
        size, needed = path.stat().st_size, max(entry.pos + entry.size for entry in entries)
        if needed > size:
            raise MediaError(path, f"is cut off: its table of frames reaches to byte {needed}, but it has {size}")
        span = stream.duration * stream.time_base if stream.duration else None
        return sum(not entry.is_discard for entry in entries), span
    return None


def _count_packets(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, Fraction | None]:
    """The same by reading every packet, which also shows whether the file goes as far as its header says."""
    stamps: list[int | None] = []
    end_s = Fraction(0)
    end = 0
    for packet in container.demux([stream, *container.streams.audio]):
        if not packet.size:
            continue
        packet_end = (packet.pts or 0) + (packet.duration or 0)
        end_s = max(end_s, packet_end * packet.time_base)
        if packet.stream is stream and not packet.is_discard:
            stamps.append(packet.pts)
            end = max(end, packet_end)
    if not stamps:
        raise MediaError(path, "holds no frames")
    known = [stamp for stamp in stamps if stamp is not None]
    if len(known) < len(stamps):
        return len(stamps), None
    _require_whole(path, container, end_s)
    return len(stamps), (end - min(known)) * stream.time_base


def _require_whole(path: Path, container: InputContainer, end_s: Fraction) -> None:
    origin_s = Fraction(container.start_time or 0, av.time_base)
    told_s, found_s = Fraction(container.duration or 0, av.time_base), end_s - origin_s
    if "matroska" in container.format.name:
        found_s = max(found_s, end_s)  # its header tells of the last moment, wherever the first one is
    if found_s < told_s - max(Fraction(1, 2), told_s / 20):  # headers are rounded, seldom by more
        raise MediaError(
            path,
            f"is cut off: its header tells of {float(told_s):.2f} s, but {float(found_s):.2f} s are there; if it plays"
            " well, `ffmpeg -i old.mkv -c copy new.mkv` writes a true header",
        )


def _begin(path: Path, container: InputContainer, stream: VideoStream) -> tuple[int, list[Packet]]:
    """Time stamp of the first frame, in ticks, and the packets that were read to know it.

    FFmpeg's header tells it but for two formats. AVI has no time stamps: FFmpeg counts, from 1 where frames may have
    to be reordered, and says that it began at 0. Matroska's may be negative: FFmpeg then gives none.
    """
    told = stream.start_time or 0
    if not {"avi", "matroska"}.intersection(container.format.name.split(",")):
        return told, []
    begun = [packet for packet in islice(container.demux(stream), 1) if packet.size]
    if container.format.name == "avi":
        return begun[0].pts if begun and begun[0].pts is not None else told, begun
    return _before_zero(path, told) if begun and begun[0].pts is None else told, begun


def _before_zero(path: Path, told: int) -> int:
    """The stamp that the first frame would have, by the rate and the number of those that have none."""
    with _opened(path) as (container, stream):
        stamps = [packet.pts for packet in container.demux(stream) if packet.size]
        known = [stamp for stamp in stamps if stamp is not None]
        rate = stream.average_rate or stream.guessed_rate
        if not known or not rate:
            return told
        return round(min(known) - (len(stamps) - len(known)) / (rate * stream.time_base))


# --- decoding ---------------------------------------------------------------------------------------------------------


def decode_video(
    path: Path,
    start: Fraction,
    fps: Fraction,
    numbers: Sequence[int],
    out: np.ndarray,
    source_fps: Fraction = Fraction(0),
    framing: Framing | None = None,
) -> None:
    """Fill `out`, uint8 [N, h, w, 3], with N frames of a clip: number i is on show `start + i / fps` s after the first.

    What lies between them is decoded all the same, only not scaled. Seeking a second time would seldom save more: x264
    puts 250 frames between key frames by default, and a clip is shorter, so it would decode the same ones again.

    Args:
        numbers: ascending.
        source_fps: take the file's frames to be that many a second, whatever their time stamps say; 0 believes these.
        framing: as in `media.decode_clip`, but for its flip; where it pads, nothing is written around the picture.
    """
    wanted = _Wanted(path, start, fps, numbers, source_fps)
    # A seek should land on the key frame at or before the start. MPEG-TS has no index and lands past it.
    seeks_s = [max(Fraction(0), wanted.begin_s - lead_s) for lead_s in _SEEK_LEADS_S]
    for seek_s in dict.fromkeys([*seeks_s, Fraction(0)]):
        with _opened(path) as (container, stream):
            wanted.origin, begun = _begin(path, container, stream)
            if seek_s:
                tick, begun = wanted.origin + math.floor(seek_s / stream.time_base), []
                try:
                    container.seek(tick, stream=stream, backward=True)
                except av.FFmpegError:  # raw streams cannot be sought
                    continue
            if _fill(wanted, tags.decoded(container, stream, begun), stream, out, framing, sought=bool(seek_s)):
                return


class _Wanted:
    """Which frames of a file a clip asks for, by their time stamps or by their numbers.

    Args: as for `decode_video`.
    """

    def __init__(
        self, path: Path, start: Fraction, fps: Fraction, numbers: Sequence[int], source_fps: Fraction
    ) -> None:
        self.path, self.fps, self.begin_s = path, fps, start
        self.origin = 0  # time stamp of the first frame, ticks
        self._start, self._numbers = start, numbers
        self._frames = [math.floor((start + i / fps) * source_fps) for i in numbers] if source_fps else None
        self._ticks: list[int] | None = None
        if self._frames is not None:
            self._look_up(self._frames)
        self._counts = self._frames is not None and self._ticks is None

    def _look_up(self, frames: list[int]) -> None:
        """The time stamps of numbered frames, so that they too can be sought."""
        stamps, origin, time_base = _stamps(self.path)
        if stamps is None:  # they can only be counted, from the first one on
            self.begin_s = Fraction(0)
            return
        place = next((place for place, frame in enumerate(frames) if frame >= len(stamps)), None)
        if place is not None:
            raise self.too_short(place)
        self._ticks = [stamps[frame] for frame in frames]
        self.begin_s = (self._ticks[0] - origin) * time_base

    def due(self, stream: VideoStream) -> list[int]:
        """Latest time stamp that counts as shown at each wanted frame, in ticks of `clock`."""
        if self._frames is not None:
            return self._frames if self._ticks is None else self._ticks
        first = self.origin + _grace(stream)
        return [math.floor(first + (self._start + i / self.fps) / stream.time_base) for i in self._numbers]

    def clock(self, stream: VideoStream) -> Callable[[VideoFrame], int]:
        """The moment of each frame, called on them in their order."""
        if self._counts:
            counted = count()
            return lambda frame: next(counted)
        return _clock(stream, self.origin)

    def grace(self, stream: VideoStream, last: VideoFrame) -> int:
        """Ticks that the file's last frame is on show: its own length, or one frame of either rate."""
        if self._counts:
            return 1
        period = max(1 / self.fps, 1 / (stream.average_rate or self.fps)) / stream.time_base
        return math.ceil(max(last.duration or 0, period) + 1)

    def too_short(self, place: int) -> MediaError:
        """The error of a file that ends before the wanted frame at `place`."""
        at = f"from {float(self._start):.3f} s on at {float(self.fps):.5g} fps"
        missing, last = self._numbers[place] + 1, self._numbers[-1] + 1
        return MediaError(self.path, f"ends too early: frame {missing} of the {last} {at} could not be decoded")


def _stamps(path: Path) -> tuple[list[int] | None, int, Fraction]:
    """Time stamps of all frames on show in their order, of the first one and a tick's length; None where some lack one.

    Read from the packets: nothing is decoded.
    """
    with _opened(path) as (container, stream):
        origin, begun = _begin(path, container, stream)
        packets = (packet for packet in chain(begun, container.demux(stream)) if packet.size and not packet.is_discard)
        stamps = [packet.pts for packet in packets]
        known = sorted(stamp for stamp in stamps if stamp is not None)
        return known if len(known) == len(stamps) else None, origin, stream.time_base


def _fill(
    wanted: _Wanted,
    decoded: Iterator[VideoFrame],
    stream: VideoStream,
    out: np.ndarray,
    framing: Framing | None,
    sought: bool,
) -> bool:
    """Pick and write every frame of the clip; False when a seek landed past the start, so that it must be redone."""
    writer = _ClipWriter(wanted.path, stream, wanted.due(stream), out, framing or Framing())
    clock = wanted.clock(stream)
    shown: VideoFrame | None = None
    tick = 0
    for frame in decoded:
        tick = clock(frame)
        if shown is None:
            if sought and (frame.pts is None or tick > writer.due[0]):
                return False
            shown = frame  # stands in for anything asked of the time before it
        if writer.write_until(shown, tick):
            return True
        shown = frame
    if shown is None:
        if sought:
            return False
        raise MediaError(wanted.path, "no frame of it can be decoded")
    # Time stamps are rounded, so one frame too few is let pass.
    if not writer.write_until(shown, tick + wanted.grace(stream, shown)):
        raise wanted.too_short(writer.done)
    return True


def _grace(stream: VideoStream) -> Fraction:
    """Ticks by which a time stamp may be late: containers round them to their own clock (Matroska: 1 ms). Where that
    ticks about once a frame (AVI, Ogg) they are exact."""
    rate = stream.average_rate or stream.guessed_rate
    return Fraction(0) if rate and rate * stream.time_base > _COARSE else Fraction(1, 2)


def _clock(stream: VideoStream, origin: int) -> Callable[[VideoFrame], int]:
    """Time stamp of each frame in ticks; counted from `origin` where the file has none (raw streams, some AVI)."""
    rate = stream.average_rate or stream.guessed_rate
    step = 1 / (rate * stream.time_base) if rate else Fraction(1)
    counted = Fraction(origin)

    def tick(frame: VideoFrame) -> int:
        nonlocal counted
        now = counted if frame.pts is None else Fraction(frame.pts)
        counted = now + step
        return round(now)

    return tick


class _ClipWriter:
    """Writes decoded frames, scaled, cropped or laid in the middle, and turned upright, to the places that are due.

    libswscale goes to planar RGB at the final size, then packs it. Straight to rgb24 takes twice as long and halves the
    colour resolution: the packed writers skip full chroma interpolation and have no SIMD version.
    """

    def __init__(self, path: Path, stream: VideoStream, due: list[int], out: np.ndarray, framing: Framing) -> None:
        self.due = due
        self.done = 0
        self._path = path
        self._out = out
        self._framing = framing
        self._pixel_shape = tags.pixel_shape(stream)
        self._colours, self._has_clear_parts = tags.colours_in(stream), tags.has_clear_parts(stream)
        self._scaler = VideoReformatter()

    def write_until(self, frame: VideoFrame, tick: int) -> bool:
        """Write `frame` to every place that is due before `tick`; True once all places are written."""
        first = self.done
        while self.done < len(self.due) and self.due[self.done] < tick:
            if self.done == first:
                if frame.is_corrupt:
                    raise MediaError(self._path, f"the picture at {float(frame.time or 0):.3f} s is damaged")
                self._write(frame, self._out[first])
            else:
                self._out[self.done] = self._out[first]
            self.done += 1
        return self.done == len(self.due)

    def _write(self, frame: VideoFrame, out: np.ndarray) -> None:
        turns, framing = tags.turns_of(frame), self._framing
        source = (round(frame.width * self._pixel_shape), frame.height)
        upright = source[::-1] if turns % 2 else source
        left, top, right, bottom = picture_box(upright, (out.shape[1], out.shape[0]), framing)
        as_stored = np.rot90(out[top:bottom, left:right], -turns)  # a view that lies as the stored picture does
        across, down = framing.stored(turns)
        if tags.is_mirrored(frame):
            as_stored, down = as_stored[::-1], 1 - down
        target_h, target_w = as_stored.shape[:2]
        width, height = (target_w, target_h) if framing.pad else cover_size(source, (target_w, target_h))
        planar = self._scaler.reformat(
            tags.on_white(frame) if self._has_clear_parts else frame,
            width,
            height,
            "gbrp16le" if self._colours else "gbrp",
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        top, left = math.floor((height - target_h) * down), math.floor((width - target_w) * across)
        planes = []
        for plane in tags.RGB_OF_GBR:
            buffer = np.frombuffer(planar.planes[plane], "<u2" if self._colours else np.uint8)
            rows = buffer.reshape(height, -1)  # with padding at each row's end
            planes.append(rows[top : top + target_h, left : left + target_w])
        if self._colours:
            planes = ordinary(np.stack(planes), self._colours)
        for channel, plane in enumerate(planes):
            as_stored[..., channel] = plane
