"""Where the time of real traffic goes: known delays, real clients, and other tools' figures."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.long import LONG

from .harness import (
    SLOW,
    TCPLAT,
    Puppet,
    Row,
    Tcplat,
    at,
    eventually,
    free_port,
    gone,
    needs,
    network,
    only,
)
from .test_service import nginx
from .witness import Tcpdump, by_direction, packet, tcpdump

PORT = 9899
"""In no other file: a run sees the packets of all namespaces."""
CLIENT, SERVER = "10.81.1.1", "10.81.2.1"
_TO_ROUTER = """
link add ca type veth peer name ra netns {pid}
link set ca up
address add 10.81.1.1/24 dev ca
"""
_ROUTER = """
link add rb type veth peer name sa netns {pid}
link set ra up
link set rb up
address add 10.81.1.2/24 dev ra
address add 10.81.2.2/24 dev rb
"""
_SERVER = """
link set sa up
address add 10.81.2.1/24 dev sa
route add default via 10.81.2.2
"""
_MEASURED = "+".join(str(PORT + number) for number in range(8))
"""Of all runs of a test: the same C for each, and only() keeps the others' ports out."""
_PROBES = ("tcp_client", "tcp_service", "dev_xmit", "tcp_stats")
"""Compiled once, whatever the port: only() keeps the others out."""
_SERVE = """
listening = socket.create_server(({host!r}, {port}))
served = []
def serve():
    now = time.monotonic_ns
    while True:
        peer, _ = listening.accept()
        while True:
            # All of a request, but for one that is larger than what fits.
            peer.recv(min({asked}, 4000), socket.MSG_PEEK | socket.MSG_WAITALL)
            woken = now()
            time.sleep({lag})
            reading = now()
            if not peer.recv({asked}, socket.MSG_WAITALL):
                break
            has_read = now()
            time.sleep({think})
            sending = now()
            peer.sendall(bytes({answered}))
            served.append((woken, reading, has_read, sending, now()))
        peer.close()
threading.Thread(target=serve, daemon=True).start()
"""
_ASK = """
asked = []
with socket.create_connection(({host!r}, {port})) as s:
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range({times}):
        began = time.monotonic_ns()
        s.sendall(bytes({asked}))
        s.recv({answered}, socket.MSG_WAITALL)
        asked.append((began, time.monotonic_ns()))
        time.sleep({pause})
"""


@attrs.frozen
class Road:
    """A client and a server, and a router between them, each in a namespace of its own."""

    client: Puppet
    router: Puppet
    server: Puppet


@pytest.fixture
def road(puppet: Callable[..., Puppet]) -> Road:
    client, router, server = (puppet(alone=True) for _ in range(3))
    network(client, script=_TO_ROUTER.format(pid=router.pid))
    network(client, script="route add default via 10.81.1.2")
    network(router, script=_ROUTER.format(pid=server.pid))
    network(server, script=_SERVER)
    router("open('/proc/sys/net/ipv4/ip_forward', 'w').write('1')")
    return Road(client, router, server)


def inside(there: Puppet, *command: str) -> str:
    """Return what a program in a puppet's network namespace prints."""
    enter = ("nsenter", f"--net=/proc/{there.pid}/ns/net")
    return subprocess.run([*enter, *command], check=True, capture_output=True, text=True).stdout


def objects_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_sums(exchanges: list[dict[str, Any]]) -> None:
    """To the nanosecond: µs with three decimals."""
    for exchange in exchanges:
        parts = [*exchange["stages"].values(), exchange["unexplained_us"]]
        whole = round(exchange["total_us"] * 1000)
        assert sum(round(part * 1000) for part in parts) == whole, exchange
        assert min(parts) >= 0, exchange


