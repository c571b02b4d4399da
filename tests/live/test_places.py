"""Sockets with a taken array entry: they are in hash maps instead, without a visible effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .harness import Puppet, Tcplat, at, by_sock, changed_loader, listen, parse
from .histograms import assert_agrees, found, one, waits

pytestmark = pytest.mark.alone  # its histograms count the connections of the whole host

ONE_PLACE = """
defines = Loader._defines
Loader._defines = lambda self, probe: defines(self, probe) | {"TCPLAT_PLACE_BITS": 0}
"""
CONNECTIONS, REQUESTS = 10, 5

CALL = f"""
sockets = [socket.create_connection(("127.0.0.1", {{port}})) for _ in range({CONNECTIONS})]
for s in sockets * {REQUESTS}:
    s.sendall(b"x" * 100)
    s.recv(1000)
for s in sockets:
    s.close()
"""
ANSWER = f"""
peers = [listening.accept()[0] for _ in range({CONNECTIONS})]
for peer in peers * {REQUESTS}:
    peer.sendall(peer.recv(1000))
for peer in peers:
    peer.recv(1)
    peer.close()
"""


def test_sockets_with_colliding_hashes_are_kept_apart(
    tmp_path: Path,
    running_tcplat: Callable[..., Tcplat],
    client: Puppet,
    puppet: Callable[..., Puppet],
) -> None:
    """Twice: the socket in the array closes, and another one takes the entry."""
    service, rows_at = puppet(), tmp_path / "rows.jsonl"
    run = running_tcplat(
        probes=("tcp_client", "tcp_service"),
        sinks=(
            f"histogram:format=json,every=0,by=all,path={tmp_path / 'histograms'}",
            f"jsonl:path={rows_at}",
        ),
        program=changed_loader(tmp_path, ONE_PLACE),
    )
    port = listen(service)
    for _ in range(2):
        service.tell(ANSWER)
        client(CALL.format(port=port))
        service.answer()
    run.stop()
    rows, _, _ = parse(rows_at.read_bytes())
    rows = [row for row in rows if port in (row["sport"], row["dport"]) and row["sport"]]

    for probe in ("tcp_client", "tcp_service"):
        sockets = [
            connection
            for sock, connection in by_sock([row for row in rows if row["probe"] == probe]).items()
            if sock and at(connection, "close") and connection[0]["dport"]
        ]
        assert len(sockets) == 2 * CONNECTIONS
        for connection in sockets:
            assert len({(row["sport"], row["dport"]) for row in connection}) == 1
            assert len(at(connection, "send")) == REQUESTS
            assert [row["bytes"] for row in at(connection, "recv")][:REQUESTS] == [100] * REQUESTS
            assert len(at(connection, "close")) == 1

    receive_path, queue = [], []
    theirs = [row for row in rows if row["probe"] == "tcp_service"]
    for other in {row["dport"] for row in at(theirs, "recv")}:
        path, queued = waits([row for row in theirs if other in (row["sport"], row["dport"])])
        receive_path += path
        queue += queued
    assert len(queue) == 2 * CONNECTIONS * REQUESTS
    histograms = found(tmp_path)
    # Arrivals are kept in steps of 16 ns.
    assert_agrees(one(histograms, "rx_ready"), receive_path, 0.02)
    assert_agrees(one(histograms, "ready_recv"), queue)
    assert {value["not_measured"] for value in histograms} == {0}
