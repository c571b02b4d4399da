"""Finds the system's bcc, puts the C together, and compiles it against our own headers."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from tcplat_core.errors import CannotRunError

from .protocol import ProbeRequest

SYSTEM_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    *(f"/usr/lib/python3.{minor}/site-packages" for minor in range(9, 20)),
    *(f"/usr/lib64/python3.{minor}/site-packages" for minor in range(9, 20)),
)
"""Where Debian and Ubuntu, then Fedora and its kin, keep python3-bpfcc or python3-bcc."""

CORE_TYPES = ("sock", "net:ns", "task_struct:tgid,signal", "signal_struct:live", "pt_regs")
"""Kernel types that the shared headers use."""

ALWAYS = ("event.bpf.h", "owner.bpf.h")
"""Headers that every probe gets: the shared maps are in them."""

_INSTALL = "apt install python3-bpfcc (Fedora: dnf install python3-bcc)"
_INCLUDE = re.compile(r"^\s*#\s*include\s+<tcplat/([a-z_]+\.bpf\.h)>\s*$", re.MULTILINE)
_SHARED = {
    True: "#define TCPLAT_SHARED(kind, key, leaf, name, size) "
    "BPF_TABLE_PUBLIC(kind, key, leaf, name, size)",
    False: "#define TCPLAT_SHARED(kind, key, leaf, name, size) "
    'BPF_TABLE("extern", key, leaf, name, size)',
}


def find_bcc() -> Path:
    """The folder of the system's bcc package, whatever Python this is.

    Only folders that root alone can write count: what is found runs as root.

    Raises:
        CannotRunError: There is none; the sentence tells PyPI's bcc apart.
    """
    for folder in SYSTEM_FOLDERS:
        package = Path(folder) / "bcc"
        if (package / "libbcc.py").is_file() and _only_roots(package):
            return package
    stray = importlib.util.find_spec("bcc")
    if stray is not None and stray.origin:
        raise CannotRunError(
            f"the package bcc in {Path(stray.origin).parent} is another project of that name "
            f"(PyPI's is about lattices), and the system's bcc is not installed: {_INSTALL}"
        )
    raise CannotRunError(f"bcc is not installed: {_INSTALL}")


def _only_roots(package: Path) -> bool:
    there = package.stat()
    return there.st_uid == 0 and not there.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def import_bcc() -> Any:
    """The bcc module, loaded by its path: a venv does not see the system's folders."""
    package = find_bcc()
    spec = importlib.util.spec_from_file_location(
        "bcc", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None  # noqa: S101 - find_bcc() saw the files
    assert spec.loader is not None  # noqa: S101
    module = importlib.util.module_from_spec(spec)
    sys.modules["bcc"] = module
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise CannotRunError(
            f"bcc's library libbcc.so.0 does not load ({error}): {_INSTALL}"
        ) from error
    return module


def program_text(
    probe: ProbeRequest,
    *,
    first: bool,
    taken: Mapping[str, str],
    defines: Mapping[str, int],
) -> str:
    """The whole C text of one probe, headers pasted in.

    bcc rewrites map calls in the main file only, so a header cannot stay one.

    Args:
        probe: Its C and its record.
        first: Whether this text defines the shared maps and the core's programs.
        taken: Point -> mechanism: becomes TCPLAT_<MECHANISM>_<point>.
        defines: Constants.
    """
    numbers = {f"HOOK_{hook.program}": n for n, hook in enumerate(reporting(probe))}
    chosen = {f"TCPLAT_{way.upper()}_{point}": 1 for point, way in taken.items()}
    head = [
        f"#define {name} {value}"
        for name, value in {**defines, **probe.defines, **numbers, **chosen}.items()
    ]
    prelude = "".join(map(_header, ALWAYS))
    body = _INCLUDE.sub(lambda found: "" if found[1] in ALWAYS else _header(found[1]), probe.source)
    tail = _header("core.bpf.h") if first else ""
    name = f'#line 1 "{probe.name}.bpf.c"'
    return "\n".join([*head, _SHARED[first], probe.struct, prelude, name, body, tail])


def reporting(probe: ProbeRequest) -> list[Any]:
    """The hooks that make rows, over all ways: the index is the record's `hook`."""
    return [
        hook for point in probe.points for way in point.ways for hook in way.hooks if not hook.quiet
    ]


def _header(name: str) -> str:
    text = files("tcplat_core").joinpath("include", "tcplat", name).read_text()
    return f'#line 1 "tcplat/{name}"\n{text}\n'


@contextmanager
def kernel_source(tree: Path) -> Iterator[None]:
    """Compile against `tree`, and come back to the folder that bcc leaves for it."""
    here = os.getcwd()
    os.environ["BCC_KERNEL_SOURCE"] = str(tree)
    try:
        yield
    finally:
        os.chdir(here)
