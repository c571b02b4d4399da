"""A file, or standard output, for sinks: whole writes that Ctrl-C can end."""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
from collections.abc import Callable

import attrs

from .errors import ReaderGoneError, TcplatError, UsageError

_PIPE_BUF = select.PIPE_BUF
"""poll(2) calls a pipe writable when this much fits, so that such a write does not block."""


@attrs.define(eq=False)
class Output:
    """Where a sink writes its bytes.

    Args:
        fd: Open for writing.
        stopping: Asked while a reader keeps us waiting: whether the user wants to end.
    """

    fd: int
    stopping: Callable[[], bool]
    closed: bool = attrs.field(default=False, init=False)
    _may_block: bool = attrs.field(init=False)
    _owned: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._may_block = not stat.S_ISREG(os.fstat(self.fd).st_mode)

    @classmethod
    def open(cls, path: str | None, stopping: Callable[[], bool]) -> Output:
        """The file at `path`, truncated or made; standard output when there is none.

        Raises:
            UsageError: It cannot be written.
        """
        if path is None:
            if sys.stdout is None:
                raise UsageError("there is no standard output: give the sink a path=")
            return cls(sys.stdout.fileno(), stopping)
        try:
            # Without O_NONBLOCK a FIFO that nobody reads would keep us here, deaf to Ctrl-C.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
            fd = os.open(path, flags, 0o644)
            os.set_blocking(fd, True)
        except OSError as error:
            if error.errno == errno.ENXIO:
                raise UsageError(f"nobody reads the pipe {path}: start its reader first") from error
            raise UsageError(f"cannot write {path}: {error.strerror}; name another path") from error
        output = cls(fd, stopping)
        output._owned = True
        return output

    def write(self, data: bytes | memoryview) -> None:
        """Write all of it, now.

        Raises:
            ReaderGoneError: Nobody reads any more.
            TcplatError: The device failed, or the user stopped a write that did not end.
        """
        view = memoryview(data)
        try:
            while view:
                chunk = view
                if self._may_block:
                    chunk = view[:_PIPE_BUF]
                    self._wait()
                view = view[os.write(self.fd, chunk) :]
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReaderGoneError from error
        except OSError as error:
            raise TcplatError(f"writing failed: {os.strerror(error.errno or errno.EIO)}") from error

    def look(self) -> None:
        """Notice a reader that has gone, without writing.

        Raises:
            ReaderGoneError: Nobody reads any more.
        """
        poll = select.poll()
        poll.register(self.fd, 0)
        # Of a pipe POLLERR tells it, of a socket POLLHUP.
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            raise ReaderGoneError

    def columns(self) -> int:
        """COLUMNS, or the terminal's width; 0 into a pipe or a file."""
        if os.environ.get("COLUMNS", "").isdecimal():
            return int(os.environ["COLUMNS"])
        try:
            return os.get_terminal_size(self.fd).columns
        except OSError:
            return 0

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while not poll.poll(100):
            if self.stopping():
                raise TcplatError("its reader did not read, and the run was stopped")

    def close(self) -> None:
        """Close the file; standard output stays open. Again it does nothing."""
        if self._owned:
            os.close(self.fd)
        self._owned = False
        self.closed = True
