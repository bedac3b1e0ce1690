"""What came of filling the cache: everything is there, or noted as failed, or only a use of a sample is lost."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic, sleep

from utils.data.black_masks import remember_black
from utils.data.cache import CacheStore
from utils.data.crew import Crew
from utils.data.handout import failure_of
from utils.data.listing import Skipped, plural
from utils.data.manifest import Job, Manifest, nothing_left_without
from utils.data.records import MASK, TEXT

# NFS may hide a new file for so long from a machine that has looked for it before.
_ARRIVAL_S = 40.0
_LOOK_S = 0.5


def num_wanted(manifests: Iterable[Manifest], kind: str) -> int:
    """Distinct entries of one kind that all datasets together need."""
    wanted: set[str] = set()
    for manifest in manifests:
        if kind == TEXT:
            wanted.add(manifest.empty_text_key)
            wanted.update(key for entry in manifest.entries for key in entry.text_keys)
        elif kind == MASK:
            wanted.update(key for entry in manifest.entries for key in entry.mask_keys)
        else:
            wanted.update(key for entry in manifest.entries for of, key in entry.media() if of == kind)
    return len(wanted)


def audit(store: CacheStore, kind: str, jobs: Sequence[Job], crew: Crew) -> dict[str, Skipped]:
    """Key -> why, of the jobs that failed on whatever rank; every other one must have its entry."""
    failed: dict[str, Skipped] = {}
    patience = monotonic() + (_ARRIVAL_S if crew.world > 1 else 0)
    for job in jobs:
        while not store.has(kind, job.key):
            if failure := failure_of(crew, job.key):
                failed[job.key] = failure
                break
            if monotonic() > patience:
                raise RuntimeError(
                    f"{job.name} is missing from the cache at {store.path(kind, job.key)} after pre-caching, and no"
                    " rank reported a failure; do all nodes see the same cache folder?"
                )
            sleep(_LOOK_S)
    return failed


def refuse_losses(
    lost: Mapping[str, Skipped],
    failed: Mapping[str, Skipped],
    manifests: Sequence[Manifest],
    kind: str,
    skip_bad_media: bool,
) -> None:
    """Raises `ValueError` where the start must not go on without what was `lost` at the encoder of `kind`, or where
    that leaves no sample of a dataset; `failed` is what was lost at it and at those before it."""
    if lost and not skip_bad_media:
        raise ValueError(failure_list(lost, manifests, kind))
    for manifest in manifests if lost else ():
        if manifest.entries and not any(entry.is_free_of(failed) for entry in manifest.entries):
            raise ValueError(nothing_left_without(manifest, failed))


def failure_list(failed: Mapping[str, Skipped], manifests: Sequence[Manifest], kind: str) -> str:
    """The error that names them all."""
    masks = [item for manifest in manifests for _, item in manifest.lost_by_masks(failed)]
    distinct = dict.fromkeys(masks or failed.values())  # a mask may be black for many crops
    lines = "".join(f"\n  {item.path}: {item.reason}" for item in distinct)
    noun, what = ("mask", "cannot be used") if kind == MASK else ("clip", "cannot be decoded")
    one, several = ("its clip", "their clips") if kind == MASK else ("it", "them")
    rest = one if len(distinct) == 1 else several
    return f"{plural(len(distinct), noun)} {what} (skip_bad_media = true goes on without {rest}):{lines}"


def black_of(lost: Mapping[str, Skipped], root: Path | None) -> frozenset[str]:
    """Which of the masks that could not be made are black; remembered for other starts in the cache at `root`."""
    black = frozenset(key for key, why in lost.items() if why.black)
    if root:
        remember_black(root, black)
    return black


def less_spared(
    lost: Mapping[str, Skipped], manifests: Sequence[Manifest], black: frozenset[str]
) -> tuple[dict[str, Skipped], list[Manifest]]:
    """The masks without which samples are lost, and the manifests without the uses that are: a sample goes where the
    mask of its every turn is black, and else those turns alone."""
    settled = [manifest.settled(black) for manifest in manifests]
    before, after = (
        {key for manifest in each for entry in manifest.entries for key in entry.mask_keys if key in lost}
        for each in (manifests, settled)
    )
    return {key: why for key, why in lost.items() if key in after or key not in before}, settled
