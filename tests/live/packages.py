"""tcplat as a user installs it: a wheel that is built once, and fresh environments with it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import attrs

from .harness import outside, patience

ROOT = Path(__file__).parents[2]
_SOURCES = ("LICENSE", "README.md", "bin", "hatch_build.py", "plugins", "pyproject.toml")
_LEFT_OUT = ("__pycache__", "compiled", "*.so", ".*_cache")
"""What tools and an installation from this folder leave there."""
_PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")


@attrs.frozen
class Venv:
    """A venv of the Python that runs the tests, with nothing but what pip has installed there."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Venv:
        """Make it without a pip of its own, which takes longer than everything else."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        return cls(folder)

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def pip(self, *what: str | Path) -> None:
        """Install these."""
        command = [*outside(), *_PIP, "--python", self.program("python"), "install", *what]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=patience(300)
        )
        assert done.returncode == 0, done.stderr


def wheel() -> Path:
    """Return a wheel of this tree; it is built where no test run has built it from these sources.

    Compiling takes a minute. Processes that test at the same time share it, and so do runs.
    """
    place = Path(sys.prefix) / "wheels"
    place.mkdir(exist_ok=True)
    with (place / ".lock").open("w") as lock, tempfile.TemporaryDirectory() as made:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A copy: the build removes and compiles again what this Python has loaded.
        tree = Path(made, "tree")
        tree.mkdir()
        for name in (*_SOURCES, "tcplat_core"):
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns(*_LEFT_OUT)
                shutil.copytree(ROOT / name, tree / name, ignore=ignore)
            else:
                shutil.copy(ROOT / name, tree / name)
        folder = place / _digest(tree)
        if not folder.exists():
            for older in place.iterdir():
                if older.is_dir():
                    shutil.rmtree(older)
            # Not optimized: that is most of the time, and no test here asks how fast it is.
            subprocess.run(
                [*outside(), *_PIP, "wheel", "--no-deps", "-w", f"{made}/wheel", tree],
                check=True,
                timeout=patience(300),
                env={**os.environ, "CFLAGS": "-O0"},
            )
            shutil.move(f"{made}/wheel", folder)
        (built,) = folder.glob("*.whl")
        return built


def _digest(tree: Path) -> str:
    """Return what changes with the sources, and with the Python that they are compiled for."""
    digest = hashlib.sha256(str(sysconfig.get_config_var("EXT_SUFFIX")).encode())
    for path in _files(tree):
        digest.update(f"\0{path.relative_to(tree)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _files(tree: Path) -> Iterator[Path]:
    return (path for path in sorted(tree.rglob("*")) if path.is_file())
