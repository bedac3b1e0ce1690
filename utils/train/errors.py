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

# The launcher kills all ranks as soon as one has failed: the others give rank 0 this long to say why.
OTHERS_WAIT_S = 20.0

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How it ended."""

    status: int = 0


@contextmanager
def reported() -> Iterator[Outcome]:
    """Turn an exception into a message and a status. A mistake that every rank sees is told by rank 0 alone.

    `ValueError` and `OSError` are how the project tells users of wrong input: no traceback for them on the console, it
    is in the log file.
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
    expected = isinstance(error, (ValueError, OSError))
    if not dist.is_main():
        logger.debug("stopped", exc_info=error)
        if expected:
            time.sleep(OTHERS_WAIT_S)
        else:
            logger.error("%s: %s\n%s", type(error).__name__, error, traceback.format_exc())
        return
    logger.debug("stopped", exc_info=error)
    logger.error("%s", error if expected else f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def _leave(status: int) -> None:
    """End now if other ranks may be waiting for this one: a normal exit would wait for them in turn."""
    if torch_dist.is_initialized() and dist.world_size() > 1:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
