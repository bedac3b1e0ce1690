"""A pool of spawned processes in which a worker that dies or hangs costs its item and never the whole run."""

import contextlib
import math
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any, NamedTuple, Protocol

import multiprocess
import multiprocess.connection
import multiprocess.resource_tracker

_SPAWN = multiprocess.get_context("spawn")
_START_TIMEOUT_S = 300.0  # imports from a network disk can take minutes
_SLICE_S = 1.0  # of waiting; one that takes much longer tells that this process was stopped (Ctrl-Z)
# Terminals, launchers and Slurm send them to all processes of a job. They are for the parent, which ends its workers:
# one that they reach first would look like a clip that kills its decoder.
_PARENTS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
_STARTED = -1  # index of the message by which a worker says that its imports are done


class Progress(Protocol):
    """Where progress is shown; `utils.monitor.progress` has one for people."""

    def start(self, total: int, label: str) -> None: ...

    def advance(self, n: int, name: str) -> None:
        """`n` more items are done, `name` the last of them."""

    def done(self) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def start(self, total: int, label: str) -> None: ...

    def advance(self, n: int, name: str) -> None: ...

    def done(self) -> None: ...


DECODE_TIMEOUT = "decode_timeout_s"  # the run TOML's key


class WorkerLost(RuntimeError):
    """A worker died or made no progress over one item; the message names the item."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


class Outcome(NamedTuple):
    """What became of one item: `error` is None, what `function` raised, or a `WorkerLost`."""

    item: Any
    value: Any
    error: Exception | None


class WorkerPool:
    """Runs `function(item)` in `workers` processes, or in this one when `workers` is 0.

    `function` and items must pickle. Each process imports the module of `function` anew, and the main module too, so
    both should import little. Leave the `with` block before asking for another run.
    """

    def __init__(
        self, function: Callable[[Any], Any], workers: int, timeout_s: float = 120.0, timeout_key: str = ""
    ) -> None:
        """
        Args:
            timeout_s: how long a worker may take over one item.
            timeout_key: where a person may set it.
        """
        self._function = function
        self._timeout_s = timeout_s
        self._mend = f"; raise {timeout_key} if it is only slow" if timeout_key else ""
        self._workers = [_Worker(function) for _ in range(workers)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in self._workers:
            worker.kill()

    def run(
        self,
        items: Iterable[Any],
        ahead: int | Callable[[], int],
        name: Callable[[Any], str] = str,
        overtake_s: float | None = None,
    ) -> Iterator[Outcome]:
        """Outcomes in the order of `items`, of which at most `ahead` are handed out before their turn.

        Args:
            ahead: may change while it runs.
            overtake_s: once others have waited for so long, they no longer wait for the one whose turn it is.

        Raises:
            WorkerLost: workers cannot even start.
        """
        if not self._workers:
            yield from (_call(self._function, item) for item in items)
            return
        most = ahead if callable(ahead) else lambda: ahead
        source = enumerate(items)
        waiting: dict[int, Any] = {}  # index -> item, handed out, oldest first
        finished: dict[int, Outcome] = {}

        def refill() -> None:
            while len(waiting) + len(finished) < max(1, most()) and (pulled := next(source, None)) is not None:
                index, item = pulled
                waiting[index] = item
                self._least_busy().submit(index, item)

        refill()
        since = monotonic()  # when an outcome was last given
        while waiting or finished:
            while not finished or next(iter(waiting), math.inf) < min(finished):
                left_s = math.inf if overtake_s is None else max(0.0, since + overtake_s - monotonic())
                if finished and not left_s:
                    break
                for index, value, error in self._collect(name, left_s if finished else math.inf):
                    finished[index] = Outcome(waiting.pop(index), value, error)
            outcome = finished.pop(min(finished))
            refill()  # before the caller goes off with this one, or the workers would idle meanwhile
            yield outcome
            since = monotonic()

    def _least_busy(self) -> "_Worker":
        worker = min(self._workers, key=lambda worker: len(worker.queue))
        if worker.started and not worker.queue and not worker.process.is_alive():  # it died idle: no item is to blame
            worker.kill()
            fresh = self._workers[self._workers.index(worker)] = _Worker(self._function)
            return fresh
        return worker

    def _collect(
        self, name: Callable[[Any], str], longest_s: float = math.inf
    ) -> Iterator[tuple[int, Any, Exception | None]]:
        """Wait for a worker to answer or to fail, `longest_s` at most; one (index, value, error) for each that did."""
        busy = {worker.pipe: worker for worker in self._workers if worker.queue}
        patience_s = min(worker.since + self._patience_s(worker) for worker in busy.values()) - monotonic()
        begun, slice_s = monotonic(), max(0.0, min(patience_s, longest_s, _SLICE_S))
        ready = multiprocess.connection.wait(list(busy), timeout=slice_s)
        if monotonic() - begun > slice_s + _SLICE_S:  # and the workers with it, most likely: no item is to blame
            for worker in busy.values():
                worker.since = monotonic()
        for pipe in ready:
            worker = busy.pop(pipe)
            try:
                index, value, error = pipe.recv()
            except (EOFError, OSError):  # its end of the pipe closed with it
                yield self._replace(worker, name, worker.fate())
                continue
            worker.since = monotonic()
            worker.started = True
            if index != _STARTED:
                worker.queue.popleft()
                yield index, value, error
        for worker in busy.values():
            patience_s = self._patience_s(worker)
            if monotonic() - worker.since > patience_s and not worker.pipe.poll():
                mend = self._mend if worker.started else ""
                yield self._replace(worker, name, f"no progress for {patience_s:g} s{mend}")

    def _patience_s(self, worker: "_Worker") -> float:
        return self._timeout_s if worker.started else _START_TIMEOUT_S

    def _replace(self, worker: "_Worker", name: Callable[[Any], str], fate: str) -> tuple[int, None, WorkerLost]:
        """Give up the item that `worker` was at, and hand the rest of its queue to a new one."""
        worker.kill()
        index, item = worker.queue.popleft()
        if not worker.started:
            raise WorkerLost("the worker processes cannot start", f"{fate}; the lines above may say why")
        fresh = _Worker(self._function)
        for rest in worker.queue:
            fresh.submit(*rest)
        self._workers[self._workers.index(worker)] = fresh
        return index, None, WorkerLost(name(item), fate)


class _Worker:
    """One process, the pipe to it, and what it was given, oldest first."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.pipe, theirs = multiprocess.connection.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(theirs, function), daemon=True)
        with _out_of_reach():
            self.process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.queue: deque[tuple[int, Any]] = deque()
        self.since = monotonic()  # when it last showed life, or was last idle
        self.started = False

    def submit(self, index: int, item: Any) -> None:
        if not self.queue and self.started:
            self.since = monotonic()
        self.queue.append((index, item))
        with contextlib.suppress(OSError):  # it is dead; `_collect` finds that out and says so
            self.pipe.send((index, item))

    def fate(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"the worker process ended (exit code {code})"
        hint = "; memory may have run out, then use fewer workers (map_num_proc)" if -code == signal.SIGKILL else ""
        return f"the worker process was killed by {signal.Signals(-code).name}{hint}"

    def kill(self) -> None:
        self.process.kill()  # nothing to tidy up in there: it writes no files
        self.process.join()
        self.pipe.close()


@contextlib.contextmanager
def _out_of_reach() -> Iterator[None]:
    """Processes that are started meanwhile never see the signals that are for this one. It loses none itself: they are
    delivered afterwards, or to another of its threads."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
    try:
        multiprocess.resource_tracker.ensure_running()  # the first time it unblocks two of them again
        signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Any, function: Callable[[Any], Any]) -> None:
    """The life of a worker process: it ends with its parent, whose end of the pipe then closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send((_STARTED, None, None))
        while True:
            index, item = pipe.recv()
            outcome = _call(function, item)
            pipe.send((index, outcome.value, outcome.error))
    except (EOFError, OSError):
        return


def _end_with_parent() -> None:
    """Also in the middle of an item, which may take minutes, or for ever on a disk that hangs."""
    if parent := multiprocess.parent_process():
        parent.join()
        os._exit(1)


def _call(function: Callable[[Any], Any], item: Any) -> Outcome:
    try:
        return Outcome(item, function(item), None)
    except Exception as error:  # the pool's user decides what an error means
        return Outcome(item, None, _portable(error))


def _portable(error: Exception) -> Exception:
    """`error`, or what it said, where it cannot go through a pipe."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
