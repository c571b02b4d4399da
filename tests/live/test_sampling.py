"""--sample on real packets: whole connections, at every probe, both ends and both hosts alike."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tcplat_core import connection_hash, is_in_share
from tests.long import LONG

from .harness import (
    ATTACH,
    BLACKHOLE,
    SLOW,
    TCPLAT,
    Outcome,
    Puppet,
    Row,
    Tcplat,
    at,
    eventually,
    network,
    parse,
    patience,
    story,
)
from .test_merge import _FAR, _NEAR, _OTHER, _PAIR

_SENDS = ("dev_xmit",) if ATTACH == "auto" else ()
"""It has tracepoints alone."""
_ALL = ("tcp_client", "tcp_service", "tcp_stats", *_SENDS)
_SERVE = """
listening = socket.socket(socket.AF_INET if {ip} == 4 else socket.AF_INET6)
listening.bind(({host!r}, 0))
listening.listen(512)
def serve():
    while True:
        peer, _ = listening.accept()
        while peer.recv(100):
            peer.sendall(bytes(10))
        peer.close()
threading.Thread(target=serve, daemon=True).start()
listening.getsockname()[1]
"""
_ASK = """
found = []
for _ in range({count}):
    s = socket.socket(socket.AF_INET if {ip} == 4 else socket.AF_INET6)
    s.connect(({host!r}, {port}))
    found.append(s.getsockname()[1])
    for _ in range(2):
        s.sendall(bytes(5))
        s.recv(10, socket.MSG_WAITALL)
    s.close()
found
"""
_COUNT = (2000 if LONG else 800) if SLOW == 1 else 400
_ONE_IN = 8
_HOSTS = {
    "v4": (4, "127.0.0.1", "127.0.0.1"),
    "v6": (6, "::1", "::1"),
    "mapped": (6, "::", "::ffff:127.0.0.1"),
}
"""Family of the sockets, where the service listens, and to where the client connects."""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Puppet, Puppet]]:
    """Yield a server and a client in a network namespace: the C knows it, and is compiled once."""
    server = Puppet.start(alone=True)
    client = Puppet.start(within=server)
    yield server, client
    for one in (client, server):
        one.end()


@pytest.fixture
def server() -> Iterator[Puppet]:
    """In a network namespace of its own."""
    puppet = Puppet.start(alone=True)
    yield puppet
    puppet.end()


@pytest.fixture
def client(server: Puppet) -> Iterator[Puppet]:
    puppet = Puppet.start(within=server)
    yield puppet
    puppet.end()


def connection(row: Row, port: int) -> int | None:
    """Return the client's port, of a row that belongs to a connection to this port."""
    ends = (row["sport"], row["dport"])
    if port not in ends or None in ends or 0 in ends:
        return None
    return int(ends[0] if ends[1] == port else ends[1])


def by_client(rows: Iterable[Row], port: int) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = {}
    for row in rows:
        sport = connection(row, port)
        if sport:
            found.setdefault(sport, []).append(row)
    return found


def of(rows: Iterable[Row], probe: str) -> list[Row]:
    return [row for row in rows if row["probe"] == probe]


def check_whole(rows: list[Row]) -> None:
    """Check that nothing of a connection with two requests is missing at any probe."""
    caller, service = of(rows, "tcp_client"), of(rows, "tcp_service")
    told = story(caller)
    assert told[:3] == ["connect", "SYN_SENT", "ESTABLISHED"], (told, caller[0])
    assert told[-1] == "close"
    assert [row["bytes"] for row in at(caller, "send")] == [5, 5]
    assert sum(row["bytes"] for row in at(caller, "recv")) == 20
    # By kprobe and fentry, segments that change no state yet have rows of the point, too.
    changes = [row for row in service if row["func"] != "tcp_rcv_state_process"]
    told = [one for one in story(changes) if one not in ("rx_ip", "rx_tcp", "ready")]
    # The child is in the accept queue before its last change: another CPU may accept it in between.
    assert sorted(told[:2]) == ["ESTABLISHED", "accept"]
    assert told[-1] == "close"
    assert sum(row["bytes"] for row in at(service, "recv")) == 10
    assert sum(row["bytes"] for row in at(service, "send")) == 20
    for point in ("rx_ip", "nic_rx", *(("nic_tx",) if _SENDS else ())):
        flags = [row["flags"] for row in at(rows, point)]
        assert sum(flag == "SYN" for flag in flags) == 1, (point, flags)
        # rx_ip is for the service alone.
        ends = 1 if point == "rx_ip" else 2
        assert sum("FIN" in flag for flag in flags) == ends, (point, flags)
        assert sum(flag == "SYN|ACK" for flag in flags) == ends - 1, (point, flags)
        # A delayed ACK may have the number of the bytes that come before or behind it.
        sent = {(row["sport"], row["seq"]): row["bytes"] for row in at(rows, point) if row["bytes"]}
        assert sum(sent.values()) == 10 + 20 * (ends - 1), point
    assert len(of(rows, "tcp_stats")) == 2


