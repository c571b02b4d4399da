"""The progress bar on a terminal while a capture is read, and its removal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from tcplat_core.testing import make_event
from tests.long import LONG

pytestmark = pytest.mark.slow

ROWS = 400_000


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bar") / "capture.jsonl"
    # With spaces, as other programs write JSON: such lines are not read by C, but one by one.
    line = json.dumps(msgspec.to_builtins(make_event())) + "\n"
    path.write_text(line * ROWS)
    return path


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
COMMANDS = ("replay", "report", "diff")
CASES = [(command, number) for command in COMMANDS for number in SIGNALS]
if not LONG:  # each command, each signal
    CASES = [*CASES[: len(SIGNALS)], ("report", signal.SIGTERM), ("diff", signal.SIGHUP)]


@pytest.mark.parametrize(("command", "number"), CASES)
def test_interrupted_command_leaves_no_progress_bar(
    command: str, number: signal.Signals, capture: Path, tmp_path: Path
) -> None:
    arguments = {
        "replay": [str(capture), "--sink", "jsonl"],
        "report": [str(capture), "-o", str(tmp_path / "page")],
        "diff": [str(capture), str(capture)],
    }[command]
    main, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", command, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm"},
    ) as process:
        os.close(terminal)
        shown = b""
        sent = False
        until = time.monotonic() + 120
        while time.monotonic() < until:
            if not select.select([main], [], [], 0.1)[0]:
                if process.poll() is not None:
                    break
                continue
            try:
                data = os.read(main, 4096)
            except OSError:  # the last one has closed it
                break
            shown += data
            if b"%" in data and not sent:
                process.send_signal(number)
                sent = True
    os.close(main)
    assert sent
    assert b"\x1b[?25l" not in shown  # the cursor is never hidden, so it need not be restored
    if number != signal.SIGKILL:
        assert b"%" not in shown.rpartition(b"\r\x1b[K")[2]
    if command != "replay" and number in (signal.SIGTERM, signal.SIGHUP):
        assert process.returncode == -number
    assert not list(tmp_path.iterdir())


def test_sigterm_removes_the_partial_file_and_keeps_the_old(tmp_path: Path) -> None:
    old = tmp_path / "trace.json"
    old.write_text("old")
    with subprocess.Popen(
        [
            *(sys.executable, "-I", "-m", "tcplat_core", "report", "-"),
            *("-q", "-o", str(old), "--format", "perfetto"),
        ],
        stdin=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(make_event()) + b"\n")
        process.stdin.flush()
        until = time.monotonic() + 120
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        assert len(list(tmp_path.iterdir())) == 2
        process.terminate()
        process.wait(30)
    assert process.returncode == -signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
    assert old.read_text() == "old"
