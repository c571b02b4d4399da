"""Where exchanges begin and end: a reply answers all that its service had read (D33)."""

from __future__ import annotations

from collections import deque

from .chain import (
    CLIENT_SENT,
    REPLY_IP,
    REPLY_READ,
    REPLY_READY,
    REPLY_RX,
    REPLY_SENT,
    REPLY_TX,
    REQUEST_IP,
    REQUEST_READ,
    REQUEST_READY,
    REQUEST_RX,
    REQUEST_TX,
)
from .closing import settle_rst
from .connection import NO_EXCHANGES, Connection, Finished
from .exchange import ANSWERED, ONE_WAY, OPEN, UNANSWERED, Exchange
from .losses import ASKING_ROWS, READS, Losses, tear
from .outcomes import judge_cut_short, judge_unanswered, pause_in
from .row_fields import NO_PROCESS
from .samples import Tally
from .stream import CLIENT, SERVICE, caller, reached

END_OF_RUN = "end of run"
UNSAMPLED = "not sampled any more"
"""The share of the connections became smaller: what is under way is not followed to its end."""
LONG = 256
"""Entries of a log that are kept without looking whether they are needed."""
_LONGEST = 16_384
"""Entries that are kept at all: 16,384 packets that are not read yet."""
_PATIENT_NS = 1_000_000_000
"""A request that has waited for less when the run ends may yet be answered."""
_MOST_SERVICES = 4_096
"""Of which it is known how long they take for an answer."""


