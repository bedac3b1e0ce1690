"""A musubi-tuner dataset TOML, as it is: its keys checked by their own names and put into ours."""

import math
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from utils.config.clip_rules import whole_lengths
from utils.config.dataset_schema import DirectoryConfig
from utils.config.fields import MOST_FPS, Count, Lax, Pair, Suffix, Table, UserPath, checked, not_yet, rows
from utils.config.messages import Problem, dotted, problems, shown
from utils.config.source import ConfigError, Location, Source

# Names, defaults and rules: github.com/kohya-ss/musubi-tuner, dataset/config_utils.py and image_video_dataset.py.
_TABLES = ("general", "datasets")
_SIDE_STEP_PX = 16  # of its buckets, for Wan
_FRAME_STRIDE = 4  # its target_frames are 4n + 1 for every model
_FIRST_SIZE = (960, 544)
_MOST_PX = 1 << 14  # every width up to the side of the square is a bucket

_OTHER_MODEL = "it is for models that this trainer does not train; remove it"
_NOT_WHOLE = (
    f"is not a resolution; use the side of a square, or [width, height], whole numbers of pixels, {_MOST_PX} at most"
)
_NO_FRAMES = "is not a list of frame counts; use whole numbers of 1 or more: [25, 45]"
_NO_DATASET = "holds no list of folders; begin each with [[datasets]], and a video_directory or an image_directory"
_VIDEO_SOURCES = ("video_directory", "video_jsonl_file")
_SOURCES = (*_VIDEO_SOURCES, "image_directory", "image_jsonl_file")
_OURS = (("in a dataset TOML of this trainer, with a [[directory]] for each [[datasets]]", DirectoryConfig),)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_resolution(value: Any) -> bool:
    return _is_px(value) or (isinstance(value, list) and len(value) == 2 and all(map(_is_px, value)))


def _is_px(value: Any) -> bool:
    return _is_side(value) and value <= _MOST_PX


def _are_lengths(value: Any) -> bool:
    return rows(_is_side)(value) and len(value) > 0


class _Shared(Table):
    """What can stand in [general] and in a [[datasets]]. The keys of videos can too, as in its earlier versions."""

    resolution: Annotated[int | Pair, checked(_is_resolution, _NOT_WHOLE)] = _FIRST_SIZE
    """Area to train at: [width, height] in pixels, or the side of a square."""
    caption_extension: Suffix = ".txt"
    """How the names of the text files with captions end."""
    batch_size: Count = 1
    """Samples of a batch. Here micro_batch_size_per_gpu in the run TOML says it."""
    num_repeats: Annotated[float, Field(gt=0)] = 1
    """How often a clip counts in an epoch."""
    enable_bucket: bool | None = None
    """Sort by shape, in place of cropping all to one. Default: videos yes, images no."""
    bucket_no_upscale: bool = False
    """Do not enlarge what is smaller than its bucket."""
    skip_corrupted_cache: bool = False
    """Go on without damaged files of the cache. Here they are always made anew."""
    target_frames: Annotated[tuple[int, ...], Lax, checked(_are_lengths, _NO_FRAMES)] = (1,)
    """Lengths of clips, in frames."""
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = "head"
    """Which parts of a video are used."""
    frame_stride: Count = 1
    """Frames from one clip's start to the next with 'slide'."""
    frame_sample: Count = 1
    """Clips of a video with 'uniform'."""
    max_frames: Count = 129
    """Longest clip with 'full', in frames."""
    source_fps: Annotated[float, Field(ge=1, le=MOST_FPS)] | None = None
    """Frames a second that the files have. Default: each frame is taken for one of the model's."""
    cache_directory: str | None = None
    """Where it keeps its cache. Without effect here."""


class MusubiDataset(_Shared):
    """One [[datasets]]."""

    video_directory: UserPath | None = None
    """A folder; its images are passed over."""
    image_directory: UserPath | None = None
    """A folder; its videos are passed over."""
    video_jsonl_file: UserPath | None = None
    """In place of a folder, a list: a JSON object a line with video_path and caption."""
    image_jsonl_file: UserPath | None = None
    """In place of a folder, a list: a JSON object a line with image_path and caption."""
    control_directory: Annotated[Any, not_yet(None, "control models cannot be trained; remove it")] = None
    multiple_target: Annotated[Any, not_yet(False, _OTHER_MODEL)] = False
    no_resize_control: Annotated[Any, not_yet(False, _OTHER_MODEL)] = False
    control_resolution: Annotated[Any, not_yet(None, _OTHER_MODEL)] = None
    flux_kontext_no_resize_control: Annotated[Any, not_yet(False, _OTHER_MODEL)] = False
    qwen_image_edit_no_resize_control: Annotated[Any, not_yet(False, _OTHER_MODEL)] = False
    qwen_image_edit_control_resolution: Annotated[Any, not_yet(None, _OTHER_MODEL)] = None
    fp_latent_window_size: Annotated[Any, not_yet(None, _OTHER_MODEL)] = None
    fp_1f_clean_indices: Annotated[Any, not_yet(None, _OTHER_MODEL)] = None
    fp_1f_target_index: Annotated[Any, not_yet(None, _OTHER_MODEL)] = None
    fp_1f_no_post: Annotated[Any, not_yet(False, _OTHER_MODEL)] = False


