"""tcplat run ... -- CMD: traced with its children, and otherwise run as without tcplat."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import (
    Listener,
    PidFile,
    Puppet,
    Tcplat,
    at,
    by_sock,
    eventually,
    of_port,
    read_to_end,
    story,
)

Start = Callable[..., Tcplat]

CONNECT = "import socket; socket.create_connection({!r}).close()"


def connecting(server: Listener) -> list[str]:
    """Return a command that connects once."""
    return [sys.executable, "-I", "-c", CONNECT.format(server.address)]


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + 15), ("kill -KILL $$", 128 + 9)],
)
def test_run_exits_with_the_commands_status(script: str, status: int, start_tcplat: Start) -> None:
    outcome = start_tcplat(command=["sh", "-c", script]).wait()
    assert outcome.returncode == status
    assert outcome.report["delivered"] == 0


def test_command_keeps_its_stdin_and_stdout(start_tcplat: Start, tmp_path: Path) -> None:
    given = bytes(range(256)) * 100
    (tmp_path / "in").write_bytes(given)
    with (tmp_path / "in").open("rb") as stdin:
        outcome = start_tcplat(command=["cat"], stdin=stdin, stdout=subprocess.PIPE).wait()
    assert outcome.returncode == 0
    assert outcome.stdout == given


def test_quiet_run_prints_nothing(start_tcplat: Start) -> None:
    outcome = start_tcplat("--quiet", command=["sh", "-c", "echo out; echo error >&2"]).wait()
    assert outcome.stderr == "error\n"


def test_connections_of_the_command_are_traced_from_the_first_syn(
    start_tcplat: Start, server: Listener
) -> None:
    run = start_tcplat(command=connecting(server))
    assert read_to_end(server.accept()) == 0
    server.accepted[0].close()
    outcome = run.wait()
    assert outcome.returncode == 0
    assert story(outcome.rows) == [
        "connect",
        "SYN_SENT",
        "ESTABLISHED",
        *("FIN_WAIT1", "FIN_WAIT2", "CLOSE", "close"),
    ]
    assert len({row["pid"] for row in outcome.rows}) == 1
    assert {row["dport"] for row in outcome.rows} == {server.port}


def test_command_starts_once_everything_is_attached(start_tcplat: Start, tmp_path: Path) -> None:
    """It is forked before that, and waits: its first row is the connect."""
    script = f"ls {tmp_path}/*.ready > {tmp_path}/seen"
    assert start_tcplat(command=["sh", "-c", script]).wait().returncode == 0
    assert ".ready" in (tmp_path / "seen").read_text()


def test_only_children_and_grandchildren_of_the_command_are_traced(
    start_tcplat: Start, client: Puppet, server: Listener, tmp_path: Path
) -> None:
    (tmp_path / "connect.py").write_text(CONNECT.format(server.address))
    connect = f"{sys.executable} -I {tmp_path}/connect.py"
    # Itself, a child, a grandchild, and one in the background that outlives its parent.
    script = (
        f"{connect}; sh -c '{connect}; true'; sh -c 'sh -c \"{connect}; true\"; true'; "
        f"sh -c '{connect} & true'; "
        f"touch {tmp_path}/done; read line; exec {connect}"
    )
    run = start_tcplat(command=["sh", "-c", script], stdin=subprocess.PIPE)
    eventually((tmp_path / "done").exists, "the children were done")
    client.connect(server)
    for _ in range(5):
        server.accept().close()
    client("s.close()")
    assert run.process.stdin
    run.process.stdin.write(b"go\n")
    run.process.stdin.close()
    server.accept().close()
    outcome = run.wait()
    assert outcome.returncode == 0
    connects = at(outcome.rows, "connect")
    assert len(connects) == 5
    assert len(by_sock(outcome.rows)) == 5
    assert len({row["pid"] for row in connects}) == 5
    assert client.pid not in {row["pid"] for row in outcome.rows}
    assert {row["dport"] for row in outcome.rows} == {server.port}


def test_orphaned_grandchild_is_traced(
    start_tcplat: Start, server: Listener, tmp_path: Path
) -> None:
    (tmp_path / "connect.py").write_text(CONNECT.format(server.address))
    connect = f"{sys.executable} -I {tmp_path}/connect.py"
    # setsid puts it into a session of its own, and the shell in between is gone at once.
    script = f"sh -c 'setsid {connect} & true'; read line"
    run = start_tcplat(command=["sh", "-c", script], stdin=subprocess.PIPE)
    server.accept().close()
    run.wait_for("the grandchild was done", lambda rows: bool(at(rows, "close")))
    assert run.process.stdin
    run.process.stdin.close()
    assert run.wait().rows[0]["dport"] == server.port


def test_thread_of_a_child_is_traced(start_tcplat: Start, server: Listener, tmp_path: Path) -> None:
    script = tmp_path / "thread.py"
    script.write_text(f"""
