"""Ends a child process when its parent ends, even by SIGKILL."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it has ended.

    Call it in a child after fork(2), or as `preexec_fn`: the setting survives exec(2), unless that
    raises privileges. The new Python would call it too late: it takes tenths of a second to start.

    Args:
        parent: Its pid. It may have ended before this call.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
