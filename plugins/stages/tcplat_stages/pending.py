"""The last exchange of a connection on the fast path: it is told when the next reply begins."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from .chain import (
    CLIENT_SENT,
    MILESTONES,
    REPLY_IP,
    REPLY_READ,
    REPLY_RX,
    REPLY_SENT,
    REPLY_TX,
    REQUEST_IP,
    REQUEST_READ,
    REQUEST_READY,
    REQUEST_RX,
    REQUEST_TX,
)
from .connection import Connection
from .exchange import ANSWERED, Exchange
from .losses import Losses
from .plain import NO_INSTANT
from .samples import Tally
from .stream import CLIENT, SERVICE
from .turns import Turns, note_longest

if TYPE_CHECKING:
    from typing import Any

    from .row_fields import Process


class Pending:
    """An exchange as numbers; see Exchange for what they are.

    Args:
        exchange: The first one.
        turns: Gets what is told.
        losses: When rows were lost.

    Attributes:
        stamps: Instants, NO_INSTANT for what is not known.
        by: The processes at both ends, if they are not those that use them now.
    """

    def __init__(self, exchange: Exchange, turns: Turns, losses: Losses) -> None:
        conn: Connection = exchange.conn
        self._conn = conn
        self._turns = turns
        self._losses = losses
        self._by: list[Process | None] = [
            conn.ends[CLIENT].process if conn.ends[CLIENT].sock else None,
            conn.ends[SERVICE].process,
        ]
        self.by: list[Process | None] | None = exchange.by
        self.request_begin, self.request_end = exchange.request_begin, exchange.request_end
        self.reply_begin, self.replied_ns = exchange.reply_begin, exchange.replied_ns
        self.stamps = array("q", [NO_INSTANT] * len(MILESTONES))
        for number in range(REPLY_SENT + 1):
            at = exchange.stamps[number]
            if at is not None:
                self.stamps[number] = at
        # Where its durations are counted, for which instants, as of which version of the tally.
        self._histograms: list[Any] = []
        self._known = 0
        self._version = -1

    def begin_request(self, begin: int, end: int, sent_ns: int, tx_ns: int) -> None:
        """Note the next request, in place of the last exchange: its bytes, and when it was sent."""
        self.request_begin, self.request_end = begin, end
        self.stamps[CLIENT_SENT], self.stamps[REQUEST_TX] = sent_ns, tx_ns

    def come(self, nic_ns: int, ip_ns: int, ready_ns: int, read_ns: int) -> None:
        """Note when it came how far."""
        self.stamps[REQUEST_RX], self.stamps[REQUEST_IP] = nic_ns, ip_ns
        self.stamps[REQUEST_READY], self.stamps[REQUEST_READ] = ready_ns, read_ns

    def begin_reply(self, at: int, ts_ns: int) -> None:
        """Note the first send of its reply."""
        self.reply_begin, self.replied_ns = at, ts_ns
        self.stamps[REPLY_SENT] = ts_ns
        self.by = None

    def forget_reply(self) -> None:
        """Forget when the reply came how far."""
        for number in range(REPLY_SENT + 1, len(MILESTONES)):
            self.stamps[number] = NO_INSTANT

    def tell(self, end: int, tx_ns: int, nic_ns: int, ip_ns: int, read_ns: int) -> None:
        """Tell it: its reply ends at `end`, and came there at these instants."""
        self.stamps[REPLY_TX], self.stamps[REPLY_RX] = tx_ns, nic_ns
        self.stamps[REPLY_IP], self.stamps[REPLY_READ] = ip_ns, read_ns
        tally = self._turns.tally
        if tally is None or self.by is not None or not self._count(tally):
            exchange = self.exchange()
            exchange.reply_end = end
            exchange.ended = "turn"
            self._turns.tell(exchange)

    def _count(self, tally: Tally) -> bool:  # noqa: C901 - two walks through the instants
        """Count its durations; False if the tally needs the exchange."""
        stamps = self.stamps
        known = place = 0
        at_ns = began_ns = NO_INSTANT
        for number in range(len(MILESTONES)):
            next_ns = stamps[number]
            if next_ns < 0:
                continue
            if next_ns < at_ns:
                return False
            if known == 0:
                began_ns = next_ns
            known |= 1 << number
            at_ns = next_ns
        if began_ns <= self._losses.until_ns:
            return False  # it may span a loss
        if known != self._known or self._version != tally.version:
            self._histograms = tally.histograms(self.exchange(), known)
            self._known, self._version = known, tally.version
        histograms = self._histograms
        if not histograms:
            self._version = -1
            return False
        before_ns = began_ns
        for number in range(len(MILESTONES)):
            next_ns = stamps[number]
            if next_ns < 0 or known & ((1 << number) - 1) == 0:
                continue
            tally.add(histograms[place], next_ns - before_ns)
            before_ns = next_ns
            place += 1
        tally.add(histograms[place], at_ns - began_ns)
        conn = self._conn
        conn.reported += 1
        outcomes = conn.outcomes
        outcomes[ANSWERED] = outcomes.get(ANSWERED, 0) + 1
        if at_ns - began_ns > conn.longest_ns:
            conn.longest_ns = at_ns - began_ns
            note_longest(self._turns.longest, conn)
        return True

    def exchange(self) -> Exchange:
        """Return it as an object, as far as it has come."""
        exchange = Exchange(self._conn, "exchange")
        exchange.request_begin, exchange.request_end = self.request_begin, self.request_end
        exchange.reply_begin, exchange.replied_ns = self.reply_begin, self.replied_ns
        exchange.by = self._by.copy() if self.by is None else self.by
        stamps = exchange.stamps
        for number in range(len(MILESTONES)):
            at = self.stamps[number]
            if at >= 0:
                stamps[number] = at
        return exchange