class Turns:
    """Divides the streams of connections into exchanges.

    Args:
        losses: When rows were lost.

    Attributes:
        finished: What became complete.
        last_ns: The latest instant of connections that are over; when all are, of all rows.
        cut: Exchanges that were under way when the capture began: they are not reported.
        unsampled: Messages that were under way when their connection left the sample: as well.
        resampled: The sample has changed: what is in its middle may have come back, and its first
            exchange may have begun before.
        untimed: Messages of which only one instant is known.
        longest: Address and port of a service -> its longest total, ns, of what was answered.
        tally: Counts plain exchanges, where none of them is needed itself.
        missed: Messages that were under way where rows were lost: they are not reported.
    """

    def __init__(self, losses: Losses) -> None:
        self.finished: list[Finished] = []
        self.last_ns = 0
        self.cut = self.unsampled = self.untimed = self.missed = 0
        self.resampled = False
        self._leaving = False
        self._losses = losses
        self.longest: dict[tuple[str, int | None], int] = {}
        self.tally: Tally | None = None
        self._undecided: list[Exchange] = []
        """Requests that the end of the run cuts short."""

    def replied(self, conn: Connection, at: int, finish: int) -> None:
        """Take bytes of the service's stream that are seen behind the service."""
        flow = conn.flows[SERVICE]
        # Where its socket is not watched, packets alone show that it replies.
        if finish > flow.sent and not conn.ends[SERVICE].sock:
            # A packet may carry what was sent before along with what was not.
            at = max(at, flow.sent)
            flow.sent = finish
            self.reply(conn, at, None)
        if conn.waiting:
            self.come(conn)

    def reply(self, conn: Connection, at: int, ts_ns: int | None) -> None:
        """Take a send of the service from `at` on: it answers what was read and not answered."""
        watched = conn.ends[SERVICE].sock
        if watched and conn.flows[CLIENT].copied > conn.answered:
            self.settle(conn)
        asked = read_up_to(conn)
        if asked > conn.answered >= 0:
            conn.doubt = None
            self._answer(conn, at, ts_ns, asked)
            conn.came = queued_up_to(conn) if watched else asked
            return
        if conn.replying is None:
            conn.replying = exchange = Exchange(conn, "push")
            exchange.reply_begin = at
            exchange.stamps[REPLY_SENT] = ts_ns
            exchange.by[SERVICE] = caller(conn.flows[SERVICE].senders, at)
        if conn.missed:
            # It may answer what it read, or what was asked, where rows were lost.
            asking = 1 << READS + SERVICE if watched else ASKING_ROWS
            if conn.missed & asking == asking:
                tear(conn)
        if watched and conn.doubt is None:
            came = queued_up_to(conn)
            if came > max(conn.answered, conn.came) and conn.answered >= 0:
                conn.doubt = (at, ts_ns, came)

    def _answer(self, conn: Connection, at: int, ts_ns: int | None, asked: int) -> None:
        """Begin a reply to all up to `asked`, at `at`."""
        request, old = conn.flows[CLIENT], conn.replying
        if old is not None and old.reply_begin < at:
            self.end_reply(old, at, "turn")
        exchange = self._begin(conn, "exchange", asked)
        exchange.reply_begin = at
        exchange.stamps[REPLY_SENT] = ts_ns
        exchange.replied_ns = conn.last_ns if ts_ns is None else ts_ns
        exchange.by[SERVICE] = caller(conn.flows[SERVICE].senders, at)
        pause = pause_in(conn, asked) if conn.fin_ns[CLIENT] else None
        if pause is not None and pause.farewell:
            whole = exchange.stamps.copy()
            _arrived(exchange, pause.at)
            exchange.parted = exchange.stamps, self._farewell(conn, pause.at, asked)
            exchange.stamps = whole
        _ask_from(conn, asked)
        request.trim(asked + 1)
        conn.replying = exchange

    def settle(self, conn: Connection, why: str = "") -> None:
        """Decide what the service had read, where calls that have no rows may have read it.

        A wake-up shows how far it had come by then; the next wake-up comes with the next request.

        Args:
            conn: Whose service is watched.
            why: What ended it; empty while it goes on.
        """
        flow, doubt = conn.flows[CLIENT], conn.doubt
        copied = flow.copied if flow.fin < 0 else min(flow.copied, flow.fin)
        if why == "closed" and conn.reset_by is None:
            copied = max(copied, conn.came, doubt[2] if doubt else -1)  # else it were reset
        elif why and doubt and (flow.read < 0 or flow.unseen):
            copied = doubt[2]
        if copied <= max(flow.read, conn.answered):
            return
        replying = conn.replying
        if doubt is not None:
            conn.doubt = None
            flow.unseen = True
            self._answer(conn, doubt[0], doubt[1], min(doubt[2], copied))
            conn.came = doubt[2]
        elif replying is not None and replying.kind == "exchange" and copied <= conn.came:
            # Of its request, the first part was read by other calls than the rest.
            flow.unseen = True
            replying.request_end = copied
            _arrived(replying, copied)
            _ask_from(conn, copied)
            flow.trim(copied + 1)

    def _begin(self, conn: Connection, kind: str, end: int) -> Exchange:
        """Return a new exchange, with what is known of its request."""
        exchange = Exchange(conn, kind)
        if conn.breaks != self._losses.count:
            self._losses.mark(conn)
        exchange.request_begin, exchange.request_end = conn.answered, end
        exchange.stamps[CLIENT_SENT] = conn.ask_ns
        exchange.by[CLIENT] = conn.ask_by
        unsent = conn.ask_ns is None and conn.missed & 1 << CLIENT and conn.ends[CLIENT].streams
        exchange.missed = conn.torn or bool(unsent)
        conn.torn = False
        _arrived(exchange, end)
        exchange.retransmits, conn.ask_retransmits = conn.ask_retransmits, 0
        exchange.zero_windows, conn.ask_zeros = conn.ask_zeros, 0
        return exchange

    def _farewell(self, conn: Connection, at: int, end: int) -> Exchange:
        """Begin the message of a client that awaits no reply to it, and leaves."""
        _ask_from(conn, at)
        exchange = self._begin(conn, "request", end)
        exchange.outcome = ONE_WAY
        return exchange

    def end_reply(self, exchange: Exchange, end: int, why: str) -> None:
        """End the reply that is being sent, at `end`."""
        conn = exchange.conn
        conn.replying = None
        exchange.reply_end = max(end, exchange.reply_begin)
        exchange.ended = why
        if conn.waiting or not has_come(conn, end):
            if conn.waiting is NO_EXCHANGES:
                conn.waiting = deque()
            conn.waiting.append(exchange)
            self.come(conn)
        else:
            self._complete(exchange)

    def come(self, conn: Connection) -> None:
        """Complete the exchanges whose replies are there."""
        while conn.waiting and has_come(conn, conn.waiting[0].reply_end):
            self._complete(conn.waiting.popleft())

    def _complete(self, exchange: Exchange, why: str = "") -> None:
        """Emit the exchange, as no further instants can arrive; `why` the connection ends."""
        conn = exchange.conn
        flow = conn.flows[SERVICE]
        end = exchange.reply_end
        stamps = exchange.stamps
        stamps[REPLY_TX] = reached(flow.tx.log, end)
        stamps[REPLY_RX] = reached(flow.nic.log, end)
        stamps[REPLY_IP] = reached(flow.ip.log, end)
        stamps[REPLY_READY] = reached(flow.ready.log, end)
        stamps[REPLY_READ] = reached(flow.reads, end)
        flow.trim(end + 1)
        if why:
            judge_cut_short(exchange, self._stopped(conn, why))
        farewell = None
        if exchange.parted is not None and exchange.outcome == UNANSWERED:
            instants, farewell = exchange.parted
            exchange.stamps[: REQUEST_READ + 1] = instants[: REQUEST_READ + 1]
            exchange.request_end = farewell.request_begin
            farewell.ended = why
        self.tell(exchange)
        if farewell is not None:
            self.tell(farewell)

    def tell(self, exchange: Exchange) -> None:
        """Report a message that is over, unless it was not seen whole."""
        conn = exchange.conn
        request, reply = conn.flows
        if request.urgent or reply.urgent:
            exchange.urgent = (
                request.take_urgent(exchange.request_begin, exchange.request_end),
                reply.take_urgent(exchange.reply_begin, exchange.reply_end),
            )
        cut, conn.cut = conn.cut, False
        if self._leaving:
            self.unsampled += 1
            conn.left_out += 1
            return
        if cut and (
            self.resampled
            or exchange.kind == "push"
            or (conn.ends[CLIENT].sock and exchange.stamps[CLIENT_SENT] is None)
        ):
            self.cut += 1
            conn.left_out += 1
            return
        known = len(exchange.stamps) - exchange.stamps.count(None)
        # What was not answered has waited until something ended it: one instant will do.
        if known < (1 if exchange.kind == "request" or exchange.over_ns is not None else 2):
            self.untimed += 1
            conn.left_out += 1
            return
        if self._losses.count and self._losses.spans(exchange):
            self.missed += 1
            conn.left_out += 1
            conn.spans_loss += 1
            return
        # The processes of this exchange: others may use the connection later.
        exchange.by = [exchange.process(CLIENT), exchange.process(SERVICE)]
        conn.reported += 1
        exchange.number = conn.reported
        outcome, outcomes = exchange.outcome, conn.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == ANSWERED:
            total_ns = exchange.divide().total_ns
            if total_ns > conn.longest_ns:
                conn.longest_ns = total_ns
                note_longest(self.longest, conn)
        self.finished.append(exchange)

    def end(self, conn: Connection, why: str) -> None:
        """Complete what was under way on a connection that is over, as far as it came."""
        conn.leave_fast_path()
        self._leaving = why == UNSAMPLED
        settle_rst(conn)
        if conn.ends[SERVICE].sock:
            self.settle(conn, why)
        replying, reply = conn.replying, conn.flows[SERVICE]
        under_way = list(conn.waiting)
        conn.waiting.clear()
        if replying is not None:
            conn.replying = None
            replying.reply_end = max(reply.sent, replying.reply_begin)
            replying.ended = why
            under_way.append(replying)
        for exchange in under_way:
            self._complete(exchange, why)
        request = conn.flows[CLIENT]
        end = request.sent
        if end < 0:  # what came counts, whether or not the service has read it
            end = max(request.read, read_up_to(conn), queued_up_to(conn))
        if end > conn.answered >= 0:
            self._end_request(conn, end, why)
        if why == END_OF_RUN and not (conn.closing_ns or conn.error or conn.reset_by is not None):
            conn.last_ns = self.last_ns  # it lasts as long as what waits on it
        self._leaving = False
        conn.ended = why
        conn.over = True
        self.last_ns = max(self.last_ns, conn.last_ns)
        self.finished.append(conn)

    def _end_request(self, conn: Connection, end: int, why: str) -> None:
        """Report what the client sent up to `end`, and what nothing answers any more."""
        stopped = self._stopped(conn, why)
        pause = pause_in(conn, end)
        exchange = self._begin(conn, "request", end)
        exchange.ended = why
        farewell = None
        if pause is not None and pause.farewell:
            exchange.request_end = pause.at
            _arrived(exchange, pause.at)
            judge_unanswered(exchange, stopped, pause.resumed_ns)
            if exchange.outcome == UNANSWERED:
                farewell = self._farewell(conn, pause.at, end)
                farewell.ended = why
            else:
                exchange.request_end = end
                _arrived(exchange, end)
        if farewell is None:
            judge_unanswered(exchange, stopped)
        if pause is not None and exchange.over_ns is not None:
            _arrived(exchange, pause.at)  # it has waited during the pause
        if exchange.outcome == OPEN and why == END_OF_RUN:
            self._undecided.append(exchange)
        self.tell(exchange)
        if farewell is not None:
            self.tell(farewell)

    def _stopped(self, conn: Connection, why: str) -> tuple[int, str]:
        """Until when a connection was followed, of which no end was seen."""
        return (self.last_ns if why == END_OF_RUN else conn.last_ns), why

    def decide(self) -> None:
        """At the end of the run, judge what is open by how long the service took before."""
        for exchange in self._undecided:
            _decide(exchange, self.longest.get(exchange.conn.service, 0))
        self._undecided.clear()


