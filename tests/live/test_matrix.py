"""The same scripted traffic, the same rows: whatever the kernel and the mechanism.

One test per probe and IP version. `make test-vm` runs this file in each kernel
with each mechanism and prints the matrix.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from .harness import (
    ATTACH,
    Outcome,
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

CONNECTIONS = 5
MESSAGES = 3
SIZE = 3000

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
    """The rows of a script, and its ports."""

    rows: list[Row]
    port: int
    closed: int


@functools.cache
def _folder(base: str, ip: int) -> Path:
    """One per IP version: the tests look at the same traffic."""
    folder = Path(base) / f"matrix{ip}"
    folder.mkdir()
    return folder


@attrs.frozen
class Script:
    """The traffic, under the eyes of a tcplat: at `port` somebody listens, at `closed` nobody."""

    ip: int
    puppet: Callable[..., Puppet]
    port: int
    closed: int

    def play(self, run: Tcplat) -> Outcome:
        """From the first connect until all sockets are gone, and tcplat as well."""
        server, client = self.puppet(), self.puppet()
        values = {"ip": self.ip, "port": self.port, "connections": CONNECTIONS, "size": SIZE}
        server(_SERVE.format(**values))
        client(_CALL.format(**values, closed=self.closed, messages=MESSAGES))
        ours = {self.port, self.closed}
        run.wait_for(
            "all sockets were gone",
            lambda rows: (
                len([r for r in at(rows, "close") if ours & {r["sport"], r["dport"]}])
                > 2 * CONNECTIONS
            ),
        )
        outcome = run.stop()
        print(outcome.stderr)  # noqa: T201 - pytest shows it where a test fails
        assert outcome.report["dropped"] == 0
        return outcome


@pytest.fixture
def script(ip: int, puppet: Callable[..., Puppet]) -> Script:
    return Script(ip, puppet, free_port(ip), free_port(ip))


@pytest.fixture
def traffic(
    request: pytest.FixtureRequest,
    script: Script,
    tmp_path_factory: pytest.TempPathFactory,
    running_tcplat: Callable[..., Tcplat],
) -> Seen:
    known = request.config.stash.setdefault(_SEEN, {})
    if script.ip not in known:
        port = script.port
        run = running_tcplat(
            *("--probe", "tcp_service", "--probe", f"xdp_port:iface=lo,port={port}"),
            *("--probe", "tcp_stats"),
            *("--hold", "200ms"),
            folder=_folder(str(tmp_path_factory.getbasetemp()), script.ip),
        )
        known[script.ip] = Seen(script.play(run).rows, port, script.closed)
    return known[script.ip]


_SEEN = pytest.StashKey[dict[int, Seen]]()

both = pytest.mark.parametrize("ip", [4, 6])


def counts(rows: list[Row]) -> Counter[str]:
    return Counter(row["point"] for row in rows)


@both
def test_tcp_client(traffic: Seen, ip: int) -> None:
    rows, port, closed = traffic.rows, traffic.port, traffic.closed
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
def test_tcp_service(traffic: Seen, ip: int) -> None:
    rows, port = traffic.rows, traffic.port
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
def test_tcp_stats(traffic: Seen, ip: int) -> None:
    rows, port = traffic.rows, traffic.port
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
def test_xdp_port(traffic: Seen, ip: int) -> None:
    rows, port = traffic.rows, traffic.port
    ours = [row for row in rows if row["probe"] == "xdp_port"]
    assert {row["ip"] for row in ours} == {ip}
    to, back = ([row for row in ours if row[side] == port] for side in ("dport", "sport"))
    assert len(to) + len(back) == len(ours)
    assert Counter(row["flags"] for row in ours)["SYN"] == CONNECTIONS
    assert Counter(row["flags"] for row in ours)["SYN|ACK"] == CONNECTIONS
    for packets in (to, back):
        assert sum(row["bytes"] for row in packets) == CONNECTIONS * MESSAGES * SIZE
        assert sum("FIN" in row["flags"] for row in packets) == CONNECTIONS


@both
def test_histograms(
    script: Script, ip: int, tmp_path: Path, running_tcplat: Callable[..., Tcplat]
) -> None:
    """Their own run: xdp_port has none."""
    run = running_tcplat(
        *("--sink", f"histogram:by=port,every=0,format=json,path={tmp_path / 'histograms'}"),
        probes=("tcp_client", "tcp_service"),
    )
    rows = [row for row in script.play(run).rows if row["ip"] == ip]
    histograms = found(tmp_path)
    ours = [value for value in histograms if value["port"] == script.port]
    called = [row for row in rows if row["dport"] == script.port]
    assert_agrees(one(ours, "connect"), [row["connect_us"] for row in called if completes(row)])
    (refused,) = [value for value in histograms if value["port"] == script.closed]
    assert (refused["histogram"], refused["count"]) == ("connect_failed", 1)

    served = [row for row in rows if row["probe"] == "tcp_service"]
    served = [row for row in served if script.port in (row["sport"], row["dport"])]
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
