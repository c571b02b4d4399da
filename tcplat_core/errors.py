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
NEEDS_CAPABILITIES = (
    "loading BPF programs needs CAP_BPF and CAP_PERFMON, which this root lacks: give the container "
    "these capabilities, or run it on the host"
)
TOO_MANY_FILES = {
    number: f"{os.strerror(number).lower()}: raise the limit (ulimit -n)"
    for number in (errno.EMFILE, errno.ENFILE)
}
"""errno -> cause and remedy."""
OUT_OF_MEMORY = "out of memory: raise the limit (ulimit -v, or memory.max of the cgroup)"
_NO_MEMORY = ("MemoryError", "bad_alloc", "out of memory", "Cannot allocate memory")
"""What Python, libstdc++, LLVM and the C library print."""


def lacks_memory(text: str) -> bool:
    """Return whether a library's or compiler's last words are that memory ran out."""
    return any(words in text for words in _NO_MEMORY)


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
    """SIGTERM or SIGHUP arrived; raised by the handler, so that every `finally` runs."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class InterruptedByUserError(KeyboardInterrupt):
    """SIGINT arrived, in a command without an end of its own for it; raised by the handler."""


def is_the_users(error: BaseException) -> bool:
    """Return whether a signal from the user caused it, not the plugin code that raised it.

    `run` and `replay` handle SIGINT themselves: there a plugin itself raised a KeyboardInterrupt.
    """
    if isinstance(error, TerminatedError | InterruptedByUserError):
        return True
    if isinstance(error, KeyboardInterrupt):
        return signal.getsignal(signal.SIGINT) == signal.default_int_handler
    return False


def message(error: BaseException) -> str:
    """Return the message of an exception, or its class if it has none.

    For a BaseException that is no Exception, such as SystemExit, the class comes first: its text
    is no sentence. The class may be a plugin's, whose __str__() can raise anything.
    """
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException as another:
        if is_the_users(another):
            raise
        text = ""
    if isinstance(error, Exception):
        return text or name
    return f"{name}: {text}" if text else name


def named(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message."""
    (line,) = message(error).splitlines()[:1] or [""]
    return _with_class(error, line)


def in_a_line(error: BaseException) -> str:
    """Return the class of an exception and its whole message."""
    return _with_class(error, " ".join(message(error).split()))


def _with_class(error: BaseException, text: str) -> str:
    name = type(error).__name__
    return text if text == name or text.startswith(f"{name}: ") else f"{name}: {text}"


@contextlib.contextmanager
def blaming(code: str) -> Iterator[None]:
    """Turn an exception of a plugin's code into a PluginError of one sentence.

    Args:
        code: The plugin's code that runs in this block: ``sink x: its factory``.

    Raises:
        PluginError: The code raised something else than a TcplatError or ReaderGoneError.
    """
    try:
        yield
    except (TcplatError, ReaderGoneError):
        raise
    except BaseException as error:
        if is_the_users(error):
            raise
        raise PluginError(f"{code} failed: {named(error)}") from error


REFUSED = (errno.EPERM, errno.EACCES, errno.ENOSYS)
"""errno of a refused system call; without a file name, a filter or security module refused."""


def refused(call: str, number: int) -> CannotRunError:
    """Return an error for a system call that a filter refuses, with the remedy."""
    reason = os.strerror(number).lower()
    why = "a seccomp filter or a security module is in force"
    if number == errno.ENOSYS:
        why = "this kernel lacks it, or a seccomp filter hides it"
    return CannotRunError(
        f"{call}() is refused here ({reason}): {why}; "
        "allow it (docker, podman: --security-opt seccomp=unconfined)"
    )


def _call(error: OSError) -> str:
    """Return the C function that raised an error, read from the source line that called it.

    A traceback ends with the Python frame, and does not name the C function.
    """
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if frame is None:
        return "a system call"
    code = frame.tb_frame.f_code
    place = next(itertools.islice(code.co_positions(), frame.tb_lasti // 2, None), None)
    import linecache  # noqa: PLC0415 - slow to import, seldom needed

    line, _, column, _ = place or (None, None, None, None)
    source = linecache.getline(code.co_filename, line or 0).encode()[column or 0 :].decode()
    function, opened, _ = source.partition("(")
    return function.removesuffix(".__init__").rpartition(".")[2].strip() if opened else code.co_name


def of_system_call(error: OSError) -> TcplatError:
    """Return an error that gives the cause in one sentence and, if known, the remedy."""
    if error.errno in TOO_MANY_FILES:
        return TcplatError(TOO_MANY_FILES[error.errno])
    if error.errno == errno.ENOMEM:
        return TcplatError(OUT_OF_MEMORY)
    if error.errno in REFUSED and error.filename is None:
        return refused(_call(error), error.errno)
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if name.startswith("/proc/") and not os.path.exists("/proc/self"):  # noqa: PTH110 - quick
        return CannotRunError("/proc is not mounted: mount -t proc proc /proc")
    if name.startswith("/sys/") and not os.path.exists("/sys/kernel"):  # noqa: PTH110 - as above
        return CannotRunError("/sys is not mounted: mount -t sysfs sysfs /sys")
    what = os.strerror(error.errno).lower() if error.errno else str(error)
    return TcplatError(f"{name}: {what}" if name else what)
