"""The rooms of tcplat_core: which may import which, and which bcc, pyroute2 and the loader."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import pytest

CORE = Path(__file__).parents[2] / "tcplat_core"

# Room -> the rooms that it may import. A room stands below all that may import it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "event": ("errors",),
    "plugin": ("errors", "event"),
    "kernel": ("errors", "plugin"),
    "loader": ("errors", "plugin", "kernel"),
    "deliver": ("errors", "event", "plugin", "kernel"),
    "registry": ("errors", "event", "plugin", "kernel"),
    "run": ("errors", "event", "plugin", "kernel", "loader", "deliver"),
    "capture": ("errors", "event", "plugin", "loader", "deliver", "registry"),
    "testing": ("errors", "event", "plugin", "kernel", "loader", "deliver", "registry", "run"),
    "cli": (
        *("errors", "event", "plugin", "kernel", "loader", "deliver", "registry", "run"),
        *("capture", "testing"),
    ),
    "__main__": ("errors", "kernel", "run", "cli"),
    "__init__": ("errors", "event", "plugin", "deliver", "capture"),  # the public names
}
DOORS = {"loader.protocol", "loader.filter", "loader.program_text"}
"""Of the loader, all that others may import: data and texts, for which no rights are needed."""
ONLY = {"bcc": ("loader.",), "pyroute2": ("kernel.netdev", "kernel.netns")}
"""The prefix of modules that may import it."""


@functools.cache
def modules() -> dict[str, Path]:
    """Each module of tcplat_core, by its name without `tcplat_core.`; a package by its own."""
    found = {}
    for path in sorted(CORE.rglob("*.py")):
        parts = path.relative_to(CORE).with_suffix("").parts
        if "templates" not in parts:
            found[".".join(parts).removesuffix(".__init__") or "__init__"] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, path: Path) -> Iterator[str]:
    """Yield the imports of a module, at any depth and for types; ours without `tcplat_core.`."""
    ours = modules()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (one.name.removeprefix("tcplat_core.") for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = (node.module or "").removeprefix("tcplat_core").lstrip(".")
            if node.level:
                above = "" if name == "__init__" else package
                for _ in range(node.level - 1):
                    above = above.rpartition(".")[0]
                source = ".".join(filter(None, (above, node.module)))
            for one in node.names:
                whole = f"{source}.{one.name}" if source else one.name
                yield whole if whole in ours else source


EDGES = [
    (name, imported)
    for name, path in modules().items()
    for imported in sorted(set(imports(name, path)))
]
OURS = [(name, imported) for name, imported in EDGES if imported in modules()]


def room(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_a_room() -> None:
    assert {room(name) for name in modules()} == set(MAY_IMPORT)


def test_no_room_imports_one_above_it() -> None:
    upwards = [
        f"{name} imports {imported}"
        for name, imported in OURS
        if room(name) != room(imported) and room(imported) not in MAY_IMPORT[room(name)]
    ]
    assert not upwards


def test_table_lists_rooms_bottom_up() -> None:
    order = list(MAY_IMPORT)
    for name, below in MAY_IMPORT.items():
        assert all(order.index(one) < order.index(name) for one in below), name


def test_table_has_no_unused_permission() -> None:
    needed = {(room(name), room(imported)) for name, imported in OURS}
    spare = [
        (name, one)
        for name, below in MAY_IMPORT.items()
        for one in below
        if (name, one) not in needed
    ]
    assert not spare


def test_modules_have_no_import_cycles() -> None:
    below: dict[str, set[str]] = {}
    for name, imported in OURS:
        if name != imported:
            below.setdefault(name, set()).add(imported)
    # A leaf imports nothing that is left: what cannot be taken away is in a circle, or above one.
    left = set(modules())
    while leaves := {name for name in left if not below.get(name, set()) & left}:
        left -= leaves
    while roots := {name for name in left if not any(name in below.get(one, ()) for one in left)}:
        left -= roots
    assert not left


@pytest.mark.parametrize("package", ONLY)
def test_third_party_package_is_imported_in_its_place_alone(package: str) -> None:
    allowed = ONLY[package]
    places = [name for name, imported in EDGES if imported.partition(".")[0] == package]
    assert all(name.startswith(allowed) for name in places), places


def test_bcc_is_imported_by_the_loader_alone() -> None:
    """It is loaded by its path: import_bcc() is what imports it."""
    who = [
        name
        for name, path in modules().items()
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.Name) and node.id == "import_bcc")
        or (isinstance(node, ast.alias) and node.name == "import_bcc")
    ]
    assert who
    assert all(name.startswith("loader.") for name in who), who


def test_other_rooms_use_the_loaders_entry_modules_alone() -> None:
    inside = [
        f"{name} imports {imported}"
        for name, imported in OURS
        if room(imported) == "loader" != room(name) and imported not in DOORS
    ]
    assert not inside


# --- size

MOST_LINES = {"module": 450, "class": 300, "function": 60}
LONG = {
    "plugins.sinks.tcplat_sinks.plugin.tcplat_register_sinks",
    "plugins.stages.tcplat_stages.connection.Connection.__init__",
    "plugins.stages.tcplat_stages.summary.as_json",
}
"""Longer than that. A comment in the line that begins each says why it is one thing."""
KINDS = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}


@attrs.frozen
class Part:
    """A module, a class or a function of the core or of a plugin; `head` is how it begins."""

    kind: str
    name: str
    lines: int
    head: str


def parts() -> Iterator[Part]:
    root = CORE.parent
    for folder in (CORE, *root.glob("plugins/*/tcplat_*")):
        for path in folder.rglob("*.py"):
            if "templates" not in path.parts:
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                lines = path.read_text(encoding="utf-8").splitlines()
                yield Part("module", name, len(lines), "")
                yield from parts_of(parsed(path), name, lines)


def parts_of(node: ast.AST, above: str, text: Sequence[str]) -> Iterator[Part]:
    for child in ast.iter_child_nodes(node):
        name = above
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{above}.{child.name}"
            first, last = child.lineno - 1, child.end_lineno or child.lineno
            head = "\n".join(text[first : child.body[0].lineno - 1])
            yield Part(KINDS[type(child)], name, last - first, head)
        yield from parts_of(child, name, text)


def test_modules_classes_and_functions_are_short(
    measured: Callable[[str], None],
) -> None:
    found = sorted(parts(), key=lambda part: part.lines, reverse=True)
    for kind in MOST_LINES:
        first = [part for part in found if part.kind == kind][:3]
        longest = ", ".join(f"{part.name} {part.lines}" for part in first)
        measured(f"longest {kind}: {longest}")
    assert {part.name for part in found if part.lines > MOST_LINES[part.kind]} == LONG


def test_longer_parts_have_a_reason() -> None:
    silent = [part.name for part in parts() if part.name in LONG and "#" not in part.head]
    assert silent == []
