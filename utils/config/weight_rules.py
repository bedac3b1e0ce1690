"""Checks of the keys that say what clips count in the loss, or that they hold the adapter to the base."""

import os
from collections.abc import Iterator, Sequence

from utils.config.dataset_schema import DirectoryConfig
from utils.config.schema import AdapterConfig
from utils.config.source import Location

HELD = "is_regularization"


def regularization_errors(
    adapter: AdapterConfig | None, directories: Sequence[DirectoryConfig]
) -> Iterator[tuple[Location, str]]:
    """Regularization sets of the training data that could hold nothing: where, and what is wrong."""
    held = [index for index, folder in enumerate(directories) if folder.is_regularization]
    for index in held if adapter is None else ():
        text = f"directory[{index}].{HELD} = true holds an adapter to what the model predicts without it"
        yield ("directory", index, HELD), f"{text}, and there is no [adapter]; add [adapter], or remove the key"
    if adapter and len(held) == len(directories):
        text = f"directory[0].{HELD} = true, as on every [[directory]], leaves no clips to learn from"
        yield ("directory", 0, HELD), f"{text}; add a [[directory]] of those, or remove the key"


def mask_errors(directories: Sequence[DirectoryConfig]) -> Iterator[tuple[Location, str]]:
    """Masks named where none can lie, of what is there: where, and what is wrong."""
    for index, folder in enumerate(directories):
        masks, one = folder.mask_path, folder.default_mask_file
        if masks and masks.is_file():
            text = f"directory[{index}].mask_path = '{masks}' is a file; name the folder that holds the masks"
            yield ("directory", index, "mask_path"), f"{text}, or make it default_mask_file, the mask of all"
        elif masks and masks.is_dir() and folder.path.is_dir() and os.path.samefile(masks, folder.path):
            text = f"directory[{index}].mask_path = '{masks}' is the folder of the clips"
            yield ("directory", index, "mask_path"), f"{text}; put the masks into one of their own"
        if one and one.is_dir():
            text = f"directory[{index}].default_mask_file = '{one}' is a folder; name an image or a video"
            yield ("directory", index, "default_mask_file"), f"{text}, or make it mask_path"


def held_out_advice(directories: Sequence[DirectoryConfig]) -> Iterator[tuple[Location, str]]:
    """The same keys in an eval dataset, where every clip is measured alike."""
    for index, folder in enumerate(directories):
        for key, told in (("weight", f"{folder.weight:g}"), (HELD, "true")):
            if getattr(folder, key) != DirectoryConfig.model_fields[key].default:
                text = f"directory[{index}].{key} = {told} has no effect in an eval dataset"
                yield ("directory", index, key), f"{text}: held-out clips are all measured alike"
