"""The same scripted traffic gives the same rows on every kernel, by every mechanism.

One test per probe and IP version. `make test-vm` runs this file in each kernel
with each mechanism and prints the matrix. A guest takes minutes to compile a probe, so that
two runs see all the traffic: one has the histograms, which `xdp_port` and `tcp_stats` lack.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from .harness import (
    ATTACH,
    Puppet,
    Row,
    Tcplat,
    at,
    by_sock,
    check_mechanism,
    completes,
    free_port,
)
from .histograms import assert_agrees, found, one, waits

pytestmark = pytest.mark.alone  # it loses nothing of what the whole host does

VERSIONS = (4, 6)
GUEST = {4: 20_404, 6: 20_406}
"""Ports in a guest, where no one else listens: `xdp_port` is compiled once for all mechanisms."""
CONNECTIONS = 5
MESSAGES = 3
SIZE = 3000

HISTOGRAMS = "histograms"
"""The file that found() reads."""
Arguments = Callable[[list[int]], Sequence[str]]
Complete = Callable[[list[Row], int, int], bool]

_SERVE = """
family = socket.AF_INET if {ip} == 4 else socket.AF_INET6
host = "127.0.0.1" if {ip} == 4 else "::1"
listening = socket.create_server((host, {port}), family=family)
def serve():
    for _ in range({connections}):
        peer, _ = listening.accept()
        while message := peer.recv({size}, socket.MSG_WAITALL):
            peer.sendall(message)
        peer.close()
threading.Thread(target=serve, daemon=True).start()
"""
_CALL = """
host = "127.0.0.1" if {ip} == 4 else "::1"
for _ in range({connections}):
    s = socket.create_connection((host, {port}))
    for _ in range({messages}):
        s.sendall(bytes({size}))
        assert len(s.recv({size}, socket.MSG_WAITALL)) == {size}
    s.close()