@attrs.frozen
class Truth:
    """What client and server themselves saw of one exchange, by tcplat's clock, in ns.

    A process that reads a clock before and after a call may be preempted in between: these
    are bounds, but they hold whatever the machine does meanwhile.
    """

    began: int
    ended: int
    woken: int
    reading: int
    has_read: int
    sending: int
    sent: int

    def check(self, exchange: dict[str, Any]) -> None:
        """Since no stage is negative, and all add up, what is in one of them is in no other."""
        queue, server = (round(exchange["stages"][name] * 1000) for name in ("queue", "server"))
        assert self.reading - self.woken <= queue <= self.has_read - self.began, (self, exchange)
        assert self.sending - self.has_read <= server <= self.sent - self.reading, (self, exchange)
        assert round(exchange["total_us"] * 1000) <= self.ended - self.began, (self, exchange)


@attrs.frozen
class Measured:
    """What tcplat says of some exchanges."""

    exchanges: list[dict[str, Any]]

    def least(self, stage: str) -> float:
        """Take the least disturbed exchange; a known delay is in each of them."""
        return float(min(one["stages"][stage] for one in self.exchanges))

    @property
    def stages(self) -> set[str]:
        return {name for one in self.exchanges for name in one["stages"]}


@pytest.fixture
def measure(
    road: Road, tmp_path: Path, running_tcplat: Callable[..., Tcplat]
) -> Callable[..., Measured]:
    """Trace while the client sends so many requests to the server."""

    def run(
        *,
        lag: float = 0,
        think: float = 0,
        asked: int = 100,
        answered: int = 100,
        times: int = 30,
        pause: float = 0.002,
    ) -> Measured:
        number = len(list(tmp_path.glob("*.waterfall")))
        path, port = tmp_path / f"{number}.waterfall", PORT + number
        where = {"host": SERVER, "port": port}
        sizes = {"asked": asked, "answered": answered}
        road.server(_SERVE.format(**where, **sizes, lag=lag, think=think))
        tcplat = running_tcplat(
            *only(port),
            probes=[
                *("tcp_client", "tcp_service", f"dev_xmit:port={_MEASURED}", "tcp_stats"),
                f"xdp_port:iface=sa,port={_MEASURED},netns={road.server.pid},mode=generic",
            ],
            sinks=(f"waterfall:format=json,path={path}", f"jsonl:path={tmp_path / 'rows.jsonl'}"),
        )
        road.client.tell(_ASK.format(**where, **sizes, times=times, pause=pause))
        road.client.answer()
        eventually(lambda: len(objects_in(path)) >= times, "all exchanges were emitted")
        assert tcplat.stop().returncode == 0
        exchanges = objects_in(path)
        assert len(exchanges) == times
        check_sums(exchanges)
        assert {one["pid"] for one in exchanges} == {road.client.pid}
        assert {one["service_pid"] for one in exchanges} == {road.server.pid}
        served = eventually(
            lambda: noted if len(noted := road.server("served")) == times else [],
            "the server had noted all",
        )
        for exchange, there, here in zip(exchanges, road.client("asked"), served, strict=True):
            Truth(*there, *here).check(exchange)
        return Measured(exchanges)

    return run


def assert_others_stay(before: Measured, after: Measured, moved: str) -> None:
    assert before.stages == after.stages
    for stage in before.stages - {moved}:
        change = abs(after.least(stage) - before.least(stage))
        assert change < max(100 * SLOW, 0.05 * before.least(stage)), stage


@pytest.mark.alone  # it measures times
def test_known_delays_appear_in_their_stage(
    road: Road, measure: Callable[..., Measured], measured: Callable[[str], None]
) -> None:
    needs("tc")
    plain = measure()
    assert {"client_send", "wire", "queue", "server", "server_send"} < plain.stages

    thinks = measure(think=0.010)
    thought = thinks.least("server")
    assert 10_000 <= thought < 10_000 + max(100 * SLOW, 0.05 * 10_000)
    assert_others_stay(plain, thinks, "server")

    waits = measure(lag=0.010)
    waited = waits.least("queue")
    assert 10_000 <= waited < 10_000 + max(100 * SLOW, 0.05 * 10_000)
    assert_others_stay(plain, waits, "queue")

    # 4,000 bytes are three packets of 66 bytes more each, and 1,600 go at once.
    size, rate, burst = 4_000, 1_000_000, 1_600
    # The bucket is full again after 13 ms. A CPU that slept so long wakes readers late, both times.
    paced = {"asked": size, "times": 20, "pause": 0.03}
    large = measure(**paced)
    inside(road.router, *f"tc qdisc add dev rb root tbf rate {rate} burst {burst} limit 1m".split())
    shaped = measure(**paced)
    expected_us = (size + 3 * 66 - burst) * 8 * 1e6 / rate
    wire = shaped.least("wire")
    assert wire == pytest.approx(expected_us, rel=0.05, abs=100)
    assert_others_stay(large, shaped, "wire")
    measured(
        f"a server that thinks 10 ms: {thought:.0f} µs; a reader that waits 10 ms: "
        f"{waited:.0f} µs; a link of 1 Mbit/s: wire {wire:.0f} µs, reckoned {expected_us:.0f} µs"
    )


