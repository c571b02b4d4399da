"""The command behind ``--``: it waits to be released, and its status is passed on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcplat_core.errors import UsageError
from tcplat_core.run.traced_command import TracedCommand

Fork = Callable[..., TracedCommand]


@pytest.fixture
def fork() -> Iterator[Fork]:
    """Commands that are gone when the test is over."""
    commands: list[TracedCommand] = []

    def make(*arguments: str) -> TracedCommand:
        commands.append(TracedCommand.fork(arguments))
        return commands[-1]

    yield make
    for command in commands:
        if command.status is None:
            os.kill(command.pid, signal.SIGKILL)
            os.waitpid(command.pid, 0)


def wait(command: TracedCommand) -> None:
    """Until it has ended; it stays a zombie, so that ended() can collect it."""
    os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)


def state(command: TracedCommand) -> str:
    """R, S, Z ... as in proc(5)."""
    return Path(f"/proc/{command.pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("status", [0, 1, 2, 42, 126, 127, 255])
def test_exit_status_is_passed_on(fork: Fork, status: int) -> None:
    command = fork("sh", "-c", f"exit {status}")
    command.go()
    wait(command)
    assert command.ended()
    assert command.status == status
    command.stop()
    assert command.status == status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGSEGV])
def test_death_by_a_signal_becomes_status_128_plus_its_number(
    fork: Fork, number: signal.Signals
) -> None:
    command = fork("sh", "-c", f"ulimit -c 0; kill -{int(number)} $$")
    command.go()
    wait(command)
    assert command.ended()
    assert command.status == 128 + number


def test_command_waits_until_it_is_released(fork: Fork, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    command = fork("touch", str(mark))
    # It sleeps in read(2) on the gate until it is released.
    while state(command) != "S":
        assert not mark.exists()
    assert not command.ended()
    assert not mark.exists()
    command.go()
    wait(command)
    assert mark.exists()


def test_command_stopped_before_its_start_never_runs(fork: Fork, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    command = fork("touch", str(mark))
    command.stop()
    assert command.status == 127
    assert command.ended()
    assert not mark.exists()
    assert not Path(f"/proc/{command.pid}").exists()


POLITE = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
os.write(int(sys.argv[1]), b"!")
signal.pause()
"""


def test_stop_sends_sigterm_and_waits_for_the_command(fork: Fork) -> None:
    ready, said = os.pipe()
    os.set_inheritable(said, True)
    command = fork(sys.executable, "-c", POLITE, str(said))
    command.go()
    os.close(said)
    assert os.read(ready, 1) == b"!"
    os.close(ready)
    assert not command.ended()
    command.stop()
    assert command.status == 7


def test_signal_between_go_and_exec_is_not_lost(fork: Fork) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        command = fork("sleep", "1000")
        bit = 1 << signal.SIGTERM - 1

        def catches() -> bool:
            status = Path(f"/proc/{command.pid}/status").read_text()
            return bool(int(status.split("SigCgt:")[1].split()[0], 16) & bit)

        until = time.monotonic() + 30
        while catches() and time.monotonic() < until:
            time.sleep(0.001)
        assert not catches()
        os.kill(command.pid, signal.SIGTERM)
        command.stop()
        assert command.status == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_stop_is_idempotent(fork: Fork) -> None:
    command = fork("sleep", "1000")
    command.go()
    command.stop()
    command.stop()
    assert command.status == 128 + signal.SIGTERM
    assert command.stopped


def test_missing_program_is_named() -> None:
    with pytest.raises(UsageError, match="there is no program 'no-such-program' to run"):
        TracedCommand.fork(["no-such-program"])


def test_file_without_execute_permission_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a program")
    with pytest.raises(UsageError, match=r"there is no program '.*notes\.txt' to run"):
        TracedCommand.fork([str(path)])


def test_program_with_exec_format_error_is_named(
    fork: Fork, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "script_without_a_first_line"
    path.write_text("echo hello\n")
    path.chmod(0o755)
    command = fork(str(path))
    command.go()
    wait(command)
    assert f"cannot run {path}: Exec format error" in capfd.readouterr().err


def test_arguments_are_passed_unchanged(fork: Fork, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"import sys; open({str(out)!r}, 'w').write(repr(sys.argv[1:]))"
    command = fork(sys.executable, "-c", code, "a b", "", "$HOME", "--pid")
    command.go()
    wait(command)
    assert out.read_text() == "['a b', '', '$HOME', '--pid']"


def test_command_does_not_ignore_sigpipe(fork: Fork, tmp_path: Path) -> None:
    """Python ignores SIGPIPE, and an ignored signal would stay so."""
    copy = tmp_path / "status"
    command = fork("cp", "/proc/self/status", str(copy))
    command.go()
    wait(command)
    (ignored,) = (line for line in copy.read_text().splitlines() if line.startswith("SigIgn"))
    assert not int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1


def test_command_inherits_no_fd_of_tcplat(
    fork: Fork, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "out.jsonl").open("w"):
        command = fork("ls", "-l", "/proc/self/fd")
        command.go()
        wait(command)
    listing = capfd.readouterr().out
    assert " 0 -> " in listing
    assert "out.jsonl" not in listing
