"""Opens /dev/null for a closed standard input, output or error (``2>&-``).

Otherwise the next file opened would get the number 0, 1 or 2, and receive our messages or the
output of a command that we start.
"""

from __future__ import annotations

import fcntl
import os
import sys

_STAND_INS = ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY))
"""Standard input and output get the wrong mode, so that their use fails visibly. Writes to
standard error succeed: there is no place to report a failure."""


def keep_taken() -> None:
    """Open /dev/null in place of closed descriptors. Call it before any file is opened.

    `sys.stdin` and `sys.stdout` become None if they cannot be used, as Python sets them for closed
    ones; also after execve(2) of this process, which inherits the replacements.
    """
    for fd, mode in _STAND_INS:
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            # open(2) returns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdin is not None and _mode(0) == os.O_WRONLY:
        sys.stdin = None
    if sys.stdout is not None and _mode(1) == os.O_RDONLY:
        sys.stdout = None
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - until the end


def _mode(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
