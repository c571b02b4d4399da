"""Connects to a socket with a timeout, and stops when the user ends the run.

A blocking connect(2) to a unix socket whose queue is full waits without limit. Python restarts it
after a signal (PEP 475), and may then raise EINVAL for a socket that is connected already.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable

LIMIT_S = 10.0
"""Default timeout for each address."""
_AGAIN_S = 0.02
"""Interval of the attempts if the queue is full: poll(2) does not report when it is not."""
_STOP_CHECK_MS = 100
"""Interval at which `stopping` is checked."""


def connect(
    where: str | tuple[str, int], stopping: Callable[[], bool], limit_s: float = LIMIT_S
) -> socket.socket:
    """Return a connected, blocking socket.

    Args:
        where: The path of a unix socket, or host and port.
        stopping: Returns whether the user has ended the run.
        limit_s: Timeout for each address of the host, s.

    Raises:
        InterruptedError: The user ended the run first.
        OSError: The connection failed; TimeoutError after `limit_s`.
        UnicodeError: The host name is invalid.
    """
    addresses: list[tuple[int, object]] = [(socket.AF_UNIX, where)]
    if not isinstance(where, str):
        found = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)
        addresses = [(family, address) for family, _, _, _, address in found]
    failed: OSError | None = None
    for family, address in addresses:
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            _reach(made, address, stopping, limit_s)
            made.setblocking(True)
        except InterruptedError:
            made.close()
            raise
        except OSError as error:
            made.close()
            failed = error
        else:
            return made
    raise failed or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _reach(
    made: socket.socket, address: object, stopping: Callable[[], bool], limit_s: float
) -> None:
    end = time.monotonic() + limit_s
    poll = select.poll()
    poll.register(made, select.POLLOUT)
    number = made.connect_ex(address)  # type: ignore[arg-type] # of whichever family
    while number:
        if stopping():
            raise InterruptedError(errno.EINTR, "it was stopped")
        if time.monotonic() >= end:
            raise TimeoutError(errno.ETIMEDOUT, f"it took no connection for {limit_s:g} s")
        if number == errno.EAGAIN:
            time.sleep(_AGAIN_S)
            number = made.connect_ex(address)  # type: ignore[arg-type] # see above
        elif number == errno.EINPROGRESS:
            if poll.poll(_STOP_CHECK_MS):
                number = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            raise OSError(number, os.strerror(number))
