"""``tcplat plugins new``: a plugin that works, to start from.

The templates are whole projects, of a plugin that is called ``skeleton``.
"""

from __future__ import annotations

import contextlib
import keyword
import os
import re
import shutil
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from tcplat_core.errors import UsageError
from tcplat_core.plugin.outfile import MODE, Place, in_words

from .find import Plugins

_SKELETON = "skeleton"
_LONGEST = 32
_CORE = "core"
"""The package tcplat_core, whose name a plugin cannot take."""


def create(kind: str, name: str, parent: Path) -> list[Path]:
    """Write the project ``tcplat-NAME`` into a folder.

    Args:
        kind: probe or sink.
        name: As in ``--probe NAME``; its underscores are dashes in the project's name.
        parent: Where to; must be there.

    Returns:
        The project's folder, and below it the files.

    Raises:
        UsageError: Not with this name, or not there.
    """
    _check_name(name)
    project = parent / f"tcplat-{_dashed(name)}"
    written = [project]
    with in_words(str(project)):
        try:
            folder = _made(str(project))
        except FileExistsError as error:
            raise UsageError(
                f"{project} exists already: remove it, or give another --dir"
            ) from error
        try:
            for path, source in _walk(files(__package__) / "templates" / kind):
                # With its dot, git would take the template's for one of our own.
                target = ".gitignore" if path == "gitignore" else rendered(path, name)
                text = rendered(source.read_text(encoding="utf-8"), name)
                _write(folder, target, text.encode())
                written.append(project / target)
        except BaseException:
            # For example on a full disk: half a project would block the next attempt.
            _empty(folder)
            with contextlib.suppress(OSError):
                project.rmdir()
            raise
        finally:
            os.close(folder)
    return written


_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o755
"""Whatever the umask: no other user can place a link in a folder that only its owner can write."""


def _made(path: str) -> int:
    """Create a folder and hold it open, so that no other user can replace it.

    Raises:
        UsageError: A link of another user is on the way, or the folder is another user's.
        OSError: It cannot be made.
    """
    place = Place.find(path, follow=False)
    try:
        os.mkdir(place.name, _MODE, dir_fd=place.folder)
        folder = os.open(place.name, _FOLDER, dir_fd=place.folder)
    finally:
        place.close()
    if os.fstat(folder).st_uid != os.geteuid():
        os.close(folder)
        raise UsageError(f"cannot write {path}: another user has put a folder of theirs there")
    return folder


def _write(folder: int, path: str, data: bytes) -> None:
    """Write a new file, and the folders to it, in a folder that no other user can write to."""
    parent = ""
    for part in path.split("/")[:-1]:
        parent += f"{part}/"
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent, _MODE, dir_fd=folder)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, MODE, dir_fd=folder), "wb") as file:
        file.write(data)


def _empty(folder: int) -> None:
    """Remove the content of a folder, by its fd: its path may lead elsewhere by now."""
    with os.scandir(folder) as found:
        inside = [(one.name, one.is_dir(follow_symlinks=False)) for one in found]
    for name, is_dir in inside:
        if is_dir:
            shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
        else:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)


def rendered(text: str, name: str) -> str:
    """Return a template's text, or path, for a plugin of this name."""
    return text.replace(f"tcplat-{_SKELETON}", f"tcplat-{_dashed(name)}").replace(_SKELETON, name)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _walk(folder: Traversable, at: str = "") -> Iterator[tuple[str, Traversable]]:
    for one in folder.iterdir():
        if one.name.startswith((".", "__pycache__")):  # files of editors and of Python
            continue
        if one.is_dir():
            yield from _walk(one, f"{at}{one.name}/")
        else:
            yield f"{at}{one.name}", one


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > _LONGEST:
        raise UsageError(
            f"{name!r} is not a valid name for a plugin: use lower-case letters, digits and single "
            f"underscores between them, {_LONGEST} at most, and a letter first"
        )
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} is a Python keyword: use another name")
    own = {one.name for one in Plugins.load().found if one.distribution == "tcplat"}
    if name in (_CORE, _SKELETON, "sinks") or name in own:
        raise UsageError(f"{name!r} is a name of tcplat itself: use another")
