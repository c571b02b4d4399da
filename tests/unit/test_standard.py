"""Closed standard input, output and error: commands behave as with /dev/null."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path

import msgspec
import pytest

from tcplat_core import SCHEMA_VERSION, RunReport
from tcplat_core.testing import make_event
from tests.long import LONG

pytestmark = pytest.mark.slow

REPORT = {"v": SCHEMA_VERSION, "report": RunReport(probes={}, duration_s=1).as_json()}
CAPTURE = b"".join(
    msgspec.json.encode(one) + b"\n" for one in [*(make_event() for _ in range(3)), REPORT]
)


def tcplat(
    arguments: Sequence[str], closed: Sequence[int] = ()
) -> subprocess.CompletedProcess[bytes]:
    """Run it, with these closed and the others at pipes."""
    close = "".join(f"{fd}>&- " if fd else "<&- " for fd in closed)
    command = [sys.executable, "-I", "-m", "tcplat_core", *arguments]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {close}', "sh", *command],
        input=b"",
        capture_output=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    path = tmp_path / "capture.jsonl"
    path.write_bytes(CAPTURE)
    return path


@pytest.fixture(scope="module")
def to_a_file(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[list[str], Path, bytes]]:
    """Commands, the file that each writes, and what is in it if nothing is closed."""
    folder = tmp_path_factory.mktemp("closed")
    capture, out, page = folder / "capture.jsonl", folder / "out", folder / "page"
    # A damaged line is said on standard error, which must not be the file.
    capture.write_bytes(b"{broken\n" + CAPTURE)
    commands = [
        (["replay", str(capture), "--sink", f"jsonl:path={out}"], out),
        (["report", str(capture), "-o", str(page)], page),
    ]
    assert [tcplat(arguments).returncode for arguments, _ in commands] == [0, 0]
    return [(arguments, path, path.read_bytes()) for arguments, path in commands]


CLOSED: list[tuple[int, ...]] = [(0, 1, 2), (2,), (0,), (1,), (0, 1), (0, 2), (1, 2)]
if not LONG:
    CLOSED = CLOSED[:2]


@pytest.mark.parametrize("closed", CLOSED, ids=str)
def test_closed_standard_streams_do_not_change_output_files(
    closed: tuple[int, ...], to_a_file: list[tuple[list[str], Path, bytes]]
) -> None:
    for arguments, path, whole in to_a_file:
        path.unlink(missing_ok=True)
        assert tcplat(arguments, closed).returncode == 0
        assert path.read_bytes() == whole


def test_closed_stderr_does_not_change_stdout(capture: Path) -> None:
    for arguments in (["replay", str(capture), "--sink", "summary"], ["diff", *[str(capture)] * 2]):
        with_it, without = tcplat(arguments), tcplat(arguments, (2,))
        assert (without.returncode, without.stdout) == (with_it.returncode, with_it.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["replay", "{}", "--sink", "jsonl"],
        ["diff", "{}", "{}"],
        ["report", "{}", "-o", "-"],
        ["merge", "{}", "{}"],
    ],
    ids=itemgetter(0),
)
def test_unwritable_message_does_not_end_the_command(arguments: list[str], capture: Path) -> None:
    capture.write_bytes(b"{broken\n" + CAPTURE)  # which is said before the first row
    arguments = [word.format(capture) for word in arguments]
    closed = tcplat(arguments, (2,))
    reader, gone = os.pipe()
    os.close(reader)
    for to in (os.open("/dev/full", os.O_WRONLY), gone):
        try:
            ran = subprocess.run(
                [sys.executable, "-I", "-m", "tcplat_core", *arguments],
                stdout=subprocess.PIPE,
                stderr=to,
                check=False,
                timeout=120,
            )
        finally:
            os.close(to)
        assert (ran.returncode, ran.stdout) == (closed.returncode, closed.stdout)


def test_quiet_still_reports_a_switched_off_sink(capture: Path) -> None:
    ran = tcplat(["replay", "-q", str(capture), "--sink", "jsonl:path=/dev/full"])
    assert ran.returncode == 1
    assert b"sink jsonl:path=/dev/full was switched off: writing failed: No space" in ran.stderr


def test_closed_stdin_or_stdout_that_is_needed_is_reported(capture: Path) -> None:
    for arguments, closed, words in (
        (["replay", str(capture), "--sink", "jsonl"], 1, b"standard output is closed"),
        (["merge", str(capture), str(capture)], 1, b""),
        (["replay", "-", "--sink", "table"], 0, b"standard input is closed"),
    ):
        ran = tcplat(arguments, (closed,))
        assert ran.returncode != 0
        assert words in ran.stderr
        assert b"Traceback" not in ran.stderr


def test_read_only_dev_null_as_stdout_is_reported_as_closed(capture: Path) -> None:
    """As after a second exec(2): closed descriptors are /dev/null then."""
    with open(os.devnull, "rb") as unwritable:  # noqa: PTH123 - there is no path to speak of
        ran = subprocess.run(
            [sys.executable, "-I", "-m", "tcplat_core", "replay", str(capture)],
            stdout=unwritable,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert ran.returncode == 2
    assert b"standard output is closed" in ran.stderr


BLOCKED = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.executable, [sys.executable, "-I", "-m", "tcplat_core", *sys.argv[1:]])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signals_blocked_at_the_start_still_end_tcplat(
    number: signal.Signals, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", BLOCKED, "replay", str(pipe)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        try:
            # It is read from then on, without an end.
            writer = opened_once_read(pipe, child)
            try:
                child.send_signal(number)
                child.wait(timeout=60)
            finally:
                os.close(writer)
        finally:
            child.kill()


def opened_once_read(pipe: Path, reader: subprocess.Popen[bytes]) -> int:
    """Open a named pipe for writing. Without O_NONBLOCK a dead reader would block us for ever."""
    deadline = time.monotonic() + 60
    while True:
        assert reader.poll() is None
        assert time.monotonic() < deadline
        with contextlib.suppress(OSError):  # ENXIO: it has no reader
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.005)


def test_command_inherits_the_original_signal_mask() -> None:
    """As without tcplat. In a process of its own: the signal mask is inherited."""
    text = """
import signal, sys
from tcplat_core.run import signals
from tcplat_core.run.traced_command import TracedCommand
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1])
signals.unblock()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
child = TracedCommand.fork(["grep", "SigBlk", "/proc/self/status"])
child.go()
while not child.ended():
    pass
"""
    done = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
    assert int(done.stdout.split()[1], 16) == 1 << signal.SIGUSR1 - 1
