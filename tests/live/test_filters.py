"""Each filter keeps complete connections of what it names, and nothing else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.long import LONG

from .harness import Listener, Puppet, Row, Tcplat, at, by_sock, free_port, gone

_EXCHANGE = """
s = socket.create_connection({address!r})
s.sendall(b"ping")
assert s.recv(4, socket.MSG_WAITALL) == b"pong"
s.close()
"""
WHOLE = ["connect", "state", "send", "recv", "close"]


def exchange(client: Puppet, server: Listener) -> None:
    """One connection, one request, one answer."""
    client.tell(_EXCHANGE.format(address=server.address[:2]))
    peer = server.accept()
    assert peer.recv(4) == b"ping"
    peer.sendall(b"pong")
    client.answer()
    peer.close()


def fence(run: Tcplat, client: Puppet, server: Listener, count: int = 1) -> list[Row]:
    """Return all rows once a last connection is complete: `count` pass the filter."""
    exchange(client, server)
    return run.wait_for("the last connection was gone", gone(count))


def whole(rows: list[Row], connections: int) -> bool:
    """So many connections, each from connect to close."""
    each = by_sock(rows).values()
    return len(each) == connections and all(
        set(WHOLE) <= {row["point"] for row in one} for one in each
    )


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """Yield a cgroup of this test."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    found = [line.split()[1] for line in mounts if line.split()[2] == "cgroup2"]
    if not found:
        pytest.skip("no cgroup2 is mounted")
    home = Path(found[0])
    folder = home / f"tcplat-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for inner in (folder / "inner", folder):
        with contextlib.suppress(FileNotFoundError):
            for pid in (inner / "cgroup.procs").read_text(encoding="ascii").split():
                (home / "cgroup.procs").write_text(pid, encoding="ascii")
            inner.rmdir()


