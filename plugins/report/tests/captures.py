"""Synthetic captures of two hosts, with the true times of every exchange."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import attrs
import msgspec

from tcplat_core import SCHEMA_VERSION, Event, Sampled
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport
from tcplat_core.registry.find import Plugins

EPOCH_NS = 1_700_000_000_000_000_000
NETNS = (4_026_531_840, 4_026_531_840)
"""Equal on both hosts, as the number of a first namespace often is."""
STAGES_US = {
    "client_send": 15,
    "wire": 40,
    "softirq": 8,
    "tcp": 5,
    "queue": 30,
    "server": 400,
    "server_send": 15,
    "wire_back": 40,
    "softirq_back": 8,
    "tcp_back": 5,
    "queue_back": 30,
}
"""How long each lasts, about."""
_POINTS = (
    ("tcp_client", "send", 0),
    ("dev_xmit", "nic_tx", 0),
    ("xdp_port", "nic_rx", 1),
    ("tcp_service", "rx_ip", 1),
    ("tcp_service", "ready", 1),
    ("tcp_service", "recv", 1),
    ("tcp_service", "send", 1),
    ("dev_xmit", "nic_tx", 1),
    ("xdp_port", "nic_rx", 0),
    ("tcp_service", "rx_ip", 0),
    ("tcp_client", "ready", 0),
    ("tcp_client", "recv", 0),
)
"""Probe, point and host of each of an exchange's twelve instants."""


@functools.cache
def row_class(probe: str) -> type[Event]:
    return Plugins.load().probes[probe].event


@functools.cache
def nulls(probe: str) -> dict[str, Any]:
    return dict.fromkeys(row_class(probe).__struct_fields__)


@attrs.define(eq=False)
class Traffic:
    """Connections between two hosts, each of several exchanges one after the other.

    Args:
        connections: So many.
        exchanges: On each.
        seed: Of all chance.
        factors: Stage -> times as long.
        gap_us: Between two connections' beginnings.
        comm: The client's name.
        without: Points without a probe: ``0/nic_tx`` on host 0.
        slow: (connection, exchange) -> µs more in `server`.
    """

    connections: int = 20
    exchanges: int = 10
    seed: int = 1
    factors: dict[str, float] = attrs.field(factory=dict)
    gap_us: int = 500
    comm: str = "curl"
    without: frozenset[str] = frozenset()
    slow: dict[tuple[int, int], int] = attrs.field(factory=dict)
    began_ns: int = 1_000_000_000_000
    hung: dict[int, int] = attrs.field(factory=dict)
    """Connection -> how long (µs) its client waits for the missing reply to a last request."""
    closes: bool = True

    def rows(self) -> Iterator[tuple[int, Event]]:
        """Host and row, by the true clock, in order."""
        chance = Random(self.seed)  # noqa: S311 - made-up traffic
        waiting: list[tuple[int, int, int, Event]] = []
        order = 0
        for number in range(self.connections):
            start = self.began_ns + number * self.gap_us * 1000
            while waiting and waiting[0][0] < start:
                _, _, host, row = heapq.heappop(waiting)
                yield host, row
            for host, row in self._connection(number, start, chance):
                order += 1
                if f"{host}/{row.point}" not in self.without:
                    heapq.heappush(waiting, (row.ts_ns, order, host, row))
        while waiting:
            _, _, host, row = heapq.heappop(waiting)
            yield host, row

    def _connection(  # noqa: C901, PLR0915 - one story, from its beginning to its end
        self, number: int, ts_ns: int, chance: Random
    ) -> Iterator[tuple[int, Event]]:
        near, far = ("10.0.0.1", 10_000 + number % 50_000), ("10.0.0.2", 80)
        first = (chance.randrange(2**32), chance.randrange(2**32))
        sent = [0, 0]
        socks = (ts_ns, ts_ns)  # both hosts count their sockets from the same number

        def row(at: int, probe: str, point: str, host: int, sender: int, **more: Any) -> Event:
            packet = point in ("nic_tx", "nic_rx", "rx_ip")
            here, there = (near, far) if (sender if packet else host) == 0 else (far, near)
            values = {
                **nulls(probe),
                "v": SCHEMA_VERSION,
                "ts_ns": at,
                "time_ns": at + EPOCH_NS,
                "probe": probe,
                "point": point,
                "func": {"nic_rx": "xdp", "nic_tx": "net:net_dev_start_xmit"}.get(point, point),
                "attach": "xdp" if point == "nic_rx" else "tracepoint",
                "cpu": 0,
                "netns": NETNS[host],
                "ip": 4,
                "saddr": here[0],
                "sport": here[1],
                "daddr": there[0],
                "dport": there[1],
                "desc": point,
                "sock": 0 if packet else socks[host],
            }
            if not packet:
                values |= {
                    "pid": 100,
                    "tid": 100,
                    "comm": (self.comm, "nginx")[host],
                    "state": "TCP_ESTABLISHED",
                }
            if probe in ("dev_xmit", "xdp_port"):
                values |= {"window": 500, "ack": (first[1 - sender] + 1 + sent[1 - sender]) % 2**32}
            if probe == "dev_xmit":
                values["dev"] = "eth0"
            if probe == "xdp_port":
                values["ifname"] = "eth0"
            values |= more
            return row_class(probe)(**values)

        yield (
            0,
            row(
                ts_ns,
                "tcp_client",
                "state",
                0,
                0,
                sport=None,
                old_state="TCP_CLOSE",
                state="TCP_SYN_SENT",
            ),
        )
        for step, (host, probe, point, sender, flags) in enumerate(
            (
                (0, "dev_xmit", "nic_tx", 0, "SYN"),
                (1, "xdp_port", "nic_rx", 0, "SYN"),
                (1, "dev_xmit", "nic_tx", 1, "SYN|ACK"),
                (0, "xdp_port", "nic_rx", 1, "SYN|ACK"),
            ),
            1,
        ):
            at = ts_ns + 20_000 * step
            more = {"seq": first[sender], "bytes": 0, "flags": flags}
            yield host, row(at, probe, point, host, sender, **more)
        ts_ns += 110_000
        states = {"old_state": "TCP_SYN_SENT", "state": "TCP_ESTABLISHED"}
        yield 0, row(ts_ns, "tcp_client", "state", 0, 0, **states)
        states = {"old_state": "TCP_SYN_RECV", "state": "TCP_ESTABLISHED"}
        yield 1, row(ts_ns + 30_000, "tcp_service", "state", 1, 1, **states)
        ts_ns += 50_000
        for exchange in range(self.exchanges):
            sizes = (chance.randrange(50, 500), chance.randrange(100, 1400))
            at = ts_ns
            for step, (probe, point, host) in enumerate(_POINTS):
                sender = int(step >= 6)
                fields = {
                    "seq": (first[sender] + 1 + sent[sender]) % 2**32,
                    "bytes": sizes[sender],
                    "flags": "PSH|ACK" if probe in ("dev_xmit", "xdp_port") else None,
                }
                if point == "rx_ip":
                    fields["flags"] = "PSH|ACK"
                yield host, row(at, probe, point, host, sender, **fields)
                if point == "recv":
                    sent[sender] += sizes[sender]
                if step < len(STAGES_US):
                    stage = list(STAGES_US)[step]
                    mean = STAGES_US[stage] * self.factors.get(stage, 1)
                    at += round(mean * 1000 * chance.lognormvariate(0, 0.4))
                    if stage == "server":
                        at += self.slow.get((number, exchange), 0) * 1000
            ts_ns = at + chance.randrange(20_000, 200_000)
        if number in self.hung:
            for probe, point, host in _POINTS[:6]:
                packet = point in ("nic_tx", "nic_rx", "rx_ip")
                fields = {
                    "seq": (first[0] + 1 + sent[0]) % 2**32,
                    "bytes": 50,
                    "flags": "PSH|ACK" if packet else None,
                }
                yield host, row(ts_ns, probe, point, host, 0, **fields)
                ts_ns += 10_000
            ts_ns += self.hung[number] * 1_000
        if not self.closes:
            fields = {"old_state": "TCP_CLOSE", "state": "TCP_SYN_SENT", "sport": None}
            yield 0, row(ts_ns, "tcp_client", "state", 0, 0, **fields, sock=ts_ns)
            return
        for host, probe in ((0, "tcp_client"), (1, "tcp_service")):
            yield host, row(ts_ns + host * 50_000, probe, "close", host, host, state="TCP_CLOSE")


