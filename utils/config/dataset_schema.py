"""The schema of a dataset TOML: settings at the top hold for every [[directory]] that does not set them itself."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from utils.config.fields import (
    AspectRatios,
    Count,
    FrameBuckets,
    Lax,
    Resolutions,
    SizeBuckets,
    Table,
    UserPath,
    checked,
    not_yet,
)

_NO_FOLDER = "is empty; add a [[directory]] with a path"


class SharedSettings(Table):
    """What can stand at the top and in a [[directory]]. Aspect ratios are width / height, sizes are pixels."""

    resolutions: Resolutions = ()
    """Areas to train at: sides of a square, or [width, height] pairs. Every clip is used once for each of them."""
    enable_ar_bucket: bool = False
    """Sort clips by shape; otherwise all are cropped to the resolution as it stands, a square or [width, height]."""
    min_ar: Annotated[float, Field(gt=0)] = 0.5
    """Smallest aspect ratio of the buckets."""
    max_ar: Annotated[float, Field(gt=0)] = 2.0
    """Largest aspect ratio of the buckets."""
    num_ar_buckets: Count = 7
    """Number of aspect ratios, spaced evenly in the logarithm from min_ar to max_ar."""
    ar_buckets: AspectRatios = ()
    """Aspect ratios by hand, in place of the three keys above: numbers, or [width, height] pairs."""
    frame_buckets: FrameBuckets = (1,)
    """Lengths in frames at the model's rate; 1 is for images and is always there."""
    size_buckets: SizeBuckets = ()
    """Buckets by hand, [width, height, frames], in place of resolutions, aspect ratios and frame_buckets."""
    num_repeats: Annotated[float, Field(gt=0)] = 1.0
    """How often a clip counts in an epoch; 0.5 uses half of the clips in each."""
    skip_empty_caption: bool = True
    """Leave out clips without a caption, listed by name; false trains them with an empty one."""
    caption_prefix: str = ""
    """Put before every caption, as it stands: end it with a space or comma."""

    shuffle_tags: Annotated[bool, not_yet(False)] = False
    """diffusion-pipe: shuffles the tags of a caption. Not supported yet."""
    cache_shuffle_num: Annotated[int, not_yet(0)] = 0
    """diffusion-pipe: caches several shufflings of the tags. Not supported yet."""
    cache_shuffle_delimiter: str = ", "
    """diffusion-pipe: goes with cache_shuffle_num. Accepted, without effect."""
    shuffle_metadata: Annotated[bool, not_yet(True, "remove it: the order comes from seed")] = True
    """diffusion-pipe: shuffles the files once before all else. Here the order comes from the run's seed."""
    online_captions: Annotated[bool, not_yet(False)] = False
    """diffusion-pipe: captions read while training. Not supported yet."""


class DirectoryConfig(SharedSettings):
    """One folder of clips and images, settings of the top level already filled in."""

    path: UserPath
    """The folder, absolute or seen from where the trainer is started. Captions lie beside the files as `<name>.txt`."""

    mask_path: Annotated[str | None, not_yet(None)] = None
    """diffusion-pipe: masks for the loss. Not supported yet."""
    default_mask_file: Annotated[str | None, not_yet(None)] = None
    """diffusion-pipe: the mask of files without one. Not supported yet."""
    control_path: Annotated[str | None, not_yet(None)] = None
    """diffusion-pipe: reference images of editing models. Not supported yet."""


class DatasetConfig(SharedSettings):
    """A whole dataset TOML."""

    directory: Annotated[tuple[DirectoryConfig, ...], Lax, checked(lambda value: value != [], _NO_FOLDER)]
    """One or more folders."""
    subsample_ratio: Annotated[float | None, not_yet(None, "remove it and set num_repeats to the share")] = None
    """diffusion-pipe: uses a share of the batches. Not supported."""

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("directory"), (list, tuple)):
            return value
        shared = {key: value[key] for key in SharedSettings.model_fields if key in value}
        folders = [{**shared, **folder} if isinstance(folder, dict) else folder for folder in value["directory"]]
        return {**value, "directory": folders}
