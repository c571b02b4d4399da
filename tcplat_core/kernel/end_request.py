"""The user's request to end the process: one signal, or several."""

from __future__ import annotations

import os
import select
import signal
import time

from tcplat_core.errors import InterruptedByUserError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a command."""
SAME_REQUEST_S = 1.0
"""Time in which further signals are the same request: timeout(1) signals its child and then the
child's group, and a closing terminal sends SIGHUP on top of what its user pressed."""
ENDED_AT_ONCE = "ended at once by another signal: the output may lack its end"


class EndRequest:
    """Distinguishes a request, its repetition, and a user who does not want to wait."""

    def __init__(self) -> None:
        """Begin without a request."""
        self._came_s: float | None = None

    def is_first(self, number: int) -> bool:
        """Return whether this signal is the first; end the process if it comes later than the same.

        Called by the handlers of signals. Exiting closes all file descriptors, which detaches
        everything.
        """
        now_s = time.monotonic()
        if self._came_s is None:
            self._came_s = now_s
            return True
        if now_s - self._came_s >= SAME_REQUEST_S:
            _say_at_once()
            os._exit(128 + number)
        return False


class Interrupts:
    """Handler of SIGINT for commands that do not handle it themselves: as Python's, but once."""

    def __init__(self) -> None:
        """Begin without a request."""
        self.request = EndRequest()

    def __call__(self, number: int, _frame: object) -> None:
        """Raise InterruptedByUserError at the first signal."""
        if self.request.is_first(number):
            raise InterruptedByUserError


def _say_at_once() -> None:
    """Report the reason on standard error, unless that would block."""
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    try:
        if poll.poll(0):
            os.write(2, f"tcplat: {ENDED_AT_ONCE}\n".encode())
    except OSError:
        pass  # no reader
