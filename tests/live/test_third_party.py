"""A probe that is no part of tcplat: installed by pip, and run on segments that get lost.

The sender's packets reach its own interface, where tcpdump sees them, and are dropped
at the other end of the wire.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from .harness import Puppet, Row, Tcplat, at, eventually, needs, network, patience

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "tcplat-retransmit"

WIRE = """
link add wire0 type veth peer name wire1 netns {peer}
link set wire0 gso_max_segs 1
address add 10.78.0.1/24 dev wire0
address add fd78::1/64 dev wire0 nodad
link set wire0 up
"""
FAR_END = """
link set wire1 gso_max_segs 1
address add 10.78.0.2/24 dev wire1
address add fd78::2/64 dev wire1 nodad
link set wire1 up
"""
NEAR = {4: "10.78.0.1", 6: "fd78::1"}
FAR = {4: "10.78.0.2", 6: "fd78::2"}

every_ip = pytest.mark.parametrize("ip", [4, 6])


@pytest.fixture(scope="session")
def venv(_root: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with tcplat and the probe in it, each installed as a stranger would."""
    folder = tmp_path_factory.mktemp("stranger") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = (folder / "bin/pip", "install", "-q", "--disable-pip-version-check")
    subprocess.run([*pip, ROOT, DEMO], check=True, timeout=patience(100))
    return folder


@pytest.fixture
def retransmits(venv: Path, start_tcplat: Callable[..., Tcplat]) -> Callable[..., Tcplat]:
    """Starts the venv's tcplat with the probe alone, and waits until it is attached."""

    def start(*arguments: str, options: str = "") -> Tcplat:
        return start_tcplat(
            *arguments,
            program=(str(venv / "bin/tcplat"),),
            probes=(f"tcp_retransmit{options}",),
            attach="auto",
        ).wait_ready()

    return start


@attrs.define(eq=False)
class Wire:
    """Two processes, a network namespace each, and a wire between them that can be cut."""

    near: Puppet
    far: Puppet

    def listen(self, ip: int = 4) -> int:
        """Have the far end listen; its port."""
        return int(
            self.far(f"""
listening = socket.create_server(({FAR[ip]!r}, 0), family=socket.AF_INET{"6" if ip == 6 else ""})
listening.getsockname()[1]
""")
        )

    def connect(self, ip: int = 4) -> tuple[int, int]:
        """Connect near to far: `s` here, `peer` there; source and destination port."""
        port = self.listen(ip)
        self.near(f"s = socket.create_connection(({FAR[ip]!r}, {port}))")
        self.far("peer = listening.accept()[0]")
        return int(self.near("s.getsockname()[1]")), port

    def cut(self, rule: str = "drop", *, at: Puppet | None = None, hook: str = "input") -> None:
        """Drop what arrives at the far end; TCP there never sees it."""
        self._nft(
            at or self.far,
            f"table inet lossy {{ chain {hook} {{ type filter hook {hook} priority 0; "
            f"meta l4proto tcp {rule}; }}; }}\n",
        )

    def mend(self, *, at: Puppet | None = None) -> None:
        self._nft(at or self.far, "delete table inet lossy")

    def _nft(self, at: Puppet, script: str) -> None:
        within = ("nsenter", f"--net=/proc/{at.pid}/ns/net")
        subprocess.run([*within, "nft", "-f", "-"], input=script.encode(), check=True)

    def nstat(self, name: str) -> int:
        """A counter of the near namespace."""
        told = _within(self.near, "nstat", "-asz", "--json", name)
        return int(json.loads(told)["kernel"][name])

    def ss(self, sport: int) -> str:
        """What `ss -ti` says of the near socket of this port."""
        return _within(self.near, "ss", "-tinH", f"sport = :{sport}")


def _within(puppet: Puppet, *command: str) -> str:
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{puppet.pid}/ns/net", *command],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout


def rto_us(ss: str) -> float:
    """`rto:204`, in ms, as µs."""
    found = re.search(r"\brto:([\d.]+)", ss)
    assert found, ss
    return float(found[1]) * 1000


@pytest.fixture
def wire(puppet: Callable[..., Puppet]) -> Wire:
    needs("nft", "nstat", "ss")
    near, far = puppet(alone=True), puppet(alone=True)
    network(near, script=WIRE.format(peer=far.pid))
    network(far, script=FAR_END)
    return Wire(near, far)


@attrs.frozen
class Segment:
    """What tcpdump saw."""

    sport: int
    dport: int
    seq: int
    bytes: int


