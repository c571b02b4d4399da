"""Safe output paths: no other user's link, file or pipe can redirect them.

In a folder that other users can write to, a path may lead to a symbolic link or hard link to a
file of ours, or to another user's file or pipe. So a path is resolved component by component, each
folder held by a file descriptor. In such a folder only this user's and root's links are followed,
only their files are written, and new files are created with O_EXCL. In other folders only this
user and root can create entries, and paths are resolved as usual. The rules are the same for root.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import BinaryIO

import attrs

from tcplat_core.errors import UsageError

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the open of a FIFO without a reader blocks, and Ctrl-C does not end it.
_WRITE = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MOST_LINKS = 40
"""MAXSYMLINKS of the kernel."""
_ATTEMPTS = 16
"""Retries if a file is created or removed between the check and the open."""
MODE = 0o644
"""Mode of a new file, before the umask."""


@attrs.define(eq=False)
class Place:
    """A name in an open folder: other users can no longer change where the path leads.

    For sinks that do not use :class:`Output`. Must be closed.

    Args:
        path: The path, as the user wrote it.
        folder: File descriptor (O_PATH) of the folder.
        name: The last component.
        magic: It is a link of procfs, which the kernel resolves, such as the one of /dev/stdout.
        plain: No other user can replace a folder of the path, so the path itself is safe too.
    """

    path: str
    folder: int
    name: str
    magic: bool = False
    plain: bool = True

    @classmethod
    def find(cls, path: str, *, follow: bool = True) -> Place:
        """Resolve a path to its folder and last component.

        Args:
            path: The path, as the user wrote it.
            follow: Resolve the last component too if it is a link.

        Raises:
            UsageError: No such folder, or the path has a link of another user.
        """
        with in_words(path):
            return find(path, follow=follow)

    @property
    def address(self) -> str:
        """A safe path to this place: the user's own, or one through /proc/self/fd."""
        return self.path if self.plain else f"/proc/self/fd/{self.folder}/{self.name}"

    def look(self) -> os.stat_result | None:
        """Return the status of what is there, with any owner; None if nothing is."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=self.magic)
        except FileNotFoundError:
            return None

    def status(self) -> os.stat_result | None:
        """Return the status of what is there, if it may be written; None if nothing is.

        Raises:
            UsageError: It must not be written.
            OSError: It cannot be read, or is a folder.
        """
        found = self.look()
        if found is None:
            return None
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if stat.S_ISSOCK(found.st_mode):
            raise UsageError(f"cannot write {self.path}: it is a socket; name a file")
        self.judge(found)
        return found

    def check(self, *, replacing: bool = False) -> os.stat_result | None:
        """Check that it can be written, without creating or changing anything.

        Args:
            replacing: A file will be replaced by another, not written itself.

        Returns:
            The status of what is there; None if nothing is.

        Raises:
            UsageError: It cannot be written.
        """
        with in_words(self.path):
            found = self.status()
            in_place = found and (self.magic or not (replacing and stat.S_ISREG(found.st_mode)))
            target, access = (self.name, os.W_OK) if in_place else (".", os.W_OK | os.X_OK)
            # os.access() follows links; what is not a magic link is no link here.
            if not os.access(target, access, dir_fd=self.folder, effective_ids=True):
                read_only = os.statvfs(self.folder).f_flag & os.ST_RDONLY
                number = errno.EROFS if read_only else errno.EACCES
                raise OSError(number, os.strerror(number))
            return found

    def open(self) -> int:
        """Open what is there, or a new file, for writing. An existing file is not truncated.

        Raises:
            UsageError: It must not be written.
            OSError: It cannot be opened.
        """
        for _ in range(_ATTEMPTS):
            with suppress(FileExistsError, FileNotFoundError):
                if self.status() is None:
                    return self.create(self.name)
                flags = _WRITE & ~os.O_NOFOLLOW if self.magic else _WRITE
                fd = os.open(self.name, flags, dir_fd=self.folder)
                try:
                    # Judge the opened file: the entry may have been replaced since status().
                    self.judge(os.fstat(fd))
                except BaseException:
                    os.close(fd)
                    raise
                os.set_blocking(fd, True)
                return fd
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def create(self, name: str, mode: int = MODE) -> int:
        """Create a file of this name in the same folder, and open it for writing.

        Raises:
            OSError: It exists, or cannot be created.
        """
        return os.open(name, _WRITE | os.O_CREAT | os.O_EXCL, mode, dir_fd=self.folder)

    def judge(self, found: os.stat_result) -> None:
        """Refuse a file that another user may have put there.

        Raises:
            UsageError: It is refused.
        """
        folder = os.fstat(self.folder)
        if self.magic or not is_shared(folder):
            return
        owners = {os.geteuid(), 0}
        if not folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            owners.add(folder.st_uid)  # only that user can create files there
        kind = "a file"
        if not stat.S_ISREG(found.st_mode):
            kind = "a pipe" if stat.S_ISFIFO(found.st_mode) else "a socket or device"
            if os.geteuid() == 0:
                # The user behind sudo may pass a pipe; root does not write to that user's files.
                with suppress(ValueError):
                    owners.add(int(os.environ.get("SUDO_UID", "")))
        if found.st_uid not in owners:
            raise _refused(self.path, f"{kind} of another user (uid {found.st_uid})")
        if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
            raise _refused(self.path, "a file with more than one hard link")

    @contextmanager
    def there(self) -> Iterator[str]:
        """Give a safe path to what is there now, such as a socket to connect to.

        Raises:
            UsageError: Another user may have put it there.
            OSError: Nothing is there.
        """
        fd = os.open(self.name, _LOOK, dir_fd=self.folder)
        try:
            self.judge(os.fstat(fd))
            yield self.path if self.plain and not self.shared else f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    @property
    def shared(self) -> bool:
        """Whether users other than root and this one can create files in the folder."""
        return is_shared(os.fstat(self.folder))

    def unlink(self) -> None:
        """Remove what is there.

        Raises:
            OSError: It cannot be removed.
        """
        os.unlink(self.name, dir_fd=self.folder)

    def close(self) -> None:
        """Close the folder. Idempotent."""
        if self.folder >= 0:
            os.close(self.folder)
        self.folder = -1


def is_shared(folder: os.stat_result) -> bool:
    """Return whether users other than root and this one can create files in a folder."""
    return folder.st_uid not in (0, os.geteuid()) or bool(
        folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _can_be_exchanged(folder: os.stat_result, found: os.stat_result) -> bool:
    """Return whether other users can replace an entry of a folder."""
    trusted = (0, os.geteuid())
    if not is_shared(folder):
        return False
    sticky = folder.st_mode & stat.S_ISVTX and folder.st_uid in trusted
    return not (sticky and found.st_uid in trusted)


def find(path: str, *, follow: bool = True) -> Place:
    """Follow a path, as Place.find() does.

    Raises:
        UsageError: The path has a link of another user.
        OSError: There is no such folder, or the path ends with one.
        ValueError: The path is invalid.
    """
    walk = _Walk(path, follow)
    try:
        return walk.place()
    except BaseException:
        os.close(walk.folder)
        raise


@attrs.define(eq=False)
class _Walk:
    """Resolves a path; holds one folder open at a time."""

    path: str
    follow: bool
    folder: int = attrs.field(init=False)
    plain: bool = attrs.field(default=True, init=False)
    """See Place; of the folders so far."""
    _todo: deque[str] = attrs.field(factory=deque, init=False)
    _links: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.folder = os.open("/" if self.path.startswith("/") else ".", _FOLDER)

    def place(self) -> Place:
        """Resolve the whole path."""
        if not self.path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._todo += self.path.split("/")
        while True:
            part = self._todo.popleft()
            last = not self._todo
            if last and part in ("", ".", ".."):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if part in ("", "."):
                continue
            magic = self._enter(part, last=last)
            if magic is not None:
                return Place(self.path, self.folder, part, magic, self.plain)

    def _enter(self, part: str, *, last: bool) -> bool | None:
        """Enter a folder or follow a link; at the end, return whether it is a magic link."""
        try:
            fd = os.open(part, _LOOK, dir_fd=self.folder)
        except FileNotFoundError:
            if last:
                return False
            raise
        keep = False
        try:
            found = os.fstat(fd)
            if stat.S_ISLNK(found.st_mode) and (self.follow or not last):
                if not _is_procfs(self.folder):
                    self._follow(part, fd, found)
                elif last:
                    return True
                else:
                    # A magic link: the kernel resolves it, and its text is no path.
                    self._go(os.open(part, _FOLDER, dir_fd=self.folder))
                return None
            if last:
                return False
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            keep = True
            self.plain = self.plain and not _can_be_exchanged(os.fstat(self.folder), found)
            self._go(fd)
            return None
        finally:
            if not keep:
                os.close(fd)

    def _follow(self, part: str, fd: int, found: os.stat_result) -> None:
        if is_shared(os.fstat(self.folder)):
            self.plain = False
            # Another user can create a hard link to a symbolic link of ours.
            if found.st_uid not in (0, os.geteuid()) or found.st_nlink > 1:
                who = f"a symbolic link of another user (uid {found.st_uid})"
                raise _refused(self.path, f"{who}: {part}" if self._todo else who)
        self._links += 1
        if self._links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink("", dir_fd=fd)
        if target.startswith("/"):
            self._go(os.open("/", _FOLDER))
        self._todo.extendleft(reversed(target.split("/")))

    def _go(self, folder: int) -> None:
        os.close(self.folder)
        self.folder = folder


def _is_procfs(folder: int) -> bool:
    try:
        return os.fstat(folder).st_dev == os.stat("/proc/self").st_dev
    except OSError:  # not mounted
        return False


def _refused(path: str, what: str) -> UsageError:
    return UsageError(
        f"cannot write {path}: it is {what}, in a folder that other users can write to; "
        "use another path"
    )


def lock(fd: int, path: str) -> None:
    """Lock a file until its descriptor is closed: two writers would overwrite each other's lines.

    Raises:
        UsageError: Another process or sink has locked it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"cannot write {path}: another run writes it; use another path") from error
    except OSError:
        pass  # a file system without locks


