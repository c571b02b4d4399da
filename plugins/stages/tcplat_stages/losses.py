"""Lost rows: when they were, and what of a connection was not seen whole because of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from operator import itemgetter

from tcplat_core import Loss

from .chain import REPLY_READ, REQUEST_READ
from .connection import Connection
from .exchange import OPEN, Exchange
from .stream import CLIENT, SERVICE

STREAM = frozenset({"send", "send_short", "recv", "ready"})
"""Rows of a socket that have bytes of its streams."""
PACKETS = frozenset({"nic_tx", "nic_rx", "rx_ip"})
MOVES = frozenset({"connect", "state"})
"""Rows by which a socket may begin another connection."""
_READER = "reader"
"""Point of the loss that stands for rows of any kind, which a sink kept from a slow reader."""
_TELLING = frozenset({*STREAM, *MOVES, *PACKETS, "close", _READER})
"""Points whose loss may hide a turn, or the end of a connection."""
READS, PACKET_ROWS, KINDS = 2, 4, ("nic_tx", "nic_rx", "rx_ip")
"""Bits of Connection.missed: two for each end's sends, two for its reads, three for the packets."""
_ALL_ROWS = (1 << PACKET_ROWS + 2 * len(KINDS)) - 1
ASKING_ROWS = 1 << CLIENT | ((1 << len(KINDS)) - 1) << PACKET_ROWS
"""Rows by which it is known that the client asks, where no probe watches the service."""
_MOST_LOSSES = 4_096
"""Stretches of time in which rows were lost, to the instant."""
_UNTIL_NS = itemgetter(1)


class Losses:
    """When rows were lost, and which connections have had a row since.

    Attributes:
        row_ns: When the last row was of which something follows.
        count: How often a gap began or ended; each connection knows how often by its last row.
        ends: The ends of the gaps that may not be over yet, in order.
        until_ns: The end of the last gap; -1 without any.
    """

    def __init__(self) -> None:
        self.row_ns = 0
        self.count = 0
        self.ends: list[int] = []
        self._gaps: list[tuple[int, int]] = []
        """Between which instants rows were lost: apart from each other, and in order."""
        self.until_ns = -1
        self._blurred_ns = -1
        """Up to here the gaps are no longer kept: rows may have been lost anywhere."""

    def add(self, loss: Loss) -> None:
        """Take a loss: rows are missing between the last row and the next, if it has no times.

        What is under way meanwhile is not seen whole. What was complete stays so, unless the next
        row of its connection shows that more had passed in between; or rows of the other end
        have shown so before, whose ring had room when this one was full already.
        """
        if loss.point not in _TELLING:
            return
        since_ns = loss.since_ns or self.row_ns
        until_ns = max(since_ns, loss.until_ns)
        gaps, ends = self._gaps, self.ends
        if not until_ns or (gaps and gaps[-1] == (since_ns, until_ns)):
            return  # of another point, at the same time
        if until_ns > self.row_ns and until_ns not in ends:
            insort(ends, until_ns)
            if len(ends) > _MOST_LOSSES:
                ends.pop(0)
        while gaps and gaps[-1][1] >= since_ns:
            before = gaps.pop()
            since_ns, until_ns = min(before[0], since_ns), max(before[1], until_ns)
        gaps.append((since_ns, until_ns))
        self.until_ns = until_ns
        if len(gaps) > _MOST_LOSSES:
            half = len(gaps) // 2
            self._blurred_ns = gaps[half - 1][1]
            del gaps[:half]
        self.count += 1

    def end(self, ts_ns: int) -> None:
        """End the gaps that are over at an instant: later rows are whole."""
        del self.ends[: bisect_right(self.ends, ts_ns)]
        self.count += 1

    def mark(self, conn: Connection) -> None:
        """Note that rows of a connection may be lost between its last one and the next."""
        conn.breaks = self.count
        conn.missed = _ALL_ROWS
        for index, flow in enumerate(conn.flows):
            if flow.unseen:  # by splice(): a gap in its reads means nothing
                conn.missed &= ~(1 << READS + 1 - index)

    def spans(self, exchange: Exchange) -> bool:
        """Return whether rows were lost between its first instant and its last known one."""
        if exchange.missed:
            return True
        known = [at for at in exchange.stamps if at is not None]
        began_ns = min(known)
        if began_ns <= self._blurred_ns:
            return True
        first = bisect_left(self._gaps, began_ns, key=_UNTIL_NS)
        if first == len(self._gaps):
            return False
        conn, stamps = exchange.conn, exchange.stamps
        last, reader = (
            (REQUEST_READ, SERVICE) if exchange.kind == "request" else (REPLY_READ, CLIENT)
        )
        if exchange.outcome == OPEN or (conn.ends[reader].streams and stamps[last] is None):
            return True  # its end is not known: the row that had it may be lost
        return exchange.beyond or self._gaps[first][0] < max(*known, exchange.over_ns or 0)


def resumes(conn: Connection, kind: int, *, gap: bool) -> None:
    """Take the first row of a kind behind a loss; `gap`: bytes have passed in between.

    Then turns may have passed, too: where the reply before ended is not known, nor where
    what is under way began.
    """
    if conn.missed & kind:
        conn.missed &= ~kind
        if gap:
            conn.torn = True
            tear(conn)


def tear(conn: Connection) -> None:
    """Mark what is replied, or on its way to the client, as not seen whole."""
    for exchange in conn.waiting:
        exchange.missed = True
    if conn.replying is not None:
        conn.replying.missed = True
