"""Checks of the keys that say where media and captions are: which of them have no effect beside the others."""

from collections.abc import Iterator

from utils.config.dataset_schema import DirectoryConfig

SOURCES = (".csv", ".jsonl", ".tar")  # what files can stand in a folder's place: those of utils.data.sources


def caption_advice(folder: DirectoryConfig) -> Iterator[tuple[str, str]]:
    """What is worth saying of one folder: the key, and what follows its name."""
    shuffles = folder.shuffle_tags or folder.cache_shuffle_num
    if folder.shuffle_tags and not folder.cache_shuffle_num:
        yield "shuffle_tags", " = true shuffles each caption once, for good; cache_shuffle_num = 10 gives 10 orders"
    if folder.keep_first and not shuffles:
        yield "keep_first", f" = {folder.keep_first} has no effect without cache_shuffle_num"
    if folder.default_caption.strip() and not folder.skip_empty_caption:
        yield "skip_empty_caption", " = false has no effect with default_caption"
    if folder.recursive and folder.path.suffix.lower() in SOURCES:
        yield "recursive", f" = true has no effect on a {folder.path.suffix} file"