def made_and_left_out(outcome: Outcome, probe: str, point: str) -> int:
    """Return how many rows of a hook point there were, and would have been."""
    hooks = outcome.report["probes"][probe]["hooks"]
    return sum(hook["produced"] + hook["unsampled"] for hook in hooks if hook["point"] == point)


def in_share(ends: tuple[str, str], port: int, one_in: int = _ONE_IN) -> Callable[[int], bool]:
    """Return whether a connection between two addresses is in a share, by the client's port."""
    return lambda sport: is_in_share(connection_hash(ends[0], sport, ends[1], port), one_in)


def services_closed(run: Tcplat, count: int) -> list[Row]:
    """Wait until the services of so many connections have closed them."""
    return run.wait_for(
        f"{count} connections were over",
        lambda rows: len(at(of(rows, "tcp_service"), "close")) >= count,
    )


@pytest.mark.parametrize("where", list(_HOSTS))
def test_sampled_connections_are_whole_at_every_probe(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat], where: str
) -> None:
    server, client = pair
    ip, listens, calls = _HOSTS[where]
    run = running_tcplat(
        *("--sample", f"1/{_ONE_IN}", "--netns", str(server.pid)),
        probes=(*_ALL, "xdp_port:iface=lo,port=all"),
    )
    port = server(_SERVE.format(ip=ip, host=listens))
    client.tell(_ASK.format(ip=ip, host=calls, port=port, count=_COUNT))
    expected = set(filter(in_share((calls, calls), port), client.answer(300)))
    services_closed(run, len(expected))
    outcome = run.stop()
    found = by_client(outcome.rows, port)
    assert found.keys() == expected
    # Five standard deviations of a binomial distribution.
    assert abs(len(expected) - _COUNT / _ONE_IN) < 5 * (_COUNT / _ONE_IN * (1 - 1 / _ONE_IN)) ** 0.5
    for rows in found.values():
        check_whole(rows)
    # What belongs to no connection stays.
    listener = [row for row in of(outcome.rows, "tcp_service") if row["sport"] == port]
    assert "LISTEN" in story(row for row in listener if not row["dport"])
    check_books(outcome)
    first = json.loads(run.path.read_bytes().partition(b"\n")[0])
    assert first["sampled"] == {"one_in": _ONE_IN, "since_ns": 0, "host": 0}
    check_joined(run.path, len(expected))


def check_books(outcome: Outcome) -> None:
    """Check that rows made and rows left out are those of all connections, hook by hook."""
    assert outcome.report["dropped"] == 0
    assert outcome.report["one_in"] == [_ONE_IN, _ONE_IN]
    assert f"1/{_ONE_IN} of the connections sampled" in outcome.stderr
    for probe, point, each in (
        ("tcp_client", "connect", 1),
        ("tcp_client", "send", 2),
        ("tcp_client", "close", 1),
        ("tcp_service", "accept", 1),
        ("tcp_stats", "stats", 2),
    ):
        assert made_and_left_out(outcome, probe, point) == each * _COUNT, (probe, point)
    if _SENDS:
        sent = made_and_left_out(outcome, "dev_xmit", "nic_tx")
        assert made_and_left_out(outcome, "xdp_port", "nic_rx") == sent


def check_joined(capture: Path, connections: int) -> None:
    """Check that the joined sinks have each request, and none that was not answered."""
    words = ["--sink", "stages:format=json,group_by=none", "--sink", "summary:format=json"]
    command = [*TCPLAT, "replay", "-q", str(capture), *words]
    written = subprocess.run(command, check=True, capture_output=True).stdout
    lines = [json.loads(line) for line in written.splitlines()]
    (answered,) = [one for one in lines if one.get("stage") == "total"]
    assert answered["count"] == 2 * connections
    ends = [one for one in lines if "conn" in one]
    assert len(ends) == connections
    assert all(one["exchanges"] == 2 and not one["unanswered"] for one in ends)


