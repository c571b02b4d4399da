"""Network namespaces, as a user names them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import TOO_MANY_FILES, TcplatError, UsageError

NAMED = Path("/run/netns")
"""Where `ip netns add` puts them."""
_NSFS_MAGIC = 0x6E736673
"""linux/magic.h: f_type of statfs(2)."""
_STATFS_BYTES = 256
"""More than struct statfs has anywhere; f_type is its first long."""
_NS_GET_NSTYPE = 0xB703
"""linux/nsfs.h, since 4.11: the CLONE_NEW... of a namespace."""
_CLONE_NEWNET = 0x40000000


def path(text: str) -> Path:
    """Where the namespace is that a name of ``ip netns``, a process id or a path means."""
    if "/" in text:
        return Path(text)
    return Path(f"/proc/{text}/ns/net") if text.isdecimal() else NAMED / text


@contextlib.contextmanager
def opened(text: str) -> Iterator[int]:
    """Open a network namespace, and give its file descriptor.

    Args:
        text: A name of ``ip netns``, a process id or a path.

    Raises:
        OSError: Nothing is there, or it cannot be opened.
        UsageError: What is there is something else.
    """
    place = path(text)
    # Before it is opened: a FIFO or a device may wait, or act. Namespaces are regular files.
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
    """Return the inode's number, by which rows and programs know the namespace.

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
    # os.statvfs() leaves the type out. An ioctl of this number may mean anything elsewhere.
    libc, raw = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(_STATFS_BYTES)
    if libc.fstatfs(fd, raw):
        return False
    return (
        ctypes.c_long.from_buffer(raw).value == _NSFS_MAGIC
        and fcntl.ioctl(fd, _NS_GET_NSTYPE) == _CLONE_NEWNET
    )
