"""Requests to stop: the first SIGINT or SIGTERM lets the step end and a checkpoint be written, then the run stops."""

from __future__ import annotations

import signal
import threading
import time

STOPPING = (signal.SIGINT, signal.SIGTERM)
IMPATIENCE = 2.0  # seconds; launchers pass on what the terminal has sent already, so a second signal soon is the same


class Stop:
    """A context whose `asked` is True once a signal came. Another one, later, stops at once.

    Handlers of Python can be set in the main thread only; elsewhere nothing is caught.
    """

    def __init__(self):
        self.asked, self._since, self._before = False, 0.0, {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in STOPPING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame) -> None:
        if self.asked and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt("the last checkpoint stays")
        if not self.asked:
            self.asked, self._since = True, time.monotonic()


def leave_to_parent(_worker: int) -> None:
    """In a process that reads data: signals meant for the whole group are its parent's to answer.

    A second SIGTERM ends it, so that a parent that is gone can be followed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
