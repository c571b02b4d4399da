"""Which connection a row belongs to, with real sockets: reconnects, and equal addresses."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .harness import (
    SLOW,
    TCPLAT,
    Listener,
    Puppet,
    Tcplat,
    at,
    eventually,
    free_port,
    needs,
    network,
    only,
    read_exactly,
)

PORT, CLIENT_PORT = 7_000, 40_000
_PAIR = """
link add pa type veth peer name pb netns {pid}
address add 10.82.0.1/24 dev pa
link set pa up
"""
_PEER = """
address add 10.82.0.2/24 dev pb
link set pb up
"""
_SERVE = """
listening = socket.create_server(("10.82.0.2", {port}))
def serve():
    peer, _ = listening.accept()
    for _ in range(10):
        peer.recv({asked}, socket.MSG_WAITALL)
        peer.sendall(bytes({answered}))
    peer.recv(1)
    peer.close()
"""
_ASK = """
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(("10.82.0.1", {near}))
s.connect(("10.82.0.2", {port}))
for _ in range(10):
    s.sendall(bytes({asked}))
    s.recv({answered}, socket.MSG_WAITALL)
s.close()
"""


def replayed(path: Path, sink: str) -> list[dict[str, Any]]:
    """Return what a replay makes of a capture."""
    ended = subprocess.run(
        [*TCPLAT, "replay", str(path), "--sink", f"{sink}:format=json"],
        check=True,
        capture_output=True,
    )
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize(
    "probes",
    [
        ("tcp_client", "tcp_service", "dev_xmit"),
        ("tcp_client", "tcp_service"),
        ("dev_xmit",),
        ("tcp_client",),
        ("tcp_service",),
    ],
    ids="+".join,
)
def test_namespace_pairs_with_equal_addresses_are_not_mixed(
    puppet: Callable[..., Puppet],
    running_tcplat: Callable[..., Tcplat],
    probes: tuple[str, ...],
) -> None:
    pairs = [(puppet(alone=True), puppet(alone=True)) for _ in range(2)]
    where = {"port": PORT, "near": CLIENT_PORT}
    sizes = [{"asked": 100 + number, "answered": 200 + number} for number in range(2)]
    for (client, server), size in zip(pairs, sizes, strict=True):
        network(client, script=_PAIR.format(pid=server.pid))
        network(server, script=_PEER)
        server(_SERVE.format(**where, **size))
    tcplat = running_tcplat(*only(PORT), probes=probes)
    for _, server in pairs:
        server.tell("serve()")
    for (client, _), size in zip(pairs, sizes, strict=True):
        client.tell(_ASK.format(**where, **size))
    for client, server in pairs:
        client.answer()
        server.answer()
    sockets = 2 * len({"tcp_client", "tcp_service"} & set(probes))
    tcplat.wait_for("all closed", lambda rows: len(at(rows, "close")) == sockets)
    assert tcplat.stop().returncode == 0
    watched = ("tcp_client" in probes, "tcp_service" in probes)
    right = {
        (*(one.pid if known else None for one, known in zip(pair, watched, strict=True)), number)
        for number, pair in enumerate(pairs)
    }
    exchanges = [one for one in replayed(tcplat.path, "waterfall") if one["kind"] == "exchange"]
    seen = Counter(
        (
            one["pid"] if watched[0] else None,
            one["service_pid"],
            one["request_bytes"] - 100,
            one["reply_bytes"] - 200,
        )
        for one in exchanges
    )
    assert seen == {(*pids, number, number): 10 for *pids, number in right}
    connections = [one for one in replayed(tcplat.path, "summary") if "conn" in one]
    assert len(connections) == 2
    assert {
        (one["client"]["pid"], one["service"]["pid"], one["bytes_to_service"] // 10 - 100)
        for one in connections
    } == right
    assert not any(one["doubtful"] for one in connections)


def test_each_connect_of_one_socket_is_a_separate_connection(
    puppet: Callable[..., Puppet], running_tcplat: Callable[..., Tcplat]
) -> None:
    port = free_port()
    client = puppet()
    tcplat = running_tcplat(
        *only(port),
        probes=("tcp_client", "tcp_service", "dev_xmit", "tcp_stats"),
    )
    client(f"s = socket.socket(); to = ('127.0.0.1', {port})")
    for _ in range(2):
        assert client("s.connect_ex(to)") == 111
    serving = puppet()
    serving(f"listening = socket.create_server(('127.0.0.1', {port}))")
    client("s.connect(to); s.sendall(bytes(10))")
    # Not close(): once the FIN is acknowledged, tcp_time_wait() would replace the socket by one
    # that has no rows.
    serving("peer, _ = listening.accept(); peer.recv(10); peer.sendall(bytes(20))")
    serving("peer.shutdown(socket.SHUT_WR)")
    client("s.recv(20, socket.MSG_WAITALL); s.recv(1)")
    # Disconnected, and connected once more.
    client(
        "import ctypes; libc = ctypes.CDLL(None); "
        "assert libc.connect(s.fileno(), bytes(16), 16) == 0"
    )
    client("s.connect(to); s.sendall(bytes(30))")
    serving("peer, _ = listening.accept(); peer.recv(30); peer.sendall(bytes(40)); peer.close()")
    client("s.recv(40, socket.MSG_WAITALL); s.close()")
    tcplat.wait_for("all closed", lambda rows: len(at(rows, "close")) == 3)
    assert tcplat.stop().returncode == 0
    connections = [one for one in replayed(tcplat.path, "summary") if "conn" in one]
    connections.sort(key=lambda one: one["ts_ns"])
    assert [one["error"] for one in connections] == ["refused", "refused", "ECONNRESET", None]
    assert [one["reset_by"] for one in connections] == ["service", "service", "client", None]
    assert [one["exchanges"] for one in connections] == [0, 0, 1, 1]
    sent = [(one["bytes_to_service"], one["bytes_to_client"]) for one in connections[2:]]
    assert sent == [(10, 20), (30, 40)]
    # What the kernel counts begins anew with each, too.
    got = [one["client"]["bytes_received"] for one in connections[2:]]
    assert got == [20 + 1, 40 + 1]  # a FIN counts
    for one in connections:
        assert 0 < one["connect_us"] <= one["duration_us"] < 5e6 * SLOW
    assert len({one["sport"] for one in connections}) == 4


def _drop(there: Puppet, port: int) -> None:
    for words in (
        "add table ip quiet",
        "add chain ip quiet in { type filter hook input priority 0; }",
        f"add rule ip quiet in tcp dport {port} drop",
        f"add rule ip quiet in tcp sport {port} drop",
    ):
        enter = ("nsenter", f"--net=/proc/{there.pid}/ns/net")
        subprocess.run([*enter, "nft", words], check=True)


_KEEPALIVE = "(1, 9, 1), (6, 4, 1), (6, 5, 1), (6, 6, 2)"
_USER_TIMEOUT = "(6, 18, 1500),"


@pytest.mark.parametrize("options", [_KEEPALIVE, _USER_TIMEOUT], ids=["keepalive", "user_timeout"])
@pytest.mark.parametrize(
    "probes",
    [("tcp_client", "tcp_stats"), ("tcp_client", "tcp_service", "dev_xmit", "tcp_stats")],
    ids="+".join,
)
def test_timeout_is_not_a_reset(
    puppet: Callable[..., Puppet],
    running_tcplat: Callable[..., Tcplat],
    options: str,
    probes: tuple[str, ...],
) -> None:
    needs("nft")
    there = puppet(alone=True)
    tcplat = running_tcplat(*only(PORT), probes=probes)
    there(f"l = socket.create_server(('127.0.0.1', {PORT}))")
    there(f"c = socket.create_connection(('127.0.0.1', {PORT})); a, _ = l.accept()")
    there("c.sendall(b'hi'); a.recv(2); a.sendall(b'ok'); c.recv(2)")
    there(f"for one in ({options}): c.setsockopt(*one)")
    _drop(there, PORT)
    if options == _USER_TIMEOUT:
        there("c.sendall(b'lost')")
    assert there("try: c.recv(2)\nexcept OSError as error: failed = error.errno\nfailed") == 110
    there("c.close(); a.close()")
    tcplat.wait_for("closed", lambda rows: bool(at(rows, "close")))
    assert tcplat.stop().returncode == 0
    conn = next(
        one for one in replayed(tcplat.path, "summary") if one["client"]["pid"] == there.pid
    )
    assert (conn["error"], conn["reset_by"], conn["reset_why"]) == ("timed out", None, None)


@pytest.mark.alone  # it measures when the silence is noticed
def test_quiet_connection_is_emitted_live_as_in_a_replay(
    server: Listener,
    puppet: Callable[..., Puppet],
    running_tcplat: Callable[..., Tcplat],
    tmp_path: Path,
) -> None:
    live, capture = tmp_path / "live", tmp_path / "rows.jsonl"
    stages = tmp_path / "stages"
    client = puppet()
    with live.open("wb") as stdout:
        tcplat = running_tcplat(
            *only(server.port),
            probes=("tcp_client", "tcp_service", "dev_xmit"),
            sinks=("waterfall", f"stages:every=2s,path={stages}", f"jsonl:path={capture}"),
            stdout=stdout,
        )
    client.connect(server)
    peer = server.accept()
    for _ in range(2):
        client.tell("s.sendall(bytes(10)); s.recv(20, socket.MSG_WAITALL)")
        read_exactly(peer, 10)
        peer.sendall(bytes(20))
        client.answer()
    quiet = time.monotonic()

    def shown() -> int:
        return live.read_text(encoding="utf-8").count("10 B, reply 20 B")

    # The second request ended the first exchange; the second ends by time alone.
    eventually(lambda: shown() == 2, "the last exchange was emitted")
    # Ten seconds of silence, and no more than one; this machine may be busy.
    assert 10 <= time.monotonic() - quiet < 11 * max(1, SLOW / 4)
    eventually(lambda: stages.read_text().count("-- until") == 2, "its interval ended")
    peer.close()
    assert tcplat.stop().returncode == 0
    for name, path in (("waterfall", live), ("stages:every=2s", stages)):
        again = subprocess.run(
            [*TCPLAT, "replay", str(capture), "--sink", name],
            check=True,
            capture_output=True,
            env=dict(os.environ),  # readline puts COLUMNS where os.environ does not see it
        )
        assert again.stdout == path.read_bytes(), name
    assert "(idle)" in live.read_text(encoding="utf-8")
