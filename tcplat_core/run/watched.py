"""Watches the traced processes for their end."""

from __future__ import annotations

import contextlib
import os
import select

import attrs


@attrs.define(eq=False)
class Watched:
    """The traced processes; a pidfd is held for one that is alive (pidfd_open(2))."""

    pids: list[int]
    _fd: int | None = attrs.field(default=None, init=False)

    def ended(self) -> bool:
        """Return whether all have ended; zombies count as ended."""
        return self.fd() is None

    def fd(self) -> int | None:
        """Return an fd, readable when the watched process ends; None if all have ended."""
        while True:
            if self._fd is None:
                if not self.pids:
                    return None
                with contextlib.suppress(ProcessLookupError):
                    self._fd = os.pidfd_open(self.pids.pop())
                continue
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if not poll.poll(0):
                return self._fd
            self.close()

    def close(self) -> None:
        """Close the pidfd. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