import threading
def work():
    {CONNECT.format(server.address)}
thread = threading.Thread(target=work)
thread.start()
thread.join()
""")
    run = start_tcplat(command=["sh", "-c", f"{sys.executable} -I {script}; true"])
    server.accept().close()
    rows = run.wait().rows
    assert story(rows)[:3] == ["connect", "SYN_SENT", "ESTABLISHED"]
    assert {row["tid"] == row["pid"] for row in rows} == {False}


def test_command_and_pid_are_both_traced(
    start_tcplat: Start, client: Puppet, server: Listener, tmp_path: Path
) -> None:
    """-p and a command: both are traced."""
    script = f"touch {tmp_path}/started; read line"
    run = start_tcplat("-p", str(client.pid), command=["sh", "-c", script], stdin=subprocess.PIPE)
    eventually((tmp_path / "started").exists, "the command had begun")
    client.connect(server)
    assert run.process.stdin
    run.process.stdin.close()
    rows = of_port(run.wait().rows, server.port)
    assert {row["pid"] for row in rows} == {client.pid}


def test_missing_command_is_refused(start_tcplat: Start) -> None:
    outcome = start_tcplat(command=["/no/such/program"]).wait()
    assert outcome.returncode == 2
    assert outcome.stderr == "tcplat: there is no program '/no/such/program' to run\n"


def test_command_is_not_started_if_the_run_fails(start_tcplat: Start, tmp_path: Path) -> None:
    outcome = start_tcplat(
        command=["touch", str(tmp_path / "made")], sinks=["jsonl:path=/no/such/folder/x"]
    ).wait()
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_the_command_too(number: int, start_tcplat: Start, pid_file: PidFile) -> None:
    run = start_tcplat(command=pid_file.command("sleep", "60"))
    eventually(pid_file.pid, "the command had begun")
    outcome = run.stop(number)
    assert not pid_file.alive()
    assert outcome.returncode == 0
    assert outcome.report
    assert outcome.stderr.count("\n") == 1


def test_command_is_stopped_with_the_run(start_tcplat: Start, pid_file: PidFile) -> None:
    command = pid_file.command("sleep", "60")
    outcome = start_tcplat("--duration", "300ms", command=command).wait()
    assert outcome.returncode == 0
    assert outcome.report
    assert pid_file.pid()
    assert not pid_file.alive()


def test_killed_session_leaves_no_waiting_command(start_tcplat: Start, tmp_path: Path) -> None:
    """The command waits to be released; without its session it must end, and not run."""
    made = tmp_path / "made"
    run = start_tcplat(command=["touch", str(made)])

    def children() -> list[str]:
        task = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        return task.read_text().split() if task.exists() else []

    waiting = eventually(children, "the command was forked")
    if run.ready.exists():
        pytest.skip("it was ready before it could be killed")
    run.kill()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in waiting), "they were gone")
    if not run.ready.exists():
        assert not made.exists()


def test_command_has_the_privileges_of_tcplat(start_tcplat: Start) -> None:
    """What `sudo tcplat run -- CMD` traces is what `sudo CMD` would do."""
    outcome = start_tcplat(command=["cat", "/proc/self/status"], stdout=subprocess.PIPE).wait()
    mine = Path("/proc/self/status").read_text()

    def field(text: str, name: str) -> str:
        return next(line for line in text.splitlines() if line.startswith(name))

    theirs = outcome.stdout.decode()
    for name in ("Uid:", "Gid:", "CapEff:", "CapBnd:", "NoNewPrivs:", "SigBlk:"):
        assert field(theirs, name) == field(mine, name)
    # SIGPIPE has its default action, as under a shell.
    assert int(field(theirs, "SigIgn:").split()[1], 16) >> (signal.SIGPIPE - 1) & 1 == 0


def test_command_inherits_no_fd_of_tcplat(start_tcplat: Start) -> None:
    outcome = start_tcplat(command=["ls", "/proc/self/fd"], stdout=subprocess.PIPE).wait()
    # The last one is the folder that ls reads.
    assert outcome.stdout.split() == [b"0", b"1", b"2", b"3"]
