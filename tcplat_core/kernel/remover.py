"""Removes folders when the process that made them ends, even by SIGKILL."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import attrs


@attrs.frozen
class Remover:
    """A child process that removes folders when this process ends, or on close().

    It waits for a byte in a pipe, or for its end of file, which comes when the last process that
    holds the write end has ended.
    """

    _pipe: int
    _pid: int

    @classmethod
    def start(cls, paths: Sequence[Path]) -> Self:
        """Fork the child. Call it before the folders exist, so that none can be left behind.

        Raises:
            OSError: Too many open files or processes.
        """
        wait, pipe = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        pid = os.fork()
        if not pid:
            _remove_at_end(wait, paths)
        os.close(wait)
        return cls(pipe, pid)

    def close(self) -> None:
        """Remove the folders now, and wait until that is done."""
        with contextlib.suppress(BrokenPipeError):  # the child was killed
            os.write(self._pipe, b".")  # another process may hold the write end, too
        os.close(self._pipe)
        os.waitpid(self._pid, 0)


@contextlib.contextmanager
def passing_folder() -> Iterator[Path]:
    """Yield a new temporary folder; it is removed after the block or with this process."""
    path = Path(tempfile.gettempdir(), f"tcplat-{secrets.token_hex(8)}")
    remover = Remover.start([path])
    try:
        path.mkdir(mode=0o700)
        yield path
    finally:
        remover.close()


def _remove_at_end(wait: int, paths: Sequence[Path]) -> None:
    """Run in the child: keep only the pipe open, so that no pipe's reader waits for us."""
    try:
        os.dup2(wait, 0)
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the listing itself
                if fd != "0":
                    os.close(int(fd))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.read(0, 1)
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os._exit(0)
