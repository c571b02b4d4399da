"""Output of sinks to a file or standard output: complete writes, which Ctrl-C can interrupt.

A file is created or truncated only when the run begins: a start that fails leaves an existing
file unchanged.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import attrs

from tcplat_core.errors import ReaderGoneError, TcplatError, UsageError

from . import outfile
from .numbers import decimal

_PIPE_BUF = select.PIPE_BUF
_MOST_COLUMNS = 1 << 16
"""poll(2) reports a pipe as writable if this much fits, so that such a write does not block."""


_held_back: ContextVar[list[Output] | None] = ContextVar("_held_back", default=None)


@contextlib.contextmanager
def held_back() -> Iterator[list[Output]]:
    """Postpone creating and truncating files opened in this block until their begin().

    Yields:
        The outputs, as they are opened.
    """
    outputs: list[Output] = []
    token = _held_back.set(outputs)
    try:
        yield outputs
    finally:
        _held_back.reset(token)


@attrs.define(eq=False)
class Output:
    """Where a sink writes its bytes.

    Args:
        fd: Open for writing; -1 for a file that is not created or truncated yet.
        stopping: Returns whether the user has ended the run; called while a write blocks.
        lines: The output is lines: if the disk is full, no partial line is left. Otherwise no
            partial write() is left.
        alone: What another sink writes in between would make the output unreadable.
    """

    fd: int
    stopping: Callable[[], bool]
    lines: bool = True
    alone: bool = False
    closed: bool = attrs.field(default=False, init=False)
    _may_block: bool = attrs.field(default=False, init=False)
    _owned: bool = attrs.field(default=False, init=False)
    _place: outfile.Place | None = attrs.field(default=None, init=False)
    """Place of a file that is not created or truncated yet."""
    _path: str = attrs.field(default="", init=False)
    """Path of a regular file that is open, or was removed before it was closed."""
    _early: bytearray = attrs.field(factory=bytearray, init=False)
    """Data written before begin()."""

    def __attrs_post_init__(self) -> None:
        self._check_fd()

    def _check_fd(self) -> None:
        self._may_block = self.fd >= 0 and not stat.S_ISREG(os.fstat(self.fd).st_mode)

    @classmethod
    def open(
        cls,
        path: str | None,
        stopping: Callable[[], bool],
        *,
        lines: bool = True,
        alone: bool = False,
    ) -> Output:
        """Open the file at `path`, or standard output if `path` is None.

        Checks now whether the file can be written. It is created or truncated now too, except
        while a run creates its sinks: then, when everything is attached.

        Raises:
            UsageError: It cannot be written, or another sink writes there that must not.
        """
        if path is None:
            if sys.stdout is None:
                raise UsageError("standard output is closed: give the sink a path=")
            output = cls(sys.stdout.fileno(), stopping, lines, alone)
            output._hold_back("standard output")
            return output
        place: outfile.Place | None
        with outfile.in_words(path):
            place = outfile.find(path)
        try:
            with outfile.in_words(path):
                found = place.check()
                if found and not stat.S_ISREG(found.st_mode):
                    # Opened only once: if it were closed in between, the reader would see EOF.
                    output = cls(place.open(), stopping, lines, alone)
                    output._owned = True
                    output._hold_back(path)
                    return output
            output = cls(-1, stopping, lines, alone)
            output._place, place = place, None
        finally:
            if place:
                place.close()
        if not output._hold_back(path):
            output.begin()
        return output

    def _hold_back(self, where: str) -> bool:
        """Note an output that is opened in held_back(); return whether it is.

        Raises:
            UsageError: Another one is the same file, or the same stream while one must be alone.
        """
        outputs = _held_back.get()
        if outputs is None:
            return False
        for other in outputs:
            why = ""
            if (self.alone or other.alone) and self._is_stream_of(other):
                why = ", and one of them a capture, which could not be read back"
            if why or self._is_file_of(other):
                self.close()
                raise UsageError(f"two sinks write to {where}{why}: give each a path of its own")
        outputs.append(self)
        return True

    def _is_stream_of(self, other: Output) -> bool:
        """Return whether both write to the same standard output, pipe, socket or terminal."""
        if self._place or other._place:
            return False
        if self.fd == other.fd:
            return True
        ours, theirs = os.fstat(self.fd), os.fstat(other.fd)
        readable = not stat.S_ISCHR(ours.st_mode) or os.isatty(self.fd)
        return readable and os.path.samestat(ours, theirs)

    def _is_file_of(self, other: Output) -> bool:
        """Return whether both write, or will create, the same regular file."""
        ours, theirs = self._place, other._place
        if ours is None and theirs is None:
            return False  # sinks may share standard output
        if ours is not None and theirs is not None and ours.name == theirs.name:
            folders = (os.fstat(place.folder) for place in (ours, theirs))
            return os.path.samestat(*folders)
        found = theirs.look() if theirs else os.fstat(other.fd)
        return found is not None and self.is_at(found)

    def begin(self) -> None:
        """Create or truncate the file, if that was postponed. Idempotent.

        Raises:
            UsageError: The file can no longer be written.
        """
        if self._place is None:
            return
        place, self._place = self._place, None
        with contextlib.closing(place), outfile.in_words(place.path):
            self.fd = place.open()
            self._owned = True
            self._check_fd()
            if not self._may_block:
                self._path = "" if place.magic else place.path
                outfile.lock(self.fd, place.path)
                os.ftruncate(self.fd, 0)
        if self._early:
            self.write(self._early)
            self._early.clear()

    def is_at(self, found: os.stat_result) -> bool:
        """Return whether this is the regular file that is, or will be, written."""
        with contextlib.suppress(OSError):
            ours = self._place.status() if self._place else os.fstat(self.fd)
            return outfile.is_same(ours, found)
        return False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of the data, now.

        Raises:
            ReaderGoneError: The reader has closed the pipe or socket.
            TcplatError: The device failed, or the user ended the run while the write blocked.
        """
        if self._place is not None:
            self._early += data
            return
        view = memoryview(data)
        done = 0
        try:
            while done < len(view):
                chunk = view[done:]
                if self._may_block:
                    chunk = self._piece(chunk)
                    self._wait()
                done += os.write(self.fd, chunk)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ReaderGoneError from error
        except OSError as error:
            self._take_back(view[:done])
            raise TcplatError(f"writing failed: {os.strerror(error.errno or errno.EIO)}") from error

    def _piece(self, rest: memoryview) -> memoryview:
        """Return a piece that fits into a pipe: whole lines, unless one line is longer."""
        piece = rest[:_PIPE_BUF]
        if self.lines and len(rest) > _PIPE_BUF:
            end = bytes(piece).rfind(b"\n") + 1
            return piece[:end] if end else piece
        return piece

    def _take_back(self, written: memoryview) -> None:
        """Truncate a partial line, or partial write, that a failed write left in a file."""
        end = bytes(written).rfind(b"\n") + 1 if self.lines else 0
        surplus = len(written) - end
        if self._may_block or not surplus:
            return
        with contextlib.suppress(OSError):
            at = os.lseek(self.fd, 0, os.SEEK_CUR)
            # Not if another process has appended: then the partial line is not at the end.
            if os.fstat(self.fd).st_size == at:
                os.ftruncate(self.fd, at - surplus)
                os.lseek(self.fd, at - surplus, os.SEEK_SET)

    def look(self) -> None:
        """Check for a closed pipe or socket, without writing.

        Raises:
            ReaderGoneError: The reader has closed it.
        """
        if self._place is not None:
            return
        poll = select.poll()
        poll.register(self.fd, 0)
        # A closed reader is POLLERR for a pipe, POLLHUP for a socket.
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            raise ReaderGoneError

    def columns(self) -> int:
        """Return COLUMNS, or the width of the terminal; 0 for a pipe or a file."""
        columns = decimal(os.environ.get("COLUMNS", ""), _MOST_COLUMNS)
        if columns is not None:
            return columns
        try:
            return os.get_terminal_size(self.fd).columns
        except OSError:
            return 0

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while not poll.poll(100):
            if self.stopping():
                raise TcplatError("the run was stopped while its reader did not read")

    def close(self) -> None:
        """Close the file; standard output stays open. Idempotent.

        A file that was not created or truncated yet is not changed.
        """
        if self._place is not None:
            self._place.close()
            self._place = None
        if self._owned:
            self._path = self.removed()
            os.close(self.fd)
        self._owned = False
        self.closed = True

    def removed(self) -> str:
        """Return the path if the file was removed or replaced while it was open; else ``""``."""
        if self._owned and self._path and os.fstat(self.fd).st_nlink:
            return ""
        return self._path