class _File(Table):
    """The whole of it."""

    general: _Shared = _Shared()
    """What holds for every [[datasets]] that does not say otherwise."""
    datasets: Annotated[
        tuple[MusubiDataset, ...], Lax, checked(lambda value: isinstance(value, list) and value != [], _NO_DATASET)
    ]
    """One or more folders, each begun with [[datasets]]."""


_VIDEO_KEYS = ("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames", "source_fps")
# ours -> theirs, where the value is the same
_SAME = {"num_repeats": "num_repeats", "caption_extension": "caption_extension"}
_SAME_OF_VIDEOS = {"video_clip_mode": "frame_extraction"} | {
    key: key for key in ("frame_stride", "frame_sample", "max_frames")
}


class Translated(NamedTuple):
    """The same dataset in our keys."""

    source: Source  # each key still on its line, under the name that the file gives it
    notices: list[str]  # what becomes of keys that have no equal here


def is_musubi(source: Source) -> bool:
    """Whether a dataset TOML is one of musubi-tuner's, by its tables."""
    return "directory" not in source.data and any(table in source.data for table in _TABLES)


def from_musubi(source: Source, batch_key: str = "micro_batch_size_per_gpu", run_batch: Any = 1) -> Translated:
    """`source` as `DatasetConfig` takes it.

    Args:
        batch_key: what says in the run TOML how large batches are, for what is said of batch_size.
        run_batch: its value.

    Raises:
        ConfigError: all that is wrong with the file, by its own keys.
    """
    try:
        file = _File.model_validate(source.data)
    except ValidationError as error:
        found = problems(error, source, _File, _OURS)
    else:
        folders = [_Folder(source, file, index, (batch_key, run_batch)) for index in range(len(file.datasets))]
        found = [problem for folder in folders for problem in folder.wrong()]
    if found:
        raise ConfigError([text for _, text in sorted(found, key=lambda problem: problem[0])])
    directories: list[dict[str, Any]] = []
    places: dict[Location, Location] = {}
    said: dict[str, list[Location]] = {}
    for folder in folders:
        directories.append(folder.directory())
        places |= folder.places
        for place, text in folder.said():
            said.setdefault(text, []).append(place)
    notices = [f"{source.where(where[0])}{text}{_more(where)}" for text, where in said.items()]
    names = {ours: dotted(theirs) for ours, theirs in places.items()}
    lines = {ours: source.line(theirs) for ours, theirs in places.items() if source.line(theirs)}
    data = {"directory": directories}
    return Translated(Source(source.path, data, lines, frozenset(), names), notices)


