"""What the joiner makes of rows: connections, their two ends, their two byte streams, exchanges.

Plain classes with slots: some of these are touched for each of a million rows.
Sequence numbers are unwrapped: they go on growing where TCP's begin anew at 2^32.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections import deque
from typing import Any, NamedTuple, TypeVar

from .stages import (
    CONNECT_CALLED,
    CONNECT_MILESTONES,
    CONNECT_STAGES,
    CONNECTED,
    HANDSHAKE_DONE,
    MILESTONES,
    REPLY_SENT,
    STAGES,
    SYN_RX,
    SYN_TX,
    SYNACK_RX,
    SYNACK_TX,
    Split,
    split,
)

CLIENT, SERVICE = 0, 1
"""Numbers of the ends. Stream 0 flows from the client, stream 1 from the service."""

ANSWERED, UNANSWERED, CUT, OPEN, ONE_WAY, UNKNOWN, PUSH = (
    "answered",
    "unanswered",
    "cut",
    "open",
    "one_way",
    "unknown",
    "push",
)
OUTCOMES = (ANSWERED, UNANSWERED, CUT, OPEN, ONE_WAY, UNKNOWN, PUSH)
"""What may become of an exchange. The first alone is a sample of the time that a request takes."""
FAILED = frozenset({UNANSWERED, CUT})
"""Outcomes of requests that never were answered, or not to the end."""

STATS = ("srtt_us", "min_rtt_us", "rto_us", "retransmits", "bytes_acked", "bytes_received")
"""What probe tcp_stats tells of a socket that closes."""


def real(row: Any, name: str) -> float | None:
    """A field that not every probe has; None where there is none, or where it is no number.

    What the probe of somebody else calls so may be anything.
    """
    value = getattr(row, name, None)
    return value if type(value) in (int, float) else None


def whole(row: Any, name: str) -> int | None:
    """The same of a field that is a whole number."""
    value = getattr(row, name, None)
    return value if type(value) is int else None


_Text = TypeVar("_Text", str, str | None)


def shared(text: _Text) -> _Text:
    """The same text, once for all who keep it: each row of a capture has one of its own."""
    return sys.intern(text) if type(text) is str else text


class Who(NamedTuple):
    """A process, as a row names it; null where nothing does."""

    pid: int | None
    comm: str | None


NOBODY = Who(None, None)

Callers = list[tuple[int, Who]]
"""From which position on, and by which process: an entry wherever that is another one."""


def caller(callers: Callers, position: int) -> Who | None:
    """Return the process that sent the byte at `position`; None where no row tells."""
    found = None
    for begin, who in reversed(callers):
        if begin <= position:
            found = who
            break
    return found


Log = list[tuple[int, int | None]]
"""Position reached, and when: None where the rows that would tell were missed."""


NO_LOG: Log = []


def added(log: Log, finish: int, ts_ns: int | None) -> Log:
    """Return the log with one thing more; one of its own, where there was nothing.

    Most have one: a list that grows would take room for four.
    """
    if log:
        log.append((finish, ts_ns))
        return log
    return [(finish, ts_ns)]


MOST_URGENT = 8
"""Urgent bytes one after the other."""
MOST_URGENT_KEPT = 256
"""Places of them in one request."""
_MOST_LATE = 4_096
"""Packets behind a hole."""


def reached(log: Log, position: int) -> int | None:
    """When a log has the stream up to `position`; None where nobody can know."""
    index = bisect_left(log, (position,))
    return log[index][1] if index < len(log) else None


class Reach:
    """How far a stream has come at one point where it is seen, and when it had come how far.

    A position is the number of the first byte that has not come so far; -1 for unknown.
    """

    __slots__ = ("late", "log", "position")

    def __init__(self) -> None:
        self.position = -1
        self.log = NO_LOG
        self.late: list[tuple[int, int]] | None = None
        """What came behind a hole: from where to where. Seldom there."""

    def pass_by(self, at: int, finish: int, ts_ns: int) -> bool:
        """Bytes from `at` to `finish` come in order. False if they had come already.

        Where rows are missing before `at`, the instants of those bytes stay unknown: they are
        not those of what came next.
        """
        if finish <= self.position:
            return False
        if 0 <= self.position < at:
            self.log = added(self.log, at, None)
        self.position = finish
        self.log = added(self.log, finish, ts_ns)
        return True

    def arrive(self, at: int, finish: int, ts_ns: int, begin: int) -> bool:
        """Bytes from `at` to `finish` come; they count when nothing is missing before them.

        Args:
            at: Their first.
            finish: The one after their last.
            ts_ns: Now.
            begin: First byte of the stream, as far as it is known.

        Returns:
            False if they had come already.
        """
        position = self.position
        if position < 0:
            position = self.position = begin
        if finish <= position:
            return False
        if at > position:
            self._keep(at, finish)
            return True
        if self.late:
            finish = self._whole(finish)
        self.position = finish
        self.log = added(self.log, finish, ts_ns)
        return True

    def _keep(self, at: int, finish: int) -> None:
        """Bytes that came too early."""
        if self.late is None:
            self.late = []
        self.late.append((at, finish))
        if len(self.late) > _MOST_LATE:
            # No hole is so wide: the rows that would fill it are missing.
            self.skip(min(self.late)[0])

    def skip(self, finish: int) -> None:
        """Bytes up to `finish` have come, and no row tells when."""
        if self.late:
            finish = self._whole(finish)
        self.position = finish
        self.log = added(self.log, finish, None)

    def _whole(self, finish: int) -> int:
        """Where the stream is whole up to, once it is whole up to `finish`."""
        late = sorted(self.late or ())
        while late and late[0][0] <= finish:
            finish = max(finish, late.pop(0)[1])
        self.late = late
        return finish

    def forget(self, position: int) -> None:
        """Drop what only tells of bytes before `position`."""
        log = self.log
        if log and log[0][0] < position:
            del log[: bisect_left(log, (position,))]
            if not log:
                self.log = NO_LOG


NOWHERE = Reach()
"""Of every point where no byte of a stream was seen: the connections of a port scan have no
other. It is read alone, and never moved."""
NO_SENDERS: Callers = []
"""Of every stream of which no call was seen: nothing is ever put into it, nor into NO_LOG."""


class Flow:
    """One direction of a connection.

    Attributes:
        ref: The highest sequence number seen: others are unwrapped by it.
        begin: First byte.
        syn: The SYN's own number, as on the wire.
        sent: How far the sender's calls have come.
        sends: End and instant of each of those calls.
        senders: Which processes made them.
        last_send: Where the last one's bytes begin.
        fin: Where it ends: the FIN's number; -1 until a packet has it.
        copied: How far its receiver had read when it was last told of more: by whatever call.
        urgent: From where to where the rows of its calls left out urgent bytes, in exchanges
            that are not told yet.
        beside: How many such bytes there were.
        unseen: Some of it was read by calls that have no rows (splice() by tracepoint).
        tx: At the sender's device, in namespace tx_netns; device tx_dev is the first.
        nic: At the receiver's interface, in namespace rx_netns; rx_if is the first.
        ip: At the receiver's IP.
        ready: In the receiver's socket.
        read: How far the receiver's calls have come, the last of them at read_ns.
        reads: End and instant of each of those calls; no instant of what no row told.
        retransmits: Packets seen that carry what was sent before.
        zero_windows: How often the sender of this stream closed its own window.
        zero: It is closed.
    """

    __slots__ = (
        "begin",
        "beside",
        "copied",
        "fin",
        "ip",
        "last_send",
        "nic",
        "read",
        "read_ns",
        "reads",
        "ready",
        "ref",
        "retransmits",
        "rx_if",
        "rx_netns",
        "senders",
        "sends",
        "sent",
        "syn",
        "tx",
        "tx_dev",
        "tx_netns",
        "unseen",
        "urgent",
        "zero",
        "zero_windows",
    )

    def __init__(self) -> None:
        self.ref = self.begin = self.syn = self.fin = -1
        self.sent = self.last_send = self.read = self.copied = -1
        self.unseen = False
        self.urgent: tuple[tuple[int, int], ...] = ()
        self.beside = 0
        self.sends = self.reads = NO_LOG
        self.senders = NO_SENDERS
        self.read_ns = 0
        self.tx = self.nic = self.ip = self.ready = NOWHERE
        self.tx_netns: int | None = None
        self.tx_dev: str | None = None
        self.rx_netns: int | None = None
        self.rx_if: str | None = None
        self.retransmits = self.zero_windows = 0
        self.zero = False

    def at(self, seq: int) -> int:
        """A sequence number, unwrapped."""
        ref = self.ref
        if ref < 0:
            self.ref = seq + (1 << 32)
            return self.ref
        at = ref + ((seq - ref + 0x80000000) & 0xFFFFFFFF) - 0x80000000
        if at > ref:
            self.ref = at
        return at

    def send(self, at: int, finish: int, ts_ns: int) -> None:
        """The sender calls, for bytes from `at` to `finish`."""
        self.sends = added(self.sends, finish, ts_ns)
        self.last_send = at
        if at > self.sent:
            self.skip_urgent(self.sent, at)
        self.sent = max(self.sent, finish)

    def take(self, finish: int, ts_ns: int) -> None:
        """The receiver has read up to `finish`: it has come, whether or not its rows have."""
        self.note_read(finish, ts_ns)
        self.read, self.read_ns = finish, ts_ns
        if 0 <= self.nic.position < finish:
            self.nic.skip(finish)
        if 0 <= self.ip.position < finish:
            self.ip.skip(finish)

    def note_read(self, finish: int, ts_ns: int | None) -> None:
        """Put into `reads` that the receiver has read up to `finish`."""
        self.reads = added(self.reads, finish, ts_ns)

    def drop_logs(self) -> None:
        """Forget when: how far the stream has come stays."""
        self.sends = self.reads = NO_LOG
        self.senders = NO_SENDERS
        for reach in (self.tx, self.nic, self.ip, self.ready):
            if reach.log:
                reach.log = NO_LOG
        self.urgent = ()

    def skip_urgent(self, before: int, at: int) -> None:
        """Rows of calls go on at `at`, and the last one ended at `before`.

        A byte that was sent with MSG_OOB has a number, and is beside the stream. Where more
        are missing than a few, it is rows that are.
        """
        if 0 <= before < at <= before + MOST_URGENT:
            self.urgent = (*self.urgent[-MOST_URGENT_KEPT:], (before, at))
            self.beside += at - before

    def take_urgent(self, begin: int, end: int) -> int:
        """Return how many urgent bytes lie between two positions; forget what lies before `end`."""
        if not self.urgent:
            return 0
        found = sum(max(min(last, end) - max(at, begin), 0) for at, last in self.urgent)
        self.urgent = tuple(one for one in self.urgent if one[1] > end)
        return found

    def arrived(self) -> int:
        """How far it has come at the receiver's host."""
        return max(self.ip.position, self.nic.position)

    def forget(self, position: int) -> None:
        """Drop what only tells of bytes before `position`."""
        sends, reads = self.sends, self.reads
        if sends and sends[0][0] < position:
            del sends[: bisect_left(sends, (position,))]
        if reads and reads[0][0] < position:
            del reads[: bisect_left(reads, (position,))]
        while len(self.senders) > 1 and self.senders[1][0] < position:
            del self.senders[0]
        self.tx.forget(position)
        self.nic.forget(position)
        self.ip.forget(position)
        self.ready.forget(position)

    def logs(self) -> tuple[Log, ...]:
        """All that grows with the stream."""
        return (self.sends, self.reads, self.tx.log, self.nic.log, self.ip.log, self.ready.log)