@pytest.mark.parametrize("size", [100, 300_000])
def test_dev_xmit_rows_agree_with_tcpdump(
    size: int, road: Road, tmp_path: Path, running_tcplat: Callable[..., Tcplat]
) -> None:
    needs("tcpdump", "tshark")
    road.server(_SERVE.format(host=SERVER, port=PORT, asked=size, answered=size, lag=0, think=0))
    run = running_tcplat(probes=[f"dev_xmit:port={PORT}"])
    with tcpdump(
        tmp_path / "ca.pcap", "ca", f"tcp and src host {CLIENT}", there=road.client
    ) as seen:
        road.client.tell(
            _ASK.format(host=SERVER, port=PORT, asked=size, answered=size, times=3, pause=0)
        )
        road.client.answer()
        run.wait_for("the ACK of the last FIN left", _has_acknowledged_the_last_fin)
        rows = run.stop().rows
        ours = _left(rows, "")
        eventually(lambda: seen.count() >= len(ours), "tcpdump saw as many")
    assert by_direction([packet(row) for row in ours]) == by_direction(seen.packets())
    # Where an ACK is late, the last segment may go twice.
    data = [row for row in ours if row["bytes"]]
    ends = [(row["seq"] - data[0]["seq"] + row["bytes"]) % 2**32 for row in data]
    assert max(ends) == 3 * size
    # Segments of many packets are one row, as they are one of tcpdump's.
    assert (max(row["bytes"] for row in ours) > 1_448) == (size > 1_448)
    assert {row["pid"] for row in ours if row["bytes"]} == {road.client.pid}
    assert {row["ifname"] for row in rows} == {None}
    # The router's, too: they have no process.
    assert {row["dev"] for row in rows} == {"ca", "ra", "rb", "sa"}
    assert {row["pid"] for row in rows if row["dev"][0] == "r"} == {None}


def _left(rows: list[Row], flag: str) -> list[Row]:
    return [row for row in rows if row["dev"] == "ca" and flag in row["flags"]]


def _has_acknowledged_the_last_fin(rows: list[Row]) -> bool:
    """Return whether the client has sent its FIN and acknowledged the server's."""
    ours = _left(rows, "")
    return bool(_left(ours, "FIN")) and ours[-1]["flags"] == "ACK"


def test_pid_filter_follows_the_packets_of_a_process(
    road: Road, running_tcplat: Callable[..., Tcplat]
) -> None:
    serving = {"host": SERVER, "port": PORT, "asked": 10, "answered": 10}
    road.server(_SERVE.format(**serving, lag=0, think=0))
    run = running_tcplat("-p", str(road.client.pid), probes=["dev_xmit"])
    road.client.tell(_ASK.format(**serving, times=3, pause=0))
    road.client.answer()
    rows = run.wait_for("the last FIN left", lambda rows: len(_left(rows, "FIN")) >= 1)
    assert {row["dev"] for row in rows} == {"ca"}
    assert {row["pid"] for row in rows} == {road.client.pid}
    assert [row["flags"] for row in rows][:2] == ["SYN", "ACK"]


# --- a real server and a real client

