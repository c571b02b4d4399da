"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; end now if it has.

    For a child behind fork(2), and as `preexec_fn`: what exec(2) starts keeps it, unless it
    gains rights thereby. Python takes tenths of a second to start: to ask there is too late.

    Args:
        parent: Its pid. It may have died before we could ask.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
