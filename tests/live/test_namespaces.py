"""tcplat in time and PID namespaces: the time is the host's, pids are those of its /proc."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import (
    TCPLAT,
    Listener,
    Outcome,
    Puppet,
    Tcplat,
    at,
    gone,
    needs,
    of_port,
    reached,
    read_exactly,
)

Start = Callable[..., Tcplat]
StartPuppet = Callable[..., Puppet]


def stopped(run: Tcplat) -> Outcome:
    """Kill it: unshare and nsenter do not forward signals to their children."""
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    os.kill(int(children.read_text(encoding="ascii").split()[0]), signal.SIGINT)
    return run.wait()


EXCHANGE = """
import os, socket
s = socket.create_connection({!r})
s.sendall(b'x')
s.recv(1)
print(os.getpid(), flush=True)
"""


@pytest.mark.parametrize(
    "offsets", [("--monotonic", "1000"), ("--monotonic", "-300"), ("--boottime", "5000")]
)
def test_time_namespace_offset_is_corrected(
    offsets: tuple[str, str], start_tcplat: Start, client: Puppet, server: Listener
) -> None:
    needs("unshare")
    if not Path("/proc/self/ns/time").exists():
        pytest.skip("this kernel has no time namespaces")
    run = start_tcplat(program=("unshare", "--time", "--fork", *offsets, *TCPLAT)).wait_ready()
    before = (time.monotonic_ns(), time.time_ns())
    client.connect(server)
    peer = server.accept()
    client("s.sendall(b'x')")
    read_exactly(peer, 1)
    peer.close()
    # By the clock of the namespace, the row would be far in the future or in the past.
    run.wait_for(
        "the peer's FIN was there",
        lambda rows: reached("CLOSE_WAIT")(of_port(rows, server.port)),
    )
    after = (time.monotonic_ns(), time.time_ns())
    outcome = stopped(run)
    rows = of_port(outcome.rows, server.port)
    assert [row["ts_ns"] for row in rows] == sorted(row["ts_ns"] for row in rows)
    for row in rows:
        assert before[0] < row["ts_ns"] < after[0]
        assert before[1] - 1e8 < row["time_ns"] < after[1] + 1e8


@pytest.fixture
def inside(puppet: StartPuppet) -> Puppet:
    """Process 1 of a PID namespace."""
    needs("unshare", "nsenter")
    return puppet(numbered=True)


def there(inside: Puppet) -> tuple[str, ...]:
    """Tcplat in that namespace."""
    children = Path(f"/proc/{inside.pid}/task/{inside.pid}/children").read_text(encoding="ascii")
    return ("nsenter", "--target", children.split()[0], "--pid", "--mount", *TCPLAT)


def test_pid_is_that_of_the_pid_namespace_of_the_run(
    start_tcplat: Start, puppet: StartPuppet, inside: Puppet, server: Listener
) -> None:
    """For an older socket, whose owner /proc gives, and for one that the programs saw."""
    inside.connect(server, "old")
    peers = [server.accept()]
    outside = puppet()
    run = start_tcplat("-p", "1", program=there(inside)).wait_ready()
    outside.connect(server)
    peers.append(server.accept())
    inside.connect(server)
    peers.append(server.accept())
    inside("import threading\nold.sendall(b'x'); s.sendall(b'x')")
    inside("t = threading.Thread(target=lambda: s.sendall(b'y')); t.start(); t.join()")
    outside("s.sendall(b'x')")
    for peer, count in zip(peers, (1, 1, 2), strict=True):
        read_exactly(peer, count)
        peer.close()
    run.wait_for("both FINs were there", reached("CLOSE_WAIT", 2))
    rows = of_port(stopped(run).rows, server.port)
    assert {row["pid"] for row in rows} == {1}
    assert len({row["sock"] for row in rows}) == 2
    one, two, three = (row["tid"] for row in at(rows, "send"))
    assert (one, two) == (1, 1)
    assert 1 < three < 1000


def test_process_outside_the_pid_namespace_has_comm_but_no_pid(
    start_tcplat: Start, client: Puppet, inside: Puppet, server: Listener
) -> None:
    client("open('/proc/self/comm', 'w').write('outside')")
    run = start_tcplat("--port", str(server.port), program=there(inside)).wait_ready()
    client.connect(server)
    peer = server.accept()
    client("s.close()")
    peer.close()
    run.wait_for("it was gone", gone())
    rows = of_port(stopped(run).rows, server.port)
    assert {(row["pid"], row["tid"], row["comm"]) for row in rows} == {(None, None, "outside")}


def test_command_in_a_nested_pid_namespace_is_traced(
    start_tcplat: Start, inside: Puppet, server: Listener
) -> None:
    code = EXCHANGE.format(server.address)
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    run = start_tcplat(program=there(inside), command=command)
    peer = server.accept()
    read_exactly(peer, 1)
    peer.sendall(b"y")
    rows = of_port(run.wait().rows, server.port)
    (pid,) = {row["pid"] for row in rows}
    assert len(at(rows, "send")) == len(at(rows, "recv")) == 1
    assert 1 < pid < 1000  # its number above, where it is no process 1


def test_tcplat_runs_as_pid_1_of_a_pid_namespace(start_tcplat: Start, server: Listener) -> None:
    """As `unshare --pid --fork --mount-proc tcplat run -- COMMAND` starts it."""
    needs("unshare")
    code = "import os; os.write(2, os.readlink(b'/proc/self') + b'\\n')" + EXCHANGE
    run = start_tcplat(
        program=("unshare", "--pid", "--fork", "--mount-proc", *TCPLAT),
        command=[sys.executable, "-c", code.format(server.address)],
    )
    peer = server.accept()
    read_exactly(peer, 1)
    peer.sendall(b"y")
    outcome = run.wait()
    assert outcome.returncode == 0
    rows = of_port(outcome.rows, server.port)
    (pid,) = {row["pid"] for row in rows}
    assert len(at(rows, "send")) == len(at(rows, "recv")) == 1
    assert str(pid) == outcome.stderr.split("\n")[0]


def test_proc_of_another_pid_namespace_is_refused(start_tcplat: Start) -> None:
    """Where fork(2) and /proc differ in pids, a command could not be found by its pid."""
    needs("unshare")
    run = start_tcplat(program=("unshare", "--pid", "--fork", *TCPLAT), command=["true"])
    outcome = run.wait()
    assert outcome.returncode == 3
    assert "/proc shows the processes of another PID namespace" in outcome.stderr