def is_same(one: os.stat_result | None, other: os.stat_result) -> bool:
    """Return whether both are the same regular file."""
    return one is not None and stat.S_ISREG(one.st_mode) and os.path.samestat(one, other)


def leads_to(path: str, there: os.stat_result) -> bool:
    """Return whether whole_file() would replace, or write, a regular file.

    Raises:
        UsageError: `path` cannot be written.
    """
    if path == "-":
        return sys.stdout is not None and is_same(os.fstat(sys.stdout.fileno()), there)
    with in_words(path), closing(find(path)) as place:
        return is_same(place.look(), there)


@contextmanager
def in_words(path: str, what: str = "") -> Iterator[None]:
    """Turn an operating system error about a path into a sentence.

    Args:
        path: The path, as the user wrote it.
        what: What the file is, with a trailing blank.

    Raises:
        UsageError: Instead of an OSError or a ValueError.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UsageError(f"no process reads the pipe {path}: start the reader first") from error
        raise UsageError(
            f"cannot write {what}{path}: {error.strerror}; use another path"
        ) from error
    except ValueError as error:
        raise UsageError(f"cannot write {what}{path!r}: {error}; use another path") from error


@contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Give a file to write that replaces the one at `path` when the block ends.

    If the block raises, the old file is kept. The new file has the mode of the old one, and its
    owner if this process may change owners. ``-`` is standard output. Anything that is not a
    regular file, such as a pipe, is written directly.

    Raises:
        UsageError: It cannot be written.
    """
    if path == "-":
        if sys.stdout is None:
            raise UsageError("standard output is closed: give a file")
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with in_words(path):
        place = find(path)
    try:
        found = place.check(replacing=True)
        if found and (place.magic or not stat.S_ISREG(found.st_mode)):
            with in_words(path):
                fd = place.open()
            with os.fdopen(fd, "wb") as file:
                yield file
        else:
            with _beside(place, found) as file:
                yield file
    finally:
        place.close()


@contextmanager
def _beside(place: Place, old: os.stat_result | None) -> Iterator[BinaryIO]:
    """Create a file in the same folder, and rename it to the place after the block."""
    # At most 255 bytes, even for a long name.
    name = f".{os.fsdecode(os.fsencode(place.name)[:200])}.{os.urandom(6).hex()}"
    try:  # around all of it: a signal may come as soon as the file is there
        # 0600 at first: a process that opened it with wider rights could read all later writes.
        with in_words(place.path):
            fd = place.create(name, 0o600 if old else 0o666)
        with os.fdopen(fd, "wb") as file:
            if old:
                with suppress(OSError):
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, stat.S_IMODE(old.st_mode) & 0o777)
            yield file
        with in_words(place.path):
            os.rename(name, place.name, src_dir_fd=place.folder, dst_dir_fd=place.folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=place.folder)
        raise