def end_idle(turns: Turns, conn: Connection) -> None:
    """Complete the reply of a connection that was silent for long, if it has come."""
    conn.leave_fast_path()
    reply = conn.flows[SERVICE]
    if conn.replying is not None and has_come(conn, reply.sent):
        if conn.ends[SERVICE].sock:
            turns.settle(conn, "idle")
        turns.end_reply(conn.replying, reply.sent, "idle")


def note_longest(longest: dict[tuple[str, int | None], int], conn: Connection) -> None:
    """Note the longest total of a connection for its service."""
    if conn.longest_ns > longest.get(conn.service, 0) and (
        len(longest) < _MOST_SERVICES or conn.service in longest
    ):
        longest[conn.service] = conn.longest_ns


def _decide(exchange: Exchange, longest_ns: int) -> None:
    """At the end of the run: it may yet be answered, or has waited longer than any that was."""
    conn, waited_ns = exchange.conn, exchange.waited_ns or 0
    if not exchange.number:  # it is not reported
        return
    if waited_ns < _PATIENT_NS or waited_ns <= longest_ns:
        return
    exchange.outcome = UNANSWERED
    conn.outcomes[OPEN] -= 1
    conn.outcomes[UNANSWERED] = conn.outcomes.get(UNANSWERED, 0) + 1


