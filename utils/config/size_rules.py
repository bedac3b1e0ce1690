"""Advice on the sizes that a dataset asks for, held against what the model can take."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from utils.config.dataset_schema import DirectoryConfig

if TYPE_CHECKING:  # at run time models would bring torch
    from models.base import MediaSpec

FAR = 0.1  # share of a side or of the aspect ratio; smaller changes are the usual rounding, 1080 to 1088 for one


def size_advice(folder: DirectoryConfig, spec: "MediaSpec") -> Iterator[tuple[str, str]]:
    """Sizes that come out far from what was written: the key, and what follows its name.

    Aspect-ratio buckets are sizes that nobody wrote, and `size_buckets` are refused where they do not fit.
    """
    if folder.size_buckets or folder.enable_ar_bucket:
        return
    for asked in folder.resolutions:
        width, height = (asked, asked) if isinstance(asked, int) else asked
        new_width, new_height = spec.nearest_side(width), spec.nearest_side(height)
        changes = new_width / width, new_height / height, (new_width / new_height) / (width / height)
        if any(abs(change - 1) > FAR for change in changes):
            shown = asked if isinstance(asked, int) else [*asked]
            yield (
                "resolutions",
                f" has {shown}, and clips will be of {new_width}x{new_height} px: sides of this model are multiples of "
                f"{spec.pixel_multiple}; write sizes that are, to choose them yourself",
            )
