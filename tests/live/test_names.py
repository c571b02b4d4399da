"""`comm` is the name of the process, whichever of its threads calls, and whenever it changes."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Listener, Puppet, Row, Tcplat, at, eventually, of_port, reached, read_exactly

Start = Callable[..., Tcplat]
StartPuppet = Callable[..., Puppet]

CALL = "open('/proc/thread-self/comm', 'w').write({!r})"
IN_A_THREAD = """
import threading
def work():
    open('/proc/thread-self/comm', 'w').write({name!r})
    {code}
worker = threading.Thread(target=work)
worker.start()
worker.join()
"""


def reached_at(server: Listener, state: str, count: int = 1) -> Callable[[list[Row]], bool]:
    """For wait_for(): of connections to this server alone, in a run that traces all processes."""
    return lambda rows: reached(state, count)(of_port(rows, server.port))


def rows_to_close(run: Tcplat, server: Listener) -> list[Row]:
    """Wait for the close of the only connection to this server; stop, return its rows."""
    run.wait_for("it was closed", lambda rows: bool(at(of_port(rows, server.port), "close")))
    return of_port(run.stop().rows, server.port)


def names(rows: list[Row], point: str) -> list[tuple[str, str | None]]:
    return [(row["comm"], row["thread"]) for row in at(rows, point)]


def test_row_has_the_names_of_process_and_thread(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    client(CALL.format("shop"))
    client.connect(server, "old")
    old = server.accept()
    run = running_tcplat()
    client.connect(server)
    peer = server.accept()
    client(IN_A_THREAD.format(name="pool 1", code="s.sendall(b'x' * 10); old.sendall(b'x' * 5)"))
    read_exactly(peer, 10)
    peer.sendall(b"y")
    client("s.recv(1)")
    client("s.sendall(b'x')")
    client(IN_A_THREAD.format(name="pool 2", code="s.sendall(b'x')"))
    # What is closed unread is reset.
    read_exactly(peer, 2)
    read_exactly(old, 5)
    peer.close()
    run.wait_for("the peer's FIN was there", reached_at(server, "CLOSE_WAIT"))
    old.close()
    run.wait_for("both FINs were there", reached_at(server, "CLOSE_WAIT", 2))
    rows = of_port(run.stop().rows, server.port)
    assert {row["comm"] for row in rows} == {"shop"}
    assert names(rows, "connect") == [("shop", None)]
    assert [name for _, name in names(rows, "send")] == ["pool 1", "pool 1", None, "pool 2"]
    assert names(rows, "recv") == [("shop", None)]
    # In softirq: of the thread that used the socket last.
    last = [row["thread"] for row in rows if row["state"] == "TCP_CLOSE_WAIT"]
    assert last == ["pool 2", "pool 1"]
    assert all((row["thread"] is None) == (row["tid"] in (None, row["pid"])) for row in rows)


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("by_exec", [False, True])
def test_changed_process_name_is_followed(
    running_tcplat: Start,
    client: Puppet,
    server: Listener,
    tmp_path: Path,
    *,
    by_exec: bool,
    older: bool,
) -> None:
    """The last row is one of softirq: the process has not touched the socket again."""
    client(CALL.format("before"))
    if older:
        client.connect(server)
    run = running_tcplat()
    if not older:
        client.connect(server)
    peer = server.accept()
    client("s.sendall(b'x')")
    read_exactly(peer, 1)
    if by_exec:
        program = tmp_path / "after"
        program.symlink_to(shutil.which("sleep") or "sleep")
        client("os.set_inheritable(s.fileno(), True)")
        client.tell(f"os.execv({str(program)!r}, ['after', '600'])")
    else:
        client(CALL.format("after"))
    comm = Path(f"/proc/{client.pid}/comm")
    eventually(lambda: comm.read_text(encoding="ascii") == "after\n", "it had its new name")
    peer.close()
    run.wait_for("the peer's FIN was there", reached_at(server, "CLOSE_WAIT"))
    rows = of_port(run.stop().rows, server.port)
    client.process.kill()  # sleep(1) does not end with its standard input
    assert names(rows, "send") == [("before", None)]
    assert names(rows[-1:], "state") == [("after", None)]


@pytest.mark.parametrize("older", [False, True])
def test_comm_filter_follows_a_changed_name(
    running_tcplat: Start, client: Puppet, server: Listener, *, older: bool
) -> None:
    client(CALL.format("before"))
    if older:
        client.connect(server)
    run = running_tcplat("--comm", "after")
    if not older:
        client.connect(server)
    peer = server.accept()
    client("s.sendall(b'x')")
    read_exactly(peer, 1)
    client(CALL.format("after"))
    peer.sendall(b"y")
    client("s.recv(1)")
    peer.close()
    run.wait_for("the peer's FIN was there", reached_at(server, "CLOSE_WAIT"))
    client(CALL.format("before"))
    client("s.close()")
    rows = of_port(run.stop().rows, server.port)
    assert [row["point"] for row in rows] == ["recv", "state"]
    assert {row["comm"] for row in rows} == {"after"}


def test_thread_name_is_not_taken_for_comm(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    client(CALL.format("shop"))
    run = running_tcplat("--comm", "shop")
    code = f"global s; s = socket.create_connection({server.address!r}); s.sendall(b'x')"
    client(IN_A_THREAD.format(name="pool 1", code=code))
    run.wait_for("it had sent", lambda rows: bool(at(rows, "send")))
    rows = of_port(run.stop().rows, server.port)
    assert names(rows, "connect") == names(rows, "send") == [("shop", "pool 1")]


def needs_io_uring() -> None:
    """Skip the test where the kernel, or a filter of system calls, refuses io_uring."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(425, 0, None)  # io_uring_setup(2), the same number everywhere: EFAULT at best
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EPERM):
        pytest.skip(f"io_uring_setup is refused here: {os.strerror(error)}")


