"""Network namespaces: by name, process id or path."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from tcplat_core.errors import TOO_MANY_FILES, TcplatError, UsageError
from tcplat_core.plugin.numbers import decimal

NAMED = Path("/run/netns")
"""Where `ip netns add` puts them."""
_NSFS_MAGIC = 0x6E736673
"""linux/magic.h: f_type of statfs(2)."""
_STATFS_BYTES = 256
"""More than struct statfs has on any machine; f_type is its first long."""
_NS_GET_NSTYPE = 0xB703
"""linux/nsfs.h, since 4.11: the CLONE_NEW... of a namespace."""
_CLONE_NEWNET = 0x40000000


def of_process(process: int | str = "self") -> Path:
    """Return the path of a process's network namespace."""
    return Path(f"/proc/{process}/ns/net")


def path(text: str) -> Path:
    """Return the path of a namespace, given a name of ``ip netns``, a process id or a path."""
    if "/" in text:
        return Path(text)
    return of_process(text) if text.isdecimal() else NAMED / text


@contextlib.contextmanager
def opened(text: str) -> Iterator[int]:
    """Open a network namespace, and yield its file descriptor.

    Args:
        text: A name of ``ip netns``, a process id or a path.

    Raises:
        OSError: It does not exist, or cannot be opened.
        UsageError: It is not a network namespace.
    """
    place = path(text)
    # Checked before opening, which may block (FIFO) or have effects (device).
    # Namespaces are regular files.
    fd = -1
    if stat.S_ISREG(place.stat().st_mode):
        fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if fd < 0 or not _is_netns(fd):
            raise UsageError(
                f"{text!r} is not a network namespace, though there is a file {place}: give a "
                "name of ip netns, a process id or a path such as /proc/PID/ns/net"
            )
        yield fd
    finally:
        if fd >= 0:
            os.close(fd)


def inode(text: str) -> int:
    """Return the inode number, which identifies the namespace in rows and programs.

    Raises:
        UsageError: There is no such namespace.
    """
    try:
        with opened(text) as fd:
            return os.fstat(fd).st_ino
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            raise TcplatError(TOO_MANY_FILES[error.errno]) from error
        raise UsageError(f"there is no network namespace {text!r} ({path(text)})") from error


def _is_netns(fd: int) -> bool:
    # os.statvfs() has no f_type. On other file systems this ioctl number may mean anything.
    libc, raw = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.fstatfs(fd, raw):
        return False
    return (
        ctypes.c_long.from_buffer(raw).value == _NSFS_MAGIC
        and fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    )


_MOST_PIDS = 1 << 22
"""PID_MAX_LIMIT; inodes of namespaces begin at 0xF0000000, above it."""
_MOST_INODE = (1 << 32) - 1


def netns_recorded(text: str) -> int:
    """Return the inode number of a namespace in a capture; it need not exist any more.

    Args:
        text: The inode number itself, or as for inode().

    Raises:
        UsageError: It is no inode number, and there is no such namespace.
    """
    number = decimal(text, _MOST_INODE)
    return number if number and number > _MOST_PIDS else inode(text)


@contextlib.contextmanager
def inside(netns: str) -> Iterator[None]:
    """Move this thread into a network namespace for the duration of the block.

    Args:
        netns: A name of ``ip netns``, a path or a process id; empty to stay.

    Raises:
        UsageError: There is no such namespace.
    """
    if not netns:
        yield
        return
    with contextlib.ExitStack() as stack:
        home = os.open(of_process(), os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        try:
            setns(stack.enter_context(opened(netns)))
        except OSError as error:
            if error.errno in TOO_MANY_FILES:
                raise
            raise UsageError(
                f"there is no network namespace {netns!r} ({error.strerror}); {_known()}"
            ) from error
        stack.callback(setns, home)
        yield


def _known() -> str:
    names = sorted(os.listdir(NAMED)) if NAMED.is_dir() else []
    if not names:
        return "ip netns lists none; a process id or a path works as well"
    return f"ip netns lists {', '.join(names)}"


def unshare() -> None:
    """Give this process a network namespace of its own.

    Raises:
        OSError: The kernel refuses.
    """
    # os.unshare() came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace of its own")


def setns(fd: int) -> None:
    """Move this thread into the network namespace behind a file descriptor."""
    # os.setns() came with Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