def write(
    path: Path,
    rows: Iterable[Event],
    *,
    end: bool = True,
    until_ns: int = 0,
    head: Iterable[dict[str, Any]] = (),
    one_in: int = 1,
) -> Path:
    """Return a capture of JSON lines, with the books of its rows; they are said to be sampled."""
    shares = [{"sampled": attrs.asdict(Sampled(one_in))}] if one_in > 1 else []
    books: dict[str, Counter[tuple[str, str, str]]] = {}
    encoder = msgspec.json.Encoder()
    batch: list[Event] = []
    with path.open("wb") as file:
        for item in (*shares, *head):
            file.write(encoder.encode({"v": SCHEMA_VERSION, **item}) + b"\n")
        for row in rows:
            hook = (row.point, row.func, row.attach)
            books.setdefault(row.probe, Counter())[hook] += 1
            batch.append(row)
            if len(batch) == 10_000:
                file.write(encoder.encode_lines(batch))
                batch.clear()
        file.write(encoder.encode_lines(batch))
        if end:
            probes = {
                name: ProbeReport(hooks=tuple(HookReport(*key, n, 0, n) for key, n in each.items()))
                for name, each in books.items()
            }
            report = RunReport(
                probes=probes, duration_s=1.0, until_ns=until_ns, one_in=(one_in, one_in)
            )
            line = {"v": SCHEMA_VERSION, "report": report.as_json()}
            file.write(encoder.encode(line) + b"\n")
    return path


def joint(traffic: Traffic) -> Iterator[Event]:
    """Return one capture of both hosts; namespaces and sockets are distinct, as after merge."""
    for host, row in traffic.rows():
        row.netns = (row.netns or 0) + (host << 32)
        if row.sock:
            row.sock += host << 59
        yield row


def of_host(
    traffic: Traffic, host: int, clock: Callable[[int], int] = lambda ts_ns: ts_ns
) -> Iterator[Event]:
    """Return what one host captured, by its own clock."""
    for where, row in traffic.rows():
        if where == host:
            row.ts_ns = clock(row.ts_ns)
            row.time_ns = row.ts_ns + EPOCH_NS
            yield row
