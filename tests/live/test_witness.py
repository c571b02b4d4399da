"""Times and byte counts, against tshark and ss on the same connections."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from .harness import (
    SLOW,
    Listener,
    Puppet,
    Row,
    Tcplat,
    at,
    by_sock,
    completes,
    eventually,
    needs,
    network,
    only,
    read_exactly,
    total,
)
from .witness import kept_from_programs, tcpdump

pytestmark = pytest.mark.alone  # it compares times, and adds an instance to tracefs

PORT = 9999
CONNECTIONS = 60
HOSTS = {4: "10.79.0.2", 6: "fd79::2"}
VETH = """
link add va type veth peer name vb netns {pid}
link set va up
address add 10.79.0.1/24 dev va
address add fd79::1/64 dev va nodad
"""
VETH_THERE = """
link set vb up
address add 10.79.0.2/24 dev vb
address add fd79::2/64 dev vb nodad
"""
# One SYN|ACK and two ACKs of FINs take 8 ms of it, once the burst is spent.
SLOW_ANSWERS = "qdisc add dev vb root tbf rate 200kbit burst 1600 limit 100000"
_SERVE = """
family = socket.AF_INET if {ip} == 4 else socket.AF_INET6
listening = socket.create_server(({host!r}, {port}), family=family, backlog=128)
def serve():
    while True:
        peer, _ = listening.accept()
        while peer.recv(65536):
            pass
        peer.close()
threading.Thread(target=serve, daemon=True).start()
"""
_CALL = """
for _ in range({count}):
    socket.create_connection(({host!r}, {port})).close()
"""


def inside(there: Puppet, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a puppet's network namespace."""
    enter = ("nsenter", f"--net=/proc/{there.pid}/ns/net")
    return subprocess.run([*enter, *command], check=True, capture_output=True, text=True)


def initial_rtts(pcap: Path) -> dict[int, float]:
    """Client port -> µs from SYN to the ACK that ends the handshake, as tshark reckons it."""
    fields = ("tcp.srcport", "tcp.dstport", "tcp.analysis.initial_rtt")
    read = subprocess.run(
        [
            *("tshark", "-r", str(pcap), "-Y", "tcp.analysis.initial_rtt", "-T", "fields"),
            *(word for field in fields for word in ("-e", field)),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {}
    for line in read.splitlines():
        sport, dport, seconds = line.split("\t")
        client = int(sport) if int(dport) == PORT else int(dport)
        found[client] = float(seconds) * 1e6
    return found


@pytest.mark.parametrize("ip", [4, 6])
def test_connect_times_agree_with_tshark(
    ip: int,
    puppet: Callable[..., Puppet],
    running_tcplat: Callable[..., Tcplat],
    tmp_path: Path,
    stack: ExitStack,
    measured: Callable[[str], None],
) -> None:
    needs("tcpdump", "tshark", "tc")
    client, server = puppet(alone=True), puppet(alone=True)
    network(client, script=VETH.format(pid=server.pid))
    network(server, script=VETH_THERE)
    inside(server, "tc", *SLOW_ANSWERS.split())
    server(_SERVE.format(ip=ip, host=HOSTS[ip], port=PORT))
    run = running_tcplat("-p", str(client.pid))
    pcap = stack.enter_context(tcpdump(tmp_path / "seen.pcap", "va", there=client)).path
    kept = stack.enter_context(kept_from_programs(PORT))
    client.tell(_CALL.format(count=CONNECTIONS, host=HOSTS[ip], port=PORT))
    client.answer()
    rows = run.wait_for(
        "all sockets were gone", lambda rows: len(at(rows, "close")) >= CONNECTIONS - len(kept())
    )
    theirs = eventually(
        lambda: found if len(found := initial_rtts(pcap)) >= CONNECTIONS else {},
        "tshark saw all handshakes",
    )
    ours = {row["sport"]: row["connect_us"] for row in rows if completes(row)}
    assert len(kept()) <= CONNECTIONS / 10
    for port in kept():
        ours.pop(port, None)
        theirs.pop(port, None)
    assert ours.keys() == theirs.keys()
    off = sorted(abs(ours[port] - theirs[port]) for port in ours)
    measured(
        f"IPv{ip} connect_us against tshark's initial_rtt: {min(theirs.values()):.0f} to "
        f"{max(theirs.values()):.0f} µs, off by {statistics.median(off):.1f} µs (median), "
        f"{off[-1]:.1f} (most); {len(kept())} kept from programs"
    )
    # Without times that differ, agreement would say little.
    assert max(theirs.values()) > 4 * max(1000, min(theirs.values()))
    # A busy machine delays tcpdump's clock or ours now and then, never most of the time.
    assert statistics.median(off) < 60 * SLOW
    alike = [
        port for port in ours if ours[port] == pytest.approx(theirs[port], rel=0.1, abs=60 * SLOW)
    ]
    assert len(alike) >= 0.8 * len(ours)


def ss(port: int) -> dict[int, dict[str, int]]:
    """Local port -> numbers of `ss -ti`, of the connections to or from a port."""
    shown = subprocess.run(
        ["ss", "-tinHO", f"( sport = :{port} or dport = :{port} )"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = {}
    for line in shown.splitlines():
        local = int(line.split()[3].rpartition(":")[2])
        numbers = re.findall(r"(\w+):(\d+)(?=\s|$)", line.partition("  ")[2])
        found[local] = {name: int(number) for name, number in numbers}
    return found


@pytest.mark.parametrize("ip", [4, 6])
def test_byte_counts_agree_with_ss(
    ip: int,
    listener: Callable[..., Listener],
    client: Puppet,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    server = listener(ip)
    run = running_tcplat("--probe", "tcp_service", *only(server.port))
    client.connect(server)
    peer = server.accept()
    for sent, answered in ((1, 3000), (70_000, 5), (12_345, 200_000)):
        client.tell(f"s.sendall(bytes({sent}))\nlen(s.recv({answered}, socket.MSG_WAITALL))")
        read_exactly(peer, sent)
        peer.sendall(bytes(answered))
        assert client.answer() == answered
    near = client("s.getsockname()[1]")

    def acked() -> dict[int, dict[str, int]]:
        shown = ss(server.port)
        # The SYN counts as a byte that was acked, on the connecting side.
        wanted = shown[near].get("bytes_acked") == 82_346 + 1
        return shown if wanted and shown[server.port].get("bytes_acked") == 203_005 else {}

    shown = eventually(acked, "all bytes were acknowledged, as ss says")
    rows = run.wait_for(
        "both sides had read all",
        lambda rows: total(rows, "recv") == 82_346 + 203_005,
    )

    def side(probe: str) -> list[Row]:
        return [row for row in rows if row["probe"] == probe]

    ours, far = side("tcp_client"), side("tcp_service")
    assert len(by_sock(at(ours, "send"))) == len(by_sock(at(far, "send"))) == 1
    for rows_of, numbers, syn in ((ours, shown[near], 1), (far, shown[server.port], 0)):
        went = total(rows_of, "send") - total(rows_of, "send_short")
        assert went == numbers["bytes_acked"] - syn
        assert total(rows_of, "recv") == numbers["bytes_received"]
