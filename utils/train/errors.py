"""The last words of a rank: a user's mistake in a few lines, our own with its traceback, and an exit status."""

import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as torch_dist

from utils import dist
from utils.config.load import LoadedConfig
from utils.data.crew import PeerLost
from utils.train.faults import Fault
from utils.train.memory import is_out_of_memory, out_of_memory_words
from utils.train.nonfinite import NonFiniteError
from utils.train.stopping import INTERRUPTED_STATUS, TooEarly
from utils.train.watchdog import Watchdog

# The launcher kills all ranks as soon as one has failed: before they have met, the others give rank 0 this long to say
# why. Afterwards they are in step, and see what it said.
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

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How it ended, and what is known of the run by then."""

    status: int = 0
    watchdog: Watchdog | None = None  # from when the ranks have met
    loaded: LoadedConfig | None = None

    def watch(self, watchdog: Watchdog, loaded: LoadedConfig) -> None:
        """From now on the last words tell where it happened, and which rank was first."""
        self.watchdog, self.loaded = watchdog, loaded


@contextmanager
def reported() -> Iterator[Outcome]:
    """Turn an exception into a message and a status. A mistake that every rank sees is told by rank 0 alone.

    `EXPECTED` is how the project tells users of what they can mend: no traceback for them on the console, it is in the
    log file.
    """
    outcome = Outcome()
    try:
        yield outcome
    except TooEarly as early:
        outcome.status = outcome.loaded.run.requeue_exit_code if outcome.loaded else INTERRUPTED_STATUS
        if dist.is_main():
            logger.info("stopping before the first step: %s; what is encoded is kept", early)
        _leave(outcome)
    except KeyboardInterrupt:
        outcome.status = INTERRUPTED_STATUS
        _leave(outcome)
    except Exception as error:
        outcome.status = 1
        _tell(error, outcome)
        _leave(outcome)
    finally:
        if outcome.watchdog is not None:
            outcome.watchdog.stop()


def _tell(error: Exception, outcome: Outcome) -> None:
    logger.debug("stopped", exc_info=error)
    watchdog = outcome.watchdog
    if is_lost_peer(error):
        _tell_of_another(watchdog, str(error) if isinstance(error, PeerLost) else LOST_PEER)
        return
    text, is_bug = _words(error, outcome)
    if watchdog is not None:
        watchdog.record(text)
        watchdog.hush()
    may_be_known = isinstance(error, EXPECTED) and not dist.is_main()
    if may_be_known and _is_told_by_main(text, watchdog):
        return
    place = f"\n  {watchdog.activity.place()}" if watchdog is not None and not is_out_of_memory(error) else ""
    logger.error("%s", text + place + (f"\n{traceback.format_exc()}" if is_bug else ""))


def _words(error: Exception, outcome: Outcome) -> tuple[str, bool]:
    """The message, and whether it is a mistake of ours, which needs its traceback."""
    if is_out_of_memory(error) and outcome.watchdog is not None and outcome.loaded is not None:
        return out_of_memory_words(error, outcome.watchdog.activity, outcome.loaded), False
    if isinstance(error, EXPECTED):
        return str(error), False
    return f"{type(error).__name__}: {error}", True


def _is_told_by_main(text: str, watchdog: Watchdog | None) -> bool:
    """Whether rank 0 says the same, waiting for it: most mistakes are seen by all ranks."""
    if watchdog is None:
        time.sleep(OTHERS_WAIT_S)  # rank 0 most likely does, and the launcher then ends this rank while it sleeps
        return False
    deadline = time.monotonic() + IN_STEP_WAIT_S
    while time.monotonic() < deadline:
        if any(fault.rank == 0 and fault.text == text for fault in watchdog.faults()):
            return True
        time.sleep(0.1)
    return False


def _tell_of_another(watchdog: Watchdog | None, words: str) -> None:
    """The rank that ended has the story, which a traceback of ours would bury: one line that points to it."""
    if watchdog is None:
        if dist.is_main():
            logger.error("%s", words)
        return
    fault = watchdog.first_of_others(IN_STEP_WAIT_S)
    watchdog.hush()
    if fault is None:
        watchdog.record(words)  # so that those follow who wait for this rank
        fault = Fault(watchdog.rank, words, told=False)
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
        if outcome.watchdog is not None:
            outcome.watchdog.stop()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome.status)
