"""Reads the bytes of a capture from a file, a pipe or a socket."""

from __future__ import annotations

import os
import select
import stat
import sys
from collections.abc import Callable, Iterator

import attrs

from tcplat_core.errors import TcplatError, UsageError
from tcplat_core.event.terminal import printable
from tcplat_core.plugin.connecting import connect

CHUNK = 1 << 17
"""Bytes that are read, and decoded, at once: what is made of a megabyte is too much for a
core's cache, and costs half as much again."""
_WAIT_MS = 100
"""Longest wait for bytes, ms, before chunks() yields an empty chunk."""


@attrs.define(eq=False)
class Source:
    """An open file, pipe or socket.

    Args:
        fd: Open for reading.
        name: The name that the user gave.
        size: Size of a file in bytes; 0 if unknown.
        stopping: Returns whether the user has ended the reading.
    """

    fd: int
    name: str = attrs.field(converter=printable)
    size: int = 0
    stopping: Callable[[], bool] = lambda: False
    consumed: int = attrs.field(default=0, init=False)

    @classmethod
    def open(cls, where: str, stopping: Callable[[], bool] = lambda: False) -> Source:
        """Open a path, ``-`` for standard input, ``unix:PATH`` or ``tcp:HOST:PORT``.

        Raises:
            UsageError: It cannot be read.
            InterruptedError: The user wanted to end before a socket had taken the connection.
        """
        try:
            if where.startswith("unix:"):
                made = connect(where.removeprefix("unix:"), stopping)
                return cls(made.detach(), where, 0, stopping)
            if where.startswith("tcp:"):
                return cls(connect(_host_and_port(where), stopping).detach(), where, 0, stopping)
            if where == "-":
                if sys.stdin is None:
                    raise UsageError("standard input is closed")
                fd = sys.stdin.fileno()
                return cls(fd, "standard input", os.fstat(fd).st_size, stopping)
            # Without O_NONBLOCK, opening a FIFO without a writer blocks, and Ctrl-C has no effect.
            fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(fd, True)
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                os.close(fd)
                raise UsageError(f"cannot read {where}: Is a directory")
            return cls(fd, where, status.st_size, stopping)
        except InterruptedError:
            raise
        except (OSError, UnicodeError) as error:
            why = (isinstance(error, OSError) and error.strerror) or error
            raise UsageError(f"cannot read {where}: {why}") from error

    def chunks(self) -> Iterator[bytes]:
        """Yield bytes as they come, and b"" if none came for a while, or the user wants to end.

        The caller of the decoder gets control then, also if no frame comes of all these bytes.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            if self.stopping() or not poll.poll(_WAIT_MS):
                yield b""
                continue
            try:
                data = os.read(self.fd, CHUNK)
            except ConnectionResetError:
                data = b""
            except OSError as error:
                raise TcplatError(f"reading {self.name} failed: {error.strerror}") from error
            if not data:
                return
            self.consumed += len(data)
            yield data


def _host_and_port(where: str) -> tuple[str, int]:
    host, colon, port = where.removeprefix("tcp:").rpartition(":")
    if not (colon and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UsageError(f"{where} is not of the form tcp:HOST:PORT")
    return host.strip("[]"), int(port)
