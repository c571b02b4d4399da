"""Standard input, output and error that are closed (``2>&-``): their numbers stay taken.

The next file that is opened would get the number, and with it whatever is said on standard
error: our own output, or what a command writes that we start.
"""

from __future__ import annotations

import fcntl
import os
import sys

_STAND_INS = ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY))
"""Each with the mode in which it does not work: who reads or writes it is told. But for
standard error: there is nowhere to tell it."""


def keep_taken() -> None:
    """Have /dev/null in place of what is closed. To be called before anything is opened.

    A standard output or input that cannot be used is None in `sys` from then on, as Python has it
    where it was closed; also after this process was executed anew, with the stand-ins.
    """
    for fd, mode in _STAND_INS:
        try:
            fcntl.fcntl(fd, fcntl.F_GETFD)
        except OSError:
            # The least number that is free is this one: those below are taken by now.
            os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdin is not None and _mode(0) == os.O_WRONLY:
        sys.stdin = None
    if sys.stdout is not None and _mode(1) == os.O_RDONLY:
        sys.stdout = None
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - until the end


def _mode(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