@pytest.fixture
def tcpdump(wire: Wire, tmp_path: Path, stack: ExitStack) -> Callable[[], list[Segment]]:
    """Looks at the near interface from now on; ends, and says what went out with data, SYN or FIN."""
    needs("tcpdump", "tshark")
    pcap, log = tmp_path / "near.pcap", tmp_path / "tcpdump.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["nsenter", f"--net=/proc/{wire.near.pid}/ns/net", "tcpdump", "-i", "wire0"]
            + ["-Q", "out", "-U", "--immediate-mode", "-B", "16384", "-w", str(pcap), "tcp"],
            stderr=errors,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    eventually(lambda: b"listening on" in log.read_bytes(), "tcpdump listened")

    def end() -> list[Segment]:
        process.terminate()
        process.wait(patience())
        assert b"0 packets dropped by kernel" in log.read_bytes()
        fields = ("tcp.srcport", "tcp.dstport", "tcp.seq", "tcp.len")
        told = subprocess.run(
            ["tshark", "-r", str(pcap), "-o", "tcp.relative_sequence_numbers:FALSE"]
            + ["-Y", "tcp.analysis.retransmission", "-T", "fields"]
            + [word for field in fields for word in ("-e", field)],
            check=True,
            capture_output=True,
            text=True,
        )
        return [Segment(*map(int, line.split())) for line in told.stdout.splitlines()]

    return end


def segments(rows: Iterable[Row]) -> list[Segment]:
    return [Segment(row["sport"], row["dport"], row["seq"], row["bytes"]) for row in rows]


def again(count: int) -> Callable[[list[Row]], bool]:
    """For wait_for(): so many segments were sent again."""
    return lambda rows: len(at(rows, "retransmit")) >= count


def test_pip_installs_it_and_tcplat_lists_it(venv: Path) -> None:
    told = subprocess.run(
        [venv / "bin/tcplat", "plugins", "list", "--json"], check=True, capture_output=True
    )
    found = {one["name"]: one for one in json.loads(told.stdout)}
    assert found["tcp_retransmit"]["status"] == "ok"
    assert found["tcp_retransmit"]["distribution"] == "tcplat-retransmit"
    assert {one["status"] for one in found.values()} == {"ok"}


def test_it_imports_the_public_names_alone() -> None:
    lines = [
        line
        for path in (DEMO / "tcplat_retransmit").glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "tcplat_core" in line and "import" in line
    ]
    assert lines == ["from tcplat_core import ("]


@every_ip
def test_what_was_lost_is_sent_again_with_the_rto_that_ss_shows(
    wire: Wire, retransmits: Callable[..., Tcplat], tcpdump: Callable[[], list[Segment]], ip: int
) -> None:
    run = retransmits("-p", str(wire.near.pid))
    sport, dport = wire.connect(ip)  # after the start: the core has to see it begin
    wire.near("s.sendall(b'x' * 100)")
    wire.far("peer.recv(100)")
    before = wire.ss(sport)
    wire.cut()
    wire.near("s.sendall(b'y' * 700)")
    run.wait_for("it was sent again four times", again(4))
    wire.mend()
    assert wire.far("len(peer.recv(1000))") == 700
    eventually(lambda: "unacked" not in wire.ss(sport), "all was acknowledged")
    after = wire.ss(sport)
    outcome = run.stop()
    rows = at(outcome.rows, "retransmit")

    seen = tcpdump()
    assert segments(rows) == seen
    assert {(one.sport, one.dport, one.bytes) for one in seen} == {(sport, dport, 700)}
    assert sum(row["segments"] for row in rows) == wire.nstat("TcpRetransSegs")
    assert [row["retransmits"] for row in rows] == list(range(1, len(rows) + 1))
    assert f"retrans:0/{len(rows)}" in after
    assert {row["state"] for row in rows} == {"TCP_ESTABLISHED"}
    assert {(row["pid"], row["comm"], row["ip"]) for row in rows} == {
        (wire.near.pid, Path(f"/proc/{wire.near.pid}/comm").read_text().strip(), ip)
    }
    assert {row["desc"] for row in rows} == {"data again"}
    assert {row["flags"] for row in rows} == {"PSH|ACK"}
    # ss has it in ms: the kernel keeps jiffies, which are longer than that.
    assert rows[0]["rto_us"] == pytest.approx(rto_us(before), abs=1000)
    # Each timeout doubles it; the loss probe, which may come first, does not.
    rtos = [row["rto_us"] for row in rows]
    ratios = [late / early for early, late in zip(rtos, rtos[1:], strict=False)]
    assert ratios[1:] == [2] * len(ratios[1:])
    assert ratios[0] in (1, 2)
    # What was waited for is what the row says: the timer is a jiffy or two late at most.
    for early, late in zip(rows[1:], rows[2:], strict=False):
        waited_us = (late["ts_ns"] - early["ts_ns"]) / 1000
        assert late["rto_us"] - 4_000 <= waited_us <= late["rto_us"] * 1.1 + 20_000
