"""Which PID namespace the numbers of processes are from: that of /proc, as ps(1) and -p have it."""

from __future__ import annotations

import os

from tcplat_core.errors import CannotRunError

_INITIAL = 4026531836
"""The inode of the first one: PROC_PID_INIT_INO in linux/proc_ns.h."""
_NOT_OURS = (
    "/proc shows the processes of another PID namespace than tcplat runs in: "
    "mount -t proc proc /proc (unshare --mount-proc does)"
)


def shown() -> tuple[int, int] | None:
    """Return inode and device (as the kernel has it) of the namespace that /proc shows.

    None for the first one, and where the kernel has none.

    Raises:
        CannotRunError: It cannot be known.
    """
    try:
        # Of each procfs the process 1 is the first of its namespace.
        found = os.stat("/proc/1/ns/pid")
    except PermissionError:  # CAP_SYS_PTRACE
        if _number() != os.getpid():
            raise CannotRunError(_NOT_OURS) from None
        found = os.stat("/proc/self/ns/pid")
    except OSError:
        return None
    if found.st_ino == _INITIAL:
        return None
    return found.st_ino, os.major(found.st_dev) << 20 | os.minor(found.st_dev)


def require_ours() -> None:
    """Make sure that a number from fork(2) or getpid(2) is that of the same process in /proc.

    Raises:
        CannotRunError: It is another's.
    """
    if _number() not in (None, os.getpid()):
        raise CannotRunError(_NOT_OURS)


def _number() -> int | None:
    """Return our number in /proc; None where there is none."""
    try:
        return int(os.readlink("/proc/self"))
    except (OSError, ValueError):
        return None
