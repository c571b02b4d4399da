"""Folders that go with the process that made them, however that ends."""

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
    """A child that removes folders when this process has ended, or says so.

    It waits for the end of a pipe, which comes when the last process dies that can write to it,
    or for a byte.
    """

    _pipe: int
    _pid: int

    @classmethod
    def start(cls, paths: Sequence[Path]) -> Self:
        """Fork it. The folders need not exist yet: so there is no moment at which one would stay.

        Raises:
            OSError: There are too many files or processes.
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
        """Have them removed now, and wait until they are."""
        with contextlib.suppress(BrokenPipeError):  # the child was killed
            os.write(self._pipe, b".")  # another process may have the pipe, too, and live on
        os.close(self._pipe)
        os.waitpid(self._pid, 0)


@contextlib.contextmanager
def passing_folder() -> Iterator[Path]:
    """Give a new temporary folder, which is removed behind the block or with this process."""
    path = Path(tempfile.gettempdir(), f"tcplat-{secrets.token_hex(8)}")
    remover = Remover.start([path])
    try:
        path.mkdir(mode=0o700)
        yield path
    finally:
        remover.close()


def _remove_at_end(wait: int, paths: Sequence[Path]) -> None:
    """In the child: hold nothing open but the pipe, so that no reader waits for us."""
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
