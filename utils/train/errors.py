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
from utils.train.engine import NonFiniteError

# The launcher kills all ranks as soon as one has failed: the others give rank 0 this long to say why.
OTHERS_WAIT_S = 20.0

# What a person can mend, told without a traceback.
EXPECTED = (ValueError, OSError, NonFiniteError)

# How gloo and NCCL say that the other end is gone.
LOST_PEER_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
LOST_PEER = (
    "another rank has ended, so this one stops; if it said why, that stands above or in logs/rank_*.log of the run "
    "folder (killed without a word: mostly memory that ran out)"
)

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How it ended."""

    status: int = 0


@contextmanager
def reported() -> Iterator[Outcome]:
    """Turn an exception into a message and a status. A mistake that every rank sees is told by rank 0 alone.

    `EXPECTED` is how the project tells users of what they can mend: no traceback for them on the console, it is in the
    log file.
    """
    outcome = Outcome()
    try:
        yield outcome
    except KeyboardInterrupt:
        outcome.status = 130
        _leave(outcome.status)
    except Exception as error:
        outcome.status = 1
        _tell(error)
        _leave(outcome.status)


def _tell(error: Exception) -> None:
    expected = isinstance(error, EXPECTED)
    logger.debug("stopped", exc_info=error)
    if is_lost_peer(error):
        # the rank that ended has the story; a traceback of ours would bury it
        if dist.is_main():
            logger.error(LOST_PEER)
        return
    if not dist.is_main() and expected:
        # rank 0 most likely says the same, and the launcher then ends this rank while it sleeps
        time.sleep(OTHERS_WAIT_S)
    logger.error("%s", error if expected else f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def is_lost_peer(error: Exception) -> bool:
    """Whether this rank fails only because another one has ended while they were talking."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER_SIGNS)


def _leave(status: int) -> None:
    """End now if other ranks may be waiting for this one: a normal exit would wait for them in turn."""
    if torch_dist.is_initialized() and dist.world_size() > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
