"""Durations counted in the kernel: they agree with the events, with known delays, and add up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from .harness import Listener, Outcome, Puppet, Tcplat, completes, eventually, listen, parse
from .histograms import OFF, Found, assert_agrees, found, one, waits

Start = Callable[..., Tcplat]

PING_PONG = """
for _ in range({times}):
    s.sendall(b"x" * 100)
    s.recv(1000)
"""
ECHO = """
peer, _ = listening.accept()
for _ in range({times}):
    peer.sendall(peer.recv(1000))
"""


@pytest.fixture
def sink(tmp_path: Path) -> str:
    return f"histogram:format=json,every=0,path={tmp_path / 'histograms'}"


def report(tmp_path: Path, probe: str) -> dict[str, Any]:
    """Return the books of a probe, as the sink's last line has them."""
    last = json.loads((tmp_path / "histograms").read_bytes().splitlines()[-1])
    books: dict[str, Any] = last["report"]["probes"][probe]
    return books


def assert_adds_up(histogram: Found) -> None:
    counted = sum(count for _, _, count in histogram["buckets"])
    assert histogram["count"] == counted + histogram["over"]


def echo(client: Puppet, service: Puppet, times: int) -> int:
    """Exchange requests and answers between two puppets; return the service's port."""
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    service.tell(ECHO.format(times=times))
    client(PING_PONG.format(times=times))
    service.answer()
    return port


def test_connect_histogram_agrees_with_the_events(
    tmp_path: Path, sink: str, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    rows_at = tmp_path / "rows.jsonl"
    run = running_tcplat("-p", str(client.pid), sinks=(sink, f"jsonl:path={rows_at}"))
    client(f"for _ in range(100): socket.create_connection({server.address!r}).close()")
    run.stop()
    rows, _, _ = parse(rows_at.read_bytes())
    took = [row["connect_us"] for row in rows if completes(row)]
    assert len(took) == 100
    connect = one(found(tmp_path), "connect")
    assert_agrees(connect, took)
    assert (connect["pid"], connect["not_measured"]) == (client.pid, 0)


def test_histogram_alone_sends_nothing_through_the_ring(
    tmp_path: Path, sink: str, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), sinks=(sink,))
    client(f"for _ in range(50): socket.create_connection({server.address!r}).close()")
    outcome = run.stop()
    assert outcome.returncode == 0
    books = report(tmp_path, "tcp_client")
    assert [hook["produced"] for hook in books["hooks"] if hook["produced"]] == []
    assert {hook["point"] for hook in books["hooks"]} == {"connect", "state"}
    assert books["histograms"]["connect"] == {"samples": 50, "unmeasured": 0, "rest": 0}
    assert "50 counted (connect 50)" in outcome.stderr
    assert "rows" not in outcome.stderr


def test_late_answered_connect_has_its_full_duration(
    tmp_path: Path, sink: str, running_tcplat: Start, client: Puppet, puppet: Callable[..., Puppet]
) -> None:
    """Where the queue is full, the kernel drops the SYN; the next one comes a second later."""
    service = puppet()
    port = service("""
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
listening.listen(0)
listening.getsockname()[1]
""")
    client(f"first = socket.create_connection(('127.0.0.1', {port}))")
    run = running_tcplat("-p", str(client.pid), sinks=(sink,))
    dropped = listen_drops()
    client.tell(f"""
began = time.monotonic()
second = socket.create_connection(('127.0.0.1', {port}))
(time.monotonic() - began) * 1e6
""")
    eventually(lambda: listen_drops() > dropped, "the SYN was dropped")
    service("peer, _ = listening.accept(); None")
    took_us = client.answer()
    run.stop()
    connect = one(found(tmp_path), "connect")
    assert connect["count"] == 1
    # The caller may be kept waiting for longer than the kernel.
    assert 900_000 < connect["max_us"] <= took_us * (1 + OFF)


def listen_drops() -> int:
    """How many SYNs found a full queue in this network namespace."""
    names, values = (
        line.split()
        for line in Path("/proc/self/net/netstat").read_text().splitlines()
        if line.startswith("TcpExt:")
    )
    return int(values[names.index("ListenDrops")])


