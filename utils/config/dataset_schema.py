"""The schema of a dataset TOML: settings at the top hold for every [[directory]] that does not set them itself."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from utils.config.fields import (
    AspectRatios,
    ClipMode,
    Count,
    Crop,
    FrameBuckets,
    Lax,
    Resolutions,
    ShortClips,
    SizeBuckets,
    SourceRate,
    Suffix,
    Table,
    UserPath,
    Weight,
    checked,
    not_yet,
)

_NO_DELIMITER = "is empty; write what parts one tag from the next, such as ', '"
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
    num_ar_buckets: Annotated[int, Field(ge=1, le=1000)] = 7
    """Number of aspect ratios, spaced evenly in the logarithm from min_ar to max_ar."""
    ar_buckets: AspectRatios = ()
    """Aspect ratios by hand, in place of the three keys above: numbers, or [width, height] pairs."""
    frame_buckets: FrameBuckets = (1,)
    """Lengths in frames at the model's rate; 1 is for images and is always there."""
    size_buckets: SizeBuckets = ()
    """Buckets by hand, [width, height, frames], in place of resolutions, aspect ratios and frame_buckets."""
    bucket_no_upscale: bool = False
    """Enlarge nothing: what is smaller than its bucket is trained at the largest size of that shape that it covers."""
    crop: Crop = "center"
    """What is done where the shape of a file is not its bucket's: the middle is kept, a part drawn by chance, or all of
    it, with black around it that is left out of the loss."""
    crop_sample: Count = 1
    """Crops that take turns with crop = 'random'."""
    flip: bool = False
    """Train each clip mirrored as well: its uses take the plain and the mirrored one in turn."""
    video_clip_mode: ClipMode | None = None
    """Which part of a video is used, or which parts. Default: what the run TOML says."""
    frame_stride: Count = 1
    """Frames from one clip's start to the next with video_clip_mode = 'slide'."""
    frame_sample: Count = 1
    """Clips of a video with 'uniform', and starts that take turns with 'random_start'."""
    max_frames: Count = 129
    """Longest clip with video_clip_mode = 'full', in frames at the model's rate."""
    fps: SourceRate = "model"
    """'model': videos are brought to the model's rate. 'native': their frames are taken as they are. A number: what the
    files really have, whatever they say of themselves; from there they are brought to the model's rate."""
    short_clips: ShortClips = "skip"
    """What becomes of a video shorter than every bucket: left out, looped, its last frame held, or a bucket of its
    own length."""
    stills: bool = False
    """Train single frames of videos too, one wherever video_clip_mode starts a clip; for models that take images."""
    num_repeats: Annotated[float, Field(gt=0)] = 1.0
    """How often a clip counts in an epoch; 0.5 uses half of the clips in each."""
    skip_empty_caption: bool = True
    """Leave out clips without a caption, listed by name; false trains them with an empty one."""
    recursive: bool = False
    """Read the folders inside a folder too."""
    media: Literal["all", "videos", "images"] = "all"
    """What of a folder is used, where both lie in it."""
    caption_extension: Suffix = ".txt"
    """How the names of the text files with captions end."""
    default_caption: str = ""
    """The caption of clips that have none, which are then not left out."""
    caption_prefix: str = ""
    """Put before every caption, as it stands: end it with a space or comma."""
    trigger_word: str = ""
    """Takes the place of `[trigger]` in captions and in caption_prefix."""
    shuffle_tags: bool = False
    """Shuffle the tags of captions, once each unless cache_shuffle_num says how often."""
    cache_shuffle_num: Annotated[int, Field(ge=0)] = 0
    """Shuffled orders of each caption's tags that are cached and drawn from; 0 leaves the tags as they are."""
    cache_shuffle_delimiter: Annotated[str, checked(lambda value: value != "", _NO_DELIMITER)] = ", "
    """What parts one tag from the next."""
    keep_first: Annotated[int, Field(ge=0)] = 0
    """Tags at a caption's beginning that shuffling leaves in their places."""

    shuffle_metadata: Annotated[bool, not_yet(True, "remove it: the order comes from seed")] = True
    """diffusion-pipe: shuffles the files once before all else. Here the order comes from the run's seed."""
    online_captions: Annotated[bool, not_yet(False)] = False
    """diffusion-pipe: captions read while training. Not supported yet."""


class DirectoryConfig(SharedSettings):
    """One folder of clips and images, settings of the top level already filled in."""

    path: UserPath
    """A folder, an index of clips (.jsonl, .csv) or a .tar archive; absolute, or seen from where the trainer starts."""

    mask_path: UserPath | None = None
    """A folder of images or videos named as the clips are: what is black in one is left out of the loss. An image
    stands for all frames; a file without a mask is trained whole."""
    default_mask_file: UserPath | None = None
    """The mask of files that have none in mask_path, or in their index."""
    control_path: Annotated[str | None, not_yet(None)] = None
    """diffusion-pipe: reference images of editing models. Not supported yet."""
    weight: Weight = 1.0
    """What its clips count in the loss while training; num_repeats says how often they are used."""
    is_regularization: bool = False
    """Hold the adapter, on these clips, to what the model without it predicts, in place of training them."""


class DatasetConfig(SharedSettings):
    """A whole dataset TOML."""

    directory: Annotated[tuple[DirectoryConfig, ...], Lax, checked(lambda value: value != [], _NO_FOLDER)]
    """One or more folders, each begun with [[directory]] and its path."""
    subsample_ratio: Annotated[float | None, not_yet(None, "remove it and set num_repeats to the share")] = None
    """diffusion-pipe: uses a share of the batches. Not supported."""

    def held_out(self) -> "DatasetConfig":
        """As it is evaluated: nothing mirrored, nothing cropped by chance, so that each clip is one sample."""
        changes = {"flip": False, "crop_sample": 1}
        folders = tuple(
            folder.model_copy(update=changes | {"crop": "center" if folder.crop == "random" else folder.crop})
            for folder in self.directory
        )
        return self if folders == self.directory else self.model_copy(update={"directory": folders})

    @model_validator(mode="before")
    @classmethod
    def _hand_down(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("directory"), (list, tuple)):
            return value
        shared = {key: value[key] for key in SharedSettings.model_fields if key in value}
        folders = [{**shared, **folder} if isinstance(folder, dict) else folder for folder in value["directory"]]
        return {**value, "directory": folders}
