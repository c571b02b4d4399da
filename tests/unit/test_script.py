"""The script tcplat, before Python starts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "bin/tcplat"


def test_python_does_not_get_what_the_c_library_would_load_code_by(tmp_path: Path) -> None:
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
