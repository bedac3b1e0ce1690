"""Rank-aware logging: people read rank 0 on the console, and every rank keeps a full log file.

Order of use: `quiet_libraries()` before anything heavy is imported, `terminal()` and `setup_logging()`, then
`log_to_file()` once the run folder is known. `captured_output()` goes around engine building, where libraries print.
"""

import io
import logging
import math
import os
import re
import select
import stat
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from utils.monitor.console import counted

logger = logging.getLogger(__name__)

OWN_PACKAGES = ("train", "utils", "models", "__main__")

# Libraries whose warnings are about their own affairs: on the console only from ERROR on, in the log file always.
CHATTY_PACKAGES = ("DeepSpeed", "transformers", "diffusers", "peft", "torch", "huggingface_hub", "PIL", "py")

# These put their own handlers on their loggers and stop records from reaching ours. TORCH_LOGS then goes to the file.
PACKAGES_WITH_HANDLERS = ("DeepSpeed", "transformers", "diffusers", "torch")

QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # tensorboard imports tensorflow where it finds one
    "TOKENIZERS_PARALLELISM": "false",  # otherwise it warns at every fork
}

LEVEL_STYLES = {logging.WARNING: ("warning: ", "yellow"), logging.ERROR: ("error: ", "bold red")}

NON_TERMINAL_WIDTH = 120  # columns; a log file has no edge, and 80 would cut tables


PATIENCE_S = 1.0  # that a training has with a terminal that takes nothing
CURSOR = re.compile(r"\x1b\[\?25[hl]")  # shows or hides it; the last one counts


