"""The field types that the schemas share: paths, counts, batch sizes, and keys that are known but not honoured yet."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict


class Table(BaseModel):
    """A TOML table: unknown keys refused, no silent conversions, immutable, the docstring under a key is its manual."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4095  # of Linux's file systems
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def refusal(path: Path) -> str | None:
    """Why `path` can be that of no file here, and the mend."""
    text = str(path)
    if path == Path():
        return "is empty; write a path, or remove the key"
    if _CONTROL.search(text):
        return "has a control character in it; write the path as plain text"
    if "${" in text:
        return "has a variable in it, which is not filled in here; write the path out"
    if len(text.encode()) > MOST_PATH_BYTES or any(len(part.encode()) > MOST_NAME_BYTES for part in path.parts):
        return "is too long for a path; write a shorter one"
    try:
        path.expanduser()
    except RuntimeError:
        return f"has a home folder that is not known here, {path.parts[0]}; write the path out"
    return None


def _expand(path: Path) -> Path:
    if wrong := refusal(path):
        raise ValueError(wrong)
    return path.expanduser()


class Refused(AfterValidator):
    """Marks a key that is known, and refused unless its value asks for nothing."""


def not_yet(inactive: Any, mend: str = "remove it") -> Refused:
    """A key that is known and refused: `inactive` is the one value that asks for nothing and therefore passes."""

    def check(value: Any) -> Any:
        if value != inactive:
            raise ValueError(f"is not supported yet; {mend}")
        return value

    return Refused(check)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _int_row(value: Any, length: int, least: int = 1) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == length
        and all(_is_int(item) and item >= least for item in value)
    )


def checked(test: Callable[[Any], bool], complaint: str) -> BeforeValidator:
    """A whole-value test in place of pydantic's branch-by-branch report on unions, which names no key of the user's."""

    def check(value: Any) -> Any:
        if not test(value):
            raise ValueError(complaint)
        return value

    return BeforeValidator(check)


def rows(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list, all items of which pass `test`."""
    return lambda value: isinstance(value, (list, tuple)) and all(test(item) for item in value)


def _is_batch_size(value: Any) -> bool:
    return (_is_int(value) and value >= 1) or (rows(lambda item: _int_row(item, 2))(value) and len(value) > 0)


def _is_resolution(value: Any) -> bool:
    return (_is_int(value) and value >= 1) or _int_row(value, 2)


def _is_aspect_ratio(value: Any) -> bool:
    return (_is_number(value) and 0 < value < float("inf")) or _int_row(value, 2)


MOST_FPS = 1000  # cameras for slow motion give 960; with far more every video is shorter than a frame


def _is_rate(value: Any) -> bool:
    return value in ("model", "native") if isinstance(value, str) else _is_number(value) and 1 <= value <= MOST_FPS


def _is_weight(value: Any) -> bool:
    return _is_number(value) and 0 < value < float("inf")


def _is_suffix(value: Any) -> bool:
    return isinstance(value, str) and len(value) > 1 and value.startswith(".") and not set("/\\\0 ") & set(value)


def _is_path_or_paths(value: Any) -> bool:
    given = list(value.values()) if isinstance(value, dict) else [value]
    return bool(given) and all(isinstance(path, (str, Path)) and Path(path) != Path() for path in given)


# TOML has arrays and strings only, so a tuple and a path are taken from them; what is in them stays strict.
Lax = Strict(False)
UserPath = Annotated[Path, Lax, AfterValidator(_expand)]
Pair = Annotated[tuple[int, int], Lax]
Triple = Annotated[tuple[int, int, int], Lax]
Count = Annotated[int, Field(ge=1)]
Cadence = Annotated[int, Field(ge=1)] | None
FloatDtype = Literal["float32", "bfloat16", "float16"]
# The names are those of utils.data.clips.CLIP_MODES, which says what each does.
ClipMode = Literal[
    "single_beginning",
    "single_middle",
    "head",
    "middle",
    "chunk",
    "slide",
    "uniform",
    "multiple_overlapping",
    "full",
    "random_start",
    "spread",
]
ShortClips = Literal["skip", "loop", "pad", "smaller_bucket"]
Crop = Literal["center", "random", "pad"]  # the names of utils.data.clips.CROPS

ExpertPaths = Annotated[
    UserPath | dict[str, UserPath],
    checked(
        _is_path_or_paths,
        "is not a path; write one path, or one for each expert: {high_noise = '...', low_noise = '...'}",
    ),
]
SourceRate = Annotated[
    float | Literal["model", "native"],
    checked(
        _is_rate,
        "is no frame rate; use 'model', 'native', or the frames a second that the files really have, without quotes, "
        f"1 to {MOST_FPS}",
    ),
]
Weight = Annotated[
    float, checked(_is_weight, "is no weight; use a number above 0, or remove the [[directory]] to train without it")
]
Suffix = Annotated[str, checked(_is_suffix, "is not how a file's name ends; write it with its dot: '.txt'")]
BatchSize = Annotated[
    int | Annotated[tuple[Pair, ...], Lax],
    checked(
        _is_batch_size,
        "is not a batch size; use a whole number of 1 or more, or [resolution, batch] pairs: [[512, 4], [1024, 1]]",
    ),
]
Resolutions = Annotated[
    tuple[int | Pair, ...],
    Lax,
    checked(
        rows(_is_resolution),
        "is not a list of resolutions; use sides of a square in pixels: [512], or [width, height] pairs: [[832, 480]]",
    ),
]
AspectRatios = Annotated[
    tuple[float | Pair, ...],
    Lax,
    checked(
        rows(_is_aspect_ratio),
        "is not a list of aspect ratios; use width/height: [1.0, 1.78], or [width, height] pairs: [[832, 480]]",
    ),
]
SizeBuckets = Annotated[
    tuple[Triple, ...],
    Lax,
    checked(
        rows(lambda item: _int_row(item, 3)),
        "is not a list of buckets; use [width, height, frames] triples: [[832, 480, 81]]",
    ),
]
FrameBuckets = Annotated[
    tuple[int, ...],
    Lax,
    checked(
        rows(lambda item: _is_int(item) and item >= 1),
        "is not a list of frame counts; use whole numbers of 1 or more: [1, 33, 81]",
    ),
    # An image always has a home, as in diffusion-pipe: 1 need not be written.
    AfterValidator(lambda frames: tuple(sorted({1, *frames}))),
]
