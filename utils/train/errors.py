"""The last words of a rank: a user's mistake in a few lines, our own with its traceback, and an exit status."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as torch_dist

from utils import dist
from utils.config.load import LoadedConfig
from utils.data.crew import PeerLost
from utils.dist_meeting import first_fault, tell_launcher, tell_others
from utils.monitor.logs import captured_output
from utils.train.faults import Fault
from utils.train.memory import is_out_of_memory, out_of_memory_words
from utils.train.nonfinite import NonFiniteError
from utils.train.run_lock import RunLock
from utils.train.signals import StopSignals
from utils.train.stopping import INTERRUPTED_STATUS, TooEarly
from utils.train.watchdog import Watchdog

# The launcher kills all ranks of its node as soon as one has failed: before they have met, the others give the first of
# the node this long to say why. Afterwards they are in step, and see what rank 0 said.
OTHERS_WAIT_S = 20.0
IN_STEP_WAIT_S = 5.0

# What a person can mend, told without a traceback.
EXPECTED = (ValueError, OSError, NonFiniteError)

# How gloo and NCCL say that the other end is gone.
LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
    "remote error",
    "communicator was aborted",
    "failed to recv, got 0 bytes",
)
LOST_PEER = (
    "another rank has ended, so this one stops; if it said why, that stands above or in logs/rank_*.log of the run "
    "folder (killed without a word: mostly memory that ran out)"
)

OWN_CODE = [Path(__file__).parents[2] / folder for folder in ("models", "utils")]

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How it ended, and what is known of the run by then."""

    status: int = 0
    watchdog: Watchdog | None = None  # from when the ranks have met
    loaded: LoadedConfig | None = None
    lock: RunLock | None = None  # on the run folder

    def watch(self, watchdog: Watchdog, loaded: LoadedConfig, lock: RunLock | None = None) -> None:
        """From now on the last words tell where it happened, and which rank was first."""
        self.watchdog, self.loaded, self.lock = watchdog, loaded, lock

    def close(self, clean: bool) -> None:
        """Nothing of this rank is left in the run folder; `clean`: nor of any other soon."""
        if self.watchdog is not None:
            self.watchdog.stop()
        if self.lock is not None:
            self.lock.release(dist.is_main(), clean or dist.world_size() == 1)


@contextmanager
def reported(signals: StopSignals | None = None) -> Iterator[Outcome]:
    """Turn an exception into a message and a status. A mistake that every rank sees is told by rank 0 alone.

    `EXPECTED` is how the project tells users of what they can mend: no traceback for them on the console, it is in the
    log file.
    """
    outcome, signals, clean = Outcome(), signals or StopSignals(), False
    try:
        yield outcome
    except TooEarly as early:
        signals.conclude()
        _stop_early(early, outcome)
    except KeyboardInterrupt:
        signals.conclude()
        outcome.status = INTERRUPTED_STATUS
        _leave(outcome)
    except Exception as error:
        signals.conclude()
        if is_lost_peer(error) and (early := signals.stop_of_others()):
            _stop_early(early, outcome)
            return
        outcome.status = 1
        _tell(error, outcome)
        _leave(outcome)
    else:
        clean = True
    finally:
        signals.conclude()
        outcome.close(clean)


def _stop_early(early: TooEarly, outcome: Outcome) -> None:
    """A start was asked to end; where another rank has failed it was the launcher that asked, because of that."""
    outcome.status = early.status
    if outcome.watchdog is not None and (fault := outcome.watchdog.first_of_others(0)):
        outcome.status = 1
        logger.log(logging.ERROR if outcome.watchdog.speaks_for(fault) else logging.DEBUG, "%s", fault.words())
    elif dist.is_main():
        logger.info("%s", early)
    _leave(outcome)


