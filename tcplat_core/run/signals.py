"""How the user ends a run."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Sequence

import attrs

from tcplat_core.event.terminal import say

_inherited: frozenset[int] = frozenset()
"""What was blocked when this process was started."""

NOTHING_RECORDED = "stopped before the probes were attached; nothing was recorded"
NOTHING_REPLAYED = "stopped before anything was read; nothing was replayed"


def stopped_early(arguments: Sequence[str]) -> int:
    """Say that Ctrl-C came before a run, or whatever it was to be, had begun.

    Args:
        arguments: Of the command line, which may not have been read yet.

    Returns:
        The exit status: Ctrl-C ends a run or a replay as it should end; anything else was not
        finished.
    """
    command = arguments[0] if arguments else ""
    sentence = {"run": NOTHING_RECORDED, "replay": NOTHING_REPLAYED}.get(command)
    if sentence is None:
        return 128 + signal.SIGINT
    ours = itertools.takewhile(lambda argument: argument != "--", arguments)
    if not {"-q", "--quiet"} & set(ours):
        say(sentence)
    return 0


def unblock() -> None:
    """Have no signal blocked, whatever this process inherited: it could not be ended."""
    global _inherited  # noqa: PLW0603 - a process has one
    _inherited = frozenset(signal.pthread_sigmask(signal.SIG_SETMASK, ()))


def block_again() -> None:
    """Block what was blocked at the start, in a child that becomes another program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _inherited)


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
