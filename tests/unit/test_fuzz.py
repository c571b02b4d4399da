"""Some hostile captures; ``make fuzz`` tries them for ten minutes."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.long import LONG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CASES = sorted((ROOT / "tests/fuzz/cases").iterdir())
AMOUNT = ("--seconds", "600") if LONG else ("--count", "50", "--jobs", "1")


def fuzz(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.fuzz", *arguments],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_workers_end_with_the_fuzzer() -> None:
    command = [sys.executable, "-m", "tests.fuzz.fuzz", "--seconds", "300", "--jobs", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while len(workers := children.read_text(encoding="ascii").split()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        fds = [os.pidfd_open(int(pid)) for pid in workers]
        process.kill()
    for fd in fds:
        assert select.select([fd], [], [], 10)[0]
        os.close(fd)


def test_captures_of_past_failures_are_handled() -> None:
    assert CASES
    fuzz("--again", *map(str, CASES))


@pytest.mark.parametrize("seed", [1])
def test_hostile_captures_are_handled(seed: int) -> None:
    fuzz(*AMOUNT, "--seed", str(seed))