REQUESTS = 5_000 if LONG else 1_500
# A request every two milliseconds: the microseconds that curl itself takes do not count then.
_SLOWLY = """
limit_req_zone $binary_remote_addr zone=slowly:1m rate=500r/s;
server {{
    listen 127.0.0.1:{port};
    location / {{ limit_req zone=slowly burst=10; stub_status; }}
}}
"""
_WRITE_OUT = "%{local_port} %{time_connect} %{time_pretransfer} %{time_starttransfer} %{time_total}"


def curls(folder: Path, port: int, requests: int, *, keep_alive: bool) -> list[dict[str, float]]:
    """Send requests by one curl; return what it reports of each, in µs."""
    config = folder / "curl"
    one = f'url = "http://127.0.0.1:{port}/"\noutput = "/dev/null"\n'
    close = "" if keep_alive else 'header = "Connection: close"\n'
    config.write_text(f'silent\n{close}write-out = "{_WRITE_OUT}\\n"\n{one * requests}')
    out = subprocess.run(
        ["curl", "-q", "--config", str(config)], check=True, capture_output=True, text=True
    ).stdout
    names = ("port", "connect", "pretransfer", "starttransfer", "total")
    return [
        {
            name: float(word) * (1 if name == "port" else 1e6)
            for name, word in zip(names, line.split(), strict=True)
        }
        for line in out.splitlines()
    ]


@pytest.mark.parametrize("keep_alive", [True, False])
@pytest.mark.alone  # it compares times
def test_stages_of_many_requests_add_up_and_agree_with_curl(
    *,
    keep_alive: bool,
    tmp_path: Path,
    running_tcplat: Callable[..., Tcplat],
    measured: Callable[[str], None],
) -> None:
    needs("curl")
    requests = REQUESTS if SLOW == 1 else 200
    capture, waterfall = tmp_path / "rows.jsonl", tmp_path / "waterfall"
    port = free_port()
    with nginx(tmp_path, _SLOWLY.format(port=port)) as (_, workers):
        run = running_tcplat(
            *only(port),
            *("--ring-size", "64M"),
            probes=_PROBES,
            sinks=(f"waterfall:format=json,path={waterfall}", f"jsonl:path={capture}"),
        )
        theirs = curls(tmp_path, port, requests, keep_alive=keep_alive)
        eventually(lambda: waterfall.read_bytes().count(b"\n") >= requests, "all were emitted")
        outcome = run.stop()
    assert "0 lost" in outcome.stderr
    ours = objects_in(waterfall)
    assert len(ours) == len(theirs) == requests
    check_sums(ours)
    assert {one["kind"] for one in ours} == {"exchange"}
    assert {one["unexplained_us"] for one in ours} == {0}
    assert {one["comm"] for one in ours} == {"curl"}
    assert {one["service_pid"] for one in ours} <= set(workers)
    shapes = Counter(tuple(one["stages"]) for one in ours)
    assert shapes.most_common(1)[0][1] > 0.99 * requests, shapes
    # In the order in which they were asked; of each connection its own.
    ours.sort(key=lambda one: one["ts_ns"])
    assert [one["sport"] for one in ours] == [one["port"] for one in theirs]
    # From the request's first byte on its way to the last byte of the reply.
    reckoned = [one["total"] - one["pretransfer"] for one in theirs]
    mine = [one["total_us"] for one in ours]
    off = statistics.median((a - b) / b for a, b in zip(mine, reckoned, strict=True))
    measured(
        f"curl, {requests} requests, keep-alive {keep_alive}: {statistics.median(mine):.0f} µs, "
        f"curl says {statistics.median(reckoned):.0f} µs, {off:+.1%} at the median"
    )
    assert abs(off) < 0.05
    again = subprocess.run(
        [*TCPLAT, "replay", str(capture), "--sink", "waterfall:format=json"],
        check=True,
        capture_output=True,
    ).stdout
    assert again == waterfall.read_bytes()


_HAPROXY = """
global
    nbthread 1
defaults
    mode tcp
    option splice-request
    option splice-response
    timeout connect 30s
    timeout client 60s
    timeout server 60s
listen front
    bind 127.0.0.1:{port}
    server back 127.0.0.1:{behind}
"""


