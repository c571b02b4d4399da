"""The script tcplat, before Python starts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bin/tcplat"


_REMOVED = ("GCONV_PATH", "LOCPATH", "PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__")


def test_variables_that_name_code_are_removed_before_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    values = " ".join(f"${{{name}-unset}}" for name in _REMOVED)
    python.write_text(f'#!/bin/sh\necho "{values} $KEPT $1"\n')
    python.chmod(0o755)
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    (tmp_path / "tcplat-start").write_text(f"#!{python}\n")
    done = subprocess.run(
        ["/bin/sh", tmp_path / "tcplat"],
        env={**dict.fromkeys(_REMOVED, "/x"), "KEPT": "kept"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "unset unset unset unset kept -I\n"


def test_python_starts_with_as_few_files_as_the_shell(tmp_path: Path) -> None:
    """The shell keeps the script at 10, and has no other above 9."""
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    (tmp_path / "tcplat-start").write_text("#!/bin/echo\n")
    done = subprocess.run(
        ["/bin/sh", "-c", 'ulimit -n 11; exec /bin/sh "$0"', str(tmp_path / "tcplat")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (f"-I {tmp_path}/tcplat-start\n", "")


@pytest.mark.parametrize("first", [None, "", "#!"])
def test_missing_path_of_python_is_status_3(tmp_path: Path, first: str | None) -> None:
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    if first is not None:
        (tmp_path / "tcplat-start").write_text(first)
    done = subprocess.run(["/bin/sh", tmp_path / "tcplat"], check=False, capture_output=True)
    assert done.returncode == 3


@pytest.mark.parametrize("variable", ["PYTHONEXECUTABLE", "__PYVENV_LAUNCHER__"])
def test_planted_standard_library_is_not_imported(tmp_path: Path, variable: str) -> None:
    there = tmp_path / "planted"
    library = there / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in ("encodings", "collections", "importlib", "re", "lib-dynload"):
        source = Path(sysconfig.get_path("stdlib"), folder)
        shutil.copytree(source, library / folder, ignore=shutil.ignore_patterns("*.so"))
    for module in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        shutil.copy(module, library)
    hit = tmp_path / "hit"
    with (library / "encodings/__init__.py").open("a") as file:
        file.write(f"\nopen({str(hit)!r}, 'w').close()\n")
    (there / "bin").mkdir()
    (there / "pyvenv.cfg").write_text(f"home = {there}/bin\nversion = 3\n")
    start = tmp_path / "tcplat-start"
    start.write_text(f"#!{sys.executable}\nprint('started')\n")
    shutil.copy(SCRIPT, tmp_path / "tcplat")
    done = subprocess.run(
        ["/bin/sh", tmp_path / "tcplat"],
        env={variable: f"{there}/bin/python3"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert not hit.exists()
    assert done.stdout == "started\n"


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
