"""Caches compiled programs, and facts about this kernel and compiler.

The kernel runs the content, so only folders that no other user can write to are used.
All files may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import attrs
import msgpack

from tcplat_core.kernel.btf import VMLINUX
from tcplat_core.kernel.rights import held

from .isolation import scratch

ENTRIES = 64
"""Number of files kept; the oldest are deleted first."""
_SUFFIXES = (".program", ".types", ".facts", ".listing")
"""Suffixes of all files. Other files stay: the user may have chosen the folder."""


@attrs.frozen
class Cache:
    """Small msgpack files by name. Without a folder nothing is cached.

    A file ends with a hash of the rest, because a power failure can leave half of one.
    """

    root: Path | None

    @classmethod
    def open(cls, root: Path | None = None) -> Cache:
        """Return this user's cache, or an empty one without a folder if no folder is safe."""
        try:
            folder = root or default_root()
            own_folder(folder)
        except (OSError, RuntimeError):  # RuntimeError: no home directory
            return cls(None)
        return cls(folder)

    def read(self, name: str) -> Any:
        """Return the value given to write(), or None."""
        if self.root is None:
            return None
        try:
            path = self.root / name
            data = _read_own(path)
            body, seal = data[:-32], data[-32:]
            if digest(body).encode() != seal:
                return None
            os.utime(path)
            return msgpack.unpackb(body, strict_map_key=False)
        except (OSError, ValueError):
            return None

    def write(self, name: str, value: Any) -> None:
        """Store a value if possible; safe against concurrent starts."""
        if self.root is None:
            return
        body = msgpack.packb(value)
        with contextlib.suppress(OSError):
            fd, fresh = tempfile.mkstemp(prefix=".new-", dir=scratch(self.root))
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(body + digest(body).encode())
                Path(fresh).rename(self.root / name)
            except OSError:
                Path(fresh).unlink(missing_ok=True)
                raise
            self._prune()

    def _prune(self) -> None:
        assert self.root is not None  # noqa: S101 - write() has checked
        files = [path for path in self.root.iterdir() if path.suffix in _SUFFIXES]
        for old in sorted(files, key=lambda path: path.lstat().st_mtime, reverse=True)[ENTRIES:]:
            old.unlink(missing_ok=True)


@functools.cache
def identity() -> str:
    """Return a hash that differs between builds of the kernel and versions of tcplat.

    A newer version must not read files of an older one.
    """
    rooms = (Path(__file__).parent, Path(__file__).parents[1] / "kernel")
    code = [path.read_bytes() for room in rooms for path in sorted(room.glob("*.py"))]
    notes = b""
    with contextlib.suppress(OSError):
        notes = Path("/sys/kernel/notes").read_bytes()  # contains the build-id
    notes = notes or VMLINUX.read_bytes()
    uname = os.uname()
    names = (uname.release, uname.version, uname.machine)
    return digest(notes, *(name.encode() for name in names), *code)


def digest(*parts: bytes) -> str:
    """Return a hash of these byte strings, in this order."""
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()


def _read_own(path: Path) -> bytes:
    """Return the content of a file that only this user can write to.

    Raises:
        OSError: It cannot be read, or another user can write it.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or not _is_ours(status):
            raise PermissionError(f"{path} is not a file that only we can write to")
        return file.read()


def default_root() -> Path:
    """Return the default folder of the cache.

    Raises:
        PermissionError: Not root, but with capabilities: processes of this user without them
            could write to a folder of this user.
    """
    if os.geteuid() == 0:
        return Path("/var/cache/tcplat")
    if held():
        raise PermissionError("with capabilities alone there is no cache")
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if xdg.startswith("/") else Path.home() / ".cache") / "tcplat"


def check_own(folder: Path) -> None:
    """Check that a path is a folder to which only this user and root can write.

    Raises:
        PermissionError: It is not.
        FileNotFoundError: It does not exist.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or not _is_ours(status):
        raise PermissionError(f"{folder} is not a folder that only we can write to")
    for above in folder.parent.resolve().parents:
        _check_above(above)
    _check_above(folder.parent.resolve())


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _check_above(folder: Path) -> None:
    """Check that no other user can replace a subfolder."""
    status = folder.stat()
    others = stat.S_IWOTH | (stat.S_IWGRP if status.st_gid else 0)
    if status.st_uid not in (0, os.geteuid()) or (
        status.st_mode & others and not status.st_mode & stat.S_ISVTX
    ):
        raise PermissionError(f"others can replace what is in {folder}")


def own_folder(folder: Path) -> None:
    """Create a folder and missing parents with mode 0700, and check it."""
    if not folder.parent.exists():
        own_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_own(folder)
