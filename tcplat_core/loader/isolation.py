"""Isolates the loader from its caller: folder, TMPDIR, limits, masks and personality.

The compiler reads headers from the current folder, temporary files go to TMPDIR, and limits, masks
and personality are inherited. The user who starts tcplat chooses all of them, and need not be root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import attrs

from tcplat_core.errors import CannotRunError, TcplatError
from tcplat_core.kernel.orphan import end_with
from tcplat_core.kernel.remover import Remover

_PER_LINUX = 0
_PREFIX = "tcplat-work-"
"""Followed by the pid of the parent."""
_TEMPORARY = (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path("/run"))  # noqa: S108 - see below
"""Not tempfile's choice, which is TMPDIR first, and the current folder last. All users may write
there, but the work folder's name is random, and its mode is 0700 from the start."""
_STALE_S = 3600.0
"""No start takes this long: an older folder remained after a power failure."""
_SPACE_BYTES = 1 << 20
"""More than the kernel's types as C and the cache files together."""
_LIMITS = (
    resource.RLIMIT_AS,
    resource.RLIMIT_CPU,
    resource.RLIMIT_DATA,
    resource.RLIMIT_FSIZE,
    resource.RLIMIT_STACK,
)
"""Limits under which a compiler fails halfway. RLIMIT_NOFILE is kept: the session needs as many
files as the loader, and reports it."""
_KEPT = (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ)
"""Signals that cannot be set, or that Python itself ignores."""

_libc = ctypes.CDLL(None, use_errno=True)
_parent = 0
_work: Path | None = None


def begin(parent: int) -> None:
    """Reset the inherited state, and have this process end with its parent.

    Args:
        parent: Pid of the parent. It may have ended already.
    """
    global _parent  # noqa: PLW0603 - a process has one
    _parent = parent
    end_with(parent)
    os.chdir("/")
    os.umask(0o077)
    for number in signal.valid_signals() - {*_KEPT}:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    _libc.personality(_PER_LINUX)  # `setarch --uname-2.6` changes the kernel's version
    for limit in _LIMITS:
        hard = resource.getrlimit(limit)[1]
        try:
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        except (OSError, ValueError):  # without CAP_SYS_RESOURCE
            resource.setrlimit(limit, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def orphaned() -> bool:
    """Return whether the parent has ended; False if begin() was not called."""
    return _parent != 0 and os.getppid() != _parent


def refuse_orphan() -> None:
    """Refuse to attach programs if the session has ended.

    Raises:
        TcplatError: It has ended.
    """
    if orphaned():
        raise TcplatError("the session has ended")


def scratch(root: Path) -> Path:
    """Return a folder for files that are then renamed into `root`: the work folder if inside."""
    return _work if _work and _work.parent == root else root


@attrs.define(eq=False)
class WorkFolder:
    """A private folder, used as current folder and TMPDIR.

    A child process removes it when this process ends, even by SIGKILL.
    """

    path: Path
    _remover: Remover

    @classmethod
    def enter(cls, parent: Path | None) -> Self:
        """Create it, and make it the current folder.

        Args:
            parent: A folder that no other user can write to; None for the system's temporary one.

        Raises:
            CannotRunError: No folder is writable.
        """
        global _work  # noqa: PLW0603 - a process has one
        name = f"{_PREFIX}{_parent}-{secrets.token_hex(8)}"
        paths = [one / name for one in (*([parent] if parent else ()), *_TEMPORARY)]
        remover = Remover.start(paths)
        work = cls(_made(paths), remover)
        os.chdir(work.path)
        os.environ["TMPDIR"] = tempfile.tempdir = str(work.path)
        _work = work.path
        if parent:
            _remove_stale(parent)
        return work

    def close(self) -> None:
        """Remove it, and wait for the child."""
        os.chdir("/")
        self._remover.close()


def _made(paths: Sequence[Path]) -> Path:
    for path in paths:
        with contextlib.suppress(OSError):  # not there, read-only, full: the next one
            path.mkdir(mode=0o700)
            try:
                _check_space(path / "space")
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            return path
    places = ", ".join(str(path.parent) for path in paths)
    raise CannotRunError(
        f"no folder for temporary files: make one of {places} writable, "
        f"with {_SPACE_BYTES >> 20} MiB free"
    )


def _check_space(file: Path) -> None:
    """Check that there is space for _SPACE_BYTES: in a full file system mkdir(2) may succeed."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _SPACE_BYTES)
    finally:
        os.close(fd)
        file.unlink()


def _remove_stale(parent: Path) -> None:
    for old in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another start removes its own
            if time.time() - old.lstat().st_mtime > _STALE_S:
                shutil.rmtree(old, ignore_errors=True)
