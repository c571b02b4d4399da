"""Rows of a connect that completes, fails, is abandoned or stays pending."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Callable

import pytest

from .harness import (
    ATTACH,
    FAMILY,
    LOCAL,
    Listener,
    Puppet,
    Row,
    Tcplat,
    Traffic,
    Watched,
    at,
    by_sock,
    completes,
    free_port,
    gone,
    needs,
    reached,
    read_to_end,
    story,
)

WHOLE = ["connect", "SYN_SENT", "ESTABLISHED", "FIN_WAIT1", "FIN_WAIT2", "CLOSE", "close"]
"""A connection that its client closes first. (TIME_WAIT is no socket: the kernel says CLOSE.)"""


@pytest.fixture
def client(watched: Watched) -> Puppet:
    return watched.client


def whole_connection(client: Puppet, server: Listener, traffic: Traffic) -> list[Row]:
    """Connect, close from the client's side, and see the rows."""
    client.connect(server)
    peer = server.accept()
    client("s.close()")
    peer.close()
    traffic.wait_for("the socket was gone", gone())
    return traffic.rows()


def assert_took_from_connect_on(rows: list[Row], done: Row) -> None:
    """connect_us is the time between two rows, to the nanosecond."""
    (connect,) = at(rows, "connect")
    assert round(done["connect_us"] * 1000) == done["ts_ns"] - connect["ts_ns"] > 0


@pytest.mark.parametrize("ip", [4, 6])
def test_connection_is_traced_from_connect_to_close(
    ip: int, watched: Watched, client: Puppet, listener: Callable[..., Listener]
) -> None:
    server = listener(ip)
    rows = whole_connection(client, server, watched.to(server.port))

    assert story(rows) == WHOLE
    states = at(rows, "state")
    assert [row["old_state"] for row in states[1:]] == [row["state"] for row in states[:-1]]
    assert states[0]["old_state"] == "TCP_CLOSE"
    # The connect row knows where to; the ancestor printed 0.0.0.0:0.
    assert rows[0]["connect_us"] is None
    assert [row["desc"] for row in rows] == [
        "SYN goes out",
        "sending SYN",
        "connected",
        "FIN sent",
        "FIN acked",
        "closed",
        "socket gone",
    ]
    for row in rows:
        assert (row["ip"], row["daddr"], row["dport"]) == (ip, *server.address)
        assert row["saddr"] == LOCAL[ip]
        assert (row["pid"], row["tid"]) == (client.pid, client.pid)
        assert row["netns"] == os.stat("/proc/self/ns/net").st_ino
        assert row["probe"] == "tcp_client"
        assert row["v"] == 2
    assert len({row["sock"] for row in rows}) == 1
    # From ESTABLISHED on it has the port that it really came from.
    assert {row["sport"] for row in rows[2:]} == {rows[2]["sport"]}
    assert rows[2]["sport"] > 0
    (done,) = filter(completes, rows)
    assert_took_from_connect_on(rows, done)
    assert [row["connect_us"] is None for row in rows].count(False) == 1


