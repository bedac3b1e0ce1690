"""Rank-aware logging: people read rank 0 on the console, and every rank keeps a full log file.

Order of use: `quiet_libraries()` before anything heavy is imported, `terminal()` and `setup_logging()`, then
`log_to_file()` once the run folder is known. `captured_output()` goes around engine building, where libraries print.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

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


class Forgiving(io.TextIOWrapper):
    """A terminal may go, as where an ssh connection drops: that nobody reads any more is no reason to end a run, least
    of all in the middle of its checkpoint. The log file has it all."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def terminal() -> Console:
    """The console that everything shown to people goes through.

    It writes to a private copy of standard output, so that it stays visible while `captured_output` sends the real one
    to the log file. One console for log lines, tables and the live line keeps them from tearing each other.
    """
    sys.stdout.flush()
    copy = Forgiving(os.fdopen(os.dup(1), "wb"), sys.stdout.encoding or "utf-8", "replace", line_buffering=True)
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
