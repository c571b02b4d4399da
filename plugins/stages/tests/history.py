"""Synthetic connections: the rows that probes would make of them, and the true times."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

import attrs

CLIENT, SERVICE = 0, 1
NETNS = (4_026_531_840, 4_026_532_999)
ADDRESSES = (("10.0.0.1", 40_000), ("10.0.0.2", 80))
DEVICES = ("va", "vb")
SOCKETS = ("tcp_client", "tcp_service")


@attrs.define(eq=False)
class Row:
    """Whatever a row may hold; what a probe does not know is None."""

    ts_ns: int
    point: str
    probe: str = ""
    sock: int = 0
    netns: int | None = None
    saddr: str = ""
    sport: int | None = None
    daddr: str = ""
    dport: int | None = None
    seq: int | None = None
    ack: int | None = None
    bytes: int | None = None
    flags: str | None = None
    state: str | None = "TCP_ESTABLISHED"
    old_state: str | None = None
    desc: str = ""
    pid: int | None = None
    comm: str | None = None
    ip: int = 4
    connect_us: float | None = None
    accept_us: float | None = None
    ifname: str | None = None
    dev: str | None = None
    window: int | None = 500
    role: str | None = None
    srtt_us: int | None = None
    min_rtt_us: int | None = None
    rto_us: int | None = None
    retransmits: int | None = None
    bytes_acked: int | None = None
    bytes_received: int | None = None

    @property
    def time_ns(self) -> int:
        return self.ts_ns + 1_700_000_000_000_000_000


@attrs.define(eq=False)
class History:
    """One connection. Times are given, rows come out sorted by them.

    Args:
        first: Initial sequence numbers, of the client and of the service.
        netns: Namespaces of the two ends.
        ends: Addresses and ports of the two ends.
        socks: Numbers of the two sockets.
        numbered: Changes of state have the number of the client's first byte.
    """

    first: tuple[int, int] = (1_000, 5_000)
    netns: tuple[int, int] = NETNS
    ends: Sequence[tuple[str, int]] = ADDRESSES
    by_sock: tuple[int, int] = (11, 22)
    numbered: bool = False
    made: list[Row] = attrs.field(factory=list)
    sent: list[int] = attrs.field(factory=lambda: [0, 0])
    """Bytes that each end has sent."""

    def rows(self, without: Iterable[str] = ()) -> list[Row]:
        """In order of time, without these points, or probes' points: ``tcp_client/send``."""
        out = set(without)
        return sorted(
            (
                row
                for row in self.made
                if not {row.point, row.probe, f"{row.probe}/{row.point}"} & out
            ),
            key=lambda row: row.ts_ns,
        )

    def seq(self, end: int, byte: int) -> int:
        """Return number of a byte of an end's stream; -1 is its SYN."""
        return (self.first[end] + 1 + byte) % 2**32

    def socket(self, ts_ns: int, end: int, point: str, **more: Any) -> Row:
        """Add a row of an end's socket."""
        near, far = self.ends[end], self.ends[1 - end]
        row = Row(
            ts_ns,
            point,
            probe=SOCKETS[end],
            sock=self.by_sock[end],
            netns=self.netns[end],
            saddr=near[0],
            sport=near[1],
            daddr=far[0],
            dport=far[1],
            pid=100 + end,
            comm=("curl", "nginx")[end],
        )
        self.made.append(attrs.evolve(row, **more))
        return self.made[-1]

    def packet(
        self, ts_ns: int, point: str, end: int, byte: int, count: int = 0, **more: Any
    ) -> Row:
        """Add a packet that an end sends, at a hook point."""
        near, far = self.ends[end], self.ends[1 - end]
        there = end if point == "nic_tx" else 1 - end
        row = Row(
            ts_ns,
            point,
            probe={"nic_tx": "dev_xmit", "nic_rx": "xdp_port", "rx_ip": "tcp_service"}[point],
            netns=self.netns[there],
            saddr=near[0],
            sport=near[1],
            daddr=far[0],
            dport=far[1],
            seq=self.seq(end, byte),
            ack=self.seq(1 - end, self.sent[1 - end]),
            bytes=count,
            flags="PSH|ACK" if count else "ACK",
            state=None,
            dev=DEVICES[there] if point == "nic_tx" else None,
            ifname=DEVICES[there] if point == "nic_rx" else None,
        )
        self.made.append(attrs.evolve(row, **more))
        return self.made[-1]

    def shake_hands(self, ts_ns: int = 1_000) -> int:
        """Add the handshake, one step per microsecond; return when it is over."""
        t = ts_ns
        unnamed = {"sport": None, "state": "TCP_SYN_SENT"}
        self.socket(t, CLIENT, "connect", **unnamed)
        self.socket(t + 1, CLIENT, "state", old_state="TCP_CLOSE", **unnamed)
        self.packet(t + 1_000, "nic_tx", CLIENT, -1, flags="SYN")
        self.packet(t + 2_000, "nic_rx", CLIENT, -1, flags="SYN")
        self.packet(t + 2_100, "rx_ip", CLIENT, -1, flags="SYN")
        self.packet(t + 3_000, "nic_tx", SERVICE, -1, flags="SYN|ACK")
        self.packet(t + 4_000, "nic_rx", SERVICE, -1, flags="SYN|ACK")
        number = self.seq(CLIENT, 0) if self.numbered else None
        self.socket(
            t + 5_000, CLIENT, "state", old_state="TCP_SYN_SENT", connect_us=5.0, seq=number
        )
        self.packet(t + 5_100, "nic_tx", CLIENT, 0)
        self.packet(t + 5_200, "nic_rx", CLIENT, 0)
        self.socket(t + 6_000, SERVICE, "state", old_state="TCP_SYN_RECV", seq=number)
        self.socket(t + 7_000, SERVICE, "accept", accept_us=1.0)
        return t + 7_000

    def message(
        self,
        end: int,
        count: int,
        at: Sequence[int],
        *,
        pieces: int = 1,
        random: Random | None = None,
    ) -> None:
        """So many bytes, at these six instants: sent, left, at the interface, at IP, ready, read.

        Pieces are segments that come in any order and may be lost and sent again; the
        instants are those of the last byte that makes the message whole.
        """
        loses = random is not None
        random = random or Random(0)  # noqa: S311 - a history, no secret
        sent, left, nic, ip, ready, read = at
        begin = self.sent[end]
        self.sent[end] += count
        peer = 1 - end
        pieces = min(pieces, count)
        cuts = [0, *sorted(random.sample(range(1, count), pieces - 1)), count]
        segments = list(itertools.pairwise(cuts))
        # Several calls; the first one counts.
        calls = cuts if random.random() < 0.5 else [0, count]
        for number, (first, last) in enumerate(itertools.pairwise(calls)):
            when = sent + number * (left - sent) // (len(calls) - 1)
            self.socket(when, end, "send", seq=self.seq(end, begin + first), bytes=last - first)
        last_one = random.randrange(pieces)
        arrivals = []
        for number, (first, last) in enumerate(segments):
            goes = left - (pieces - 1 - number) * (left - sent) // (2 * pieces)
            self.packet(goes, "nic_tx", end, begin + first, last - first)
            if number == last_one:
                comes = nic
                if loses and random.random() < 0.5:
                    again = random.randint(goes, nic)
                    self.packet(again, "nic_tx", end, begin + first, last - first)
            else:
                comes = random.randint(goes, nic)
            arrivals.append((comes, first, last))
            self.packet(comes, "nic_rx", end, begin + first, last - first)
        for comes, first, last in arrivals:
            # The order of arrival is kept everywhere.
            later = ip if comes == nic else min(comes + (ip - nic), ip)
            self.packet(later, "rx_ip", end, begin + first, last - first)
        # Readers of a part: as far as the stream was whole.
        for comes, whole in _grown(arrivals):
            if whole < count and random.random() < 0.5:
                when = comes + (ready - nic) // 2 if comes < nic else ready
                self.socket(when, peer, "ready", seq=self.seq(end, begin), bytes=whole)
        self.socket(ready, peer, "ready", seq=self.seq(end, begin), bytes=count)
        part = random.randrange(count) if random.random() < 0.5 else 0
        if part:
            self.socket(
                random.randint(ready, read), peer, "recv", seq=self.seq(end, begin), bytes=part
            )
        self.socket(read, peer, "recv", seq=self.seq(end, begin + part), bytes=count - part)

    def close(self, ts_ns: int) -> None:
        """Close the client's end, then the service's."""
        self.socket(ts_ns, CLIENT, "state", old_state="TCP_ESTABLISHED", state="TCP_FIN_WAIT1")
        self.packet(ts_ns + 10, "nic_tx", CLIENT, self.sent[CLIENT], flags="FIN|ACK")
        self.packet(ts_ns + 20, "nic_rx", CLIENT, self.sent[CLIENT], flags="FIN|ACK")
        self.socket(
            ts_ns + 25, SERVICE, "state", old_state="TCP_ESTABLISHED", state="TCP_CLOSE_WAIT"
        )
        self.socket(ts_ns + 30, SERVICE, "recv", seq=self.seq(CLIENT, self.sent[CLIENT]), bytes=0)
        self.socket(ts_ns + 40, SERVICE, "state", old_state="TCP_CLOSE_WAIT", state="TCP_LAST_ACK")
        self.packet(ts_ns + 50, "nic_tx", SERVICE, self.sent[SERVICE], flags="FIN|ACK")
        self.socket(
            ts_ns + 60, CLIENT, "state", old_state="TCP_FIN_WAIT2", state="TCP_CLOSE", desc="closed"
        )
        self.socket(ts_ns + 60, CLIENT, "close", state="TCP_CLOSE")
        self.packet(ts_ns + 70, "nic_tx", CLIENT, self.sent[CLIENT] + 1)
        self.packet(ts_ns + 80, "nic_rx", CLIENT, self.sent[CLIENT] + 1)
        self.socket(
            ts_ns + 90, SERVICE, "state", old_state="TCP_LAST_ACK", state="TCP_CLOSE", desc="closed"
        )
        self.socket(ts_ns + 90, SERVICE, "close", state="TCP_CLOSE")


def _grown(arrivals: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """When more of the stream was whole, and how much, from segments and when they came."""
    whole, had = 0, []
    for comes, first, last in sorted(arrivals):
        had.append((first, last))
        before = whole
        for piece in sorted(had):
            if piece[0] <= whole < piece[1]:
                whole = piece[1]
        if whole > before:
            yield comes, whole
