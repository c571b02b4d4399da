"""The script tcplat, before Python starts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bin/tcplat"


def test_loader_variables_of_libc_are_removed_before_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "${GCONV_PATH-unset} ${LOCPATH-unset} $KEPT $1"\n')
    python.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    (tmp_path / "tcplat-start").write_text(f"#!{python}\n")
    done = subprocess.run(
        ["/bin/sh", tmp_path / "tcplat"],
        env={"GCONV_PATH": "/x", "LOCPATH": "/x", "KEPT": "kept"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "unset unset kept -I\n"


def test_exported_shell_functions_are_not_called(tmp_path: Path) -> None:
    """As where /bin/sh is bash (Fedora, RHEL), which takes them from BASH_FUNC_*."""
    python, shell, hit = tmp_path / "python", tmp_path / "sh", tmp_path / "hit"
    python.write_text('#!/bin/sh\necho "started $1"\n')
    python.chmod(0o755)
    bash = shutil.which("bash")
    assert bash
    shell.symlink_to(bash)
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    (tmp_path / "tcplat-start").write_text(f"#!{python}\n")
    planted = f'() {{ echo called >> {hit}; builtin "$@"; }}'
    done = subprocess.run(
        [shell, tmp_path / "tcplat"],
        env={f"BASH_FUNC_{name}%%": planted for name in ("readlink", "read")},
        check=False,
        capture_output=True,
        text=True,
    )
    assert not hit.exists()
    assert done.stdout == "started -I\n"
