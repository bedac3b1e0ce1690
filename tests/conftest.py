"""What holds for all tests."""

import signal


def pytest_configure() -> None:
    """Under nohup, as some run them, SIGHUP is ignored by the tests and all that they start, which then cannot be asked
    by it to stop."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