def test_failed_connect_is_not_counted(
    tmp_path: Path, sink: str, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    run = running_tcplat("-p", str(client.pid), sinks=(sink,))
    address = server.address
    client(f"socket.create_connection({address!r}).close()")
    server.listening.close()
    client(f"""
for _ in range(3):
    try:
        socket.create_connection({address!r})
    except ConnectionRefusedError:
        pass
""")
    run.stop()
    histograms = found(tmp_path)
    assert one(histograms, "connect")["count"] == 1
    assert one(histograms, "connect_failed")["count"] == 3


def test_receive_histograms_agree_with_the_events(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    service = puppet()
    rows_at = tmp_path / "rows.jsonl"
    run = running_tcplat(
        "-p", str(service.pid), probes=("tcp_service",), sinks=(sink, f"jsonl:path={rows_at}")
    )
    port = echo(client, service, 500)
    run.stop()
    rows, _, _ = parse(rows_at.read_bytes())
    rows = [row for row in rows if port in (row["sport"], row["dport"])]
    receive_path, queue = waits(rows)
    assert len(queue) == 500
    histograms = found(tmp_path)
    # Arrivals are kept in steps of 16 ns.
    assert_agrees(one(histograms, "rx_ready"), receive_path, 0.02)
    assert_agrees(one(histograms, "ready_recv"), queue)
    assert {value["not_measured"] for value in histograms} == {0}
    for histogram in histograms:
        assert_adds_up(histogram)


def test_reader_delay_of_10_ms_is_measured(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    service = puppet()
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",), sinks=(sink,))
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    service.tell("""
peer, _ = listening.accept()
times = []
for _ in range(20):
    select.select([peer], [], [])
    woken = time.monotonic()
    time.sleep(0.01)
    reading = time.monotonic()
    data = peer.recv(1000)
    times.append((woken, reading, time.monotonic()))
    peer.sendall(data)
times
""")
    sent_at = client("""
sent = []
for _ in range(20):
    sent.append(time.monotonic())
    s.sendall(b"x" * 100)
    s.recv(1000)
sent
""")
    times = service.answer()
    run.stop()
    queue = one(found(tmp_path), "ready_recv")
    assert queue["count"] == 20
    # The reader itself cannot measure its wake-up delay.
    least = [(reading - woken) * 1e6 for woken, reading, _ in times]
    most = [(read - sent) * 1e6 for sent, (_, _, read) in zip(sent_at, times, strict=True)]
    assert min(least) >= 10_000
    assert_between(queue, least, most)


def assert_between(histogram: Found, least_us: Sequence[float], most_us: Sequence[float]) -> None:
    """Each sample is within its bounds: then the k-th of them all is, between the k-th bounds."""
    shown = [(low, high) for low, high, count in histogram["buckets"] for _ in range(count)]
    for (low, high), least, most in zip(shown, sorted(least_us), sorted(most_us), strict=True):
        assert least <= high, (histogram, least_us)
        assert low <= most, (histogram, most_us)


def test_partial_reads_are_measured_from_their_own_wake_up(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    """Three queued messages, read in 50-byte pieces: each has waited since its message came."""
    service = puppet()
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",), sinks=(sink,))
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    service("peer, _ = listening.accept()")
    client("s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)")
    arrived = []
    for number in (1, 2, 3):
        sent = client("sent = time.monotonic(); s.send(b'x' * 100); sent")
        seen = service(f"""
while len(peer.recv(1000, socket.MSG_PEEK)) < {number} * 100: pass
seen = time.monotonic()
time.sleep(0.1)
seen
""")
        arrived += [(sent, seen)] * 2
    read_at = service("""
read = []
for _ in range(6):
    reading = time.monotonic()
    peer.recv(50)
    read.append((reading, time.monotonic()))
read
""")
    run.stop()
    queue = one(found(tmp_path), "ready_recv")
    assert (queue["count"], queue["not_measured"]) == (6, 0)
    both = list(zip(arrived, read_at, strict=True))
    least = [(reading - seen) * 1e6 for (_, seen), (reading, _) in both]
    most = [(read - sent) * 1e6 for (sent, _), (_, read) in both]
    assert min(least) >= 100_000
    assert_between(queue, least, most)


def test_wake_ups_beyond_seven_are_counted_as_not_measured(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    """Seven wake-ups per socket are stored; later ones are counted as not measured."""
    service = puppet()
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",), sinks=(sink,))
    port = listen(service)
    client(f"s = socket.create_connection(('127.0.0.1', {port}))")
    service("peer, _ = listening.accept()")
    client("s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)")
    # One by one: what leaves while the one before has not arrived may arrive with the next.
    for number in range(1, 21):
        client("s.send(b'x' * 100)")
        service(f"while len(peer.recv(4000, socket.MSG_PEEK)) < {number} * 100: pass")
    service("[len(peer.recv(100, socket.MSG_WAITALL)) for _ in range(20)]")
    # Afterwards the state is clean.
    client("s.send(b'x' * 100)")
    service("len(peer.recv(100, socket.MSG_WAITALL))")
    run.stop()
    queue = one(found(tmp_path), "ready_recv")
    assert (queue["count"], queue["not_measured"]) == (8, 13)


def test_pid_filter_applies_to_histograms(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    puppet: Callable[..., Puppet],
    server: Listener,
) -> None:
    ours, other = puppet(), puppet()
    run = running_tcplat("-p", str(ours.pid), sinks=(sink,))
    for who, times in ((ours, 3), (other, 5)):
        who(f"for _ in range({times}): socket.create_connection({server.address!r}).close()")
    run.stop()
    (connect,) = found(tmp_path)
    assert (connect["pid"], connect["count"]) == (ours.pid, 3)


@pytest.mark.parametrize("by", ["all", "process", "remote", "port"])
def test_group_by_separates_the_groups(
    by: str,
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    puppet: Callable[..., Puppet],
    listener: Callable[..., Listener],
) -> None:
    clients, servers = [puppet(), puppet()], [listener(), listener(6)]
    pids = ",".join(str(client.pid) for client in clients)
    run = running_tcplat("-p", pids, sinks=(f"{sink},by={by}",))
    for client, server in itertools.product(clients, servers):
        client(f"for _ in range(4): socket.create_connection({server.address!r}).close()")
    run.stop()
    histograms = found(tmp_path)
    keys = ("pid", "address", "port")
    groups = {tuple(value[key] for key in keys): value["count"] for value in histograms}
    assert (
        groups
        == {
            "all": {(None, None, None): 16},
            "process": {(client.pid, None, None): 8 for client in clients},
            "remote": {
                (None, "127.0.0.1", servers[0].port): 8,
                (None, "::1", servers[1].port): 8,
            },
            "port": {(None, None, server.port): 8 for server in servers},
        }[by]
    )


def test_groups_beyond_the_limit_are_counted_as_others(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    listener: Callable[..., Listener],
) -> None:
    servers = [listener() for _ in range(5)]
    run = running_tcplat("-p", str(client.pid), sinks=(f"{sink},by=port,groups=2",))
    for server in servers:
        client(f"socket.create_connection({server.address!r}).close()")
    outcome = run.stop()
    counts = {(value["port"], value["rest"]): value["count"] for value in found(tmp_path)}
    assert counts == {
        (servers[0].port, False): 1,
        (servers[1].port, False): 1,
        (None, True): 3,
    }
    assert "connect: 3 came when all groups were in use" in outcome.stderr


def test_intervals_add_up_to_the_run(
    tmp_path: Path, running_tcplat: Start, client: Puppet, server: Listener
) -> None:
    path = tmp_path / "histograms"
    run = running_tcplat(
        "-p", str(client.pid), sinks=(f"histogram:every=100ms,format=json,path={path}",)
    )
    for number in (1, 2, 3):
        client(f"for _ in range(10): socket.create_connection({server.address!r}).close()")
        eventually(
            lambda number=number: path.read_bytes().count(b'"window":"interval"') >= number,  # type: ignore[misc] # bound now
            "an interval had ended",
        )
    run.stop()
    intervals, (whole,) = found(tmp_path, "interval"), found(tmp_path)
    assert len(intervals) >= 3
    assert sum(value["count"] for value in intervals) == whole["count"] == 30
    cells: dict[float, int] = {}
    for low, _, count in (bucket for value in intervals for bucket in value["buckets"]):
        cells[low] = cells.get(low, 0) + count
    assert cells == {low: count for low, _, count in whole["buckets"]}


def test_socket_closed_during_attach_leaves_no_stale_state(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    """The kernel reuses the address of a socket immediately; stale state would be wrong."""
    service = puppet()
    port = service("""
def serve():
    while True:
        peer, _ = listening.accept()
        with peer:
            while data := peer.recv(1000):
                peer.sendall(data)

listening = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, daemon=True).start()
listening.getsockname()[1]
""")
    client(f"""
def call():
    global calls
    while not enough.is_set():
        with socket.create_connection(("127.0.0.1", {port})) as s:
            for _ in range(20):
                s.sendall(b"x" * 100)
                s.recv(1000)
        calls += 1

calls = 0
enough = threading.Event()
caller = threading.Thread(target=call, daemon=True)
caller.start()
""")
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",), sinks=(sink,))
    before = client("calls")
    eventually(lambda: client("calls") >= before + 50, "it was called as often as we need")
    client("enough.set(); caller.join()")
    run.stop()
    (path,) = (
        value
        for value in found(tmp_path)
        if value["histogram"] == "rx_ready" and value["pid"] == service.pid
    )
    assert path["count"] > 100
    assert path["not_measured"] == 0


def test_histogram_unavailable_by_the_mechanism_is_named(
    tmp_path: Path,
    sink: str,
    running_tcplat: Start,
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    service = puppet()
    run = running_tcplat("-p", str(service.pid), probes=("tcp_service",), sinks=(sink,))
    echo(client, service, 10)
    outcome: Outcome = run.stop()
    books = report(tmp_path, "tcp_service")
    (recv,) = {hook["attach"] for hook in books["hooks"] if hook["point"] == "recv"}
    if recv == "tracepoint":
        assert books["no_histograms"] == {"in_recv": "recv by tracepoint cannot measure it"}
        assert "no in_recv: recv by tracepoint" in outcome.stderr
        assert "in_recv" not in books["histograms"]
    else:
        assert one(found(tmp_path), "in_recv")["count"] == 10