@contextmanager
def haproxy(folder: Path, behind: int) -> Iterator[tuple[int, int]]:
    """Its port, and its process; it hands on what comes to another port, by splice()."""
    program = shutil.which("haproxy") or "/usr/sbin/haproxy"
    port = free_port()
    config = folder / "haproxy.cfg"
    config.write_text(_HAPROXY.format(port=port, behind=behind))
    process = subprocess.Popen([program, "-db", "-f", config])
    try:

        def listens() -> bool:
            assert process.poll() is None
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(listens, "haproxy listened")
        yield port, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.parametrize("watched", [_PROBES, ("tcp_client", "tcp_service")])
def test_requests_read_by_splice_are_paired(
    watched: tuple[str, ...],
    puppet: Callable[..., Puppet],
    tmp_path: Path,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    server, client, behind = puppet(), puppet(), free_port()
    sizes, times = {"asked": 20_000, "answered": 30_000}, 4
    server(_SERVE.format(host="127.0.0.1", port=behind, **sizes, lag=0, think=0.005))
    with haproxy(tmp_path, behind) as (port, pid):
        path = tmp_path / "waterfall"
        tcplat = running_tcplat(
            *only(port),
            probes=watched,
            sinks=(f"waterfall:format=json,path={path}",),
        )
        asking = {"host": "127.0.0.1", "port": port, **sizes, "times": times, "pause": 0.1}
        client.tell(_ASK.format(**asking))
        client.answer()
        eventually(lambda: len(objects_in(path)) >= times, "all exchanges were emitted")
        assert tcplat.stop().returncode == 0
    exchanges = objects_in(path)
    check_sums(exchanges)
    assert [(one["outcome"], one["request_bytes"], one["reply_bytes"]) for one in exchanges] == [
        ("answered", *sizes.values())
    ] * times
    assert {one["service_pid"] for one in exchanges} == {pid}
    for exchange, (began, ended) in zip(exchanges, client("asked"), strict=True):
        assert 5_000 <= exchange["total_us"] <= (ended - began) / 1000


@pytest.mark.parametrize("watched", [_PROBES, ("tcp_client",), ("tcp_service",)])
def test_hanging_request_has_the_time_its_client_waited(
    watched: tuple[str, ...],
    puppet: Callable[..., Puppet],
    tmp_path: Path,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    server, client, port = puppet(), puppet(), free_port()
    # It answers two requests, and not the third.
    server(f"""
listening = socket.create_server(("127.0.0.1", {port}))
peers = []
def serve():
    peer, _ = listening.accept()
    peers.append(peer)
    for _ in range(2):
        peer.recv(100)
        peer.sendall(bytes(100))
threading.Thread(target=serve, daemon=True).start()
""")
    path = tmp_path / "waterfall"
    tcplat = running_tcplat(
        *only(port),
        probes=watched,
        sinks=(f"waterfall:format=json,slow=1,path={path}", "summary:format=json"),
    )
    client.tell(f"""
with socket.create_connection(("127.0.0.1", {port})) as s:
    for _ in range(2):
        s.sendall(bytes(100))
        s.recv(100)
    s.settimeout(0.5)
    began = time.monotonic_ns()
    s.sendall(bytes(50))
    sent = time.monotonic_ns()
    try:
        s.recv(100)
    except TimeoutError:
        leaving = time.monotonic_ns()
left = time.monotonic_ns()
""")
    client.answer()
    server("peers[0].close()")
    assert tcplat.stop().returncode == 0
    (slowest,) = objects_in(path)
    assert (slowest["outcome"], slowest["total_us"]) == ("unanswered", None)
    assert slowest["over_by"] == "closed by the client"
    began, sent, leaving, left = (client(name) for name in ("began", "sent", "leaving", "left"))
    least = leaving - (began if "tcp_client" in watched else sent)
    assert 0.9 * least <= slowest["waited_us"] * 1000 <= 1.1 * (left - began)


# --- what the kernel itself counts


def _ss(there: Puppet, port: int) -> dict[str, float]:
    shown = inside(there, "ss", "-tinHO", f"( sport = :{port} or dport = :{port} )")
    numbers = dict(re.findall(r"(\w+):([\d.]+)(?=[\s/]|$)", shown))
    retrans = re.search(r"retrans:\d+/(\d+)", shown)
    return {
        **{name: float(number) for name, number in numbers.items()},
        "retrans": float(retrans[1]) if retrans else 0,
    }


def test_summary_agrees_with_ss_and_tshark(
    road: Road,
    tmp_path: Path,
    running_tcplat: Callable[..., Tcplat],
    measured: Callable[[str], None],
) -> None:
    needs("ss", "tcpdump", "tshark", "nft")
    road.server(f"""
listening = socket.create_server(({SERVER!r}, {PORT}))
""")
    # Segments leave one by one: tshark counts packets, the kernel segments.
    network(road.client, script="link set ca gso_max_segs 1")
    # Every 20th segment to the service is lost, and no ACK: the service has nothing to repeat.
    inside(
        road.router,
        "nft",
        (
            "table ip lossy { chain f { type filter hook forward priority 0; "
            f"ip daddr {SERVER} tcp dport {PORT} meta length > 200 numgen inc mod 20 == 9 drop; "
            "}; }"
        ),
    )
    path = tmp_path / "summary"
    run = running_tcplat(
        *only(PORT),
        probes=_PROBES,
        sinks=(f"summary:format=json,path={path}",),
    )
    with tcpdump(tmp_path / "ca.pcap", "ca", there=road.client) as seen:
        road.client(f"s = socket.create_connection(({SERVER!r}, {PORT}))")
        road.server("peer = listening.accept()[0]")
        asked, answered = 400_000, 30_000
        road.client.tell(f"s.sendall(bytes({asked})); len(s.recv({answered}, socket.MSG_WAITALL))")
        road.server(f"len(peer.recv({asked}, socket.MSG_WAITALL)), peer.sendall(bytes({answered}))")
        assert road.client.answer() == answered
        shown = eventually(
            lambda: (
                found if (found := _ss(road.client, PORT)).get("bytes_acked") == asked + 1 else {}
            ),
            "all was acknowledged",
        )
        there = eventually(
            lambda: (
                found if (found := _ss(road.server, PORT)).get("bytes_acked") == answered else {}
            ),
            "and the answer",
        )
        # A reset is not acknowledged: the last word was what ss has seen.
        road.client(_ABORT)
        road.server("select.select([peer], [], []); peer.close()")
        eventually(lambda: path.read_text() if path.exists() else "", "the connection was reported")
        eventually(lambda: _tshark(seen, "tcp.flags.reset == 1"), "tcpdump has written all")
        witness = _retransmissions(seen)
    run.stop()
    (conn,) = objects_in(path)
    client, service = conn["client"], conn["service"]
    assert (conn["bytes_to_service"], conn["bytes_to_client"]) == (asked, answered)
    assert client["retransmits"] == shown["retrans"] > 0
    assert client["retransmits_seen"] == witness == conn["retransmits"]
    assert service["retransmits"] == there.get("retrans") == 0
    assert client["srtt_us"] == pytest.approx(shown["rtt"] * 1000, abs=1)
    assert client["min_rtt_us"] == pytest.approx(shown["minrtt"] * 1000, abs=1)
    assert service["srtt_us"] == pytest.approx(there["rtt"] * 1000, abs=1)
    # ss rounds to ticks, of 4 ms at most.
    assert client["rto_us"] == pytest.approx(shown["rto"] * 1000, abs=8_000)
    assert (conn["reset_by"], conn["reset_why"]) == ("client", "it aborted")
    measured(
        f"summary and ss: srtt {client['srtt_us']} and {shown['rtt'] * 1000:.0f} µs, min RTT "
        f"{client['min_rtt_us']} and {shown['minrtt'] * 1000:.0f} µs, retransmits "
        f"{client['retransmits']} and {shown['retrans']:.0f}, tshark {witness}"
    )


_ABORT = "s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()"
_AGAIN = ("retransmission", "fast_retransmission", "spurious_retransmission", "out_of_order")


def _retransmissions(seen: Tcpdump) -> int:
    # What comes again soon, tshark takes for out of order; a sender's packets never are.
    return _tshark(seen, " or ".join(f"tcp.analysis.{name}" for name in _AGAIN))


def _tshark(seen: Tcpdump, which: str) -> int:
    """How many such packets of the client tcpdump has written."""
    read = subprocess.run(
        [
            *("tshark", "-r", str(seen.path), "-T", "fields", "-e", "tcp.seq", "-Y"),
            f"ip.src == {CLIENT} and ({which})",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return len(read.splitlines())


def test_reset_has_sender_and_reason(
    road: Road, tmp_path: Path, running_tcplat: Callable[..., Tcplat]
) -> None:
    road.server(f"listening = socket.create_server(({SERVER!r}, {PORT}))")
    path = tmp_path / "summary"
    run = running_tcplat(
        *only(PORT, PORT + 1),
        probes=_PROBES,
        sinks=(f"summary:format=json,path={path}", f"jsonl:path={tmp_path / 'rows.jsonl'}"),
    )
    # A service that closes without having read.
    road.client(f"s = socket.create_connection(({SERVER!r}, {PORT})); s.sendall(b'hello')")
    road.server("peer = listening.accept()[0]; select.select([peer], [], []); peer.close()")
    road.client("""
try: s.recv(1)
except ConnectionResetError: pass
s.close()
""")
    # A client that aborts.
    road.client(f"s = socket.create_connection(({SERVER!r}, {PORT}))")
    road.server("peer = listening.accept()[0]")
    road.client(_ABORT)
    road.server("select.select([peer], [], []); peer.close()")
    # No listener.
    road.client(f"""
try: socket.create_connection(({SERVER!r}, {PORT + 1}))
except ConnectionRefusedError: pass
""")
    eventually(lambda: path.exists() and len(objects_in(path)) >= 3, "all were emitted")
    run.stop()
    unread, aborted, refused = sorted(objects_in(path), key=lambda conn: int(conn["ts_ns"]))
    assert (unread["reset_by"], unread["reset_why"]) == ("service", "it closed with unread data")
    assert (aborted["reset_by"], aborted["reset_why"]) == ("client", "it aborted")
    assert (refused["reset_by"], refused["reset_why"]) == ("service", "no listener at that port")
    assert refused["error"] == "refused"


def test_live_output_equals_its_replay(
    road: Road, tmp_path: Path, start_tcplat: Callable[..., Tcplat]
) -> None:
    serving = {"host": SERVER, "port": PORT, "asked": 3_000, "answered": 3_000}
    road.server(_SERVE.format(**serving, lag=0, think=0.001))
    sinks = {
        "waterfall": tmp_path / "1",
        "waterfall:slow=3,min_stage=server:500us": tmp_path / "2",
        "summary": tmp_path / "3",
        "stages:group_by=remote+port": tmp_path / "4",
        "stages:format=json,every=10ms": tmp_path / "5",
    }
    capture = tmp_path / "capture"
    given = [name + (":" if ":" not in name else ",") + f"path={sinks[name]}" for name in sinks]
    run = start_tcplat(
        *only(PORT),
        probes=_PROBES,
        sinks=(*given, f"jsonl:path={capture}"),
    ).wait_ready()
    road.client.tell(_ASK.format(**serving, times=20, pause=0))
    road.client.answer()
    eventually(lambda: gone(2)(parsed(capture)), "both sockets were gone")
    run.stop()
    for name, path in sinks.items():
        again = subprocess.run(
            [*TCPLAT, "replay", str(capture), "--sink", name],
            check=True,
            capture_output=True,
            env=dict(os.environ),  # readline puts COLUMNS where os.environ does not see it
        ).stdout
        assert again == path.read_bytes(), name
        assert again


def parsed(capture: Path) -> list[Row]:
    lines = capture.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert at(rows, "send") or len(rows) < 1_000
    return [row for row in rows if "point" in row]
