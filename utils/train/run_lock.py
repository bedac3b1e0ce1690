"""Who is at work in a run folder: one start at a time, and a dead one holds it no longer."""

import errno
import fcntl
import json
import os
import shlex
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from utils.data.liveness import born_at, machine
from utils.train.triggers import QUIT_FILE

NAME = "in_use.json"
BEAT_S = 5.0
SILENT_S = 30.0  # one of another machine that has not beaten for so long is dead
FOLLOW_S = 30.0  # that the ranks of a start have to end after its first one
LOOK_S = 0.25
_HELD = (errno.EACCES, errno.EAGAIN)


class Holder(NamedTuple):
    """The start that holds a folder, as told by its rank 0."""

    machine: str  # the same for processes that see each other
    host: str
    pid: int
    born: str
    since: str

    @property
    def boot(self) -> str:
        """The same for processes of one kernel, whose locks on any disk see each other."""
        return self.machine.split(" ")[0]

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class InUse(ValueError):
    """Another start is at work in a run folder.

    Attributes:
        told: the folder, and who it is.
        way_out: how to end that one.
    """

    def __init__(self, run_dir: Path, who: str, way_out: str = "") -> None:
        self.told = f"the run folder {run_dir} is in use by {who}"
        self.way_out = way_out or f"touch {shlex.quote(str(run_dir / QUIT_FILE))}"
        mend = f"wait for its end, stop it ({self.way_out}), or start anew without --resume_from_checkpoint"
        super().__init__(f"{self.told}; {mend}")


class RunLock:
    """One rank's part in holding `<run>/in_use.json`, whose byte N rank N locks.

    The kernel frees the locks of a process that dies, however it does. Locks of record (`lockf`), since a process that
    is forked off would share the other kind, and hold it beyond the end of this one. Disks that machines share may not
    pass locks on, so rank 0 also touches the file now and then.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / NAME
        self._descriptor: int | None = None
        self._stop = threading.Event()

    def take(self, tell: Callable[[str], None], *, silent_s: float = SILENT_S, follow_s: float = FOLLOW_S) -> None:
        """On rank 0, before the others `follow`.

        Args:
            tell: what is waited for.

        Raises:
            InUse: another start is at work there.
            OSError: the file cannot be written.
        """
        deadline, told = time.monotonic() + follow_s, False
        while True:
            before = self._refuse_living_elsewhere(tell, silent_s)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            locked = self._lock()
            if locked and self._is_current():
                break
            # by its rank 0, or only by ranks that are about to follow it
            if not locked and not self._lock(1):
                self._close()
                raise self._refusal(before)
            if not locked and time.monotonic() > deadline:
                self._close()
                raise self._refusal_of_followers(before)
            self._close()
            if not locked:
                if not told:
                    tell(f"waiting up to {follow_s:g} s for the last ranks of an earlier start to leave {self._path}")
                told = True
                time.sleep(LOOK_S)
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        holder = Holder(machine(), socket.gethostname(), os.getpid(), born_at(os.getpid()), now)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder._asdict()).encode(), 0)
        with suppress(OSError):
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 0, 1)  # bytes of the others
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def follow(self, rank: int) -> None:
        """On the other ranks: a start that comes after this one waits for their ends too."""
        with suppress(OSError):  # a disk without locks, or that hesitates
            self._descriptor = os.open(self._path, os.O_RDWR)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def release(self, is_main: bool, clean: bool) -> None:
        """This rank leaves the folder.

        Args:
            clean: so do the others; else they may need a moment, and what comes next waits for them.
        """
        self._stop.set()
        with suppress(OSError):
            if is_main and self._descriptor is not None:
                os.ftruncate(self._descriptor, 0)
                if clean:
                    self._path.unlink(missing_ok=True)
        self._close()

    # --- looking ------------------------------------------------------------------------------------------------------

    def _refuse_living_elsewhere(self, tell: Callable[[str], None], silent_s: float) -> Holder | None:
        """Who is written there. Locks tell of those on this machine; one of another is watched for a sign of life, for
        clocks differ. Nothing of this process is locked yet: to close a file frees its locks."""
        holder = self._read()
        if holder is None or holder.boot == machine().split(" ")[0]:
            return holder
        first = self._touched()
        tell(f"{self._path} says that {holder} is at work there; looking for {silent_s:g} s whether that is so")
        deadline = time.monotonic() + silent_s
        while time.monotonic() < deadline:
            time.sleep(min(LOOK_S, silent_s))
            if self._read() is None:
                return None
            if self._touched() != first:
                raise self._refusal(holder)
        return holder

    def _refusal(self, holder: Holder | None) -> InUse:
        return InUse(self._path.parent, str(holder or self._read() or "another start"))

    def _refusal_of_followers(self, holder: Holder | None) -> InUse:
        """No rank 0 is there to read a file that stops it."""
        first = f" ({holder})" if holder else ""
        who = f"processes of an earlier start, whose rank 0{first} has ended"
        return InUse(self._path.parent, who, f"fuser -v {shlex.quote(str(self._path))} lists them")

    def _read(self) -> Holder | None:
        try:
            return Holder(**json.loads(self._path.read_bytes()))
        except (OSError, ValueError, TypeError):  # absent, or let go
            return None

    def _touched(self) -> int:
        with suppress(OSError), self._path.open("rb") as file:  # opened: NFS answers a bare stat from memory
            return os.fstat(file.fileno()).st_mtime_ns
        return 0

    def _lock(self, length: int = 0) -> bool:
        """Lock the first bytes, 0 is all; False where another process has a part of them."""
        assert self._descriptor is not None
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length)
        except OSError as error:
            if error.errno in _HELD:
                return False
            # a disk without locks
            holder = self._read()
            return holder is None or holder.machine != machine() or born_at(holder.pid) != holder.born
        return True

    def _is_current(self) -> bool:
        """Whether the file that is locked is still the one of that name: its holder may have taken it away."""
        assert self._descriptor is not None
        try:
            return os.fstat(self._descriptor).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            return False

    # --- holding ------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._path)  # by name: to open and close it would free the lock

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
