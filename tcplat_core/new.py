"""``tcplat plugins new``: a plugin that works, to start from.

The templates are whole projects, of a plugin that is called ``skeleton``.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from .errors import UsageError
from .plugins import Plugins

_SKELETON = "skeleton"
_LONGEST = 32
_CORE = "core"
"""The package tcplat_core is ours."""


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
    try:
        project.mkdir()
        for path, source in _walk(files(__package__) / "templates" / kind):
            # With its dot, git would take the template's for one of our own.
            target = project / (".gitignore" if path == "gitignore" else rendered(path, name))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rendered(source.read_text(encoding="utf-8"), name), encoding="utf-8")
            written.append(target)
    except FileExistsError as error:
        raise UsageError(f"{project} is there already; remove it, or name another --dir") from error
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from error
    return written


def rendered(text: str, name: str) -> str:
    """A template's text, or path, for a plugin of that name."""
    return text.replace(f"tcplat-{_SKELETON}", f"tcplat-{_dashed(name)}").replace(_SKELETON, name)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _walk(folder: Traversable, at: str = "") -> Iterator[tuple[str, Traversable]]:
    for one in folder.iterdir():
        if one.name.startswith((".", "__pycache__")):  # left by those who worked on the templates
            continue
        if one.is_dir():
            yield from _walk(one, f"{at}{one.name}/")
        else:
            yield f"{at}{one.name}", one


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or len(name) > _LONGEST:
        raise UsageError(
            f"{name!r} is no name for a plugin: take lower-case letters, digits and single "
            f"underscores between them, {_LONGEST} at most, and a letter first"
        )
    if keyword.iskeyword(name):
        raise UsageError(f"{name!r} is a word of Python's and no name for a plugin")
    ours = {one.name for one in Plugins.load().found if one.distribution == "tcplat"}
    if name in (_CORE, _SKELETON, "sinks") or name in ours:
        raise UsageError(f"{name!r} is a name of tcplat's own; take another")