r = socket.socket(socket.AF_INET if {ip} == 4 else socket.AF_INET6)
r.connect_ex((host, {closed})), r.close()
"""


@attrs.frozen
class Seen:
    """All rows and histograms of a run, and the ports of one IP version.

    Args:
        rows: Of both versions.
        histograms: Of both versions.
        port: Of a listener.
        closed: A port without a listener.
    """

    rows: list[Row]
    histograms: list[Row]
    port: int
    closed: int


def play(folder: Path, arguments: Arguments, complete: Complete) -> dict[int, Seen]:
    """Return what one run sees of the traffic of both IP versions, by IP version.

    It lasts from the first connect until `complete`, which is asked for each version.

    Args:
        folder: For its files.
        arguments: Of `tcplat run`, from the listeners' ports.
        complete: Whether the rows have all that happened at a listener's port.
    """
    listening = GUEST if os.environ.get("TCPLAT_VM") else {ip: free_port(ip) for ip in VERSIONS}
    closed = {ip: free_port(ip) for ip in VERSIONS}
    with ExitStack() as stack:
        run = Tcplat.start(folder, *arguments(list(listening.values())), probes=())
        stack.callback(run.kill)
        run.wait_ready()
        for ip in VERSIONS:
            server, client = Puppet.start(), Puppet.start()
            stack.callback(server.end)
            stack.callback(client.end)
            values = {"ip": ip, "port": listening[ip], "connections": CONNECTIONS, "size": SIZE}
            server(_SERVE.format(**values))
            client(_CALL.format(**values, closed=closed[ip], messages=MESSAGES))
        run.wait_for(
            "all of the traffic was reported",
            lambda rows: all(complete(rows, listening[ip], closed[ip]) for ip in VERSIONS),
        )
        outcome = run.stop()
        print(outcome.stderr)  # noqa: T201 - pytest shows it where a test fails
        assert outcome.report["dropped"] == 0
    counted = found(folder) if (folder / HISTOGRAMS).exists() else []
    return {ip: Seen(outcome.rows, counted, listening[ip], closed[ip]) for ip in VERSIONS}


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """Return what the probes with histograms see."""
    folder = tmp_path_factory.mktemp("sockets")
    histograms = f"histogram:by=port,every=0,format=json,path={folder / HISTOGRAMS}"

    def all_closed(rows: list[Row], port: int, closed: int) -> bool:
        ends = [row for row in at(rows, "close") if {port, closed} & {row["sport"], row["dport"]}]
        return len(ends) > 2 * CONNECTIONS

    return play(
        folder,
        lambda _: ("--probe", "tcp_client", "--probe", "tcp_service", "--sink", histograms),
        all_closed,
    )


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """Return what the probes without histograms see."""

    def all_ended(rows: list[Row], port: int, _closed: int) -> bool:
        ours = [row for row in rows if port in (row["sport"], row["dport"])]
        ends = [row for row in ours if row["probe"] == "xdp_port" and "FIN" in row["flags"]]
        # The kernel skips a kprobe that interrupts another's handler.
        wanted = 1 if ATTACH == "kprobe" else 2 * CONNECTIONS
        return len(ends) >= 2 * CONNECTIONS and len(at(ours, "stats")) >= wanted

    return play(
        tmp_path_factory.mktemp("others"),
        lambda ports: (
            *("--probe", f"xdp_port:iface=lo,port={'+'.join(map(str, ports))}"),
            *("--probe", "tcp_stats", "--hold", "200ms"),
        ),
        all_ended,
    )


both = pytest.mark.parametrize("ip", VERSIONS)


def counts(rows: list[Row]) -> Counter[str]:
    return Counter(row["point"] for row in rows)


@both
def test_tcp_client(sockets: dict[int, Seen], ip: int) -> None:
    rows, port, closed = sockets[ip].rows, sockets[ip].port, sockets[ip].closed
    ours = [row for row in rows if row["probe"] == "tcp_client" and row["dport"] in (port, closed)]
    assert {row["ip"] for row in ours} == {ip}
    found = counts(ours)
    assert found["connect"] == CONNECTIONS + 1
    assert found["send"] == found["recv"] == CONNECTIONS * MESSAGES
    assert found["close"] == CONNECTIONS + 1
    assert found["send_short"] == 0
    assert sum(map(completes, ours)) == CONNECTIONS
    (refused,) = [row for row in ours if row["desc"] == "refused"]
    assert refused["dport"] == closed
    assert refused["connect_us"] > 0
    assert sum(row["bytes"] for row in at(ours, "send")) == CONNECTIONS * MESSAGES * SIZE
    assert sum(row["bytes"] for row in at(ours, "recv")) == CONNECTIONS * MESSAGES * SIZE
    check_mechanism(ours)


@both
def test_tcp_service(sockets: dict[int, Seen], ip: int) -> None:
    rows, port = sockets[ip].rows, sockets[ip].port
    ours = [row for row in rows if row["probe"] == "tcp_service"]
    ours = [row for row in ours if port in (row["sport"], row["dport"])]
    assert {row["ip"] for row in ours if row["old_state"] != "TCP_CLOSE"} == {ip}
    found = counts(ours)
    assert found["accept"] == CONNECTIONS
    assert found["recv"] == CONNECTIONS * (MESSAGES + 1)  # one more for the end of the stream
    assert found["send"] == CONNECTIONS * MESSAGES
    assert found["close"] == CONNECTIONS
    assert found["send_short"] == 0
    assert sum(row["bytes"] for row in at(ours, "recv")) == CONNECTIONS * MESSAGES * SIZE
    assert sum(row["bytes"] for row in at(ours, "rx_ip")) == CONNECTIONS * MESSAGES * SIZE
    assert sum(row["bytes"] for row in at(ours, "rx_tcp")) >= CONNECTIONS * MESSAGES * SIZE
    assert found["ready"] >= CONNECTIONS * MESSAGES
    done = [row for row in at(ours, "state") if row["old_state"] == "TCP_SYN_RECV"]
    assert [row["state"] for row in done] == ["TCP_ESTABLISHED"] * CONNECTIONS
    check_mechanism(ours)


@both
def test_tcp_stats(others: dict[int, Seen], ip: int) -> None:
    rows, port = others[ip].rows, others[ip].port
    ours = [row for row in at(rows, "stats") if port in (row["sport"], row["dport"])]
    assert {row["ip"] for row in ours} == {ip}
    found = Counter(row["role"] for row in ours)
    if ATTACH == "kprobe":  # the kernel skips one that interrupts another's handler
        assert set(found) <= {"client", "service"}
        assert 0 < found.total() <= 2 * CONNECTIONS
    else:
        assert found == {"client": CONNECTIONS, "service": CONNECTIONS}
    for row in ours:
        # The FIN counts where it has come, or was acknowledged, by then; the SYN always does.
        assert row["bytes_received"] - MESSAGES * SIZE in (0, 1)
        assert row["bytes_acked"] - MESSAGES * SIZE in (1, 2)
        assert row["retransmits"] == 0
        assert 0 < row["min_rtt_us"] <= row["srtt_us"] * 8
        assert row["srtt_us"] < row["rto_us"]
    check_mechanism(ours)


@both
def test_xdp_port(others: dict[int, Seen], ip: int) -> None:
    port = others[ip].port
    wanted = {seen.port for seen in others.values()}
    packets = [row for row in others[ip].rows if row["probe"] == "xdp_port"]
    assert all(len(wanted & {row["sport"], row["dport"]}) == 1 for row in packets)
    ours = [row for row in packets if port in (row["sport"], row["dport"])]
    assert {row["ip"] for row in ours} == {ip}
    to, back = ([row for row in ours if row[side] == port] for side in ("dport", "sport"))
    assert Counter(row["flags"] for row in ours)["SYN"] == CONNECTIONS
    assert Counter(row["flags"] for row in ours)["SYN|ACK"] == CONNECTIONS
    for packets in (to, back):
        assert sum(row["bytes"] for row in packets) == CONNECTIONS * MESSAGES * SIZE
        assert sum("FIN" in row["flags"] for row in packets) == CONNECTIONS


@both
def test_histograms(sockets: dict[int, Seen], ip: int) -> None:
    seen = sockets[ip]
    rows = [row for row in seen.rows if row["ip"] == ip]
    ours = [value for value in seen.histograms if value["port"] == seen.port]
    called = [row for row in rows if row["dport"] == seen.port]
    assert_agrees(one(ours, "connect"), [row["connect_us"] for row in called if completes(row)])
    (refused,) = [value for value in seen.histograms if value["port"] == seen.closed]
    assert (refused["histogram"], refused["count"]) == ("connect_failed", 1)

    served = [row for row in rows if row["probe"] == "tcp_service"]
    served = [row for row in served if seen.port in (row["sport"], row["dport"])]
    assert_agrees(one(ours, "accept"), [row["accept_us"] for row in at(served, "accept")])
    receive_path: list[float] = []
    queue: list[float] = []
    for sock, connection in by_sock(served).items():
        if not sock:  # packets, which know no socket
            continue
        peers = {row["dport"] for row in connection}
        packets = [row for row in at(served, "rx_ip") if row["sport"] in peers]
        arrived, waited = waits(packets + connection)
        receive_path += arrived
        queue += waited
    # Arrivals are kept in steps of 16 ns.
    assert_agrees(one(ours, "rx_ready"), receive_path, 0.02)
    assert_agrees(one(ours, "ready_recv"), queue)
    inside = [row["call_us"] for row in at(served, "recv") if row["bytes"]]
    if inside[0] is None:  # by tracepoint it is not known
        assert "in_recv" not in {value["histogram"] for value in ours}
    else:
        assert_agrees(one(ours, "in_recv"), inside)
    assert {value["not_measured"] for value in ours} == {0}