@pytest.mark.parametrize("by", ["sqp", "wrk"])
def test_comm_of_io_uring_request_is_its_process(
    running_tcplat: Start, client: Puppet, server: Listener, tmp_path: Path, by: str
) -> None:
    """The thread of the kernel that does it, iou-sqp-PID or iou-wrk-PID, is in `thread`."""
    needs_io_uring()
    program = tmp_path / f"uring-{by}"
    source = Path(__file__).with_name("uring.c")
    subprocess.run(["clang", "-O2", "-o", str(program), str(source)], check=True)
    run, filtered = running_tcplat(), running_tcplat("--comm", program.name)
    client(f"p = subprocess.Popen({[str(program), by, str(server.port)]!r})")
    peer = server.accept()
    read_exactly(peer, 1)
    peer.sendall(b"y")
    assert client("p.wait()") == 0
    rows = rows_to_close(run, server)
    assert {(row["pid"], row["comm"]) for row in rows} == {(client("p.pid"), program.name)}
    for point in ("connect", "send", "recv"):
        [(_, thread)] = names(rows, point)
        assert thread
        assert thread.rstrip("0123456789") == f"iou-{by}-"
    kept = rows_to_close(filtered, server)
    for key in ("point", "state", "bytes", "pid", "tid", "comm", "thread"):
        assert [row[key] for row in kept] == [row[key] for row in rows]


def test_unaccepted_connection_has_the_listeners_current_name(
    running_tcplat: Start, puppet: StartPuppet, client: Puppet
) -> None:
    """Without an accept, a connection is the listener's, under its name at the time."""
    service = puppet()
    service(CALL.format("before"))
    service("l = socket.create_server(('127.0.0.1', 0))")
    port = service("l.getsockname()[1]")
    run = running_tcplat(probes=("tcp_service",))
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    service(CALL.format("after"))
    client(f"t = socket.create_connection(('127.0.0.1', {port}))")
    run.wait_for(
        "both were connected",
        lambda rows: (
            len(
                [
                    row
                    for row in rows
                    if row["state"] == "TCP_ESTABLISHED"
                    and row["point"] == "state"
                    and row["sport"] == port
                ]
            )
            == 2
        ),
    )
    syns = [row for row in run.stop().rows if row["flags"] == "SYN" and row["dport"] == port]
    assert [row["comm"] for row in syns if row["point"] == "rx_ip"] == ["before", "after"]