class Forgiving(io.TextIOWrapper):
    """Standard output that is no reason to end a run, nor to hold it up, least of all in the middle of its checkpoint.

    A terminal may go, as where an ssh connection drops, or take nothing for hours: Ctrl-S, a laptop that sleeps, a
    `| less` that nobody pages. Then text with the end of a line in it is waited for once, up to `patience_s`, and text
    without one, which is the live line that is drawn again anyway, not at all. What was begun is kept, what comes after
    it is left out. Once the terminal takes text again, it is told how much it missed. The log file has it all.
    """

    def __init__(self, buffer: IO[bytes], encoding: str, patience_s: float = math.inf) -> None:
        """
        Args:
            buffer: of `_own_output`, or of any other descriptor; it is written to past its buffer.
        """
        super().__init__(buffer, encoding, "replace")  # type: ignore[arg-type]
        self._patience_s = patience_s
        self._poll = select.poll()
        self._poll.register(self.fileno(), select.POLLOUT)
        # where a write may wait, only what there is room for: a pipe that is ready takes this much, a terminal less
        self._most = 1 if self.isatty() and os.get_blocking(self.fileno()) else select.PIPE_BUF
        self._rest = b""  # begun, and not taken yet
        self._stuck = False  # one text was waited for in vain
        self._missed = self._missed_in_all = 0  # lines since it last took some, and ever
        self._cursor = ""  # how it was to be, where that was left out

    def write(self, text: str) -> int:
        with suppress(OSError):  # nobody is there any more
            self._offer(text, 0.0 if self._stuck or "\n" not in text else self._patience_s)
        return len(text)

    def settle(self) -> None:
        """The last chance of what was not taken; the log file is told how much the terminal missed."""
        with suppress(OSError):
            self._offer("", self._patience_s)
        lines = self._missed_in_all + self._rest.count(b"\n")
        self._missed_in_all = 0
        if lines:
            logger.debug("the terminal took nothing for a while: %s not shown there", counted(lines, "line"))

    def _offer(self, text: str, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        self._rest = self._push(self._rest, deadline)
        if not self._rest and (self._missed or self._cursor) and self._takes(deadline):
            self._rest = self._push(self._notice(), deadline)
        if self._rest:
            lines = sum(bool(line.strip()) for line in text.split("\n")[:-1])
            self._missed += lines
            self._missed_in_all += lines
            self._cursor = (CURSOR.findall(text) or [self._cursor])[-1]
        else:
            self._rest = self._push(text.encode(self.encoding, "replace"), deadline)
        self._stuck = bool(self._rest) and (self._stuck or wait_s > 0)

    def _notice(self) -> bytes:
        lines, cursor = self._missed, self._cursor
        self._missed, self._cursor = 0, ""
        if not lines:
            return cursor.encode()
        below = "\n" if self.isatty() else ""  # what it took last may be the live line
        said = f"({counted(lines, 'line')} not shown: the terminal took nothing for a while; see the log file)"
        return f"{below}{cursor}{said}\n".encode()

    def _push(self, data: bytes, deadline: float) -> bytes:
        """What is not taken of `data` by `deadline`."""
        while data and self._takes(deadline):
            try:
                data = data[os.write(self.fileno(), data[: self._most]) :]
            except BlockingIOError:  # room for less than a character, or another process had it
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        return data

    def _takes(self, deadline: float) -> bool:
        left_s = max(0.0, deadline - time.monotonic())
        return bool(self._poll.poll(None if left_s == math.inf else left_s * 1000))


def _own_output() -> int:
    """A descriptor of standard output that is nobody else's, and never waits where that can be had.

    It is opened anew, because the shell and the other ranks share the flags of standard output itself, and would fail
    if that did not wait. Opening is refused where the terminal is another user's (`su`); a file, which never holds
    anybody up, would begin anew.
    """
    if os.isatty(1) or stat.S_ISFIFO(os.fstat(1).st_mode):
        with suppress(OSError):
            return os.open("/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return os.dup(1)


def terminal(patience_s: float = math.inf) -> Console:
    """The console that everything shown to people goes through.

    It writes to a private copy of standard output, so that it stays visible while `captured_output` sends the real one
    to the log file. One console for log lines, tables and the live line keeps them from tearing each other.

    Args:
        patience_s: seconds to wait where standard output takes nothing, before text is left out. What is there for its
            output alone waits for ever, as other programs do: it may be paged.
    """
    sys.stdout.flush()
    copy = Forgiving(os.fdopen(_own_output(), "wb"), sys.stdout.encoding or "utf-8", patience_s)
    width = None if copy.isatty() or "COLUMNS" in os.environ else NON_TERMINAL_WIDTH
    return Console(file=copy, width=width, highlight=False)


class ConsoleHandler(logging.Handler):
    """Log records as short lines: time, level where it matters, message. Lines are never broken, so that paths in them
    can be copied."""

    def __init__(self, console: Console, rank: int) -> None:
        super().__init__()
        self.console = console
        self.rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        """What a person wants to see: our own progress once, and real trouble from any rank."""
        package = record.name.partition(".")[0]
        if package in OWN_PACKAGES:
            threshold = logging.INFO if self.rank == 0 else logging.WARNING
        else:
            threshold = logging.WARNING if self.rank == 0 and package not in CHATTY_PACKAGES else logging.ERROR
        return record.levelno >= threshold and bool(super().filter(record))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.console.print(self._line(record), soft_wrap=True)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        if isinstance(self.console.file, Forgiving):
            self.console.file.settle()
        super().close()

    def _line(self, record: logging.LogRecord) -> Text:
        line = Text(logging.Formatter("%(asctime)s ", "%H:%M:%S").format(_bare(record)), style="dim")
        line = Text.assemble(line, f"[rank {self.rank}] " if self.rank else "")
        level = max((level for level in LEVEL_STYLES if level <= record.levelno), default=None)
        if level is not None:
            line.append(*LEVEL_STYLES[level])
        return line.append(logging.Formatter("%(message)s").format(record))


def _bare(record: logging.LogRecord) -> logging.LogRecord:
    """The record without its traceback, which a formatter would append."""
    return logging.LogRecord(record.name, record.levelno, record.pathname, record.lineno, "", None, None)


class LogFileHandler(logging.FileHandler):
    """A log file that says once that it cannot be written, and never more."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            # to standard error, because a log call from here would come back here
            sys.stderr.write(f"warning: cannot write {self.baseFilename} ({sys.exc_info()[1]}); training goes on\n")

    def close(self) -> None:
        with suppress(OSError):  # what could not be written has been told
            super().close()


def setup_logging(rank: int, console: Console) -> None:
    """Send log records to `console`; to be called once a process. Python warnings become log records."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, ConsoleHandler)]:
        root.removeHandler(handler)
    root.addHandler(ConsoleHandler(console, rank))
    root.setLevel(logging.INFO)
    for package in OWN_PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG)
    logging.captureWarnings(True)


def log_to_file(run_dir: Path, rank: int) -> Path:
    """Write everything, libraries' INFO and our DEBUG included, to `<run_dir>/logs/rank_<rank>.log` too; append to it.

    Returns:
        The file.
    """
    path = run_dir / "logs" / f"rank_{rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, LogFileHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    for before in [h for h in root.handlers if isinstance(h, ConsoleHandler)]:  # a console may hesitate: the file first
        root.removeHandler(before)
        root.addHandler(ConsoleHandler(before.console, before.rank))  # a new one, since the newest is closed first
    return path


def quiet_libraries() -> None:
    """Make libraries speak through our handlers, and only there.

    Call it before heavy imports, for the environment variables that they read, and again after them, for the handlers
    that they installed. Variables that the user has set are kept.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in [n for n in logging.root.manager.loggerDict if n.partition(".")[0] in PACKAGES_WITH_HANDLERS]:
        library_logger = logging.getLogger(name)
        library_logger.handlers.clear()
        library_logger.propagate = True
    for package in ("transformers", "diffusers"):
        settings = sys.modules.get(f"{package}.utils.logging")
        if settings is not None:
            settings.disable_progress_bar()
    warnings.simplefilter("default")  # each place once; the console shows none of them


@contextmanager
def captured_output(log_file: Path | None) -> Iterator[None]:
    """Send what this process and its children print to the end of `log_file` (None: nowhere) meanwhile.

    It works on the file descriptors, so it also catches C++ libraries and the compiler that DeepSpeed starts. The
    console of `terminal()` stays visible. An exception leaves with the output restored, and says where it went.
    """
    _flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    with open(log_file or os.devnull, "ab") as sink:
        for number in kept:
            os.dup2(sink.fileno(), number)
    try:
        yield
    except Exception:
        if log_file is not None:
            logger.error("what was printed just before is in %s", log_file)
        raise
    finally:
        _flush()
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
