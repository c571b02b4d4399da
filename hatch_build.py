"""Compiles tcplat_core/deliver/fast/records.c when the package is built or installed.

Without a C compiler nothing is built, a warning is shown, and tcplat works, only slower.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = Path("tcplat_core/deliver/fast/records.c")
TARGET = SOURCE.with_name("librecords.so")


class CustomBuildHook(BuildHookInterface):
    """Called by hatchling."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 - its signature
        """Compile, and tag the wheel with the platform."""
        root = Path(self.root)
        compiler = next(
            filter(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang")), None
        )
        (root / TARGET).unlink(missing_ok=True)
        if compiler is None:
            self.app.display_warning(
                "no C compiler: tcplat will do in Python what C would do faster"
            )
            return
        flags = shlex.split(os.environ.get("CFLAGS", "-O2"))
        command = [compiler, *flags, "-fPIC", "-shared", "-o", str(TARGET), str(SOURCE)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        if done.returncode:
            self.app.display_warning(f"{shlex.join(command)}: {done.stderr}")
            return
        build_data["artifacts"].append(str(TARGET))
        build_data["pure_python"] = False
        # The library does not use Python's API: it works with any Python.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py{sys.version_info.major}-none-{platform}"
