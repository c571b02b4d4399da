"""Which process owns a socket: -p selects all sockets of that process at any time, and no other."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import (
    Listener,
    Puppet,
    Row,
    Tcplat,
    assert_tiles,
    at,
    by_sock,
    changed_loader,
    free_port,
    listen,
    of_port,
    only,
    reached,
    read_exactly,
    story,
    total,
)

Start = Callable[..., Tcplat]
StartPuppet = Callable[..., Puppet]
Listen = Callable[..., Listener]


def exchange(client: Puppet, peer: socket.socket, name: str = "s") -> None:
    """Send 10 bytes, get 20."""
    client(f"{name}.sendall(b'x' * 10)")
    read_exactly(peer, 10)
    peer.sendall(b"y" * 20)
    client(f"{name}.recv(100)")


def test_pid_filter_keeps_the_traced_process_alone(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    mine, other = puppet(), puppet()
    run = running_tcplat("-p", str(mine.pid))
    for one in (mine, other, mine, other):
        one.connect(server)
        exchange(one, server.accept())
        one("s.close()")
    for peer in server.accepted:
        peer.close()
    run.wait_for("both sockets were gone", lambda rows: len(at(rows, "close")) == 2)
    rows = run.stop().rows
    assert len(by_sock(rows)) == 2
    for connection in by_sock(rows).values():
        assert story(connection) == [
            "connect",
            "SYN_SENT",
            "ESTABLISHED",
            "send",
            "recv",
            "FIN_WAIT1",
            "FIN_WAIT2",
            "CLOSE",
            "close",
        ]
    assert {(row["pid"], row["dport"]) for row in rows} == {(mine.pid, server.port)}


def test_run_without_pid_filter_traces_every_process(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    one, two = puppet(), puppet()
    run = running_tcplat()
    one.connect(server)
    two.connect(server)
    run.wait_for(
        "both were connected", lambda rows: reached("ESTABLISHED", 2)(of_port(rows, server.port))
    )
    mine = of_port(run.stop().rows, server.port)
    assert {row["pid"] for row in mine} == {one.pid, two.pid}


def test_failed_recv_before_connect_does_not_hide_a_socket(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """The negative cache holds the socket's address until it connects."""
    run = running_tcplat("-p", str(client.pid))
    errors = client(f"""
errors = []
s = socket.socket()
for _ in range(3):
    try:
        s.recv(1)
    except OSError as error:
        errors.append(error.errno)
s.connect({server.address!r})
errors
""")
    assert errors == [errno.ENOTCONN] * 3
    exchange(client, server.accept())
    client("s.close()")
    run.wait_for("the client had closed", reached("FIN_WAIT1"))
    assert story(run.stop().rows)[:5] == ["connect", "SYN_SENT", "ESTABLISHED", "send", "recv"]


@pytest.mark.parametrize("together", [True, False])
def test_pid_filter_accepts_two_processes(
    together: bool,  # noqa: FBT001 - a parameter of the test
    running_tcplat: Start,
    puppet: StartPuppet,
    server: Listener,
) -> None:
    one, two, other = puppet(), puppet(), puppet()
    pids = f"{one.pid},{two.pid}"
    arguments = ("-p", pids) if together else ("-p", str(one.pid), "-p", str(two.pid))
    run = running_tcplat(*arguments)
    for client in (one, other, two):
        client.connect(server)
    run.wait_for("both were connected", reached("ESTABLISHED", 2))
    rows = run.stop().rows
    assert [row["pid"] for row in at(rows, "connect")] == [one.pid, two.pid]
    assert {row["pid"] for row in rows} == {one.pid, two.pid}


@pytest.mark.parametrize("ip", [4, 6])
def test_older_socket_belongs_to_its_process(
    ip: int, running_tcplat: Start, client: Puppet, listener: Listen
) -> None:
    server = listener(ip)
    client.connect(server)
    sport = client("s.getsockname()[1]")
    peer = server.accept()
    exchange(client, peer)
    run = running_tcplat("-p", str(client.pid))
    exchange(client, peer)
    peer.close()
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    client("s.close()")
    run.wait_for("the socket was gone", lambda rows: bool(at(rows, "close")))
    rows = run.stop().rows
    assert story(rows) == ["send", "recv", "CLOSE_WAIT", "LAST_ACK", "CLOSE", "close"]
    assert len({row["sock"] for row in rows}) == 1
    for row in rows:
        assert (row["ip"], row["daddr"], row["dport"], row["sport"]) == (
            ip,
            *server.address,
            sport,
        )
        assert row["pid"] == client.pid
        assert row["comm"] == Path(f"/proc/{client.pid}/comm").read_text().strip()


