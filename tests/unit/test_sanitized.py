"""C reads memory of the kernel, and bytes of any file: its tests also run with sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tcplat_core.deliver.fast import library

pytestmark = pytest.mark.slow

SOURCES = [Path(library.__file__).with_name(name) for name in ("records.c", "lines.c")]
_PLUGIN = """
import os
from pathlib import Path


def pytest_configure():
    from tcplat_core.deliver.fast import library
    library.FILE = Path(os.environ["RECORDS_SO"])
    assert library.library()
"""


def built(target: Path, *flags: str) -> Path:
    """Compile the C sources; skip the test where the compiler lacks the sanitizers."""
    command = ["gcc", "-fPIC", "-shared", "-o", str(target), *flags, *map(str, SOURCES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.timeout(900)
def test_records_c_passes_its_tests_under_asan_and_ubsan(tmp_path: Path) -> None:
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    target = built(tmp_path / "records.so", *flags)
    asan = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    tests = [str(Path(__file__).with_name(name)) for name in ("test_fast.py", "test_lines.py")]
    (tmp_path / "sanitized.py").write_text(_PLUGIN)
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "sanitized"),
            # gcc fails with the preloaded library.
            *("-k", "not test_compiler_gives_no_warning_for_records_c", *tests),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(tmp_path),
            "RECORDS_SO": str(target),
            "LD_PRELOAD": asan,
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