_ROUND_TRIPS = (
    (SYN_TX, SYNACK_RX),
    (SYN_TX, CONNECTED),
    (CONNECT_CALLED, CONNECTED),
    (SYNACK_TX, HANDSHAKE_DONE),
    (SYN_RX, HANDSHAKE_DONE),
)
"""From one instant of the handshake to another it takes a round trip; the surest first."""
_SHORTEST_TRIP_NS = 1_000_000
"""On loopback a program takes longer from one call to the next than a packet there and back."""
_LONGEST_TRIP_NS = 500_000_000
"""What takes longer waited for something else: for room in the listener's queue, say."""


class End:
    """One end of a connection: a socket, and the process that has it."""

    __slots__ = (
        *("called", "closed_ns", "conn", "index", "named", "netns", "sock"),
        *("state", "stats", "streams", "who"),
    )

    def __init__(self, conn: Connection, index: int) -> None:
        self.conn = conn
        self.index = index
        self.sock = 0
        """0 where no probe watches this end."""
        self.named = False
        """Its connection is known by its addresses."""
        self.called = False
        """Its connect() was told."""
        self.state: str | None = None
        """After the last change that was told."""
        self.netns: int | None = None
        self.who = NOBODY
        """The process that used it last: it may be another than before, or have another name."""
        self.closed_ns = 0
        self.streams = False
        """A probe watches it that has a row for each send and recv."""
        self.stats: dict[str, int | None] | None = None
        """What the kernel's socket had counted when it closed, by the names of STATS."""

    @property
    def pid(self) -> int | None:
        """Of the process that used it last; None where no row names one."""
        return self.who.pid

    @property
    def comm(self) -> str | None:
        """Name of the process that used it last."""
        return self.who.comm