def test_softirq_rows_of_an_untouched_older_socket_have_its_pid(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """The peer's FIN alone: no system call names the process of these rows."""
    client.connect(server)
    peer = server.accept()
    run = running_tcplat("-p", str(client.pid))
    peer.close()
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    rows = run.stop().rows
    assert story(rows) == ["CLOSE_WAIT"]
    assert rows[0]["pid"] == client.pid
    assert rows[0]["dport"] == server.port
    assert rows[0]["sport"]


def test_unaccepted_older_connection_belongs_to_its_listener(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    service, client = puppet(), puppet()
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",))
    client("s.sendall(b'x')")
    run.wait_for("the reader was woken", lambda rows: bool(at(rows, "ready")))
    service("peer, _ = listening.accept(); peer.recv(1)")
    rows = run.wait_for("it was read", lambda rows: bool(at(rows, "recv")))
    assert [
        row["point"] for row in rows if row["point"] in ("rx_ip", "ready", "accept", "recv")
    ] == [
        "rx_ip",
        "ready",
        "accept",
        "recv",
    ]
    assert {row["pid"] for row in rows} == {service.pid}


def test_close_at_process_exit_belongs_to_the_process(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """The kernel closes it in exit(2), on behalf of the process."""
    client.connect(server)
    server.accept()
    run = running_tcplat("-p", str(client.pid))
    client.process.kill()
    client.process.wait()
    read = server.accepted[0].recv(1)
    assert read == b""
    server.accepted[0].close()
    outcome = run.wait()
    assert outcome.returncode == 0
    assert story(outcome.rows) == ["FIN_WAIT1", "FIN_WAIT2", "CLOSE", "close"]
    assert {row["pid"] for row in outcome.rows} == {client.pid}


def test_older_pending_connect_is_traced(running_tcplat: Start, stranded: Puppet) -> None:
    stranded("s = socket.socket(); s.setblocking(False); s.connect_ex(('10.77.0.2', 7777))")
    run = running_tcplat("-p", str(stranded.pid))
    stranded("s.close()")
    run.wait_for("the socket was gone", lambda rows: bool(at(rows, "close")))
    rows = run.stop().rows
    assert story(rows) == ["CLOSE", "close"]
    # Its begin was not seen: no time is better than a wrong one.
    assert [row["connect_us"] for row in rows] == [None, None]
    assert rows[0]["old_state"] == "TCP_SYN_SENT"
    assert rows[0]["dport"] == 7777


def test_pid_filter_excludes_older_sockets_of_other_processes(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    mine, other = puppet(), puppet()
    for one in (mine, other):
        one.connect(server)
    peers = server.accept(), server.accept()
    run = running_tcplat("-p", str(mine.pid))
    for one in (mine, other):
        one("s.sendall(b'x' * 10)")
    for peer in peers:
        read_exactly(peer, 10)
        peer.sendall(b"y")
        peer.close()
    run.wait_for("a peer's FIN was there", reached("CLOSE_WAIT"))
    rows = run.stop().rows
    assert len(by_sock(rows)) == 1
    assert {row["sport"] for row in rows} == {mine("s.getsockname()[1]")}


def test_older_accepted_socket_is_not_a_client(running_tcplat: Start, client: Puppet) -> None:
    port = client("l = socket.create_server(('127.0.0.1', 0)); l.getsockname()[1]")
    with socket.create_connection(("127.0.0.1", port)) as other:
        client("a, _ = l.accept()")
        run = running_tcplat("-p", str(client.pid))
        client("a.sendall(b'hello')")
        assert other.recv(100) == b"hello"
        client("a.close()")
        assert other.recv(100) == b""
    assert run.stop().rows == []


def test_socket_in_another_network_namespace_is_traced(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    """Before and after the start of the run; both ends are in the other namespace."""
    there = puppet(alone=True)
    server = puppet(within=there)
    port = server("l = socket.create_server(('127.0.0.1', 0)); l.getsockname()[1]")
    there(f"old = socket.create_connection(('127.0.0.1', {port}))")
    server("old, _ = l.accept()")
    run = running_tcplat("-p", str(there.pid))
    there(f"new = socket.create_connection(('127.0.0.1', {port}))")
    there("old.sendall(b'x' * 10); new.sendall(b'y' * 20)")
    server("old.recv(10); old.close()")
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    rows = run.stop().rows
    assert sorted(map(story, by_sock(rows).values())) == [
        ["connect", "SYN_SENT", "ESTABLISHED", "send"],
        ["send", "CLOSE_WAIT"],
    ]
    inode = there("os.stat('/proc/self/ns/net').st_ino")
    assert inode != os.stat("/proc/self/ns/net").st_ino
    assert {row["netns"] for row in rows} == {inode}


def test_connection_over_veth_is_traced(running_tcplat: Start, puppet: StartPuppet) -> None:
    """Not only loopback: the answer comes in an interrupt of no process."""
    here, there = puppet(alone=True), puppet(alone=True)
    nsenter = ["nsenter", f"--net=/proc/{here.pid}/ns/net", "ip"]
    peer = ["name", "veth1", "netns", str(there.pid)]
    subprocess.run([*nsenter, "link", "add", "veth0", "type", "veth", "peer", *peer], check=True)
    for one, name, last in ((here, "veth0", 1), (there, "veth1", 2)):
        for line in (
            f"address add 10.77.1.{last}/24 dev {name}",
            f"address add fd77:1::{last}/64 dev {name} nodad",
            f"link set {name} up",
        ):
            one(f"subprocess.run({['ip', *line.split()]!r}, check=True)")
    there("l = socket.create_server(('::', 7777), family=socket.AF_INET6, dualstack_ipv6=True)")
    run = running_tcplat("-p", str(here.pid))
    for address in ("10.77.1.2", "fd77:1::2"):
        here(f"s = socket.create_connection(({address!r}, 7777)); s.sendall(b'x' * 10)")
        there("a, _ = l.accept(); a.recv(10); a.sendall(b'y' * 20); a.close()")
        here("s.recv(100), s.recv(100); s.close()")
    run.wait_for("both sockets were gone", lambda rows: len(at(rows, "close")) == 2)
    rows = run.stop().rows
    ends = {(row["ip"], row["saddr"], row["daddr"]) for row in rows}
    assert ends == {(4, "10.77.1.1", "10.77.1.2"), (6, "fd77:1::1", "fd77:1::2")}
    for connection in by_sock(rows).values():
        assert (total(connection, "send"), total(connection, "recv")) == (10, 20)
        assert connection[2]["connect_us"] > 0
    assert {row["pid"] for row in rows} == {here.pid}


def test_pid_is_the_process_and_tid_the_thread(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid))
    tid = client(f"""
def work():
    global s, tid
    tid = threading.get_native_id()
    s = socket.create_connection({server.address!r})
thread = threading.Thread(target=work)
thread.start()
thread.join()
tid
""")
    assert tid != client.pid
    server.accept().close()
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    client("s.send(b'x')")
    rows = run.wait_for("it was used by the other thread", lambda rows: bool(at(rows, "send")))
    assert story(rows)[:4] == ["connect", "SYN_SENT", "ESTABLISHED", "CLOSE_WAIT"]
    assert {row["pid"] for row in rows} == {client.pid}
    assert {row["tid"] for row in rows[:4]} == {tid}
    (sent,) = at(rows, "send")
    assert sent["tid"] == client.pid


FORK = """
import ctypes
r, w = os.pipe()
child = os.fork()
if not child:
    # The parent's death is the child's.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.read(r, 1)
    s.sendall(b"child")
    os.close(r)
    signal.pause()
child
"""


def test_child_that_uses_the_socket_becomes_its_owner(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat()
    client.connect(server)
    peer = server.accept()
    child = client(FORK)
    client("os.write(w, b'!')")
    read_exactly(peer, 5)
    peer.shutdown(socket.SHUT_WR)
    run.wait_for(
        "the peer's FIN was there", lambda rows: reached("CLOSE_WAIT")(of_port(rows, server.port))
    )
    rows = of_port(run.stop().rows, server.port)
    assert story(rows) == ["connect", "SYN_SENT", "ESTABLISHED", "send", "CLOSE_WAIT"]
    assert [row["pid"] for row in rows] == [client.pid] * 3 + [child] * 2
    client("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)")


# Two workers that have inherited the socket and accept one connection each.
WORKERS = """
import ctypes
listener = socket.create_server(("127.0.0.1", 0))
children = []
for _ in range(2):
    child = os.fork()
    if not child:
        # The parent's death is the child's.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        peer, _ = listener.accept()
        peer.sendall(peer.recv(10))
        signal.pause()
    children.append(child)
children
"""


def test_packets_for_traced_workers_are_kept_before_an_accept(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    service, client = puppet(), puppet()
    children = service(WORKERS)
    port = service("listener.getsockname()[1]")
    traced = ",".join(map(str, (service.pid, *children)))
    run = running_tcplat("-p", traced, probes=("tcp_service",))
    for name in ("a", "b"):
        client(f"{name} = socket.create_connection(('127.0.0.1', {port}))")
        client(f"{name}.sendall(b'x'); {name}.recv(1)")
    run.wait_for("both were answered", lambda rows: len(at(rows, "send")) == 2)
    rows = run.stop().rows
    for sport in client("[one.getsockname()[1] for one in (a, b)]"):
        mine = [row for row in rows if sport in (row["sport"], row["dport"])]
        assert len(at(mine, "rx_ip")) >= 3  # SYN, ACK, data
        (accept,) = at(mine, "accept")
        accepted = mine.index(accept)
        assert {row["pid"] for row in mine[:accepted]} == {None}
        assert {row["pid"] for row in mine[accepted:] if row["sock"]} <= set(children)
    service("for child in children: os.kill(child, signal.SIGKILL), os.waitpid(child, 0)")


# A process that listens, and its child, which accepts on command.
DAEMON = """
import ctypes
def wait_for_byte(pipe):
    return os.read(pipe[0], 1)
port, end, accept = os.pipe(), os.pipe(), os.pipe()
parent = os.fork()
if not parent:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child:
        os.write(port[1], b"%d %d" % (listener.getsockname()[1], child))
        wait_for_byte(end)
        os._exit(0)
    wait_for_byte(accept)
    peer, _ = listener.accept()
    peer.sendall(peer.recv(10))
    os._exit(0)
[parent, *map(int, os.read(port[0], 100).split())]
"""


def at_port(rows: list[Row], port: int) -> list[Row]:
    """Rows of a service."""
    return [row for row in rows if port in (row["sport"], row["dport"])]


@pytest.mark.parametrize("waits", [False, True])
def test_connection_of_an_orphaned_listener_has_no_owner_before_accept(
    waits: bool,  # noqa: FBT001 - a parameter of the test
    running_tcplat: Start,
    puppet: StartPuppet,
) -> None:
    service, client = puppet(), puppet()
    run = running_tcplat(probes=("tcp_service",))
    parent, port, child = service(DAEMON)
    ends = "os.write(end[1], b'x'); os.waitpid(parent, 0)"
    connects = f"s = socket.create_connection(('127.0.0.1', {port})); s.sendall(b'x')"
    if waits:
        client(connects)
        run.wait_for("it waited", lambda rows: bool(at(at_port(rows, port), "ready")))
    service(ends)
    client("s.sendall(b'y')" if waits else connects)
    reached_it = 2 if waits else 1
    run.wait_for("it waited", lambda rows: len(at(at_port(rows, port), "ready")) == reached_it)
    service("os.write(accept[1], b'x')")
    client("s.recv(10)")
    client("s.close()")
    run.wait_for("it was over", lambda rows: bool(at(at_port(rows, port), "close")))
    rows = at_port(run.stop().rows, port)
    (accept,) = at(rows, "accept")
    assert (rows[0]["old_state"], rows[0]["state"]) == ("TCP_CLOSE", "TCP_LISTEN")
    assert rows[0]["pid"] == parent
    before = rows[1 : rows.index(accept)]
    assert {row["point"] for row in before} >= {"rx_ip", "rx_tcp", "state", "ready"}
    assert {row["pid"] for row in before} == ({parent, None} if waits else {None})
    assert [row["comm"] is None for row in before] == [row["pid"] is None for row in before]
    # The second byte no longer belongs to the process that has ended.
    assert at(before, "ready")[-1]["pid"] is at(before, "rx_ip")[-1]["pid"] is None
    assert accept["pid"] == child


# One of a group: it listens at the port that the others have, too, or at any.
JOIN = """
{name} = socket.socket()
{name}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
{name}.bind(("127.0.0.1", {port}))
{name}.listen()
{name}.getsockname()[1]
"""


def join(puppet: Puppet, port: int = 0, name: str = "listening") -> int:
    return int(puppet(JOIN.format(name=name, port=port)))


def before_accept(rows: list[Row], sport: int) -> list[Row]:
    """Rows of a connection while it waits; all of them where it still does."""
    mine = [row for row in rows if sport in (row["sport"], row["dport"])]
    accepts = at(mine, "accept")
    return mine[: mine.index(accepts[0])] if accepts else mine


def assert_waits_for(rows: list[Row], sport: int, owner: Puppet | None) -> None:
    """Return the owner of a connection before it is accepted."""
    waiting = before_accept(rows, sport)
    assert {row["point"] for row in waiting} >= {"rx_ip", "rx_tcp", "state", "ready"}
    pid = owner and owner.pid
    comm = owner and Path(f"/proc/{pid}/comm").read_text().strip()
    assert {(row["pid"], row["comm"]) for row in waiting} == {(pid, comm)}


def ask(client: Puppet, port: int) -> int:
    """Connect and send; return the source port."""
    client(f"s = socket.create_connection(('127.0.0.1', {port})); s.sendall(b'x')")
    return int(client("s.getsockname()[1]"))


def waits(sport: int) -> Callable[[list[Row]], bool]:
    return lambda rows: bool(at(before_accept(rows, sport), "ready"))


def test_older_listener_owns_all_connections_before_accept(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    service, client = puppet(), puppet()
    port = listen(service)
    run = running_tcplat(probes=("tcp_service",))
    for sport in (ask(client, port), ask(client, port)):
        rows = at_port(run.wait_for("it waited", waits(sport)), port)
        assert_waits_for(rows, sport, service)
        # None of the listener alone: it did not change.
        assert all(row["dport"] for row in rows)
    run.stop()


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("sockets", [1, 3])
def test_last_process_of_a_reuseport_group_is_the_owner(
    older: bool,  # noqa: FBT001 - a parameter of the test
    sockets: int,
    running_tcplat: Start,
    puppet: StartPuppet,
) -> None:
    leaves, stays, client = puppet(), puppet(), puppet()
    run = None if older else running_tcplat(probes=("tcp_service",))
    port = join(leaves)
    for number in range(sockets):
        join(stays, port, f"listening{number}")
    run = run or running_tcplat(probes=("tcp_service",))
    shared = ask(client, port)
    run.wait_for("it waited", waits(shared))
    leaves.end()
    alone = ask(client, port)
    rows = run.wait_for("it waited", waits(alone))
    assert_waits_for(rows, shared, None)
    assert_waits_for(rows, alone, stays)
    # With a second such socket the owner is unknown again.
    join(leaves := puppet(), port)
    shared = ask(client, port)
    assert_waits_for(run.wait_for("it waited", waits(shared)), shared, None)
    run.stop()


def test_last_process_of_a_reuseport_group_is_traced(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    leaves, stays, client = puppet(), puppet(), puppet()
    run = running_tcplat("-p", str(stays.pid), probes=("tcp_service",))
    port = join(leaves)
    join(stays, port)
    leaves.end()
    alone = ask(client, port)
    assert_waits_for(run.wait_for("it waited", waits(alone)), alone, stays)
    run.stop()


# A child that accepts one connection from a socket that it has inherited, and says so.
INHERIT = """
import ctypes
accepted = os.pipe()
child = os.fork()
if not child:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    peer, _ = listening.accept()
    os.write(accepted[1], b"x")
    signal.pause()
child
"""


@pytest.mark.parametrize("older", [True, False])
def test_reuseport_socket_shared_with_a_child_has_no_owner(
    older: bool,  # noqa: FBT001 - a parameter of the test
    running_tcplat: Start,
    puppet: StartPuppet,
) -> None:
    leaves, stays, client = puppet(), puppet(), puppet()
    run = None if older else running_tcplat(probes=("tcp_service",))
    port = join(leaves)
    join(stays, port)
    stays(INHERIT)
    run = run or running_tcplat(probes=("tcp_service",))
    # The kernel chooses by addresses: half of them are for the child's socket.
    client(f"many = [socket.create_connection(('127.0.0.1', {port})) for _ in range(40)]")
    stays("os.read(accepted[0], 1)")
    leaves.end()
    alone = ask(client, port)
    assert_waits_for(run.wait_for("it waited", waits(alone)), alone, None)
    run.stop()
    stays("os.kill(child, signal.SIGKILL); os.waitpid(child, 0)")


# A process that listens by MPTCP, and its child, which serves one connection.
MPTCP = """
import ctypes
listener = socket.socket(proto=262)
listener.bind(("127.0.0.1", 0))
listener.listen()
child = os.fork()
if not child:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    peer, _ = listener.accept()
    peer.sendall(peer.recv(10))
    peer.recv(10)
    os._exit(0)
listener.getsockname()[1]
"""


def has_mptcp() -> bool:
    try:
        return Path("/proc/sys/net/mptcp/enabled").read_text() == "1\n"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_mptcp(), reason="this kernel has no MPTCP")
def test_mptcp_subflow_has_no_owner_before_accept(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    service, client = puppet(), puppet()
    run = running_tcplat(probes=("tcp_service",))
    port = service(MPTCP)
    client(f"s = socket.socket(proto=262); s.connect(('127.0.0.1', {port}))")
    client("s.sendall(b'x'); s.recv(10)")
    client("s.close()")
    run.wait_for("it was over", lambda rows: bool(at(at_port(rows, port), "close")))
    rows = at_port(run.stop().rows, port)
    assert {row["point"] for row in rows} >= {"rx_ip", "rx_tcp", "state", "close"}
    # By kprobe and fentry it is seen that the kernel accepts, for the child.
    accepts = at(rows, "accept")
    accepted = rows.index(accepts[0]) if accepts else len(rows)
    assert {(row["pid"], row["comm"]) for row in rows[:accepted]} == {(None, None)}
    assert {row["pid"] for row in rows[accepted:] if row["sock"]} <= {service("child")}
    service("os.waitpid(child, 0)")


def test_unaccepted_connection_stays_owned_by_its_ended_process(
    running_tcplat: Start, puppet: StartPuppet
) -> None:
    service, client = puppet(), puppet()
    run = running_tcplat(probes=("tcp_service",))
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    run.wait_for("it waited", lambda rows: "ESTABLISHED" in story(at_port(rows, port)))
    service.process.kill()
    service.process.wait()
    run.wait_for("it was gone", lambda rows: bool(at(at_port(rows, port), "close")))
    rows = at_port(run.stop().rows, port)
    assert {row["pid"] for row in rows} == {service.pid}


def test_child_of_the_traced_process_is_not_traced(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """-p names a process; only a command after -- is followed."""
    run = running_tcplat("-p", str(client.pid))
    client(f"""
child = os.fork()
if not child:
    socket.create_connection({server.address!r}).close()
    os._exit(0)
os.waitpid(child, 0)
""")
    client.connect(server)
    run.wait_for("it was connected", reached("ESTABLISHED"))
    rows = run.stop().rows
    assert len(by_sock(rows)) == 1
    assert {row["pid"] for row in rows} == {client.pid}


TAKE_OVER = """
way = socket.socket(fileno={way})
(_, (fd,), *_) = socket.recv_fds(way, 1, 1)
s = socket.socket(fileno=fd)
"""


@pytest.mark.parametrize("older", [True, False])
def test_socket_handed_to_the_traced_process_is_traced(
    older: bool,  # noqa: FBT001 - a parameter of the test
    running_tcplat: Start,
    puppet: StartPuppet,
    server: Listener,
) -> None:
    """By SCM_RIGHTS, from a process that is not traced."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = puppet(pass_fds=[theirs.fileno()])
        arguments = ("-p", str(receiver.pid))
        run = None if older else running_tcplat(*arguments)
        handed = socket.create_connection(server.address)
        peer = server.accept()
        with handed:
            handed.sendall(b"x" * 10)
            read_exactly(peer, 10)
            run = run or running_tcplat(*arguments)
            handed.sendall(b"x" * 10)
            read_exactly(peer, 10)
            socket.send_fds(ours, [b"!"], [handed.fileno()])
        receiver(TAKE_OVER.format(way=theirs.fileno()))
        receiver("s.sendall(b'y' * 20)")
        read_exactly(peer, 20)
        peer.close()
        run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
        rows = run.stop().rows
        receiver("way.detach()")
    assert story(rows) == ["send", "CLOSE_WAIT"]
    assert rows[0]["bytes"] == 20
    assert {row["pid"] for row in rows} == {receiver.pid}
    assert {(row["daddr"], row["dport"]) for row in rows} == {server.address}


def test_socket_handed_away_is_no_longer_traced(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        giver = puppet(pass_fds=[theirs.fileno()])
        run = running_tcplat("-p", str(giver.pid))
        giver.connect(server)
        peer = server.accept()
        giver(f"way = socket.socket(fileno={theirs.fileno()})")
        giver("socket.send_fds(way, [b'!'], [s.fileno()]); s.close(); way.detach()")
        _, (fd,), *_ = socket.recv_fds(ours, 1, 1)
        with socket.socket(fileno=fd) as handed:
            handed.sendall(b"z" * 30)
            read_exactly(peer, 30)
            peer.close()
            assert handed.recv(1) == b""
        giver.connect(server)
        run.wait_for("it was connected again", reached("ESTABLISHED", 2))
    rows = run.stop().rows
    assert not at(rows, "send")
    assert {row["pid"] for row in rows} == {giver.pid}


def test_socket_used_in_turn_belongs_to_the_last_caller(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    """Each call belongs to its caller, and rows of the peer's packets to the last caller."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        traced = puppet(pass_fds=[theirs.fileno()])
        run = running_tcplat("-p", str(traced.pid))
        with socket.create_connection(server.address) as shared:
            peer = server.accept()
            socket.send_fds(ours, [b"!"], [shared.fileno()])
            traced(TAKE_OVER.format(way=theirs.fileno()))
            for _ in range(3):
                for _ in range(3):
                    shared.sendall(b"x" * 10)
                    read_exactly(peer, 10)
                traced("s.sendall(b'y' * 20)")
                read_exactly(peer, 20)
            shared.sendall(b"x" * 10)
            read_exactly(peer, 10)
            peer.close()
            assert shared.recv(1) == b""
        traced("s.close(); way.detach()")
        traced.connect(server)
        run.wait_for("it was connected", reached("ESTABLISHED"))
        rows = run.stop().rows
    stories = [story(connection) for connection in by_sock(rows).values()]
    assert stories == [["send"] * 3, ["connect", "SYN_SENT", "ESTABLISHED"]]
    assert {row["pid"] for row in rows} == {traced.pid}


def test_run_ends_with_the_traced_process(
    running_tcplat: Start, puppet: StartPuppet, server: Listener
) -> None:
    one, two = puppet(), puppet()
    run = running_tcplat("-p", f"{one.pid},{two.pid}")
    one.connect(server)
    one.end()
    two.connect(server)
    two.end()
    outcome = run.wait(5)
    assert outcome.returncode == 0
    assert {row["pid"] for row in outcome.rows} == {one.pid, two.pid}
    # What the kernel does in a process's exit belongs to the process as well.
    for rows in by_sock(outcome.rows).values():
        assert story(rows)[:4] == ["connect", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1"]


def test_run_ends_with_a_zombie(running_tcplat: Start, client: Puppet) -> None:
    """A zombie has ended, whether its parent waits for it or not."""
    pid = client("""
child = os.fork()
if not child:
    signal.pause()
child
""")
    run = running_tcplat("-p", str(pid))
    client("os.kill(child, signal.SIGKILL)")
    try:
        assert run.wait(5).returncode == 0
    finally:
        client("os.waitpid(child, 0)")


def test_missing_pid_is_refused(start_tcplat: Start, client: Puppet) -> None:
    pid = client.pid
    client.end()
    outcome = start_tcplat("-p", str(pid)).wait()
    assert outcome.returncode == 2
    assert outcome.stderr == f"tcplat: there is no process {pid}\n"


@pytest.mark.parametrize("text", ["0", "-1", "x", "1,", "1,,2", "4194305", ""])
def test_malformed_pid_is_refused(text: str, start_tcplat: Start) -> None:
    outcome = start_tcplat("-p", text).wait()
    assert outcome.returncode == 2
    assert len(outcome.stderr.splitlines()) == 1


def test_hundreds_of_older_sockets_are_traced(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    client(f"old = [socket.create_connection({server.address!r}) for _ in range(100)]")
    peers = [server.accept() for _ in range(100)]
    client(f"old += [socket.create_connection({server.address!r}) for _ in range(100)]")
    peers += [server.accept() for _ in range(100)]
    run = running_tcplat("-p", str(client.pid))
    client("for s in old: s.send(b'x')")
    for peer in peers:
        read_exactly(peer, 1)
        peer.close()
    run.wait_for("all FINs were there", reached("CLOSE_WAIT", 200))
    socks = by_sock(run.stop().rows)
    assert len(socks) == 200
    sports = client("[s.getsockname()[1] for s in old]")
    assert sorted(rows[0]["sport"] for rows in socks.values()) == sorted(sports)
    for rows in socks.values():
        assert story(rows) == ["send", "CLOSE_WAIT"]
        assert_tiles(rows)


def test_packets_of_a_reconnected_socket_are_found(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """It then has other addresses, by which packets are assigned to it."""
    first, second = free_port(), server.port
    probe = f"xdp_port:iface=lo,port={first}+{second},dir=either"
    run = running_tcplat("-p", str(client.pid), probes=(probe,))
    client(f"""
s = socket.socket()
assert s.connect_ex(("127.0.0.1", {first})) == errno.ECONNREFUSED
s.connect({server.address!r})
""")
    exchange(client, server.accept())
    client("s.close()")
    run.wait_for(
        "the client's FIN was there",
        lambda rows: any(row["flags"] == "FIN|ACK" and row["dport"] == second for row in rows),
    )
    rows = run.stop().rows
    assert [row["flags"] for row in rows if row["dport"] == first] == ["SYN"]
    to = [row for row in rows if row["dport"] == second]
    assert to[0]["flags"] == "SYN"
    assert sum(row["bytes"] for row in to) == 10


NO_END = """
attach = Loader._core
Loader._core = lambda self, core, point: (
    point.point != "destroy" and attach(self, core, point)
)
"""
"""As on a kernel that runs no program at the end of a socket: its entry stays."""


def test_socket_with_an_unseen_end_leaves_no_stale_state(
    tmp_path: Path, running_tcplat: Start, client: Puppet
) -> None:
    """The kernel reuses the addresses of both sockets almost immediately."""
    program = changed_loader(tmp_path, NO_END)
    run = running_tcplat(probes=("tcp_client", "tcp_service"), program=program)
    port = client("""
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
listening = socket.create_server(("127.0.0.1", 0))
port = listening.getsockname()[1]
for _ in range(50):
    s = socket.create_connection(("127.0.0.1", port))
    peer, _ = listening.accept()
    s.send(b"x")
    peer.recv(1)
    s.close()
    peer.close()
port
""")

    def ours(rows: list[Row]) -> list[Row]:
        return [row for row in rows if port in (row["sport"], row["dport"]) and row["sock"]]

    run.wait_for("the last one was closed", lambda rows: len(at(ours(rows), "close")) >= 100)
    rows = [row for row in ours(run.stop().rows) if row["sport"] and row["dport"]]
    connections = by_sock(rows).values()
    assert len(connections) == 100
    ends = [{(row["sport"], row["dport"]) for row in connection} for connection in connections]
    assert [len(pairs) for pairs in ends] == [1] * 100
    assert len(set.union(*ends)) == 100
    assert [len(at(connection, "close")) for connection in connections] == [1] * 100


def test_service_that_takes_over_a_port_owns_its_connections(
    running_tcplat: Start, client: Puppet, puppet: StartPuppet
) -> None:
    """The older service is not traced; its listening socket only closes."""
    old, new = puppet(), puppet()
    port = old("""
listening = socket.create_server(("127.0.0.1", 0))
listening.getsockname()[1]
""")
    run = running_tcplat("-p", str(new.pid), probes=("tcp_service",))
    old("listening.close()")
    new(f"listening = socket.create_server(('127.0.0.1', {port}))")
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    new("peer, _ = listening.accept()")
    run.wait_for("it was accepted", lambda rows: bool(at(rows, "accept")))
    rows = run.stop().rows
    assert story(rows)[0] == "LISTEN"
    assert {"rx_ip", "state", "accept"} <= {row["point"] for row in rows[1:]}
    assert reached("ESTABLISHED")(rows)
    assert {row["pid"] for row in rows} == {new.pid}


NAMED = """
import ctypes
libc = ctypes.CDLL(None)
cpus = sorted(os.sched_getaffinity(0))

def be(name, cpu):
    libc.prctl(15, name)  # PR_SET_NAME
    os.sched_setaffinity(0, {cpus[cpu]})

be(b"first", 0)
"""
# A second process at the same socket, which reads while the first one sends.
RIVALS = """
rival = os.fork()
if not rival:
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    be(b"rival", 1)
    for _ in range(50_000):
        s.recv(1)
    os._exit(0)
for _ in range(50_000):
    s.send(b"x")
os.waitpid(rival, 0)
rival
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.alone  # 100,000 events fill the rings of other runs, too
def test_concurrent_callers_of_one_socket_keep_their_own_pids(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """A call belongs to its caller; pid and comm are of one process."""
    client(NAMED)
    client.connect(server)
    peer = server.accept()
    run = running_tcplat(*only(server.port), "--ring-size", "64M")
    peer.sendall(b"y" * 50_000)
    client.tell(RIVALS)
    read_exactly(peer, 50_000)
    rival = client.answer()
    peer.close()
    run.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    outcome = run.stop()
    assert outcome.report["dropped"] == 0
    for point, pid, name in (("send", client.pid, "first"), ("recv", rival, "rival")):
        rows = at(outcome.rows, point)
        assert len(rows) == 50_000
        assert {(row["pid"], row["tid"], row["comm"]) for row in rows} == {(pid, pid, name)}


def test_reused_addresses_do_not_mix_with_an_open_old_socket(
    running_tcplat: Start, client: Puppet, puppet: StartPuppet
) -> None:
    """The end of the old socket does not affect the connection that now has its addresses."""
    service = puppet()
    port = listen(service)
    run = running_tcplat(*only(port), probes=("tcp_service",))
    client(f"""
def again():
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() resets
    s.bind(("127.0.0.1", {free_port()}))
    s.connect(("127.0.0.1", {port}))
    return s
""")
    names = ("first", "second", "third", "fourth")
    for name in names[:-1]:
        client("s = again(); s.close()")
        service(f"{name}, _ = listening.accept()")
    client("s = again()")
    # Without a listener the connection alone identifies the owner of its packets.
    service("fourth, _ = listening.accept(); listening.close()")
    for name in names[:-1]:
        service(f"{name}.close()")
        client("s.sendall(b'x' * 10)")
        service("fourth.recv(10)")
    run.wait_for("all was read", lambda rows: total(rows, "recv") == 30)
    rows = run.stop().rows
    packets = [row for row in at(rows, "rx_ip") if row["dport"] == port]
    assert [row["pid"] for row in packets if row["bytes"]] == [service.pid] * 3
    resets = [row["pid"] for row in packets if "RST" in row["flags"]]
    assert resets == [service.pid] * 3
    assert len(by_sock(at(rows, "close"))) == 3


def test_packets_of_an_older_socket_have_its_pid(
    running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    """Its addresses are known from the start, and stay known once it is used."""
    client.connect(server)
    peer = server.accept()
    probe = f"xdp_port:iface=lo,port={server.port},dir=either"
    run = running_tcplat("-p", str(client.pid), probes=(probe,))
    for _ in range(3):
        exchange(client, peer)
    client("s.close()")
    run.wait_for("its FIN was there", lambda rows: any("FIN" in row["flags"] for row in rows))
    rows = run.stop().rows
    assert sum(row["bytes"] for row in rows if row["dport"] == server.port) == 30
    assert sum(row["bytes"] for row in rows if row["sport"] == server.port) == 60


@pytest.fixture(scope="module")
def their_port() -> int:
    """One for all pairs of services: the C knows it, so another one takes another compilation."""
    return free_port()


@pytest.mark.parametrize("older", [True, False], ids=["older", "younger"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1", "127.0.0.2"),
        ("127.0.0.1", "::1"),
        ("0.0.0.0", "127.0.0.2"),
        ("0.0.0.0", "::"),
        ("::", "127.0.0.2"),
        ("::ffff:127.0.0.1", "127.0.0.2"),
    ],
)
def test_two_services_at_one_port_keep_their_connections(
    first: str,
    second: str,
    older: bool,  # noqa: FBT001 - a parameter of the test
    their_port: int,
    running_tcplat: Start,
    client: Puppet,
    puppet: StartPuppet,
) -> None:
    """Each at its own address: an unaccepted connection belongs to the right service."""
    services = puppet(), puppet()
    port = their_port
    both_families = (first, second) == ("0.0.0.0", "::")

    def begin() -> None:
        for service, host in zip(services, (first, second), strict=True):
            service(f"""
listening = socket.socket(socket.AF_INET6 if ":" in {host!r} else socket.AF_INET)
listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
if ":" in {host!r}:
    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, {both_families})
listening.bind(({host!r}, {port}))
listening.listen()
""")

    if older:
        begin()
    run = running_tcplat(*only(port), probes=("tcp_service",))
    if not older:
        begin()
    targets = {"0.0.0.0": "127.0.0.1", "::ffff:127.0.0.1": "127.0.0.1", "::": "::1"}
    owners = {}
    for service, host in zip(services, (first, second), strict=True):
        target = targets.get(host, host)
        owners[target] = service.pid
        client(f"""
for _ in range(2):
    socket.create_connection(({target!r}, {port})).close()
""")
    run.wait_for(
        "all FINs were there",
        lambda rows: sum("FIN" in (row["flags"] or "") for row in at(rows, "rx_ip")) >= 4,
    )
    rows = [row for row in run.stop().rows if row["state"] != "TCP_LISTEN" and row["dport"] == port]
    for host, pid in owners.items():
        mine = [row for row in rows if row["daddr"] == host]
        assert len(mine) >= 6  # SYN, ACK and FIN, twice
        assert {row["pid"] for row in mine} == {pid}
