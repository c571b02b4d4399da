"""Errors that a user can cause, each with its exit code. One sentence, no traceback."""

from __future__ import annotations

import errno
import os
from typing import ClassVar

NEEDS_ROOT = "loading BPF programs needs root: run it with sudo"
TOO_MANY_FILES = {
    number: f"{os.strerror(number).lower()}: raise the limit (ulimit -n)"
    for number in (errno.EMFILE, errno.ENFILE)
}
"""errno -> what is wrong, and what mends it."""


class TcplatError(Exception):
    """Something went wrong while it ran."""

    exit_code: ClassVar[int] = 1


class UsageError(TcplatError):
    """The command line does not make sense."""

    exit_code = 2


class CannotRunError(TcplatError):
    """This host cannot do it: the sentence names what is missing and what mends it."""

    exit_code = 3


class PluginError(TcplatError):
    """A plugin that was asked for is missing or broken."""

    exit_code = 4


class EventsLostError(TcplatError):
    """Events were lost, and --fail-on-loss was given."""

    exit_code = 5


class ReaderGoneError(Exception):
    """Nobody reads our output any more (EPIPE): the end of the run, not an error."""


def of_system_call(error: OSError) -> TcplatError:
    """The same in a sentence: what is wrong and, where that is known, what mends it."""
    if error.errno in TOO_MANY_FILES:
        return TcplatError(TOO_MANY_FILES[error.errno])
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if name.startswith("/proc/") and not os.path.exists("/proc/self"):  # noqa: PTH110 - quick
        return CannotRunError("there is no /proc: mount it (mount -t proc proc /proc)")
    what = os.strerror(error.errno).lower() if error.errno else str(error)
    return TcplatError(f"{name}: {what}" if name else what)