_FAIL = """
for _ in range({count}):
    with socket.socket() as s:
        s.settimeout(5)
        try:
            s.connect({where!r})
        except ConnectionRefusedError:
            pass
for _ in range({count}):
    s = socket.socket()
    s.setblocking(False)
    s.connect_ex(("10.77.0.2", 80))
    s.close()
"""


def test_failed_connects_are_sampled_as_wholes(
    pair: tuple[Puppet, Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    """Refused ones, and ones that are given up before an answer."""
    server, client = pair
    count = 200
    network(server, script=BLACKHOLE)
    run = running_tcplat("--sample", "1/4", "--netns", str(server.pid), probes=_ALL)
    client(_FAIL.format(count=count, where=("127.0.0.1", 9)))
    # A connection that is in every share.
    port = server(_SERVE.format(ip=4, host="127.0.0.1"))
    client.tell(_ASK.format(ip=4, host="127.0.0.1", port=port, count=40))
    ports = client.answer()
    services_closed(run, sum(map(in_share(("127.0.0.1", "127.0.0.1"), port, 4), ports)))
    outcome = run.stop()
    for address, refused in (("127.0.0.1", 9), ("10.77.0.2", 80)):
        rows = [row for row in outcome.rows if address in (row["saddr"], row["daddr"])]
        found = by_client(rows, refused)
        assert abs(len(found) - count / 4) < 5 * (count / 4 * 3 / 4) ** 0.5
        local = rows[0]["saddr"]
        for sport, of_one in found.items():
            assert in_share((local, address), refused, 4)(sport)
            caller = of(of_one, "tcp_client")
            assert story(caller) == ["connect", "SYN_SENT", "CLOSE", "close"]
            if _SENDS:
                assert len(at(of_one, "nic_tx")) == (2 if refused == 9 else 1)
    assert made_and_left_out(outcome, "tcp_client", "connect") == 2 * count + 40
    assert made_and_left_out(outcome, "tcp_client", "close") == 2 * count + 40
    assert not [row for row in of(outcome.rows, "tcp_client") if not row["sport"]]


_SHARES = ((8, 8), (2, 8))


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Puppet, Puppet]]:
    """Yield two processes in a network namespace each, joined by va and vb."""
    near, far = Puppet.start(alone=True), Puppet.start(alone=True)
    network(near, script=_PAIR.format(pid=far.pid))
    network(far, script=_OTHER)
    yield near, far
    for one in (near, far):
        one.end()


