"""A connection: its two ends, its two streams, and what passed between them."""

from __future__ import annotations

from collections import deque
from typing import Any

from .chain import (
    CONNECT_CALLED,
    CONNECT_MILESTONES,
    CONNECT_STAGES,
    CONNECTED,
    HANDSHAKE_DONE,
    SYN_RX,
    SYN_TX,
    SYNACK_RX,
    SYNACK_TX,
    Split,
    split,
)
from .exchange import ANSWERED, Exchange
from .row_fields import NO_PROCESS, Process, shared
from .stream import CLIENT, MOST_URGENT, NOT_SEEN, SERVICE, Flow

STATS = ("srtt_us", "min_rtt_us", "rto_us", "retransmits", "bytes_acked", "bytes_received")
"""What probe tcp_stats reports when a socket closes."""

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
        *("state", "stats", "streams", "process"),
    )

    def __init__(self, conn: Connection, index: int) -> None:
        self.conn = conn
        self.index = index
        self.sock = 0
        """0 where no probe watches this end."""
        self.named = False
        """Its connection is known by its addresses."""
        self.called = False
        """Its connect() was reported."""
        self.state: str | None = None
        """After the last change that was reported."""
        self.netns: int | None = None
        self.process = NO_PROCESS
        """The process that used it last: it may be another than before, or have another name."""
        self.closed_ns = 0
        self.streams = False
        """A probe watches it that has a row for each send and recv."""
        self.stats: dict[str, int | None] | None = None
        """What the kernel's socket had counted when it closed, by the names of STATS."""

    def leave(self) -> None:
        """Forget the connection, which is over.

        It is a cycle, and the collector comes seldom: see spare_the_collector().
        """
        self.conn = None  # type: ignore[assignment] # nothing asks for it any more

    @property
    def pid(self) -> int | None:
        """Of the process that used it last; None where no row names one."""
        return self.process.pid

    @property
    def comm(self) -> str | None:
        """Name of the process that used it last."""
        return self.process.comm


