"""How the user ends a run."""

from __future__ import annotations

import os
import signal

import attrs


@attrs.define(eq=False)
class Signals:
    """SIGINT, SIGTERM and SIGHUP end the run; a second one ends the process at once.

    A SIGHUP that was ignored before stays so.
    """

    caught: int = 0
    fd: int | None = None
    """Readable once one came: a system call that waits begins anew after a signal (PEP 475)."""

    def install(self) -> None:
        """Take over the signals of this process."""
        self.fd, to = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(to, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup(1) has it ignored, so that the run outlives the terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.caught:
            # All that is attached hangs on our file descriptors.
            os._exit(128 + number)
        self.caught = number

    def stopping(self) -> bool:
        """Whether one came."""
        return bool(self.caught)
