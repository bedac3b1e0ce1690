"""What holds for all tests."""

import os
import signal


def pytest_configure() -> None:
    """The same surroundings wherever they run.

    Under nohup SIGHUP is ignored by the tests and all that they start, which then cannot be asked by it to stop; and
    pytest-xdist tells its workers the width of a terminal, at which what they start would break its lines.
    """
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.pop("COLUMNS", None)