NO_EXCHANGES: deque[Exchange] = deque(maxlen=0)
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
        stamps: Instants of the handshake, see chain.CONNECT_MILESTONES.
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
            namespaces, and no row shows which is which: it is not joined.
        ended: Why it is reported of: closed, idle, given up, end of run.
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
        "fast_from",
        "fast_path",
        "fast_pause",
        "fin_ns",
        "fins",
        "first_ns",
        "flows",
        "guessed",
        "ip",
        "keys",
        "last_ns",
        "left_ns",
        "left_out",
        "longest_ns",
        "missed",
        "number",
        "offset_ns",
        "outcomes",
        "over",
        "packet_keys",
        "replaced",
        "replying",
        "reported",
        "reset_by",
        "reset_ns",
        "reset_seen",
        "reset_why",
        "service",
        "spans_loss",
        "stamps",
        "successor",
        "syns",
        "think_ns",
        "thinks_from_ns",
        "thought_from_ns",
        "thought_ns",
        "torn",
        "unsure",
        "waiting",
        "went_on",
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
        self.reset_seen: tuple[int, int] | None = None
        """How far the streams had come when a RST was seen that no socket's row confirms."""
        self.went_on = 0
        """Bits, one for each end that has sent more since."""
        self.fins: list[int] = []
        self.fin_ns = [0, 0]
        self.reset_ns = self.error_ns = self.eof_ns = self.left_ns = 0
        self.longest_ns = 0
        """The longest total of what was answered."""
        self.think_ns = 0
        """Between the client's reading of a reply and its next request, in all."""
        self.thought_ns = 0
        """The part of it before the last request."""
        self.thinks_from_ns = self.thought_from_ns = 0
        """The read that it was counted from last, and the one before that."""
        self.outcomes: dict[str, int] = {}
        """How many exchanges of it had which outcome."""
        self.reported = 0
        """Exchanges of any outcome."""
        self.left_out = 0
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
        self.successor = False
        """Another connection had its addresses just before."""
        self.replaced = False
        """Another connection has its addresses by now; its sockets may not be closed yet."""
        self.cut = True
        """Its first exchange may have begun before we looked."""
        self.keys: list[tuple[Any, ...]] = []
        self.packet_keys: list[tuple[Any, ...]] = []
        """By which the joiner finds it: by addresses, and for packets."""
        self.answered = -1
        """Bytes of the client's stream before this position belong to exchanges that have begun."""
        self.ask_ns: int | None = None
        """When the first byte that is not answered was sent."""
        self.ask_by: Process | None = None
        """The process; None if no row has it."""
        self.ask_retransmits = 0
        self.ask_zeros = 0
        self.replying: Exchange | None = None
        """Its reply is being sent."""
        self.waiting = NO_EXCHANGES
        """Their replies are sent, and on their way."""
        self.came = -1
        """How far the client's stream had come when the reply that is being sent began."""
        self.fast_path: Any = None
        """Takes its rows, while its turns are plain: then its `replying` and the instants of its
        streams are there."""
        self.fast_from = 0
        self.fast_pause = 1
        """Exchanges from which on it may have one; and between the last one and that."""
        self.doubt: tuple[int, int | None, int] | None = None
        """Where the service sent when more had come that it was not seen to read, when, and how
        far that was: a new reply, if it read it without a row; else more of the old one."""

    def leave_fast_path(self) -> None:
        """Take it off the fast path, if it is on it."""
        if self.fast_path is not None:
            self.fast_path.leave()

    @property
    def handshake(self) -> Split:
        """How the time from connect() until the client may send divides into stages.

        Where the client is not watched: as far as is known, up to accept().
        """
        if self.stamps[CONNECTED] is None:
            return split(self.stamps, CONNECT_STAGES)
        return split(self.stamps[: CONNECTED + 1], CONNECT_STAGES[:CONNECTED])

    @property
    def is_open(self) -> bool:
        """It is under way, as far as is known."""
        return not (self.over or self.replaced)

    @property
    def connected(self) -> bool:
        """The handshake is over at one end."""
        return self.stamps[CONNECTED] is not None or self.stamps[HANDSHAKE_DONE] is not None

    def is_in(self, netns: int | None, index: int | None = None) -> bool:
        """Return whether a network namespace is known to be an end's, or on the way.

        Args:
            netns: The namespace.
            index: The end; None for any, or a packet.
        """
        if index is not None and self.ends[index].sock:
            return self.ends[index].netns == netns
        return any(end.sock and end.netns == netns for end in self.ends) or any(
            key[0] == netns for key in self.packet_keys
        )

    @property
    def duration_ns(self) -> int:
        """From its first row to its last, or to the end of the run if it was still open then."""
        return self.last_ns - self.first_ns

    @property
    def retransmits(self) -> int:
        """Of both ends: the kernel's count where it is known, else as seen in packets."""
        return sum(self.retransmits_of(index) for index in (CLIENT, SERVICE))

    def retransmits_of(self, index: int) -> int:
        """Return the number of segments that an end sent again, including SYNs."""
        stats = self.ends[index].stats
        if stats is not None and stats["retransmits"] is not None:
            return stats["retransmits"]
        return self.flows[index].retransmits + (self.syns if index == CLIENT else 0)

    def bytes_of(self, index: int) -> int | None:
        """Return the bytes that an end sent, as far as any point shows; None if none does.

        Those of its stream: urgent ones are beside it, if rows of calls show them.
        """
        flow = self.flows[index]
        # Not `ready`: a FIN counts there.
        furthest = max(flow.sent, flow.tx.position, flow.arrived(), flow.read, flow.fin)
        if furthest >= flow.begin >= 0:
            calls = flow.sent if self.ends[index].streams else -1
            if furthest <= calls + MOST_URGENT:
                furthest = calls  # the last ones were urgent
            return furthest - flow.begin - flow.beside
        # Seen from its beginning on, by a probe that would have reported of any byte.
        watched = flow.syn >= 0 or any(end.streams for end in self.ends)
        return 0 if self.began and watched else None

    @property
    def bare(self) -> bool:
        """It has no socket, and no byte of its streams was seen: SYNs, and what answers them."""
        client, service = self.ends
        return not (client.sock or service.sock) and all(
            flow.tx is flow.nic is flow.ip is NOT_SEEN for flow in self.flows
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
        """The round trip, of the kernel or of the handshake; None if neither is known."""
        known = [end.stats["min_rtt_us"] for end in self.ends if end.stats]
        trips = [us * 1_000 for us in known if us]
        if not self.syns:
            for first, last in _ROUND_TRIPS:
                began, ended = self.stamps[first], self.stamps[last]
                if began is not None and ended is not None and ended >= began:
                    trips.append(min(ended - began, _LONGEST_TRIP_NS))
                    break
        return min(trips, default=None)


Finished = Exchange | Connection
