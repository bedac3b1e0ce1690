"""Hands out what the cache lacks, item by item, among the ranks, nodes and runs that share a folder; each to one."""

import contextlib
import json
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Generic, Protocol, TypeVar

from utils.data.cache import CacheStore, write_whole
from utils.data.crew import STALE_S, Crew
from utils.data.listing import Skipped

CLAIMS_FOLDER = "claims"  # in the cache's root: one file an item that somebody is at
FAILED_FOLDER = "failed"  # in the job's folder: one note an item that could not be made
_LOOK_S = 0.5  # between looks at what others are at


class HasKey(Protocol):
    @property
    def key(self) -> str: ...


JobT = TypeVar("JobT", bound=HasKey)


class Handout(Generic[JobT]):
    """The entries of one kind that a job lacks, as one of its ranks takes them.

    An item is claimed by a file that only one process can create; it names the file in which its owner beats, so the
    claim of a dead one can be told and taken over. All walk the same list from the front, where the largest items are,
    and claim a few ahead: so a slow rank takes fewer, and nobody waits long for the last ones.

    Args:
        jobs: in the order in which they should be done.
        regenerate: make every one anew, whatever the cache holds, each on one rank of this job.
    """

    def __init__(
        self, store: CacheStore, kind: str, jobs: Sequence[JobT], crew: Crew, *, regenerate: bool = False
    ) -> None:
        self._store, self._kind, self._crew, self._anew = store, kind, crew, regenerate
        # Claims of a regeneration stay until its end: that an entry is there says nothing about whether it is new.
        self._claims = (crew.folder if regenerate else store.root) / CLAIMS_FOLDER
        self._claims.mkdir(parents=True, exist_ok=True)
        self._owner = os.path.relpath(crew.beat, store.root)
        self._todo = deque(jobs)
        self._elsewhere: dict[str, JobT] = {}  # somebody else is at it
        self._held: set[str] = set()
        self._company = crew.world > 1
        self._looked = 0.0
        self.came = 0  # made, or given up, by others
        self.damaged = 0  # were there and could not be used

    def take(self) -> Iterator[JobT]:
        """Items that are this rank's to make, claimed when they are asked for; give each of them back to `finish`."""
        while self._todo:
            job = self._todo.popleft()
            if self._is_made(job):
                self.came += 1
            elif not self._claim(job):
                self._company = True
                if self._anew:
                    self.came += 1
                else:
                    self._elsewhere[job.key] = job
            elif self._is_made(job) or self._is_given_up(job):  # between the two looks
                self._release(job.key)
                self.came += 1
            else:
                self.damaged += not self._anew and self._store.path(self._kind, job.key).exists()
                self._held.add(job.key)
                yield job

    def ahead(self, most: int) -> int:
        """How many items a rank may claim before their turn: fewer towards the end, where others could do them."""
        left = len(self._todo) + len(self._held)
        if self._company:
            left = max(2, left // (2 * max(2, self._crew.world)))
        return max(1, min(most, left))

    def finish(self, job: JobT, failure: Skipped | None = None) -> None:
        """Its entry is written, or it cannot be made: `failure` is the file and the reason."""
        if failure:
            note = {"path": str(failure.path), "reason": failure.reason, "bad": failure.bad, "black": failure.black}
            write_whole(_note(self._crew, job.key), json.dumps(note).encode())
        self._held.discard(job.key)
        if not self._anew:
            self._release(job.key)

    def drop(self) -> None:
        """Leave what was claimed and not finished to others."""
        for key in self._held:
            self._release(key)
        self._held.clear()

    def wait(self, meanwhile: Callable[[], None]) -> bool:
        """Until something can be taken again, since its owner died or gave it up, or all is made: False.

        Args:
            meanwhile: called now and then.
        """
        while self._elsewhere and not self._todo:
            self._crew.check()
            self.look()
            meanwhile()
            if self._elsewhere and not self._todo:
                sleep(_LOOK_S)
        return bool(self._todo)

    def look(self) -> None:
        """See what has become of the items that others are at. Cheap to call often."""
        if monotonic() - self._looked < _LOOK_S:
            return
        for key, job in list(self._elsewhere.items()):
            if self._is_made(job) or self._is_given_up(job):
                self.came += 1
            elif self._is_held(self._claim_path(key)):
                continue
            else:
                self._todo.append(job)
            del self._elsewhere[key]
        self._looked = monotonic()

    @property
    def num_elsewhere(self) -> int:
        return len(self._elsewhere)

    @property
    def num_left(self) -> int:
        """Not made yet, as far as this rank has looked."""
        return len(self._todo) + len(self._held) + len(self._elsewhere)

    # --- claims -------------------------------------------------------------------------------------------------------

    def _is_made(self, job: JobT) -> bool:
        return not self._anew and self._store.has(self._kind, job.key)

    def _is_given_up(self, job: JobT) -> bool:
        """Whether a rank of this job has failed on it: another would fail too."""
        return _note(self._crew, job.key).exists()

    def _claim_path(self, key: str) -> Path:
        return self._claims / f"{self._kind}-{key}"

    def _claim(self, job: JobT) -> bool:
        path = self._claim_path(job.key)
        for _ in range(2):
            try:
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                if self._anew or not self._free_dead(path):
                    return False
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(self._owner)
            return True
        return False

    def _release(self, key: str) -> None:
        self._claim_path(key).unlink(missing_ok=True)

    def _is_held(self, path: Path) -> bool:
        """Whether a living process is at it."""
        try:
            owner = path.read_text()
            # empty: its owner is between two calls, or died there
            return self._crew.lives(self._store.root / owner) if owner else self._crew.age_s(path) < STALE_S
        except FileNotFoundError:
            return False

    def _free_dead(self, path: Path) -> bool:
        """Take away the claim of a dead owner; False where the owner lives.

        Moved aside first, since two may find it dead at once, and the slower must not remove the new claim of the
        faster. What little time is left for a mistake costs one item made twice, to the same end.
        """
        try:
            owner = path.read_text()
            if self._is_held(path):
                return False
            aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            path.rename(aside)
            if aside.read_text() != owner:
                aside.rename(path)
                return False
            aside.unlink()
        except FileNotFoundError:
            pass  # gone by itself
        return True


def failure_of(crew: Crew, key: str) -> Skipped | None:
    """File and reason, of an item that some rank of this job could not make."""
    with contextlib.suppress(FileNotFoundError):
        note = json.loads(_note(crew, key).read_bytes())
        return Skipped(Path(note["path"]), note["reason"], note["bad"], note["black"])
    return None


def _note(crew: Crew, key: str) -> Path:
    return crew.folder / FAILED_FOLDER / f"{key}.json"