def test_source_port_is_that_of_getsockname(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    client.connect(server)
    sport = client("s.getsockname()[1]")
    assert [row["sport"] for row in traffic.rows() if completes(row)] == [sport]


def test_bound_socket_has_its_source_port_in_the_first_row(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    client("s = socket.socket(); s.bind(('127.0.0.1', 0))")
    sport = client("s.getsockname()[1]")
    client(f"s.connect({server.address!r})")
    assert {row["sport"] for row in traffic.rows()} == {sport}


def test_mapped_address_is_reported_as_ipv4(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    client(f"s = socket.socket(socket.AF_INET6); s.connect(('::ffff:127.0.0.1', {server.port}))")
    client("s.close()")
    server.accept().close()
    rows = traffic.wait_for("the socket was gone", gone())
    assert story(rows) == WHOLE
    assert {(row["ip"], row["daddr"]) for row in rows} == {(4, "127.0.0.1")}
    assert {row["saddr"] for row in rows[2:]} == {"127.0.0.1"}


@pytest.mark.parametrize("ip", [4, 6])
def test_refused_connect_is_traced(ip: int, watched: Watched, client: Puppet) -> None:
    port = free_port(ip)
    client(f"s = socket.socket(socket.AddressFamily({FAMILY[ip]}))")
    assert client(f"s.connect_ex(({LOCAL[ip]!r}, {port})) == errno.ECONNREFUSED")
    client("s.close()")
    rows = watched.to(port).rows()
    assert story(rows) == ["connect", "SYN_SENT", "CLOSE", "close"]
    failed = rows[2]
    assert failed["desc"] == "refused"
    assert_took_from_connect_on(rows, failed)
    assert {(row["daddr"], row["dport"]) for row in rows} == {(LOCAL[ip], port)}
    assert failed["sport"]
    assert [row["connect_us"] is None for row in rows] == [True, True, False, True]


def test_refused_nonblocking_connect_is_traced(watched: Watched, client: Puppet) -> None:
    port = free_port()
    client(f"s = socket.socket(); s.setblocking(False); s.connect_ex(('127.0.0.1', {port}))")
    rows = watched.to(port).wait_for("it was refused", reached("CLOSE"))
    assert rows[-1]["desc"] == "refused"
    assert rows[-1]["connect_us"] > 0
    assert rows[-1]["pid"] == client.pid


def test_second_connect_after_a_refusal_is_traced(watched: Watched, client: Puppet) -> None:
    port = free_port()
    client(f"s = socket.socket(); s.connect_ex(('127.0.0.1', {port}))")
    with socket.create_server(("127.0.0.1", port)) as server:
        client(f"s.connect(('127.0.0.1', {port}))")
        sport = client("s.getsockname()[1]")
        client("s.close()")
        peer, _ = server.accept()
        peer.close()
        rows = watched.to(port).wait_for("the socket was gone", gone())
    assert story(rows) == ["connect", "SYN_SENT", "CLOSE", *WHOLE]
    assert len({row["sock"] for row in rows}) == 1
    assert [row["desc"] for row in rows if row["connect_us"] is not None] == [
        "refused",
        "connected",
    ]
    # State of the first attempt is not carried over to the second.
    (done,) = filter(completes, rows)
    assert done["sport"] == sport
    assert {(row["daddr"], row["dport"]) for row in rows} == {("127.0.0.1", port)}


def test_connect_elsewhere_after_a_refusal_is_traced(
    watched: Watched, traffic: Traffic, client: Puppet, server: Listener
) -> None:
    port = free_port()
    client(f"s = socket.socket(); s.connect_ex(('127.0.0.1', {port}))")
    client(f"s.connect({server.address!r})")
    second = traffic.rows()
    first = watched.to(port).rows()
    assert story(first) == ["connect", "SYN_SENT", "CLOSE"]
    assert story(second) == ["connect", "SYN_SENT", "ESTABLISHED"]
    assert len({row["sock"] for row in (*first, *second)}) == 1


def test_reconnect_after_a_disconnect_is_traced(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    """connect(AF_UNSPEC) resets a socket to unconnected."""
    client.connect(server)
    client("""
import ctypes
ctypes.CDLL(None).connect(s.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16)
""")
    client(f"s.connect({server.address!r})")
    sport = client("s.getsockname()[1]")
    rows = traffic.rows()
    assert story(rows) == [*WHOLE[:3], "CLOSE", *WHOLE[:3]]
    assert len({row["sock"] for row in rows}) == 1
    assert rows[-1]["sport"] == sport
    assert rows[-1]["connect_us"] > 0


def test_timed_out_connect_is_traced(watched: Watched) -> None:
    """Both families, and both ways to say for how long, at once: it takes a few seconds."""
    stranded = watched.stranded
    netns = stranded("os.stat('/proc/self/ns/net').st_ino")
    stranded("""
sockets = []
for to, family in (("10.77.0.2", socket.AF_INET), ("fd77::2", socket.AF_INET6)):
    for option, value in ((socket.TCP_SYNCNT, 1), (socket.TCP_USER_TIMEOUT, 1500)):
        s = socket.socket(family)
        s.setsockopt(socket.IPPROTO_TCP, option, value)
        s.setblocking(False)
        s.connect_ex((to, 7776))
        sockets.append(s)
""")
    rows = watched.to(7776).wait_for("all four had timed out", reached("CLOSE", 4))
    assert stranded(
        "{s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for s in sockets} == {errno.ETIMEDOUT}"
    )
    assert len(by_sock(rows)) == 4
    for mine in by_sock(rows).values():
        assert story(mine) == ["connect", "SYN_SENT", "CLOSE"]
        failed = mine[-1]
        assert failed["desc"] == "timed out"
        # No system call: the kernel's timer made the row.
        assert failed["pid"] == stranded.pid
        assert failed["netns"] == netns
        assert failed["sport"]
        # A timer cannot be early.
        assert failed["connect_us"] > 900_000
        assert_took_from_connect_on(mine, failed)
    assert {(row["ip"], row["daddr"]) for row in rows} == {(4, "10.77.0.2"), (6, "fd77::2")}


def test_connect_abandoned_by_close_is_traced(watched: Watched) -> None:
    stranded, traffic = watched.stranded, watched.to(7777)
    stranded("s = socket.socket(); s.setblocking(False); s.connect_ex(('10.77.0.2', 7777))")
    traffic.wait_for("the SYN was out", reached("SYN_SENT"))
    stranded("s.close()")
    rows = traffic.wait_for("the socket was gone", gone())
    assert story(rows) == ["connect", "SYN_SENT", "CLOSE", "close"]
    assert rows[2]["desc"] == "given up"
    assert rows[2]["connect_us"] > 0
    assert rows[2]["daddr"] == "10.77.0.2"


def test_connect_abandoned_by_a_kill_is_traced(
    running_tcplat: Callable[..., Tcplat], stranded: Puppet
) -> None:
    run = running_tcplat("-p", str(stranded.pid))
    stranded.tell("s = socket.socket(); s.connect(('10.77.0.2', 7777))")
    run.wait_for("the SYN was out", reached("SYN_SENT"))
    stranded.process.kill()
    stranded.process.wait()
    outcome = run.wait()
    assert outcome.returncode == 0
    assert story(outcome.rows) == ["connect", "SYN_SENT", "CLOSE", "close"]
    assert outcome.rows[2]["desc"] == "given up"
    assert {row["pid"] for row in outcome.rows} == {stranded.pid}


@pytest.mark.parametrize("to", ["10.99.0.1", "fd99::1"])
def test_connect_without_a_route_is_traced(to: str, watched: Watched) -> None:
    """No SYN goes out, no state changes: only the call itself shows it."""
    stranded = watched.stranded
    family = "AF_INET6" if ":" in to else "AF_INET"
    before = len(watched.run.rows())
    code = stranded(f"s = socket.socket(socket.{family}); s.connect_ex(({to!r}, 7775))")
    assert code == errno.ENETUNREACH
    watched.settle()
    # (What it did with `s` before goes now.)
    rows = [row for row in at(watched.run.rows()[before:], "connect") if row["pid"] == stranded.pid]
    if not rows and ATTACH in ("auto", "tracepoint"):
        pytest.skip("no tracepoint reports a connect that finds no route")
    (row,) = rows
    assert row["desc"] == "ENETUNREACH"
    assert row["connect_us"] > 0
    assert row["state"] == "TCP_CLOSE"
    assert (row["daddr"], row["dport"], row["ip"]) == (to, 7775, 6 if ":" in to else 4)


def test_connect_without_a_free_address_is_traced(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    """The state reaches TCP_SYN_SENT, and no further."""
    # The same four numbers twice.
    code = client(f"""
again = socket.socket()
again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
again.bind(("127.0.0.1", 0))
other = socket.socket()
other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
other.bind(again.getsockname())
again.connect({server.address!r})
other.connect_ex({server.address!r})
""")
    assert code == errno.EADDRNOTAVAIL
    failed = list(by_sock(traffic.rows()).values())[-1]
    assert story(failed) == ["connect", "SYN_SENT", "CLOSE"]
    assert failed[-1]["connect_us"] > 0
    assert failed[-1]["desc"] != "connected"


def test_nonblocking_connect_completes(traffic: Traffic, client: Puppet, server: Listener) -> None:
    client(f"s = socket.socket(); s.setblocking(False); s.connect_ex({server.address!r})")
    rows = traffic.wait_for("it was connected", reached("ESTABLISHED"))
    (done,) = filter(completes, rows)
    assert done["connect_us"] > 0


def test_each_connection_has_its_own_sock(
    traffic: Traffic, client: Puppet, server: Listener
) -> None:
    client(f"""
for _ in range(100):
    socket.create_connection({server.address!r}).close()
""")
    for _ in range(100):
        server.accept().close()
    socks = by_sock(traffic.wait_for("all sockets were gone", gone(100)))
    assert len(socks) == 100
    for rows in socks.values():
        assert story(rows)[:4] == WHOLE[:4]
        assert len({row["sport"] for row in rows if row["sport"]}) == 1
        for row in rows:
            assert row["saddr"]
            assert (row["daddr"], row["dport"]) == server.address
            assert row["sport"] or row["state"] == "TCP_SYN_SENT"
    assert all(0 < sock < 2**63 for sock in socks)


def test_close_by_the_peer_is_traced(traffic: Traffic, client: Puppet, server: Listener) -> None:
    client.connect(server)
    server.accept().close()
    traffic.wait_for("the peer's FIN was there", reached("CLOSE_WAIT"))
    client("s.close()")
    rows = traffic.wait_for("the socket was gone", gone())
    assert story(rows) == [*WHOLE[:3], "CLOSE_WAIT", "LAST_ACK", "CLOSE", "close"]
    assert [row["desc"] for row in rows[3:]] == [
        "peer sent FIN",
        "FIN sent last",
        "closed",
        "socket gone",
    ]


def test_half_close_is_traced(traffic: Traffic, client: Puppet, server: Listener) -> None:
    client.connect(server)
    peer = server.accept()
    client("s.sendall(b'question'); s.shutdown(socket.SHUT_WR)")
    traffic.wait_for("the FIN was acknowledged", reached("FIN_WAIT2"))
    # The other direction still works.
    assert read_to_end(peer) == 8
    peer.sendall(b"answer")
    assert client("len(s.recv(100))") == 6
    peer.close()
    assert client("len(s.recv(100))") == 0
    client("s.close()")
    rows = traffic.wait_for("the socket was gone", gone())
    assert story(rows) == [
        *WHOLE[:3],
        "send",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "recv",
        "CLOSE",
        "recv",
        "close",
    ]
    # Whatever the kernel has cleared by the end: the addresses are the same throughout.
    assert len({(row["sport"], row["dport"], row["daddr"]) for row in rows[2:]}) == 1


def test_reset_by_the_peer_is_traced(traffic: Traffic, client: Puppet, server: Listener) -> None:
    client.connect(server)
    peer = server.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    peer.close()
    reset = traffic.wait_for("it was reset", reached("CLOSE"))[-1]
    assert (reset["old_state"], reset["state"]) == ("TCP_ESTABLISHED", "TCP_CLOSE")
    assert reset["desc"] == "ECONNRESET"
    assert reset["pid"] == client.pid
    assert reset["connect_us"] is None


def test_accepted_connections_have_no_tcp_client_rows(watched: Watched, client: Puppet) -> None:
    # Neither may be one of another test, whose rows the run has.
    port, sport = free_port(), free_port()
    client(f"l = socket.create_server(('127.0.0.1', {port}))")
    with socket.create_connection(("127.0.0.1", port), source_address=("", sport)) as other:
        client("a, _ = l.accept(); a.sendall(b'hello'); a.close(); l.close()")
        assert other.recv(100) == b"hello"
    assert watched.to(sport).rows() == []
    assert watched.to(port).rows() == []


_REJECTING = """
add table inet wall
add chain inet wall input {{ type filter hook input priority 0; }}
add rule inet wall input tcp dport {port} reject with icmpx {by}
"""
_CALLS = """
results = []
for blocking in (True, False):
    s = socket.socket({family})
    s.setblocking(blocking)
    got = s.connect_ex(({address!r}, {port}))
    if got == errno.EINPROGRESS:
        waiting = select.poll()
        waiting.register(s, select.POLLOUT)
        waiting.poll()
        got = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    s.close()
    results.append(errno.errorcode[got])
"""


@pytest.mark.parametrize("ip", [4, 6])
@pytest.mark.parametrize(
    ("by", "error"), [("admin-prohibited", None), ("port-unreachable", "refused")]
)
def test_connect_that_icmp_ends_has_the_errno_that_the_program_got(
    ip: int,
    by: str,
    error: str | None,
    puppet: Callable[..., Puppet],
    running_tcplat: Callable[..., Tcplat],
) -> None:
    """Where connect() does not block, the kernel keeps the error elsewhere."""
    needs("nft")
    client, port = puppet(alone=True), 7701
    subprocess.run(
        ["nsenter", f"--net=/proc/{client.pid}/ns/net", "nft", "-f", "-"],
        input=_REJECTING.format(port=port, by=by).encode(),
        check=True,
    )
    run = running_tcplat("-p", str(client.pid), probes=("tcp_client", "tcp_stats"))
    client(_CALLS.format(family=int(FAMILY[ip]), address=LOCAL[ip], port=port))
    got = client("results")
    rows = run.wait_for("both were gone", gone(2))
    for point in ("state", "stats"):
        shown = [row["desc"] for row in at(rows, point) if row["state"] == "TCP_CLOSE"]
        assert shown == ([error] * 2 if error else got)