NONE_WAIT: deque[Exchange] = deque(maxlen=0)
"""Of every connection of which no exchange has waited for its reply to come: an empty deque takes
more than all else of it. It takes nothing in."""


class Connection:
    """Two ends, two streams, and what passed between them.

    Attributes:
        number: Counts connections of a run, from 1.
        client: Address and port of the end that connected.
        service: Of the other.
        guessed: Which is which was guessed from the port numbers.
        began: Its handshake was seen.
        stamps: Instants of the handshake, see stages.CONNECT_MILESTONES.
        error: What its socket failed with, in plain words: refused, timed out ...
        reset_by: The end that sent a RST.
        reset_why: In plain words.
        fins: Ends that closed their side, in order.
        fin_ns: When each end was first known to have done so; 0 where it is not.
        reset_ns: When it was reset.
        error_ns: When its socket failed.
        eof_ns: When the client last read the end of the service's stream.
        left_ns: When the client's kernel knew that the service had closed its side.
        doubtful: Another connection has the same addresses at the same time, in other network
            namespaces, and nothing tells which rows are whose: it is not joined.
        ended: Why it is told of: closed, idle, given up, end of run.
    """

    __slots__ = (
        "accept_us",
        "answered",
        "ask_by",
        "ask_ns",
        "ask_retransmits",
        "ask_zeros",
        "began",
        "breaks",
        "came",
        "client",
        "closing_ns",
        "connect_us",
        "cut",
        "doubt",
        "doubtful",
        "ended",
        "ends",
        "eof_ns",
        "error",
        "error_ns",
        "fin_ns",
        "fins",
        "first_ns",
        "flows",
        "guessed",
        "heir",
        "ip",
        "keys",
        "last_ns",
        "left_ns",
        "longest_ns",
        "missed",
        "number",
        "offset_ns",
        "outcomes",
        "over",
        "replaced",
        "replying",
        "reset_by",
        "reset_ns",
        "reset_why",
        "service",
        "spans_loss",
        "stamps",
        "syns",
        "think_ns",
        "told",
        "torn",
        "unsure",
        "untold",
        "waiting",
        "ways",
    )

    def __init__(  # noqa: PLR0915 - its attributes, one by one
        self, number: int, row: Any, *, turned: bool = False
    ) -> None:
        self.number = number
        self.client: tuple[str, int | None] = (shared(row.saddr), row.sport)
        self.service: tuple[str, int | None] = (shared(row.daddr), row.dport)
        if turned:
            self.client, self.service = self.service, self.client
        self.ip: int | None = row.ip
        self.guessed = False
        self.began = False
        self.ends = (End(self, CLIENT), End(self, SERVICE))
        self.flows = (Flow(), Flow())
        self.first_ns: int = row.ts_ns
        self.last_ns: int = row.ts_ns
        self.offset_ns: int = row.time_ns - row.ts_ns
        """Unix time minus the rows' clock."""
        self.stamps: list[int | None] = [None] * len(CONNECT_MILESTONES)
        self.syns = 0
        """SYNs that were sent again."""
        self.connect_us: float | None = None
        self.accept_us: float | None = None
        self.error: str | None = None
        self.reset_by: int | None = None
        self.reset_why: str | None = None
        self.fins: list[int] = []
        self.fin_ns = [0, 0]
        self.reset_ns = self.error_ns = self.eof_ns = self.left_ns = 0
        self.longest_ns = 0
        """The longest total of what was answered."""
        self.think_ns = 0
        """Between the client's reading of a reply and its next request, in all."""
        self.outcomes: dict[str, int] = {}
        """How many exchanges of it had which outcome."""
        self.told = 0
        """Exchanges of any outcome."""
        self.untold = 0
        """Exchanges of it that are left out: cut by the capture's beginning, of one instant, or
        under way where events were lost."""
        self.spans_loss = 0
        """How many of these were under way where events were lost."""
        self.missed = 0
        """Bits, one for each kind of row that has not come since events were lost."""
        self.breaks = 0
        """How often events were lost, anywhere, by its last row."""
        self.torn = False
        """What is asked next was not seen from its beginning."""
        self.ended = ""
        self.over = False
        self.closing_ns = 0
        """When its packets ended it."""
        self.doubtful = False
        self.unsure = False
        """It was joined by addresses, and nothing else proves that it is one."""
        self.heir = False
        """Another connection had its addresses just before."""
        self.replaced = False
        """Another connection has its addresses by now; its sockets may not be closed yet."""
        self.cut = True
        """Its first exchange may have begun before we looked."""
        self.keys: list[tuple[Any, ...]] = []
        self.ways: list[tuple[Any, ...]] = []
        """By which the joiner finds it: by addresses, and for packets."""
        self.answered = -1
        """Bytes of the client's stream before this position belong to exchanges that have begun."""
        self.ask_ns: int | None = None
        """When the first byte that nobody has answered was sent."""
        self.ask_by: Who | None = None
        """By which process; None where no row tells."""
        self.ask_retransmits = 0
        self.ask_zeros = 0
        self.replying: Exchange | None = None
        """Its reply is being sent."""
        self.waiting = NONE_WAIT
        """Their replies are sent, and on their way."""
        self.came = -1
        """How far the client's stream had come when the reply that is being sent began."""
        self.doubt: tuple[int, int | None, int] | None = None
        """Where the service sent when more had come that it was not seen to read, when, and how
        far that was: a new reply, if it read it without a row; else more of the old one."""

    @property
    def handshake(self) -> Split:
        """How the time from connect() until the client may send divides into stages.

        Where the client is not watched: as far as is known, up to accept().
        """
        if self.stamps[CONNECTED] is None:
            return split(self.stamps, CONNECT_STAGES)
        return split(self.stamps[: CONNECTED + 1], CONNECT_STAGES[:CONNECTED])

    @property
    def lives(self) -> bool:
        """It is under way, as far as is known."""
        return not (self.over or self.replaced)

    @property
    def connected(self) -> bool:
        """The handshake is over at one end."""
        return self.stamps[CONNECTED] is not None or self.stamps[HANDSHAKE_DONE] is not None

    def is_in(self, netns: int | None, index: int | None = None) -> bool:
        """Whether a network namespace is known to be an end's, or on the way.

        Args:
            netns: The namespace.
            index: The end; None for any, or a packet.
        """
        if index is not None and self.ends[index].sock:
            return self.ends[index].netns == netns
        return any(end.sock and end.netns == netns for end in self.ends) or any(
            key[0] == netns for key in self.ways
        )

    @property
    def duration_ns(self) -> int:
        """From its first row to its last."""
        return self.last_ns - self.first_ns

    @property
    def retransmits(self) -> int:
        """Of both ends: as the kernel counted them where it told, else as seen in packets."""
        return sum(self.retransmits_of(index) for index in (CLIENT, SERVICE))

    def retransmits_of(self, index: int) -> int:
        """Segments that an end sent again; its SYNs count."""
        stats = self.ends[index].stats
        if stats is not None:
            return stats["retransmits"] or 0
        return self.flows[index].retransmits + (self.syns if index == CLIENT else 0)

    def bytes_of(self, index: int) -> int | None:
        """Bytes that an end sent, as far as any point tells; None where none does.

        Those of its stream: urgent ones are beside it, where rows of calls tell.
        """
        flow = self.flows[index]
        # Not `ready`: a FIN counts there.
        furthest = max(flow.sent, flow.tx.position, flow.arrived(), flow.read, flow.fin)
        if furthest >= flow.begin >= 0:
            calls = flow.sent if self.ends[index].streams else -1
            if furthest <= calls + MOST_URGENT:
                furthest = calls  # the last ones were urgent
            return furthest - flow.begin - flow.beside
        # Seen from its beginning on, by a probe that would have told of any byte.
        watched = flow.syn >= 0 or any(end.streams for end in self.ends)
        return 0 if self.began and watched else None

    @property
    def bare(self) -> bool:
        """It has no socket, and no byte of its streams was seen: SYNs, and what answers them."""
        client, service = self.ends
        return not (client.sock or service.sock) and all(
            flow.tx is flow.nic is flow.ip is NOWHERE for flow in self.flows
        )

    @property
    def exchanges(self) -> int:
        """Requests that were answered."""
        return self.outcomes.get(ANSWERED, 0)

    @property
    def patience_ns(self) -> int:
        """No reply can come sooner than so: a round trip, and no less than a millisecond."""
        return max(_SHORTEST_TRIP_NS, self.trip_ns or 0)

    @property
    def trip_ns(self) -> int | None:
        """A round trip, as the kernel or the handshake tells; None where neither does."""
        known = [end.stats["min_rtt_us"] for end in self.ends if end.stats]
        trips = [us * 1_000 for us in known if us]
        if not self.syns:
            for first, last in _ROUND_TRIPS:
                began, ended = self.stamps[first], self.stamps[last]
                if began is not None and ended is not None and ended >= began:
                    trips.append(min(ended - began, _LONGEST_TRIP_NS))
                    break
        return min(trips, default=None)


