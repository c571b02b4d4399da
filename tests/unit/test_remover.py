"""A folder that goes with its process, also where that is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcplat_core.kernel.remover import passing_folder

PROGRAM = """
import sys
from tcplat_core.kernel.remover import passing_folder
with passing_folder() as folder:
    (folder / "file").touch()
    (folder / "below").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_folder_is_removed_at_the_end_of_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with passing_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_removed_when_its_process_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        text=True,
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.parent == tmp_path
        assert (folder / "file").exists()
        process.kill()
        # The child that removes it lets go of standard output before.
        assert process.stdout.read() == ""
    until = time.monotonic() + 60
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.005)
    assert list(tmp_path.iterdir()) == []


def test_surviving_child_does_not_keep_the_folder() -> None:
    wait, go = os.pipe()
    with passing_folder() as folder:
        child = os.fork()
        if not child:
            os.close(go)
            os.read(wait, 1)
            os._exit(0)
    assert not folder.exists()
    os.close(go)
    os.waitpid(child, 0)
    os.close(wait)
