"""One request to end may be several signals: timeout(1) signals its child, and then its group."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import msgspec
import pytest

from tcplat_core.kernel.end_request import ENDED_AT_ONCE
from tcplat_core.testing import make_event

ROW = msgspec.json.encode(make_event()) + b"\n"
TWICE = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
GAP = pytest.mark.parametrize("gap_s", [0, 0.002, 0.02])


def started(*arguments: str) -> subprocess.Popen[bytes]:
    """Start tcplat with a capture that goes on."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "tcplat_core", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    process.stdin.write(ROW)
    process.stdin.flush()
    return process


def signal_twice(
    process: subprocess.Popen[bytes], number: int, gap_s: float
) -> tuple[bytes, bytes]:
    """Return the rest of both outputs. Its input stays open."""
    process.send_signal(number)
    time.sleep(gap_s)
    process.send_signal(number)
    try:
        process.wait(30)
    finally:
        process.kill()
    return process.communicate()


@TWICE
@GAP
def test_replay_that_gets_a_signal_twice_ends_cleanly(number: int, gap_s: float) -> None:
    process = started("replay", "-", "--sink", "jsonl")
    assert process.stdout
    assert process.stdout.readline() == ROW
    out, err = signal_twice(process, number, gap_s)
    assert process.returncode == 0
    assert out.startswith(b'{"v":2,"report":')
    assert err.startswith(b"tcplat: tcp_client: 1 rows, 0 known to be lost")


@TWICE
@GAP
def test_report_that_gets_a_signal_twice_leaves_no_partial_file(
    number: int, gap_s: float, tmp_path: Path
) -> None:
    process = started(
        *("report", "-", "-q", "--format", "perfetto", "-o", str(tmp_path / "trace.json"))
    )
    until = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < until:
        time.sleep(0.005)
    assert list(tmp_path.iterdir())
    _, err = signal_twice(process, number, gap_s)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert err.decode().strip() == ""
    assert not list(tmp_path.iterdir())


def in_a_process(code: str) -> tuple[int, str]:
    """Run code that signals itself, where kill() is imported."""
    head = "import os, signal, sys, time\nfrom signal import raise_signal as kill\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr


RUN = """
    from tcplat_core.run.signals import Signals
    Signals().install()
    kill({number})
    time.sleep({pause_s})
    kill({number})
    sys.exit(7)
"""
COMMAND = """
    from tcplat_core.registry.command_group import terminated_in_order
    from tcplat_core.kernel.end_request import Interrupts
    signal.signal(signal.SIGINT, Interrupts())
    try:
        with terminated_in_order():
            try:
                kill({number})
            finally:
                time.sleep({pause_s})
                kill({number})
                sys.exit(7)
    except KeyboardInterrupt:
        pass
"""


@TWICE
@pytest.mark.parametrize("code", [RUN, COMMAND], ids=["run", "command"])
def test_signal_a_second_later_ends_at_once_and_says_so(code: str, number: int) -> None:
    assert in_a_process(code.format(number=int(number), pause_s=0)) == (7, "")
    insisting = in_a_process(code.format(number=int(number), pause_s=1.1))
    assert insisting == (128 + number, f"tcplat: {ENDED_AT_ONCE}\n")


@TWICE
def test_signal_when_all_is_done_does_not_change_the_status(number: int) -> None:
    code = f"""
        class Late:
            def __del__(self, kill=os.kill, pid=os.getpid()):  # when Python removes its modules
                kill(pid, {int(number)})

        sys.late = Late()
        from tcplat_core.cli.main import main

        sys.argv = ["tcplat", "--version"]
        main()
    """
    assert in_a_process(code) == (0, "")
