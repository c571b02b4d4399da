"""A probe that is no part of tcplat: installed by pip, and run on segments that get lost.

The sender's packets reach its own interface, where tcpdump sees them, and are dropped
at the other end of the wire.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from .harness import Puppet, Row, Tcplat, at, eventually, needs, network, patience
from .packages import ROOT, Venv

DEMO = ROOT / "demo" / "tcplat-retransmit"

WIRE = """
link add wire0 address 02:00:00:00:78:01 type veth peer name wire1 netns {peer}
link set wire0 gso_max_segs 1
neigh add 10.78.0.2 lladdr 02:00:00:00:78:02 dev wire0 nud permanent
neigh add fd78::2 lladdr 02:00:00:00:78:02 dev wire0 nud permanent
address add 10.78.0.1/24 dev wire0
address add fd78::1/64 dev wire0 nodad
link set wire0 up
"""
FAR_END = """
link set wire1 address 02:00:00:00:78:02
link set wire1 gso_max_segs 1
neigh add 10.78.0.1 lladdr 02:00:00:00:78:01 dev wire1 nud permanent
neigh add fd78::1 lladdr 02:00:00:00:78:01 dev wire1 nud permanent
address add 10.78.0.2/24 dev wire1
address add fd78::2/64 dev wire1 nodad
link set wire1 up
"""
NEAR = {4: "10.78.0.1", 6: "fd78::1"}
FAR = {4: "10.78.0.2", 6: "fd78::2"}

every_ip = pytest.mark.parametrize("ip", [4, 6])


@pytest.fixture(scope="session")
def venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Venv:
    """Yield a Python with tcplat and the probe, each installed as a user would."""
    venv = Venv.make(tmp_path_factory.mktemp("user"))
    venv.pip(wheel, DEMO)
    return venv


@pytest.fixture
def retransmits(venv: Venv, start_tcplat: Callable[..., Tcplat]) -> Callable[..., Tcplat]:
    """Start the venv's tcplat with the probe alone, and wait until it is attached."""

    def start(*arguments: str, options: str = "") -> Tcplat:
        return start_tcplat(
            *arguments,
            program=(venv.program("tcplat"),),
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
        """Return a counter of the near namespace."""
        shown = _within(self.near, "nstat", "-asz", "--json", name)
        return int(json.loads(shown)["kernel"][name])

    def ss(self, sport: int) -> str:
        """Return what `ss -ti` says of the near socket of this port."""
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


def sent_before(seen: Iterable[list[int]]) -> list[list[int]]:
    """Which segments, in the order in which they left, begin below what had left already.

    (tshark's own analysis takes a fast retransmit for a segment that came out of order.)
    """
    ends: dict[tuple[int, int], int] = {}
    again = []
    for sport, dport, seq, size, syn, fin in seen:
        if not size + syn + fin:
            continue
        end = ends.setdefault((sport, dport), seq)
        if (seq - end) % 2**32 >= 2**31:
            again.append([sport, dport, seq, size])
        else:
            ends[sport, dport] = (seq + size + syn + fin) % 2**32
    return again


@pytest.fixture
def tcpdump(wire: Wire, tmp_path: Path, stack: ExitStack) -> Callable[..., list[Segment]]:
    """Watch the near interface from now on; the end returns what was sent again."""
    needs("tcpdump", "tshark")
    pcap, log = tmp_path / "near.pcap", tmp_path / "tcpdump.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [
                *("nsenter", f"--net=/proc/{wire.near.pid}/ns/net"),
                *(
                    "tcpdump",
                    "-i",
                    "wire0",
                    "-Q",
                    "out",
                    "-U",
                    "--immediate-mode",
                    "-s",
                    "128",
                    "-B",
                    "65536",
                ),
                *("-w", str(pcap), "tcp"),
            ],
            stderr=errors,
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    eventually(lambda: b"listening on" in log.read_bytes(), "tcpdump listened")

    def look(which: str) -> list[Segment]:
        fields = ("srcport", "dstport", "seq", "len", "flags.syn", "flags.fin")
        shown = subprocess.run(
            [
                *("tshark", "-r", str(pcap), "-o", "tcp.relative_sequence_numbers:FALSE"),
                *("-Y", which or "tcp", "-T", "fields"),
                *(word for field in fields for word in ("-e", f"tcp.{field}")),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        seen = [[int(word) for word in line.split()] for line in shown.stdout.splitlines()]
        return [Segment(*one[:4]) for one in (seen if which else sent_before(seen))]

    def end(count: int, *, which: str = "") -> list[Segment]:
        # What it has not read yet when it ends, it never will.
        eventually(lambda: len(look(which)) >= count, f"tcpdump saw {count} segments again")
        process.terminate()
        process.wait(patience())
        assert b"\n0 packets dropped by kernel" in log.read_bytes()
        return look(which)

    return end


def segments(rows: Iterable[Row]) -> list[Segment]:
    return [Segment(row["sport"], row["dport"], row["seq"], row["bytes"]) for row in rows]


def again(count: int) -> Callable[[list[Row]], bool]:
    """For wait_for(): so many segments were sent again."""
    return lambda rows: len(at(rows, "retransmit")) >= count


def test_third_party_probe_is_installed_by_pip_and_listed(venv: Venv) -> None:
    shown = subprocess.run(
        [venv.program("tcplat"), "plugins", "list", "--json"], check=True, capture_output=True
    )
    found = {one["name"]: one for one in json.loads(shown.stdout)}
    assert found["tcp_retransmit"]["status"] == "ok"
    assert found["tcp_retransmit"]["distribution"] == "tcplat-retransmit"
    assert {one["status"] for one in found.values()} == {"ok"}


def test_third_party_probe_imports_public_names_alone() -> None:
    lines = [
        line
        for path in (DEMO / "tcplat_retransmit").glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "tcplat_core" in line and "import" in line
    ]
    assert lines == ["from tcplat_core import ("]


@every_ip
@pytest.mark.alone  # it measures how late timers are
def test_retransmit_row_has_the_rto_that_ss_shows(
    wire: Wire, retransmits: Callable[..., Tcplat], tcpdump: Callable[..., list[Segment]], ip: int
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

    seen = tcpdump(len(rows), which="tcp.analysis.retransmission")
    assert segments(rows) == seen == tcpdump(len(rows))
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
    ratios = [late / early for early, late in itertools.pairwise(rtos)]
    assert ratios[1:] == [2] * len(ratios[1:])
    assert ratios[0] in (1, 2)
    # What was waited for is what the row says: a timer is a jiffy or two late, or, where the
    # machine had other things to do, later; never early.
    late_us = [
        (late["ts_ns"] - early["ts_ns"]) / 1000 - late["rto_us"]
        for early, late in itertools.pairwise(rows[1:])
    ]
    assert -4_000 <= min(late_us) <= 20_000 + 0.1 * rtos[-1]


@every_ip
def test_unanswered_syn_is_retransmitted(
    wire: Wire, retransmits: Callable[..., Tcplat], tcpdump: Callable[..., list[Segment]], ip: int
) -> None:
    run = retransmits("-p", str(wire.near.pid))
    port = wire.listen(ip)
    wire.cut()
    wire.near.tell(f"s = socket.create_connection(({FAR[ip]!r}, {port}))")
    run.wait_for("the SYN was sent again", again(1))
    wire.mend()
    wire.near.answer()
    rows = at(run.stop().rows, "retransmit")
    seen = tcpdump(len(rows))
    assert segments(rows) == seen
    first = rows[0]
    assert (first["state"], first["flags"], first["desc"]) == ("TCP_SYN_SENT", "SYN", "SYN again")
    assert (first["pid"], first["bytes"], first["segments"]) == (wire.near.pid, 0, 1)
    assert first["sport"] == wire.near("s.getsockname()[1]")
    # RFC 6298, 2.1: a second, before there is a sample.
    assert (first["rto_us"], first["srtt_us"]) == (1_000_000, None)


def test_retransmits_of_a_lossy_transfer_are_traced(
    wire: Wire, retransmits: Callable[..., Tcplat], tcpdump: Callable[..., list[Segment]]
) -> None:
    """Fast retransmits, on the side that accepted: its process is known to the core alone."""
    run = retransmits("-p", str(wire.near.pid))
    wire.near(f"""
listening = socket.create_server(({NEAR[4]!r}, 0))
address = listening.getsockname()
""")
    address = tuple(wire.near("address"))
    wire.far(f"s = socket.create_connection({address!r})")
    wire.near("peer = listening.accept()[0]")
    wire.cut("numgen inc mod 20 == 7 drop")
    wire.far.tell("""
count = 0
while chunk := s.recv(1 << 16):
    count += len(chunk)
count
""")
    wire.near("peer.sendall(b'z' * 2_000_000); peer.shutdown(socket.SHUT_WR)")
    assert wire.far.answer() == 2_000_000
    wire.mend()
    sport = address[1]
    eventually(lambda: "unacked" not in wire.ss(sport), "all was acknowledged")
    counted = wire.nstat("TcpRetransSegs")
    outcome = run.stop()
    rows = [row for row in at(outcome.rows, "retransmit") if row["sport"] == sport]
    assert len(rows) >= 50
    assert sum(row["segments"] for row in rows) == counted
    assert rows[-1]["retransmits"] == counted
    assert Counter(segments(rows)) == Counter(tcpdump(len(rows)))
    assert {row["pid"] for row in rows} == {wire.near.pid}
    assert outcome.report["dropped"] == 0


def test_connection_of_another_process_has_no_row(
    wire: Wire, retransmits: Callable[..., Tcplat]
) -> None:
    unfiltered = retransmits()
    sport, _ = wire.connect()  # before the second one starts: it has to be found
    of_another = retransmits("-p", str(os.getpid()))
    of_its_own = retransmits("-p", str(wire.near.pid))
    wire.cut()
    wire.near("s.sendall(b'x')")
    unfiltered.wait_for("it was sent again", again(2))
    of_its_own.wait_for("its process's tcplat saw it", again(2))
    wire.mend()
    rows = [row for row in unfiltered.stop().rows if row["sport"] == sport]
    assert {row["pid"] for row in rows} == {wire.near.pid}
    assert [row for row in of_another.stop().rows if row["sport"] == sport] == []
    assert {row["sport"] for row in of_its_own.stop().rows} == {sport}


def test_rows_below_min_rto_are_omitted(wire: Wire, retransmits: Callable[..., Tcplat]) -> None:
    run = retransmits("-p", str(wire.near.pid), options=":min_rto_us=700000")
    everything = retransmits("-p", str(wire.near.pid))
    wire.connect()
    wire.cut()
    wire.near("s.sendall(b'x')")
    run.wait_for("the RTO was long enough", again(1))
    all_rows = everything.stop().rows
    wire.mend()
    rows = run.stop().rows
    longer = [row["retransmits"] for row in all_rows if row["rto_us"] >= 700_000]
    assert len(all_rows) > len(longer) >= 1
    assert [row["retransmits"] for row in rows][: len(longer)] == longer
    assert all(row["rto_us"] >= 700_000 for row in rows)


def test_local_drops_are_distinguished(wire: Wire, retransmits: Callable[..., Tcplat]) -> None:
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 17):
        pytest.skip("before 6.17 the tracepoint fires for what was sent alone")
    run = retransmits("-p", str(wire.near.pid))
    wire.connect()
    wire.cut()
    wire.near("s.sendall(b'x' * 10)")  # on its way; what follows does not even leave
    wire.cut(at=wire.near, hook="output")
    run.wait_for("it could not be sent", lambda rows: len(at(rows, "not_sent")) >= 2)
    wire.mend(at=wire.near)
    run.wait_for("it was sent", again(1))
    wire.mend()
    rows = run.stop().rows
    assert {row["desc"] for row in at(rows, "not_sent")} == {"EPERM"}
    assert {row["pid"] for row in rows} == {wire.near.pid}
    assert len({(row["seq"], row["bytes"]) for row in rows}) == 1


def test_third_party_probe_conforms(venv: Venv) -> None:
    """With root, by the venv's own tcplat: all but what only XDP programs have to hold to."""
    shown = subprocess.run(
        [venv.program("tcplat"), "plugins", "check", "tcp_retransmit", "--json"],
        capture_output=True,
        check=False,
    )
    (one,) = json.loads(shown.stdout)
    assert shown.returncode == 0, one
    open_ = {check["check"] for check in one["checks"] if check["verdict"] != "passed"}
    assert open_ == {"lets packets pass"}


def test_tests_of_the_third_party_probe_pass(venv: Venv, tmp_path: Path) -> None:
    """As its author runs them: pytest finds the kit by itself."""
    venv.pip("pytest")
    done = subprocess.run(
        [venv.program("python"), "-m", "pytest", "-q", "-p", "no:cacheprovider", DEMO],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