@pytest.mark.parametrize("shares", _SHARES, ids=lambda shares: f"{shares[0]}-{shares[1]}")
def test_two_hosts_have_the_same_connections(
    tmp_path: Path,
    hosts: tuple[Puppet, Puppet],
    running_tcplat: Callable[..., Tcplat],
    shares: tuple[int, int],
) -> None:
    client, server = hosts
    runs = []
    for name, puppet, device, one_in in zip(("a", "b"), hosts, ("va", "vb"), shares, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        run = running_tcplat(
            *("--netns", str(puppet.pid), "--sample", f"1/{one_in}"),
            folder=folder,
            probes=(*_ALL, f"xdp_port:iface={device},port=all"),
        )
        runs.append(run)
    port = server(_SERVE.format(ip=4, host=_FAR))
    client.tell(_ASK.format(ip=4, host=_FAR, port=port, count=400))
    ports = client.answer(120)
    near, there = (set(filter(in_share((_NEAR, _FAR), port, one_in), ports)) for one_in in shares)
    services_closed(runs[1], len(there))
    runs[0].wait_for(
        "the clients were gone",
        lambda rows: len(at(of(rows, "tcp_client"), "close")) >= len(near),
    )
    outcomes = [run.stop() for run in runs]
    assert there <= near
    for outcome, expected in zip(outcomes, (near, there), strict=True):
        assert by_client(outcome.rows, port).keys() == expected
    both = [row for outcome in outcomes for row in outcome.rows]
    for sport, rows in by_client(both, port).items():
        if sport in there:
            check_whole(rows)
    out = tmp_path / "both"
    merge = [*TCPLAT, "merge", *(str(run.path) for run in runs), "-o", str(out)]
    said = subprocess.run(merge, check=True, capture_output=True, text=True).stderr
    assert ("seen from one end" in said) == (near != there)
    if near == there:
        check_joined(out, len(near))


_TALK = """
talking = [socket.create_connection(("127.0.0.1", {port})) for _ in range({count})]
requests, end = 0, time.monotonic() + {seconds}
while time.monotonic() < end:
    for s in talking:
        s.sendall(bytes(5))
    for s in talking:
        s.recv(10, socket.MSG_WAITALL)
    requests += len(talking)
    # Ten times what the limit allows, and not more: the rows before it thins have to be read.
    time.sleep(0.01)
[requests, [s.getsockname()[1] for s in talking]]
"""
_HANG_UP = """
for s in talking:
    s.close()
"""
_SERVE_MANY = """
listening = socket.create_server(("127.0.0.1", 0), backlog=512)
def serve():
    ready = select.epoll()
    ready.register(listening, select.EPOLLIN)
    peers = {}
    while True:
        for fd, _ in ready.poll():
            if fd == listening.fileno():
                peer, _ = listening.accept()
                peers[peer.fileno()] = peer
                ready.register(peer, select.EPOLLIN)
            elif peers[fd].recv(100):
                peers[fd].sendall(bytes(10))
            else:
                peers.pop(fd).close()
threading.Thread(target=serve, daemon=True).start()
listening.getsockname()[1]
"""


def shares_in(path: Path) -> list[dict[str, int]]:
    """Return the lines of a capture that say which connections have rows."""
    with path.open("rb") as file:
        return [
            json.loads(line)["sampled"] for line in file if line.startswith(b'{"v":2,"sampled"')
        ]


def check_shares(rows: Iterable[Row], shares: Iterable[dict[str, int]], port: int) -> None:
    """Check that each row is of a connection in the share of its instant, to the nanosecond."""
    seen, following, one_in = 0, list(shares), 1
    for row in rows:
        while following and following[0]["since_ns"] <= row["ts_ns"]:
            one_in = following.pop(0)["one_in"]
        sport = connection(row, port)
        if sport:
            seen += 1
            assert in_share(("127.0.0.1", "127.0.0.1"), port, one_in)(sport), row
    assert seen > 1000


@pytest.mark.alone  # it measures CPU time
def test_expensive_run_is_thinned_and_recovers(
    tmp_path: Path, server: Puppet, client: Puppet, running_tcplat: Callable[..., Tcplat]
) -> None:
    capture, live, again = (tmp_path / name for name in ("rows", "live", "again"))
    # A session that has nothing to do takes some 0.4 % of two CPUs: it must be able to recover.
    run = running_tcplat(
        *("--max-overhead", "2%", "--netns", str(server.pid), "--ring-size", "64M"),
        probes=("tcp_client", "tcp_service", "xdp_port:iface=lo,port=all"),
        sinks=(f"jsonl:path={capture}", f"stages:path={live},group_by=none"),
    )
    port = server(_SERVE_MANY)
    client.tell(_TALK.format(port=port, count=64, seconds=5 * SLOW))
    requests, ports = client.answer(120)

    def back() -> int:
        """Return the share where connections have come back: all, which takes two minutes."""
        seen = [share["one_in"] for share in shares_in(capture)] or [1]
        return seen[-1] if seen[-1] <= (1 if LONG else max(seen) // 2) else 0

    # Nothing happens any more.
    share = eventually(back, "connections came back", 180)
    client(_HANG_UP)
    more, others = client(_TALK.format(port=port, count=64, seconds=0.1))
    client(_HANG_UP)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(patience()) == 0
    rows, losses, report = parse(capture.read_bytes())
    shares = shares_in(capture)
    smallest = max(share["one_in"] for share in shares)
    assert smallest >= 4
    assert report["one_in"] == [1, smallest]
    assert not losses
    check_shares(rows, shares, port)
    expected = filter(in_share(("127.0.0.1", "127.0.0.1"), port, share), [*ports, *others])
    assert {connection(row, port) for row in rows} >= set(expected)
    # The books: each call is in a row, or counted as left out.
    hooks = report["probes"]["tcp_client"]["hooks"]
    sends = [hook for hook in hooks if hook["point"] == "send"]
    assert sum(hook["produced"] + hook["unsampled"] for hook in sends) == requests + more
    replay = [*TCPLAT, "replay", "-q", str(capture), "--sink", f"stages:path={again},group_by=none"]
    subprocess.run(replay, check=True)
    assert again.read_bytes() == live.read_bytes()
    assert b"unanswered" not in live.read_bytes()
    assert f"1/1 to 1/{smallest} of the connections".encode() in live.read_bytes()
