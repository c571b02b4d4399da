"""Signals that end a run."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
from collections.abc import Sequence

import attrs

from tcplat_core.event.terminal import say
from tcplat_core.kernel.end_request import ENDING, EndRequest

_inherited: frozenset[int] = frozenset()
"""Signals that were blocked when this process started."""

NOTHING_RECORDED = "stopped before the probes were attached; nothing was recorded"
NOTHING_REPLAYED = "stopped before any row was read; nothing was replayed"


def stopped_early(arguments: Sequence[str]) -> int:
    """Report that Ctrl-C came before the command began, and return the exit status.

    Args:
        arguments: The raw arguments of the command line.

    Returns:
        0 for a run or a replay, which Ctrl-C ends regularly; 130 for other commands.
    """
    command = arguments[0] if arguments else ""
    sentence = {"run": NOTHING_RECORDED, "replay": NOTHING_REPLAYED}.get(command)
    if sentence is None:
        return 128 + signal.SIGINT
    before = itertools.takewhile(lambda argument: argument != "--", arguments)
    if not {"-q", "--quiet"} & set(before):
        say(sentence)
    return 0


def unblock() -> None:
    """Unblock all signals: with an inherited mask this process could not be ended."""
    global _inherited  # noqa: PLW0603 - a process has one
    _inherited = frozenset(signal.pthread_sigmask(signal.SIG_SETMASK, ()))


def ignore_at_exit() -> None:
    """Ignore signals once all is done: Python restores their defaults before it exits.

    A repeated signal would then kill the process, and its status would be that of a failure.
    """
    atexit.register(_ignore)


def _ignore() -> None:
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def block_again() -> None:
    """Restore the inherited signal mask, in a child that executes another program."""
    signal.pthread_sigmask(signal.SIG_SETMASK, _inherited)


@attrs.define(eq=False)
class Signals:
    """SIGINT, SIGTERM and SIGHUP end the run.

    Repetitions within SAME_REQUEST_S are ignored; a later signal ends the process at once. An
    inherited "ignore" of SIGHUP is kept.
    """

    caught: int = 0
    fd: int | None = None
    """Readable after a signal: Python restarts interrupted system calls (PEP 475)."""
    _request: EndRequest = attrs.field(factory=EndRequest, init=False)

    def install(self) -> None:
        """Install the handlers."""
        self.fd, to = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(to, warn_on_full_buffer=False)
        for number in ENDING:
            # nohup(1) ignores it, so that the run outlives the terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self._request.is_first(number):
            self.caught = number

    def stopping(self) -> bool:
        """Return whether a signal came."""
        return bool(self.caught)
