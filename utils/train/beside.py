"""Something that a thread does beside training, asked for its result later."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

LOOK_S = 0.05  # between two looks at how far it is


class Beside(Generic[T]):
    """Runs `action` in a thread that does not keep the process alive. No collective may run in it: those of the main
    thread would meet it."""

    def __init__(self, action: Callable[[], T], name: str) -> None:
        self._action = action
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        return self._thread.is_alive()

    def wait(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Until it is done; `meanwhile` is called again and again."""
        while self.is_busy:
            self._thread.join(LOOK_S)
            meanwhile()

    def result(self) -> T:
        """What `action` returned, once it has; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._action()
        except BaseException as error:
            self._error = error