class Exchange:
    """A request and its reply, or a message that has none.

    Attributes:
        conn: Whose.
        number: Counts exchanges of the connection, from 1.
        kind: ``exchange``; ``request`` for one that got no reply; ``push`` for what
            the service sent without being asked.
        outcome: One of OUTCOMES; only an ``answered`` one has a total.
        over_ns: When its waiting was over; None where nothing waited, or it was answered.
        over_by: What ended it, in plain words.
        urgent: Bytes of the request and of the reply that are beside the stream.
        request: First byte of the request, and the one after its last; unwrapped.
        reply: Of the reply.
        by: The process at each end, told by the rows of this exchange: which sent the request's
            first byte, and the reply's; else the one that used the end last by then.
        stamps: Instants, see stages.MILESTONES.
        retransmits: Segments of it that were sent again, as seen in packets.
        zero_windows: How often one end closed its window meanwhile.
        missed: Rows of it were lost: it is not told.
        beyond: The client has read of its reply what the service was not seen to send.
        ended: How its end was known: ``turn``, ``closed``, ``idle``, ``given up``, ``end of run``.
    """

    __slots__ = (
        "_split",
        "beyond",
        "by",
        "conn",
        "ended",
        "kind",
        "missed",
        "number",
        "outcome",
        "over_by",
        "over_ns",
        "reply_begin",
        "reply_end",
        "request_begin",
        "request_end",
        "retransmits",
        "stamps",
        "urgent",
        "zero_windows",
    )

    def __init__(self, conn: Connection, kind: str) -> None:
        self.conn = conn
        self.kind = kind
        self.number = 0
        self.request_begin = self.request_end = -1
        self.reply_begin = self.reply_end = -1
        self.by: list[Who | None] = [None, None]
        self.urgent = (0, 0)
        self.stamps: list[int | None] = [None] * len(MILESTONES)
        self.retransmits = 0
        self.zero_windows = 0
        self.ended = ""
        self.beyond = self.missed = False
        self.outcome = PUSH if kind == "push" else ANSWERED
        self.over_ns: int | None = None
        self.over_by = ""
        self._split: Split | None = None

    @property
    def split(self) -> Split:
        """How its time divides into stages: those that it went through to their end.

        Where the end of a reply was not sent or did not come, what is known of its last byte
        is not of the last byte: nothing behind the beginning of the reply is a stage.
        """
        if self._split is None:
            whole = self.over_ns is None
            self._split = split(self.stamps if whole else self.stamps[: REPLY_SENT + 1])
        return self._split

    @property
    def total_ns(self) -> int:
        """From its first known instant to its last."""
        return self.split.total_ns

    @property
    def waited_ns(self) -> int | None:
        """So long a request waited that was not answered; None for one that was, or did not."""
        return None if self.over_ns is None else max(self.over_ns - self.began_ns, 0)

    @property
    def lasted_ns(self) -> int:
        """Its total, or as long as it waited."""
        waited_ns = self.waited_ns
        return self.split.total_ns if waited_ns is None else waited_ns

    @property
    def measured(self) -> bool:
        """Its total is how long a request took: it was answered, to the last byte."""
        return self.outcome == ANSWERED

    @property
    def under_way(self) -> tuple[str, ...]:
        """Stages in one of which it was when its waiting was over; none where nothing waited."""
        if self.over_ns is None:
            return ()
        last = max(number for number, at in enumerate(self.stamps) if at is not None)
        if last < REPLY_SENT and self.kind == "request" and self.conn.ends[1].streams:
            return STAGES[last:REPLY_SENT]
        return STAGES[last:]

    @property
    def began_ns(self) -> int:
        """Where its stages begin: its first known instant, by the rows' clock; there is one."""
        left_out = self.split.left_out
        return next(
            at for number, at in enumerate(self.stamps) if at is not None and number not in left_out
        )

    @property
    def request_bytes(self) -> int:
        """Of the request; 0 for a push."""
        return self.request_end - self.request_begin - self.urgent[CLIENT]

    @property
    def reply_bytes(self) -> int:
        """Of the reply; 0 for a request without one."""
        return self.reply_end - self.reply_begin - self.urgent[SERVICE]

    def who(self, index: int) -> Who:
        """Return the process at an end; see `by`."""
        return self.by[index] or self.conn.ends[index].who

    @property
    def end(self) -> End:
        """The end that it is told for: the client's, if that is known, else the service's."""
        client, service = self.who(CLIENT), self.who(SERVICE)
        known = client.pid is not None or service.pid is None
        return self.conn.ends[CLIENT if known else SERVICE]


Told = Exchange | Connection