def _tell(error: Exception, outcome: Outcome) -> None:
    logger.debug("stopped", exc_info=error)
    watchdog = outcome.watchdog
    if is_lost_peer(error):
        _tell_of_another(watchdog, str(error) if isinstance(error, PeerLost) else LOST_PEER)
        return
    text, is_bug = _words(error, outcome)
    trace = f"\n{traceback.format_exc()}" if is_bug else ""
    if watchdog is None:
        tell_launcher(text)
        _tell_before_start(error, text, trace)
        return
    place = "" if _says_where(error, watchdog) else f"\n  {watchdog.activity.place()}"
    tell_launcher(text + place)
    watchdog.record(text)
    watchdog.hush()
    may_be_known = isinstance(error, EXPECTED) and not dist.is_main()
    if not (may_be_known and _is_told_by_main(text, watchdog)):
        logger.error("%s", text + place + trace)


def _tell_before_start(error: Exception, text: str, trace: str) -> None:
    """There is no run folder yet. Most mistakes are seen by all ranks: the first one of each node tells."""
    waits = isinstance(error, EXPECTED) and dist.local_rank() > 0
    if waits:
        _pass_on(text, error)
        time.sleep(OTHERS_WAIT_S)  # the launcher ends this rank while it sleeps
    logger.error("%s", text + trace)
    if not waits:
        _pass_on(text, error)


def _pass_on(text: str, error: Exception) -> None:
    with captured_output(None):  # else torch's attempts to reach the others are the last words on the screen
        tell_others(text, error)


def _words(error: Exception, outcome: Outcome) -> tuple[str, bool]:
    """The message, and whether it is a mistake of ours, which needs its traceback."""
    if is_out_of_memory(error) and outcome.watchdog is not None and outcome.loaded is not None:
        return out_of_memory_words(error, outcome.watchdog.activity, outcome.loaded), False
    if isinstance(error, EXPECTED):
        return str(error), False
    return f"{type(error).__name__}: {error}", True


def _says_where(error: Exception, watchdog: Watchdog) -> bool:
    """Whether the message needs no place. What this project has to say of a config or a file names the key or the file;
    a library's message does not, and in a step it is the samples that matter."""
    if is_out_of_memory(error):
        return True
    *_, last = traceback.extract_tb(error.__traceback__)
    is_ours = any(Path(last.filename).is_relative_to(folder) for folder in OWN_CODE)
    is_raised = (last.line or "").startswith("raise ")  # not by a call into C such as `int(text)`
    return isinstance(error, ValueError) and is_ours and is_raised and watchdog.activity.batch() is None


def _is_told_by_main(text: str, watchdog: Watchdog) -> bool:
    """Whether rank 0 says the same, waiting for it."""
    deadline = time.monotonic() + IN_STEP_WAIT_S
    while time.monotonic() < deadline:
        if any(fault.rank == 0 and fault.text == text for fault in watchdog.faults()):
            return True
        time.sleep(0.1)
    return False


def _tell_of_another(watchdog: Watchdog | None, words: str) -> None:
    """The rank that ended has the story, which a traceback of ours would bury: one line that points to it."""
    if watchdog is None:
        words = first_fault() or words
        tell_launcher(words)
        if dist.local_rank() == 0:
            logger.error("%s", words)
        return
    fault = watchdog.first_of_others(IN_STEP_WAIT_S)
    watchdog.hush()
    if fault is None:
        watchdog.record(words)  # so that those follow who wait for this rank
        fault = Fault(watchdog.rank, words, told=False)
    tell_launcher(fault.words())
    level = logging.ERROR if watchdog.speaks_for(fault) or fault.rank == watchdog.rank else logging.DEBUG
    logger.log(level, "%s", fault.words())


def is_lost_peer(error: Exception) -> bool:
    """Whether this rank fails only because another one has ended while they were talking."""
    if isinstance(error, PeerLost):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER_SIGNS)


def _leave(outcome: Outcome) -> None:
    """End now if other ranks may be waiting for this one: a normal exit would wait for them in turn."""
    if torch_dist.is_initialized() and dist.world_size() > 1:
        outcome.close(clean=False)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.status)