def test_cgroup_filter_includes_descendants(
    cgroup: Path,
    puppet: Callable[..., Puppet],
    server: Listener,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    member, below, outsider = puppet(), puppet(), puppet()
    (cgroup / "inner").mkdir()
    (cgroup / "cgroup.procs").write_text(str(member.pid), encoding="ascii")
    (cgroup / "inner/cgroup.procs").write_text(str(below.pid), encoding="ascii")
    run = running_tcplat("--cgroup", str(cgroup))
    exchange(outsider, server)
    exchange(below, server)
    rows = fence(run, member, server, 2)
    assert {row["pid"] for row in rows} == {member.pid, below.pid}
    assert whole(rows, 2)


def test_cgroup_filter_covers_older_sockets(
    cgroup: Path,
    puppet: Callable[..., Puppet],
    server: Listener,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    member, outsider = puppet(), puppet()
    (cgroup / "cgroup.procs").write_text(str(member.pid), encoding="ascii")
    for one in (member, outsider):
        one.connect(server)
    peers = [server.accept(), server.accept()]
    run = running_tcplat("--cgroup", str(cgroup))
    for one in (outsider, member):
        one("s.sendall(b'late')\ns.close()")
    for peer in peers:
        peer.close()
    rows = run.wait_for("the member's was gone", gone(1))
    assert {row["pid"] for row in rows} == {member.pid}
    assert len(at(rows, "send")) == 1


@pytest.mark.parametrize(("pattern", "unmatched"), [("thrifty", "thrifty2"), ("thri*", "athrifty")])
def test_comm_filter_selects_by_pattern(
    pattern: str,
    unmatched: str,
    puppet: Callable[..., Puppet],
    server: Listener,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    thrifty, other = puppet(), puppet()
    thrifty("open('/proc/self/comm', 'w').write('thrifty')")
    other(f"open('/proc/self/comm', 'w').write({unmatched!r})")
    run = running_tcplat("--comm", pattern)
    exchange(other, server)
    rows = fence(run, thrifty, server)
    assert {row["comm"] for row in rows} == {"thrifty"}
    assert whole(rows, 1)


@pytest.mark.parametrize("option", ["--port", "--rport"])
def test_port_filter_matches_either_port(
    option: str,
    client: Puppet,
    listener: Callable[..., Listener],
    running_tcplat: Callable[..., Tcplat],
) -> None:
    one, other = listener(), listener()
    run = running_tcplat(option, str(one.port), "-p", str(client.pid))
    exchange(client, other)
    rows = fence(run, client, one)
    assert {row["dport"] for row in rows} == {one.port}
    assert whole(rows, 1)


def test_local_port_filter_matches_the_local_port(
    client: Puppet, server: Listener, running_tcplat: Callable[..., Tcplat]
) -> None:
    own = free_port()
    run = running_tcplat("--lport", str(own))
    exchange(client, server)
    client.tell(
        f"s = socket.create_connection({server.address!r}, source_address=('127.0.0.1', {own}))\n"
        "s.close()"
    )
    server.accept().close()
    client.answer()
    rows = run.wait_for("it was gone", gone(1))
    assert {row["sport"] for row in rows} == {own}
    assert len(by_sock(rows)) == 1
    assert len(at(rows, "connect")) == 1


@pytest.mark.parametrize(
    ("network", "inside", "outside"),
    [
        ("127.7.0.0/16", (4, "127.7.1.1"), (4, "127.8.1.1")),
        ("127.7.1.1", (4, "127.7.1.1"), (4, "127.7.1.2")),
        ("::1/128", (6, "::1"), (4, "127.0.0.1")),
    ],
)
def test_network_filter_matches_an_address(
    network: str,
    inside: tuple[int, str],
    outside: tuple[int, str],
    client: Puppet,
    listener: Callable[..., Listener],
    running_tcplat: Callable[..., Tcplat],
) -> None:
    wanted, unwanted = listener(*inside), listener(*outside)
    run = running_tcplat("--addr", network, "-p", str(client.pid))
    exchange(client, unwanted)
    rows = fence(run, client, wanted)
    assert {row["daddr"] for row in rows} == {inside[1]}
    assert whole(rows, 1)


@pytest.mark.parametrize("ip", [4, 6])
def test_ip_version_filter_selects_one_version(
    ip: int,
    client: Puppet,
    listener: Callable[..., Listener],
    running_tcplat: Callable[..., Tcplat],
) -> None:
    run = running_tcplat(f"-{ip}", "-p", str(client.pid))
    exchange(client, listener(10 - ip))
    rows = fence(run, client, listener(ip))
    assert {row["ip"] for row in rows} == {ip}
    assert whole(rows, 1)


def test_min_latency_keeps_rows_without_a_duration(
    client: Puppet, server: Listener, running_tcplat: Callable[..., Tcplat]
) -> None:
    run = running_tcplat("--min-latency", "1s", "-p", str(client.pid))
    rows = fence(run, client, server)
    assert [row for row in rows if row["connect_us"] is not None] == []
    assert len(at(rows, "send")) == 1


_SERVE = """
listening = socket.create_server(("127.0.0.1", {port}))
def serve():
    while True:
        peer, _ = listening.accept()
        peer.sendall(peer.recv(100))
        peer.close()
threading.Thread(target=serve, daemon=True).start()
"""
_CALL = """
s = socket.create_connection(("127.0.0.1", {port}))
s.sendall(b"x" * 100)
assert len(s.recv(100, socket.MSG_WAITALL)) == 100
assert s.recv(1) == b""
s.close()
"""


def test_netns_filter_applies_to_rows_and_interfaces(
    puppet: Callable[..., Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    island, here = puppet(alone=True), puppet()
    port = free_port()
    for one in (island, here):
        one(_SERVE.format(port=port))
    run = running_tcplat(
        *("--netns", str(island.pid)), probes=["tcp_client", f"xdp_port:iface=lo,port={port}"]
    )
    here(_CALL.format(port=port))
    island(_CALL.format(port=port))
    run.wait_for("the connection was gone", gone(1))
    outcome = run.stop()
    assert {row["netns"] for row in outcome.rows} == {os.stat(f"/proc/{island.pid}/ns/net").st_ino}
    assert {row["pid"] for row in at(outcome.rows, "send")} == {island.pid}
    packets = at(outcome.rows, "nic_rx")
    assert sorted(row["flags"] for row in packets if "SYN" in row["flags"]) == ["SYN", "SYN|ACK"]
    assert sum(row["bytes"] for row in packets) == 200


def test_pid_filter_keeps_packets_of_its_connections(
    puppet: Callable[..., Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    """Packets have no process: those of a process are the packets of its connections."""
    server, mine, other = puppet(), puppet(), puppet()
    port = free_port()
    server(_SERVE.format(port=port))
    run = running_tcplat(
        *("-p", str(mine.pid)), probes=["tcp_client", f"xdp_port:iface=lo,port={port}"]
    )
    for _ in range(5):
        other(_CALL.format(port=port))
        mine(_CALL.format(port=port))
    run.wait_for("the connections were gone", gone(5))
    outcome = run.stop()
    ports = {row["sport"] for row in at(outcome.rows, "send")}
    packets = at(outcome.rows, "nic_rx")
    assert len(ports) == 5
    assert {row["sport"] for row in packets} | {row["dport"] for row in packets} == {*ports, port}
    # From the first SYN on, both directions, every byte.
    assert sum(row["flags"] == "SYN" for row in packets) == 5
    assert sum(row["flags"] == "SYN|ACK" for row in packets) == 5
    assert sum(row["bytes"] for row in packets) == 5 * 200


def test_dry_run_prints_the_mechanisms_and_leaves_nothing(
    start_tcplat: Callable[..., Tcplat],
) -> None:
    outcome = start_tcplat("--dry-run", probes=["tcp_client", "xdp_port:iface=lo,port=9"]).wait()
    assert outcome.returncode == 0
    assert outcome.rows == []
    for point in (*WHOLE, "send_short"):
        assert f"tcp_client: {point} by " in outcome.stderr
    assert "xdp_port: nic_rx by xdp:xdp" in outcome.stderr


@pytest.mark.alone  # the kernel's trace is the host's
def test_debug_shows_the_c_and_trace_lines(
    client: Puppet, server: Listener, running_tcplat: Callable[..., Tcplat]
) -> None:
    run = running_tcplat("--debug", "-p", str(client.pid))
    fence(run, client, server)
    stderr = run.stop().stderr
    assert "struct tcplat_event {" in stderr
    assert "_Static_assert(sizeof(struct tcplat_event)" in stderr
    assert f"belongs to pid {client.pid}, wanted 1" in stderr


# In C, up to four are compared one by one, and more are a map.
@pytest.mark.parametrize("count", [1, 4, 5, 64] if LONG else [4, 64])
def test_lists_of_any_length_load_in_every_probe(
    count: int, start_tcplat: Callable[..., Tcplat]
) -> None:
    ports = range(1, 65536, 65535 // count)[:count]
    listed = ",".join(map(str, ports))
    plugins = "+".join(map(str, ports[:32]))
    packets = [f"dev_xmit:port={plugins}", f"xdp_port:iface=lo,port={plugins}"]
    filters = [
        *("--port", listed, "--lport", listed, "--rport", listed),
        *("--netns", str(os.getpid()), "-4"),
        *("--comm", "fifteen letters", "-p", str(os.getpid())),
        *(word for one in range(count) for word in ("--addr", f"10.{one}.0.0/16")),
    ]
    probes = ["tcp_client", "tcp_service", "tcp_stats", *packets]
    outcome = start_tcplat("--dry-run", *filters, probes=probes).wait()
    assert outcome.returncode == 0, outcome.stderr


def test_long_lists_give_the_same_rows_as_short_ones(
    client: Puppet, listener: Callable[..., Listener], running_tcplat: Callable[..., Tcplat]
) -> None:
    one, other = listener(), listener()
    ports = ",".join(str(port) for port in (*range(20, 40), one.port) if port != other.port)
    networks = [word for number in range(8) for word in ("--addr", f"10.{number}.0.0/16")]
    run = running_tcplat("--port", ports, *networks, "--addr", "127.0.0.0/8")
    exchange(client, other)
    rows = fence(run, client, one)
    assert {row["dport"] for row in rows} == {one.port}
    assert whole(rows, 1)
