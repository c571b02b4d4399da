"""A replay gives what the live run gave, also through a filter."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.long import LONG

from .harness import TCPLAT, Outcome, Puppet, Row, Tcplat, at, eventually, free_port, gone, parse

_SERVE = """
def loop(listening):
    while True:
        peer, _ = listening.accept()
        while data := peer.recv(100):
            peer.sendall(data)
        peer.close()
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
    listening = socket.create_server((host, {port}), family=family)
    threading.Thread(target=loop, args=(listening,), daemon=True).start()
"""
_CALL = """
for host in ("127.0.0.1", "::1"):
    s = socket.create_connection((host, {port}))
    for _ in range(5):
        s.sendall(b"x" * 100)
        assert len(s.recv(100, socket.MSG_WAITALL)) == 100
    s.shutdown(socket.SHUT_WR)
    assert s.recv(1) == b""
    s.close()
"""
BOTH = ("tcp_client", "tcp_service")


def replayed(path: Path | str, *arguments: str) -> bytes:
    """Return what `tcplat replay` writes."""
    return subprocess.run(
        [*TCPLAT, "replay", str(path), *arguments],
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
        env=dict(os.environ),  # readline has put the terminal's width into what is inherited
    ).stdout


def alike(rows: Iterable[Row]) -> Counter[tuple[Any, ...]]:
    """Rows but for what two runs stamp and number differently.

    The thread that used a socket last may be known a moment earlier in one of the runs.
    """
    own = ("ts_ns", "time_ns", "sock", "tid", "connect_us", "accept_us", "call_us")
    return Counter(tuple((key, row[key]) for key in row if key not in own) for row in rows)


@pytest.fixture(scope="module")
def port() -> int:
    """One for all: the C knows it, so another one would take another compilation."""
    return free_port()


@pytest.fixture
def server(puppet: Callable[..., Puppet], port: int) -> Puppet:
    one = puppet()
    one(_SERVE.format(port=port))
    return one


FILTERS = (
    "--port {port}",
    "-p {client}",
    "-p {server}",
    "-p {client},{server} --lport {port}",
    "--comm replay-te*",
    "--port {port} --addr 127.0.0.0/8 --min-latency 1s",
    "--port {port} -6 --netns {netns}",
)
MORE_FILTERS = (
    *("--lport {port}", "--rport {port}", "--port {port} --addr ::1", "--port {port} -4"),
    *("--port {port} --netns {netns}", "--port {port} --min-latency 1s"),
)
"""Each is compiled, for seconds: those of FILTERS one by one, the other side, the other version."""


@attrs.frozen
class Filtered:
    """The same traffic, as runs with one filter each saw it, and one without."""

    arguments: dict[str, list[str]]
    live: dict[str, Outcome]
    path: Path
    capture: Outcome


@pytest.fixture(scope="module")
def filtered(port: int, tmp_path_factory: pytest.TempPathFactory) -> Filtered:
    """Return what all the runs saw; each filter is compiled, and all see one traffic."""
    with ExitStack() as stack:

        def puppet() -> Puppet:
            one = Puppet.start()
            stack.callback(one.end)
            return one

        def start(*arguments: str) -> Tcplat:
            run = Tcplat.start(tmp_path_factory.mktemp("run"), *arguments, probes=BOTH)
            stack.callback(run.kill)
            return run.wait_ready()

        server, client = puppet(), puppet()
        server(_SERVE.format(port=port))
        client("open('/proc/self/comm', 'w').write('replay-test')")
        words = {"port": port, "client": client.pid, "server": server.pid, "netns": os.getpid()}
        arguments = {one: one.format(**words).split() for one in (*FILTERS, *MORE_FILTERS * LONG)}
        live = {wanted: start(*given) for wanted, given in arguments.items()}
        all_of_it = start()
        for _ in range(3):
            client(_CALL.format(port=port))
        # Of both ends of each connection: where these are, all that came before them is as well.
        all_of_it.wait_for(
            "all sockets were gone",
            lambda rows: len([row for row in at(rows, "close") if port in ends(row)]) == 12,
        )
        outcomes = {wanted: run.stop() for wanted, run in live.items()}
        return Filtered(arguments, outcomes, all_of_it.path, all_of_it.stop())


@pytest.mark.parametrize("wanted", [*FILTERS, *MORE_FILTERS * LONG])
def test_replay_filter_agrees_with_the_kernel_filter(wanted: str, filtered: Filtered) -> None:
    arguments, expected, capture = (
        filtered.arguments[wanted],
        filtered.live[wanted],
        filtered.capture,
    )
    assert (expected.losses, capture.losses) == ([], [])
    rows, _, report = parse(replayed(filtered.path, *arguments, "--sink", "jsonl", "-q"))
    assert alike(rows) == alike(expected.rows)
    everything = wanted in ("--port {port}", "--port {port} --netns {netns}")
    assert 0 < len(rows) < len(capture.rows) + everything
    for books in (report, expected.report):
        assert books["delivered"] == len(rows)
    assert "incomplete" not in report


def ends(row: Row) -> tuple[int, int]:
    return row["sport"], row["dport"]


@pytest.mark.parametrize(
    "wanted", ["-p {client}", "-p {server}", "--port {port}", "--lport {port}"]
)
def test_packets_pass_the_filter_by_either_end(
    wanted: str,
    port: int,
    server: Puppet,
    client: Puppet,
    running_tcplat: Callable[..., Tcplat],
) -> None:
    """One after the other: there is room for one XDP program on an interface."""
    probes = [*BOTH, f"xdp_port:iface=lo,port={port}"]
    arguments = wanted.format(port=port, client=client.pid, server=server.pid).split()
    packets: list[Sequence[Row]] = []
    for run in (running_tcplat(*arguments, probes=probes), None):
        recording = run or running_tcplat(probes=probes)
        for count in (2, 4):
            client(_CALL.format(port=port))
            recording.wait_for(
                "the sockets were gone",
                lambda rows, count=count: gone(count)(  # type: ignore[misc] # bound now
                    row for row in rows if port in ends(row)
                ),
            )
        recording.stop()
        data = recording.path.read_bytes()
        if run is None:
            data = replayed(recording.path, *arguments, "--sink", "jsonl", "-q")
        packets.append(at(parse(data)[0], "nic_rx"))
    live, again = packets
    # The number of empty ACKs varies.
    for flag in ("SYN", "FIN"):
        assert flagged(live, flag) == flagged(again, flag) == 2 * 2 * 2
    assert carried(live, port) == carried(again, port)
    assert sum(carried(live, port).values()) == 2 * 2 * 2 * 500


def flagged(packets: Iterable[Row], flag: str) -> int:
    return sum(flag in row["flags"] for row in packets)


def carried(packets: Iterable[Row], port: int) -> Counter[tuple[int, bool]]:
    """Bytes by version of IP and direction."""
    found: Counter[tuple[int, bool]] = Counter()
    for row in packets:
        found[row["ip"], row["dport"] == port] += row["bytes"]
    return found


def test_every_sink_writes_the_same_live_and_replayed(
    tmp_path: Path,
    stack: ExitStack,
    port: int,
    server: Puppet,
    client: Puppet,
    start_tcplat: Callable[..., Tcplat],
) -> None:
    table, lines, received = tmp_path / "table", tmp_path / "lines", tmp_path / "received"
    sockets = f"msgpack:unix={tmp_path / 's'},wait=1"
    run = start_tcplat(
        *("-p", f"{client.pid},{server.pid}"),
        probes=[*BOTH, f"xdp_port:iface=lo,port={port}"],
        sinks=[f"table:path={table}", f"jsonl:path={lines}", sockets],
    )
    eventually((tmp_path / "s").exists, "the socket was there")
    reader = stack.enter_context(
        subprocess.Popen(
            [*TCPLAT, "replay", f"unix:{tmp_path / 's'}", "--sink", f"jsonl:path={received}"]
        )
    )
    run.wait_ready()
    for _ in range(20):
        client(_CALL.format(port=port))
    eventually(lambda: lines.read_bytes().count(b'"close"') >= 80, "all sockets were gone")
    assert run.stop().returncode == 0
    assert reader.wait(20) == 0
    assert replayed(lines, "--sink", "table") == table.read_bytes()
    assert replayed(lines, "--sink", "jsonl") == lines.read_bytes() == received.read_bytes()
