"""bcc's own tools on the same connections: tcpstates and tcpconnlat.

They compile against the headers of the running kernel, so BCC_KERNEL_SOURCE has to name them;
`make test-vm` does, for the kernels where bcc's tools still compile.
"""

from __future__ import annotations

import csv
import os
import re
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from .harness import Listener, Puppet, Tcplat, at, by_sock, completes, eventually, gone, patience

pytestmark = pytest.mark.alone  # it compares the times of two tools

CONNECTIONS = 30
SENT, ANSWERED = 5 * 1024, 70 * 1024


@pytest.fixture
def tool(tmp_path: Path) -> Iterator[Callable[..., Tool]]:
    """Start one of bcc's tools without waiting: it compiles for half a minute."""
    if "BCC_KERNEL_SOURCE" not in os.environ:
        pytest.skip("BCC_KERNEL_SOURCE names no kernel headers")
    running = []

    def start(name: str, *arguments: str) -> Tool:
        path = tmp_path / name
        with path.open("wb") as out:
            process = subprocess.Popen(
                [f"{name}-bpfcc", *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        running.append(Tool(process, path))
        return running[-1]

    yield start
    for one in running:
        one.process.terminate()
        one.process.wait(patience())


@attrs.frozen
class Tool:
    """One of bcc's tools, and the file with what it prints."""

    process: subprocess.Popen[bytes]
    path: Path

    def listens(self) -> bool:
        """Wait until it is attached: it prints its column names then."""
        text = self.path.read_text()
        assert self.process.poll() is None, text[-2000:]
        return bool(re.search("^(PID|SKADDR)", text, re.MULTILINE))

    def table(self) -> list[dict[str, str]]:
        """Return what it has printed, by column; the compiler's warnings come first."""
        lines = self.path.read_text().splitlines()
        first = next(at for at, line in enumerate(lines) if line.startswith(("PID", "SKADDR")))
        if "," in lines[first]:
            return list(csv.DictReader(lines[first:]))
        names = lines[first].split()
        return [dict(zip(names, line.split(), strict=True)) for line in lines[first + 1 :]]


def test_states_and_times_agree_with_the_bcc_tools(
    tool: Callable[..., Tool],
    running_tcplat: Callable[..., Tcplat],
    client: Puppet,
    server: Listener,
    measured: Callable[[str], None],
) -> None:
    port = str(server.port)
    states = tool("tcpstates", "-s", "-D", port)
    latencies = tool("tcpconnlat", "-L")
    for started in (states, latencies):
        eventually(started.listens, "bcc's tool listened")
    run = running_tcplat("--rport", port)
    for _ in range(CONNECTIONS):
        client.connect(server)
        peer = server.accept()
        client.tell(
            f"s.sendall(bytes({SENT}))\n"
            f"assert len(s.recv({ANSWERED}, socket.MSG_WAITALL)) == {ANSWERED}\ns.close()"
        )
        peer.sendall(bytes(ANSWERED))
        client.answer()
        peer.close()
    rows = run.wait_for("all sockets were gone", gone(CONNECTIONS))

    def complete() -> bool:
        ended = [one for one in states.table() if one["NEWSTATE"] == "CLOSE"]
        connected = [one for one in latencies.table() if one["DPORT"] == port]
        return len(ended) >= CONNECTIONS <= len(connected)

    eventually(complete, "bcc's tools had seen all")
    seen: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for one in states.table():
        if one["RPORT"] == port and one["LPORT"] != "0":
            seen[int(one["LPORT"])].append((f"TCP_{one['OLDSTATE']}", f"TCP_{one['NEWSTATE']}"))
    ours = {
        next(row["sport"] for row in of_one if row["sport"]): [
            (row["old_state"], row["state"])
            for row in of_one
            # The source port is not chosen yet: tcpstates shows 0, and cannot join it.
            if row["point"] == "state" and row["old_state"] != "TCP_CLOSE"
        ]
        for of_one in by_sock(rows).values()
    }
    assert len(ours) == CONNECTIONS
    assert ours == seen

    theirs = {
        int(one["LPORT"]): float(one["LAT(ms)"]) * 1000
        for one in latencies.table()
        if one["DPORT"] == port
    }
    mine = {row["sport"]: row["connect_us"] for row in rows if completes(row)}
    assert mine.keys() == theirs.keys()
    both = [statistics.median(times.values()) for times in (mine, theirs)]
    measured(f"connect: {both[0]:.0f} µs (median), tcpconnlat {both[1]:.0f} µs")
    # Each also times the other's programs, which run at the same functions.
    assert both[0] == pytest.approx(both[1], rel=0.5)

    assert {row["pid"] for row in rows} == {client.pid}
    assert sum(row["bytes"] for row in at(rows, "send")) == CONNECTIONS * SENT
    assert sum(row["bytes"] for row in at(rows, "recv")) == CONNECTIONS * ANSWERED
