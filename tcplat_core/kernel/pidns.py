"""The PID namespace of all process ids in rows and options: that of /proc, as in ps(1)."""

from __future__ import annotations

import os

from tcplat_core.errors import CannotRunError

_INITIAL = 4026531836
"""Inode of the initial PID namespace: PROC_PID_INIT_INO in linux/proc_ns.h."""
_NOT_OURS = (
    "/proc shows the processes of another PID namespace than tcplat runs in: "
    "mount -t proc proc /proc (unshare --mount-proc does)"
)


def shown() -> tuple[int, int] | None:
    """Return inode and device (kernel encoding) of the PID namespace that /proc shows.

    None for the initial one, and if the kernel has no PID namespaces.

    Raises:
        CannotRunError: Unknown.
    """
    try:
        # In each procfs, process 1 is the init of its namespace.
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
    """Check that a pid from fork(2) or getpid(2) is the pid of the same process in /proc.

    Raises:
        CannotRunError: /proc shows another PID namespace.
    """
    if _number() not in (None, os.getpid()):
        raise CannotRunError(_NOT_OURS)


def _number() -> int | None:
    """Return our pid in /proc; None if /proc does not list us."""
    try:
        return int(os.readlink("/proc/self"))
    except (OSError, ValueError):
        return None