class _Folder:
    """One [[datasets]] with what it takes from [general]."""

    def __init__(self, source: Source, file: _File, index: int, run_batch: tuple[str, Any]) -> None:
        self._source, self._index, self._run_batch = source, index, run_batch
        self._own, self._general = file.datasets[index], file.general
        self._given = [key for key in _SOURCES if getattr(self._own, key) is not None]
        self._videos = self._given[:1] in ([key] for key in _VIDEO_SOURCES)
        self.places: dict[Location, Location] = {}  # our key -> where the file says it

    def wrong(self) -> list[Problem]:
        """What cannot work though each value by itself could."""
        here: Location = ("datasets", self._index)
        if len(self._given) != 1:
            several = f"has {' and '.join(self._given)}; give each a [[datasets]] of its own"
            none = "has no folder; add a video_directory or an image_directory"
            return [self._problem(here, several if self._given else none)]
        strays = [key for key in _VIDEO_KEYS if not self._videos and key in self._own.model_fields_set]
        text = f"is for videos, and this has {self._given[0]}; remove it"
        return [self._problem((*here, key), text) for key in strays]

    def directory(self) -> dict[str, Any]:
        """The [[directory]] that stands for it."""
        (source,) = self._given
        folder = {"path": str(self._take("path", source))}
        folder |= {"media": self._put("media", source, "videos" if self._videos else "images")}
        folder |= {ours: self._take(ours, theirs) for ours, theirs in _SAME.items()}
        size = self._size()
        folder["resolutions"] = self._put("resolutions", "resolution", [list(size)])
        if self._sorted():
            folder["enable_ar_bucket"] = self._put("enable_ar_bucket", "enable_bucket", True)
            folder["ar_buckets"] = self._put("ar_buckets", "resolution", [list(shape) for shape in shapes(size)])
            # There a file of less area than its bucket gets a shape of its own, its sides rounded down to 16 px, and
            # one of more area is enlarged where a side is too short. Here neither: `buckets.BucketTable.shapes`.
            folder["bucket_no_upscale"] = self._take("bucket_no_upscale", "bucket_no_upscale")
        if not self._videos:
            self._put("frame_buckets", source, None)  # what is said of it is of the kind of folder
            return folder
        folder |= {ours: self._take(ours, theirs) for ours, theirs in _SAME_OF_VIDEOS.items()}
        folder["frame_buckets"] = self._put("frame_buckets", "target_frames", list(self._lengths()[0]))
        stills = 1 in self._lengths()[0] and self._get("frame_extraction") != "full"
        folder["stills"] = self._put("stills", "target_frames", stills)
        folder["fps"] = self._put("fps", "source_fps", self._get("source_fps") or "native")
        return folder

    def said(self) -> list[tuple[Location, str]]:
        """What a person should know of it: where, and the text. The same text of several folders is said once."""
        notes = [("cache_directory", "cache_directory has no effect: cache_dir in the run TOML holds all entries")]
        notes = notes if self._get("cache_directory") is not None else []
        batch, (key, ours) = self._get("batch_size"), self._run_batch
        if batch not in (1, ours):
            text = f"batch_size = {batch} has no effect: {key} = {shown(ours)} in the run TOML holds"
            notes.append(("batch_size", text))
        if self._get("bucket_no_upscale") and not self._sorted():
            text = "bucket_no_upscale = true has no effect without enable_bucket, as in musubi-tuner"
            notes.append(("bucket_no_upscale", text))
        if self._videos:
            notes += self._said_of_videos()
        return [(self._where(key), text) for key, text in notes]

    def _said_of_videos(self) -> list[tuple[str, str]]:
        notes = []
        if self._get("enable_bucket") is False:
            width, height = self._size()
            text = f"enable_bucket = false crops videos to {width}x{height}; musubi-tuner heeds it for images alone"
            notes.append(("enable_bucket", text))
        if self._get("frame_extraction") != "full":
            changed = self._lengths()[1]
            if changed:
                notes.append(("target_frames", f"target_frames: {changed}"))
        if self._get("source_fps") is None:
            text = "source_fps is not set, so every frame is used, whatever the rate of the file, as in musubi-tuner"
            notes.append(("source_fps", text))
        return notes

    def _size(self) -> tuple[int, int]:
        size = self._get("resolution")
        return (size, size) if isinstance(size, int) else size

    def _sorted(self) -> bool:
        """Whether it is sorted by shape. musubi-tuner's videos are, whatever is said; here what is said holds."""
        said = self._get("enable_bucket")
        return self._videos if said is None else said

    def _lengths(self) -> tuple[tuple[int, ...], str | None]:
        return whole_lengths(self._get("target_frames"), _FRAME_STRIDE)

    def _get(self, key: str) -> Any:
        table = self._own if key in self._own.model_fields_set else self._general
        return getattr(table, key)

    def _where(self, key: str) -> Location:
        """Where the file says `key`, or the [[datasets]] that does without it."""
        places: list[Location] = [("datasets", self._index, key), ("general", key)]
        return next((place for place in places if self._source.holds(place)), ("datasets", self._index))

    def _put(self, ours: str, theirs: str, value: Any) -> Any:
        self.places["directory", self._index, ours] = self._where(theirs)
        return value

    def _take(self, ours: str, theirs: str) -> Any:
        return self._put(ours, theirs, self._get(theirs))

    def _problem(self, place: Location, text: str) -> Problem:
        name = dotted(place) if len(place) != 2 or place[0] == "general" else f"[{dotted(place)}]"
        return self._source.line(place), f"{self._source.where(place)}{name} {text}"


def shapes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """musubi-tuner's buckets for the area of `size`: (width, height) px, by its BucketSelector.

    Every width in steps of 16 px from half the side of the square to the square itself, with the height that is left of
    the area, and the same upright.
    """
    area = size[0] * size[1]
    side = math.isqrt(area)
    least = max(_SIDE_STEP_PX, _whole(side // 2))
    flat = [(short, _whole(area // short)) for short in range(least, side + _SIDE_STEP_PX, _SIDE_STEP_PX)]
    return sorted({*flat, *((height, width) for width, height in flat)})


def _whole(length: int) -> int:
    return max(_SIDE_STEP_PX, length // _SIDE_STEP_PX * _SIDE_STEP_PX)


def _more(places: list[Location]) -> str:
    """What follows a notice that is true in several places."""
    others = len(dict.fromkeys(places)) - 1
    return f" (the same in {others} more place{'s' if others > 1 else ''})" if others else ""
