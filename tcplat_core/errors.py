"""Errors that a user can cause, each with its exit code. One sentence, no traceback."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Iterator
from typing import ClassVar

NEEDS_ROOT = "loading BPF programs needs root: run it with sudo"
TOO_MANY_FILES = {
    number: f"{os.strerror(number).lower()}: raise the limit (ulimit -n)"
    for number in (errno.EMFILE, errno.ENFILE)
}
"""errno -> what is wrong, and what mends it."""


class TcplatError(Exception):
    """An error at run time."""

    exit_code: ClassVar[int] = 1


class UsageError(TcplatError):
    """The command line is invalid."""

    exit_code = 2


class CannotRunError(TcplatError):
    """This host cannot do it; the text names what is missing, and the remedy."""

    exit_code = 3


class PluginError(TcplatError):
    """A plugin that was asked for is missing or broken."""

    exit_code = 4


class EventsLostError(TcplatError):
    """Events were lost, and --fail-on-loss was given."""

    exit_code = 5


class ReaderGoneError(Exception):
    """The reader of the output has closed it (EPIPE): the end of the run, not an error."""


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP came: everything is left as an exception leaves it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def is_the_users(error: BaseException) -> bool:
    """Whether a signal of the user's is behind it, and not the plugin in whose code it was raised.

    `run` and `replay` take SIGINT over: a KeyboardInterrupt is the plugin's own there.
    """
    if isinstance(error, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) == signal.default_int_handler
    return isinstance(error, TerminatedError)


def words(error: BaseException) -> str:
    """Return the message of an exception, or its class if it has none.

    Of one that is no error, such as SystemExit, the class comes first: what it says is no
    sentence. A plugin may have made the class: its __str__() may raise whatever it likes.
    """
    name = type(error).__name__
    try:
        said = str(error)
    except BaseException as another:
        if is_the_users(another):
            raise
        said = ""
    if isinstance(error, Exception):
        return said or name
    return f"{name}: {said}" if said else name


def named(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message."""
    (line,) = words(error).splitlines()[:1] or [""]
    return _with_class(error, line)


def in_a_line(error: BaseException) -> str:
    """Return the class of an exception and its whole message."""
    return _with_class(error, " ".join(words(error).split()))


def _with_class(error: BaseException, said: str) -> str:
    name = type(error).__name__
    return said if said == name or said.startswith(f"{name}: ") else f"{name}: {said}"


@contextlib.contextmanager
def blaming(whose: str) -> Iterator[None]:
    """Have what a plugin's code raises be told as the plugin's fault, and as one sentence.

    Args:
        whose: Whose code runs in this block, and which: ``sink x: its factory``.

    Raises:
        PluginError: It raised something that is not meant for the user.
    """
    try:
        yield
    except (TcplatError, ReaderGoneError):
        raise
    except BaseException as error:
        if is_the_users(error):
            raise
        raise PluginError(f"{whose} failed: {named(error)}") from error


REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
"""errno of a system call that is not to be had: where no file is named, of a filter."""


def refused(call: str, number: int) -> CannotRunError:
    """Of a system call that a filter refuses: which it is, and what mends it."""
    words = os.strerror(number).lower()
    why = "a seccomp filter or a security module is in force"
    if number == errno.ENOSYS:
        why = "this kernel lacks it, or a seccomp filter hides it"
    return CannotRunError(
        f"{call}() is refused here ({words}): {why}; "
        "allow it (docker, podman: --security-opt seccomp=unconfined)"
    )


def _call(error: OSError) -> str:
    """Return the C function that an error came from, as far as the source tells it.

    No traceback has it: it ends with the frame in Python, and the place in it.
    """
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if frame is None:
        return "a system call"
    code = frame.tb_frame.f_code
    place = next(itertools.islice(code.co_positions(), frame.tb_lasti // 2, None), None)
    import linecache  # noqa: PLC0415 - takes long, and is seldom needed

    line, _, column, _ = place or (None, None, None, None)
    source = linecache.getline(code.co_filename, line or 0).encode()[column or 0 :].decode()
    function, opened, _ = source.partition("(")
    return function.removesuffix(".__init__").rpartition(".")[2].strip() if opened else code.co_name


def of_system_call(error: OSError) -> TcplatError:
    """Return an error that says in a sentence what is wrong and, if known, what mends it."""
    if error.errno in TOO_MANY_FILES:
        return TcplatError(TOO_MANY_FILES[error.errno])
    if error.errno in REFUSED and error.filename is None:
        return refused(_call(error), error.errno)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if name.startswith("/proc/") and not os.path.exists("/proc/self"):  # noqa: PTH110 - quick
        return CannotRunError("/proc is not mounted: mount -t proc proc /proc")
    if name.startswith("/sys/") and not os.path.exists("/sys/kernel"):  # noqa: PTH110 - as above
        return CannotRunError("/sys is not mounted: mount -t sysfs sysfs /sys")
    what = os.strerror(error.errno).lower() if error.errno else str(error)
    return TcplatError(f"{name}: {what}" if name else what)
