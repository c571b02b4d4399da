"""Where the system's bcc is. Only the loader imports it."""

from __future__ import annotations

import importlib.util
import stat
from pathlib import Path

from tcplat_core.errors import CannotRunError

SYSTEM_FOLDERS = (
    "/usr/lib/python3/dist-packages",
    *(f"/usr/lib/python3.{minor}/site-packages" for minor in range(9, 20)),
    *(f"/usr/lib64/python3.{minor}/site-packages" for minor in range(9, 20)),
)
"""Where Debian and Ubuntu, then Fedora and its kin, keep python3-bpfcc or python3-bcc."""
INSTALL = "apt install python3-bpfcc (Fedora: dnf install python3-bcc)"


def find_bcc() -> Path:
    """The folder of the system's bcc package, whatever Python this is.

    Only folders that root alone can write count: what is found runs as root.

    Raises:
        CannotRunError: There is none; the sentence tells PyPI's bcc apart.
    """
    unsafe = ""
    for folder in SYSTEM_FOLDERS:
        package = Path(folder) / "bcc"
        if (package / "libbcc.py").is_file():
            if _only_roots(package):
                return package
            unsafe = unsafe or (
                f"bcc in {package} can be changed by others than root, and would run as root: "
                f"chown -R root:root {package} && chmod -R go-w {package}"
            )
    if unsafe:
        raise CannotRunError(unsafe)
    stray = importlib.util.find_spec("bcc")
    if stray is not None and stray.origin:
        raise CannotRunError(
            f"the package bcc in {Path(stray.origin).parent} is another project of that name "
            f"(PyPI's is about lattices), and the system's bcc is not installed: {INSTALL}"
        )
    raise CannotRunError(f"bcc is not installed: {INSTALL}")


def _only_roots(package: Path) -> bool:
    """Return whether root alone can change the folder and what is imported from it."""
    return all(
        there.st_uid == 0 and not there.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        for there in map(Path.stat, (package, *package.glob("*.py")))
    )