def _ask_from(conn: Connection, asked: int) -> None:
    """Begin another request behind `asked`."""
    conn.answered = asked
    request = conn.flows[CLIENT]
    conn.ask_ns = reached(request.sends, asked + 1)
    conn.ask_by = caller(request.senders, asked)


def queued_up_to(conn: Connection) -> int:
    """Return how far the client's stream has come to the service's socket; -1 if unknown."""
    flow = conn.flows[CLIENT]
    arrived = flow.arrived()
    if arrived >= 0:
        return arrived
    ready = flow.ready.position  # a FIN counts there
    for end in (flow.fin, flow.sent):
        if end >= 0:
            ready = min(ready, end)
    return ready


def read_up_to(conn: Connection) -> int:
    """Return how far the service has read; if its socket is not watched, can have read."""
    flow = conn.flows[CLIENT]
    if conn.ends[SERVICE].sock:
        return flow.read
    arrived = flow.arrived()
    if arrived >= 0:
        return arrived
    return flow.tx.position if flow.tx.position >= 0 else flow.sent


def _arrived(exchange: Exchange, end: int) -> None:
    """When the last byte of a request, which ends at `end`, came how far."""
    flow, stamps = exchange.conn.flows[CLIENT], exchange.stamps
    stamps[REQUEST_TX] = reached(flow.tx.log, end)
    stamps[REQUEST_RX] = reached(flow.nic.log, end)
    stamps[REQUEST_IP] = reached(flow.ip.log, end)
    stamps[REQUEST_READY] = reached(flow.ready.log, end)
    stamps[REQUEST_READ] = reached(flow.reads, end)


def has_come(conn: Connection, end: int) -> bool:
    """Return whether the reply is there up to `end`, as far as any point shows."""
    flow = conn.flows[SERVICE]
    if conn.ends[CLIENT].sock:
        # Of splice() there may be no rows: then it is never known when it was read.
        return flow.read >= end or len(conn.waiting) > _LONGEST
    arrived = flow.arrived()
    if arrived >= 0:
        return arrived >= end
    return flow.tx.position < 0 or flow.tx.position >= end


def prune(conn: Connection, index: int) -> None:
    """Drop the instants of a long message that cannot be its last byte's any more."""
    flow = conn.flows[index]
    if index == CLIENT:
        needed = max(read_up_to(conn), conn.answered)
    elif conn.ends[CLIENT].sock:
        needed = flow.read
    else:
        needed = conn.waiting[0].reply_end if conn.waiting else flow.sent
    if index == SERVICE and conn.doubt is not None:
        needed = min(needed, conn.doubt[0])
    flow.trim(needed)
    if len(flow.senders) > LONG:
        flow.senders[: LONG // 2] = [(flow.senders[0][0], NO_PROCESS)]
    for log in flow.logs():
        if len(log) > _LONGEST:
            # Every other one stays: an instant is then off by one of them, not by all.
            del log[:-1:2]
