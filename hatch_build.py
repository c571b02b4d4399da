"""Compiles what tcplat has for each event, when the package is built or installed.

records.c and lines.c become a library, and the modules of tcplat_stages that have types in a .pxd
file become extension modules, by way of Cython. What cannot be compiled is left out with a warning:
then tcplat does the same in Python, only slower.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FAST = Path("tcplat_core/deliver/fast")
SOURCES = [str(FAST / name) for name in ("records.c", "lines.c")]
TARGET = FAST / "librecords.so"
STAGES = Path("plugins/stages/tcplat_stages")
COMPILED = STAGES / "compiled"


class CustomBuildHook(BuildHookInterface):
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - its signature
        """Compile, and tag the wheel with the platform."""
        root = Path(self.root)
        compiler = next(
            filter(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")), None
        )
        (root / TARGET).unlink(missing_ok=True)
        shutil.rmtree(root / COMPILED, ignore_errors=True)
        if compiler is None:
            self.app.display_warning(
                "no C compiler: tcplat will do in Python what C would do faster"
            )
            return
        flags = shlex.split(os.environ.get("CFLAGS", "-O2"))
        command = [compiler, *flags, "-fPIC", "-shared"]
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        if self._runs([*command, "-o", str(TARGET), *SOURCES]):
            build_data["artifacts"].append(str(TARGET))
            build_data["pure_python"] = False
            # The library does not use Python's API: it works with any Python.
            build_data["tag"] = f"py{sys.version_info.major}-none-{platform}"
        if self._compile_stages(command):
            build_data["artifacts"].append(f"{COMPILED}/*.so")
            build_data["pure_python"] = False
            python = f"cp{sys.version_info.major}{sys.version_info.minor}"
            build_data["tag"] = f"{python}-{python}-{platform}"

    def _compile_stages(self, command: list[str]) -> bool:
        """Compile the modules of tcplat_stages that have a .pxd file; return whether all are."""
        root, include = Path(self.root), sysconfig.get_path("include")
        lacks = ""
        if importlib.util.find_spec("Cython") is None:
            lacks = "Cython"
        elif not Path(include, "Python.h").exists():
            lacks = "Python.h (Debian: python3-dev)"
        if lacks:
            self.app.display_warning(f"no {lacks}: stages, summary and waterfall will be slower")
            return False
        names = [path.stem for path in sorted((root / STAGES).glob("*.pxd"))]
        # -fwrapv: numbers of hostile captures may wrap, and must not be undefined.
        gcc = [*command, "-w", "-fwrapv", f"-I{include}"]
        with (
            tempfile.TemporaryDirectory() as made,
            concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        ):
            folder = Path(made, "compiled")
            folder.mkdir()

            def compile_one(name: str) -> bool:
                text = f"{made}/{name}.c"
                target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
                cython = [sys.executable, "-m", "cython", "-3", "-X", "annotation_typing=False"]
                return self._runs([*cython, "-o", text, str(STAGES / f"{name}.py")]) and self._runs(
                    [*gcc, "-o", str(target), text]
                )

            whole = all(pool.map(compile_one, names))
            if whole:
                (folder / ".checked").touch()
                # Modules of two builds do not fit together.
                shutil.move(folder, root / COMPILED)
        return whole

    def _runs(self, command: list[str]) -> bool:
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(f"{shlex.join(command)}: {done.stderr}")
        return not done.returncode
