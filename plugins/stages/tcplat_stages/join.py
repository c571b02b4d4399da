"""Rows of all probes and both ends -> connections and their exchanges, by TCP's own numbers.

A row belongs to a connection by its socket, or by its addresses, ports and network
namespace; within the connection, to the bytes that its sequence number names.
Never to "the next packet": segmentation, GRO, delayed ACKs, retransmits and
pipelining move packets about, and leave the numbers of bytes alone.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from .model import (
    ANSWERED,
    CLIENT,
    CUT,
    NOBODY,
    NONE_WAIT,
    NOWHERE,
    ONE_WAY,
    OPEN,
    SERVICE,
    STATS,
    UNANSWERED,
    UNKNOWN,
    Connection,
    End,
    Exchange,
    Flow,
    Reach,
    Who,
    caller,
    reached,
    real,
    shared,
    whole,
)
from .stages import (
    ACCEPTED,
    CLIENT_SENT,
    CONNECT_CALLED,
    CONNECTED,
    HANDSHAKE_DONE,
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
    SYN_RX,
    SYN_TX,
    SYNACK_RX,
    SYNACK_TX,
)

Told = Exchange | Connection
_SECOND_NS = 1_000_000_000
_STEP_NS = _SECOND_NS // 2
"""Silence ends at whole steps of the rows' clock."""
_ROLES = {"tcp_client": CLIENT, "tcp_service": SERVICE, "client": CLIENT, "service": SERVICE}
"""Whose socket it is, by the probe, or by what tcp_stats says."""
_STREAM_PROBES = frozenset({"tcp_client", "tcp_service"})
_STREAM = frozenset({"send", "send_short", "recv", "ready"})
_PLAIN = frozenset({"ACK", "PSH|ACK"})
_PACKETS = frozenset({"nic_tx", "nic_rx", "rx_ip"})
_MOVES = frozenset({"connect", "state"})
"""Rows by which a socket may begin another connection."""
_READER = "reader"
"""Point of the loss that stands for rows of any kind, which a sink kept from a slow reader."""
_TELLING = frozenset({*_STREAM, *_MOVES, *_PACKETS, "close", _READER})
"""Points whose loss may hide a turn, or the end of a connection."""
_READS, _PACKET_ROWS, _KINDS = 2, 4, ("nic_tx", "nic_rx", "rx_ip")
"""Bits of Connection.missed: two for each end's sends, two for its reads, three for the packets."""
_ALL_ROWS = (1 << _PACKET_ROWS + 2 * len(_KINDS)) - 1
_ASKING_ROWS = 1 << CLIENT | ((1 << len(_KINDS)) - 1) << _PACKET_ROWS
"""Rows by which it is known that the client asks, where no probe watches the service."""
_MOST_LOSSES = 4_096
"""Stretches of time in which rows were lost, to the instant."""
_STRAGGLERS_NS = 2 * _SECOND_NS
"""So long a connection that is over still takes what belongs to it."""
_MOST_OVER = 8_192
"""Connections that are over and still take what belongs to them."""
_MOST_DONE = 65_536
"""Sockets that are remembered longer than their connections."""
_LONG = 256
"""Entries of a log that are kept without looking whether they are needed."""
_PATIENT_NS = _SECOND_NS
"""A request that has waited for less when the run ends may yet be answered."""
_MOST_SERVICES = 4_096
"""Of which it is known how long they take for an answer."""
_NAMES = ("client", "service")
_PARTING_NS = 5_000_000
"""On a busy host a program may take so long from its farewell to its close()."""
_LONGEST_PARTING_NS = 50_000_000
"""Within so long of a farewell both ends have closed: a request that hangs takes longer."""
_LAST_NS = attrgetter("last_ns")
_UNTIL_NS = itemgetter(1)
_LONGEST = 16_384
"""Entries that are kept at all: 16,384 packets that nobody has read yet."""


class Joiner:
    """Joins rows; see feed().

    Args:
        idle_ns: A reply is taken to be complete when all of it was read, and nothing
            more has come for so long.
        most: Connections that are remembered; the one that was silent for longest goes. Of those
            that have neither a socket nor data a quarter as many; the oldest goes.

    Attributes:
        given_up: Connections that went for want of room.
        cut: Exchanges that were under way when the capture began: they are not told.
        untimed: Messages of which only one instant is known.
        missed: Messages that were under way where rows were lost: they are not told.
        watch: Called with a connection and each row that is of bytes of its streams.
    """

    def __init__(self, *, idle_ns: int = 10 * _SECOND_NS, most: int = 32_768) -> None:
        self.given_up = 0
        self.cut = 0
        self.untimed = 0
        self.missed = 0
        self.watch: Callable[[Connection, Any], None] | None = None
        self._idle_ns = idle_ns
        self._most = most
        self._number = 0
        self._told: list[Told] = []
        self._conns: dict[int, Connection] = {}
        self._bare: dict[int, Connection] = {}
        """Those that a packet without data began, while they are remembered: the oldest first."""
        self._most_bare = max(1, most // 4)
        self._socks: dict[int, End] = {}
        self._done: dict[int, None] = {}
        """Sockets that are not closed, of connections that are told: what they still do is lost."""
        self._tuples: dict[tuple[Any, ...], list[Connection]] = {}
        self._ways: dict[tuple[Any, ...], tuple[Connection, int]] = {}
        self._over: deque[Connection] = deque()
        self._next_sweep_ns = 0
        self._last_ns = 0
        """The latest instant of connections that are over; when all are, of all rows."""
        self._row_ns = 0
        """When the last row was of which something follows."""
        self._gaps: list[tuple[int, int]] = []
        """Between which instants rows were lost: apart from each other, and in order."""
        self._blurred_ns = -1
        """Up to here these gaps are forgotten: rows may have been lost anywhere."""
        self._gap_ends: list[int] = []
        """The ends of those that may not be over yet, in order."""
        self._breaks = 0
        """How often a gap began or ended; each connection knows how often by its last row."""
        self._longest: dict[tuple[str, int | None], int] = {}
        """Address and port of a service -> its longest total, ns, of what was answered."""
        self._undecided: list[Exchange] = []
        """Requests that the end of the run cuts short."""
        self._closed_windows = 0
        """Streams whose sender has closed its own window."""
        self._points: dict[str, Callable[[End, Any, int], None]] = {
            "send": self._send,
            "recv": self._recv,
            "ready": self._ready,
            "send_short": self._send_short,
            "connect": self._connect,
            "state": self._state,
            "accept": self._accept,
            "close": self._close,
            "stats": self._stats,
        }

    def feed(self, rows: Iterable[Any]) -> list[Told]:  # noqa: C901, PLR0912, PLR0915 - one pass over a million rows
        """Take rows in order of time; what became complete by them.

        An exchange is complete when the next one's reply begins, when its connection
        is over, or when nothing moves any more. What comes out is a function of the
        rows alone, however they are divided into batches.
        """
        told = self._told = []
        socks, points, ways, watch = self._socks, self._points, self._ways, self.watch
        for row in rows:
            ts_ns = row.ts_ns
            if ts_ns >= self._next_sweep_ns:
                self._pass(ts_ns)
            if self._gap_ends and ts_ns >= self._gap_ends[0]:
                self._end_gaps(ts_ns)
            point = row.point
            sock = row.sock
            if sock:
                handler = points.get(point)
                # A null says that nobody can know: then there is nothing to join by.
                if handler is None or (point in _STREAM and row.seq is None):
                    continue
                end = socks.get(sock)
                if end is None or (point in _MOVES and _goes_again(end, row)):
                    end = self._bind(row) if end is None else self._begin_anew(end, row)
                    if end is None:
                        continue
                if not end.named and row.sport:
                    self._name(end, row)
                conn = end.conn
                conn.last_ns = ts_ns
                if conn.breaks != self._breaks:
                    self._break(conn)
                if watch is not None and row.bytes:
                    watch(conn, row)
                handler(end, row, ts_ns)
            elif point in _PACKETS:
                flags = row.flags or ""
                if row.seq is None:
                    continue
                # Half of all packets: an ACK that tells nothing, while no window is closed.
                if (
                    flags == "ACK"
                    and not row.bytes
                    and not self._closed_windows
                    and (point == "rx_ip" or getattr(row, "window", 1))
                ):
                    continue
                key = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
                way = ways.get(key)
                if way is None or (
                    flags not in _PLAIN and _opens(flags) and self._is_new(way[0], row)
                ):
                    way = self._route(row, key)
                    if way is None:
                        continue
                conn, index = way
                if conn.heir:
                    found = self._older(conn, index, row, flags)
                    if found is None:
                        continue
                    conn = found
                if conn.over:
                    continue
                conn.last_ns = ts_ns
                if conn.breaks != self._breaks:
                    self._break(conn)
                if watch is not None and row.bytes:
                    watch(conn, row)
                self._packet(conn, index, row, ts_ns, point, flags)
            self._row_ns = ts_ns
        return told

    def lost(self, point: str, since_ns: int = 0, until_ns: int = 0) -> None:
        """Rows of a point are missing: that is told between the last row and the next.

        What is under way meanwhile is not seen whole. What was complete stays so, unless the next
        row of its connection shows that more had passed in between; or rows of the other end
        have shown so before, whose ring had room when this one was full already.

        Args:
            point: Of the rows.
            since_ns: The first that is missing was not before this instant; 0: nor before here.
            until_ns: The last was not after this one.
        """
        if point not in _TELLING:
            return
        since_ns = since_ns or self._row_ns
        until_ns = max(since_ns, until_ns)
        gaps, ends = self._gaps, self._gap_ends
        if not until_ns or (gaps and gaps[-1] == (since_ns, until_ns)):
            return  # of another point, at the same time
        if until_ns > self._row_ns and until_ns not in ends:
            insort(ends, until_ns)
            if len(ends) > _MOST_LOSSES:
                ends.pop(0)
        while gaps and gaps[-1][1] >= since_ns:
            before = gaps.pop()
            since_ns, until_ns = min(before[0], since_ns), max(before[1], until_ns)
        gaps.append((since_ns, until_ns))
        if len(gaps) > _MOST_LOSSES:
            half = len(gaps) // 2
            self._blurred_ns = gaps[half - 1][1]
            del gaps[:half]
        self._breaks += 1

    def _end_gaps(self, ts_ns: int) -> None:
        """Rows that came while others were lost do not tell what these would have told."""
        del self._gap_ends[: bisect_right(self._gap_ends, ts_ns)]
        self._breaks += 1

    def _break(self, conn: Connection) -> None:
        """Rows of a connection may be lost between its last one and the next."""
        conn.breaks = self._breaks
        conn.missed = _ALL_ROWS
        for index, flow in enumerate(conn.flows):
            if flow.unseen:  # by splice(): a gap in its reads means nothing
                conn.missed &= ~(1 << _READS + 1 - index)

    def pass_time(self, ts_ns: int) -> list[Told]:
        """No row that is older than `ts_ns` comes any more; what is over by then.

        It is what feed() would have told before the next row: where time passes without
        rows, it is told sooner, and in the same order.
        """
        told = self._told = []
        self._pass(ts_ns)
        return told

    def due_ns(self, ts_ns: int) -> int | None:
        """After pass_time(): when time alone will have something be over next; None for never."""
        due_ns = self._sweep(ts_ns - ts_ns % _STEP_NS)
        return None if due_ns is None else _step(due_ns)

    def finish(self) -> list[Told]:
        """The rows have ended: tell of what is still open."""
        told = self._told = []
        conns = list(self._conns.values())
        self._last_ns = max((self._last_ns, *(conn.last_ns for conn in conns)))
        for conn in conns:
            self._finish(conn, "port reused" if conn.replaced else "end of run")
        for exchange in self._undecided:
            self._decide(exchange)
        self._undecided.clear()
        return told

    def untold(self) -> list[str]:
        """What was left out, in plain words; nothing if nothing was."""
        counts = (
            (self.cut, "that were under way when the capture began"),
            (self.untimed, "of which one instant alone is known"),
            (self.missed, "that were under way where events were lost"),
        )
        found = [f"without {count} exchanges {which}" for count, which in counts if count]
        if self.given_up:
            found.append(f"{self.given_up} connections were given up: too many at a time")
        return found

    # --- whose row it is

    def _new(self, row: Any, *, turned: bool = False) -> Connection:
        if len(self._conns) >= self._most:
            self._make_room()
        self._number += 1
        conn = self._conns[self._number] = Connection(self._number, row, turned=turned)
        conn.breaks = self._breaks
        return conn

    def _make_room(self) -> None:
        """Of the connections that were silent for longest, have a sixteenth go."""
        count = max(1, self._most // 16)
        for conn in heapq.nsmallest(count, self._conns.values(), key=_LAST_NS):
            self.given_up += 1
            self._finish(conn, "given up")

    def _keep_bare(self, conn: Connection) -> None:
        """A packet has begun it: while it stays without a socket and data, it is one of few.

        A port scan has nothing else, and so many that they would displace all connections.
        """
        bare = self._bare
        bare[conn.number] = conn
        while len(bare) > self._most_bare:
            oldest = bare.pop(next(iter(bare)))
            if not oldest.bare:
                continue
            # Its packets have ended it: time would have told, a moment later.
            over = bool(oldest.closing_ns)
            self.given_up += not over
            self._finish(oldest, "closed" if over else "given up")

    def _bind(self, row: Any) -> End | None:
        """A socket that has not been seen before, or that begins another connection."""
        if row.sock in self._done and not _calls(row):
            if row.point == "close":
                del self._done[row.sock]
            return None
        index = _ROLES.get(row.probe)
        if index is None:
            role = getattr(row, "role", None)  # what an unknown probe calls so may be anything
            index = _ROLES.get(role) if isinstance(role, str) else None
        if index is None or row.dport is None or _listens(row):
            return None
        if row.sport is None:
            conn = self._new(row, turned=index == SERVICE)
        else:
            conn = self._connection_of(row, index)
        end = conn.ends[index]
        end.named = row.sport is not None
        self._own(end, row)
        self._socks[row.sock] = end
        return end

    def _begin_anew(self, end: End, row: Any) -> End | None:
        """The socket calls connect() or listen() once more: what it was before is over for it."""
        self._retire(end, end.conn.last_ns)
        return self._bind(row)

    def _retire(self, end: End, ts_ns: int) -> None:
        """The socket has done with its connection; the other end's may not have."""
        end.closed_ns = ts_ns
        if self._socks.get(end.sock) is end:
            del self._socks[end.sock]
        other = end.conn.ends[1 - end.index]
        if not other.sock or other.closed_ns:
            self._finish(end.conn, "closed")

    def _own(self, end: End, row: Any) -> None:
        end.conn.guessed = False
        end.sock = row.sock
        end.streams = end.streams or row.probe in _STREAM_PROBES
        end.netns = row.netns
        self._used(end, row)
        # What was taken for this end's from packets, was not: of a router between, say.
        sends, receives = end.conn.flows[end.index], end.conn.flows[1 - end.index]
        if sends.tx_netns not in (None, row.netns):
            sends.tx, sends.tx_dev = NOWHERE, None
        sends.tx_netns = row.netns
        if receives.rx_netns not in (None, row.netns):
            receives.nic, receives.ip, receives.rx_if = NOWHERE, NOWHERE, None
        receives.rx_netns = row.netns

    def _used(self, end: End, row: Any) -> Who:
        """The process of a call, which may have its socket from another, or take another name."""
        if row.pid is not None or end.who is NOBODY:
            who = Who(row.pid, shared(row.comm))
            if who != end.who:
                end.who = who
        return end.who

    def _connection_of(self, row: Any, index: int) -> Connection:
        """The connection of a socket: known by its packets or its other end, or new."""
        near, far = (row.saddr, row.sport), (row.daddr, row.dport)
        client, service = (near, far) if index == CLIENT else (far, near)
        syn = _syn_of(row)
        conn = None
        # Nothing of a connection is older than the call that begins it.
        if not _calls(row):
            conn = self._free(self._find(row.netns, client, service), index, row.netns, syn)
            if conn is None:
                turned = [one for one in self._find(row.netns, service, client) if one.guessed]
                conn = self._free(turned, 1 - index, row.netns, -1)
                if conn is not None:
                    self._turn(conn)
        if conn is None:
            conn = self._new(row, turned=index == SERVICE)
            self._register(conn, row.netns)
        self._displace(conn, row.netns, index)
        self._began_with(conn, syn)
        return conn

    def _free(
        self, known: Sequence[Connection], index: int, netns: Any, syn: int
    ) -> Connection | None:
        """Return which of some connections by the same addresses a socket is an end of.

        Args:
            known: As _find() has them.
            index: Which end.
            netns: Where the socket is.
            syn: Number of the client's SYN; -1 where the row does not tell.
        """
        likely = []
        for conn in reversed(known):
            if conn.over or conn.ends[index].sock:
                continue
            begin = conn.flows[CLIENT].syn
            if syn >= 0 and begin >= 0:
                if begin == syn:
                    return conn
            elif not conn.replaced:
                likely.append(conn)
        return self._likeliest(likely, known, index, netns)

    def _likeliest(
        self, likely: list[Connection], known: Iterable[Connection], index: int | None, netns: Any
    ) -> Connection | None:
        """Return the one of these that a row of a namespace is of; None where nobody can know.

        Args:
            likely: Those that it may be of.
            known: All by these addresses.
            index: The end whose socket the row is of; None for a packet.
            netns: The namespace.
        """
        if not likely:
            return None
        here = [conn for conn in likely if conn.is_in(netns, index)]
        if len(here) == 1:
            return here[0]
        # By the same addresses there may be another connection, in two other namespaces.
        if len(likely) > 1 or sum(conn.lives for conn in known) > 1:
            return None
        likely[0].unsure = True
        return likely[0]

    def _name(self, end: End, row: Any) -> None:
        """The source port is chosen. Its packets may have been there before this row."""
        own = end.conn
        end.named = True
        own.client = (shared(row.saddr), row.sport)
        own.service = (shared(row.daddr), row.dport)
        syn = _syn_of(row)
        known = self._find(row.netns, own.client, own.service)
        conn = self._free(known, CLIENT, row.netns, syn)
        if conn is None:
            self._register(own, row.netns)
        else:
            self._merge(end, conn, row)
        self._displace(end.conn, row.netns, CLIENT)
        self._began_with(end.conn, syn)

    def _merge(self, end: End, conn: Connection, row: Any) -> None:
        """Of an end's connection only the call is known; all else of it is known as `conn`."""
        own = end.conn
        conn.ends = (end, conn.ends[SERVICE]) if end.index == CLIENT else (conn.ends[CLIENT], end)
        end.conn = conn
        for number, at in enumerate(own.stamps):
            if at is not None:
                conn.stamps[number] = at
        conn.first_ns = min(own.first_ns, conn.first_ns)
        conn.began = conn.began or own.began
        conn.cut = conn.cut and own.cut
        conn.heir = conn.heir or own.heir
        self._release(own)
        del self._conns[own.number]
        self._bare.pop(own.number, None)
        del own.ends[1 - end.index].conn  # as in _finish
        self._own(end, row)

    def _identify(self, end: End, row: Any, syn: int) -> None:
        """A row tells the number of the client's SYN: which connection it is, for sure."""
        conn = end.conn
        begin = conn.flows[CLIENT].syn
        if begin == syn:
            if end.index == CLIENT:
                conn.unsure = False
            return
        same = [
            one
            for one in self._find(row.netns, conn.client, conn.service)
            if one.flows[CLIENT].syn == syn and not one.over and not one.ends[end.index].sock
        ]
        # The other end's socket stays with what it was joined to.
        if begin >= 0 or (same and conn.ends[1 - end.index].sock):
            self._part(end, row)
        if same:
            self._merge(end, same[0], row)
        self._began_with(end.conn, syn)

    def _part(self, end: End, row: Any) -> None:
        """What was joined to an end's call is another connection's, by the same addresses."""
        conn = end.conn
        own = self._new(row, turned=end.index == SERVICE)
        other = End(conn, end.index)
        number = CONNECT_CALLED if end.index == CLIENT else HANDSHAKE_DONE
        own.stamps[number], conn.stamps[number] = conn.stamps[number], None
        own.first_ns, own.began, own.cut = conn.first_ns, conn.began, conn.cut
        if end.index == CLIENT:
            conn.ends, own.ends = (other, conn.ends[SERVICE]), (end, own.ends[SERVICE])
        else:
            conn.ends, own.ends = (conn.ends[CLIENT], other), (own.ends[CLIENT], end)
        conn.unsure = False
        end.conn = own
        self._register(own, row.netns)
        self._own(end, row)

    def _began_with(self, conn: Connection, syn: int) -> None:
        """The number of the client's SYN; -1 where nobody tells."""
        flow = conn.flows[CLIENT]
        if syn >= 0 and flow.syn < 0:
            flow.syn = syn
            if flow.begin < 0:
                flow.begin = flow.at(syn) + 1
            conn.doubtful = False

    def _find(self, netns: Any, client: Any, service: Any) -> Sequence[Connection]:
        """Return the connections by these addresses, the youngest last."""
        return self._tuples.get(_key(netns, client, service), ())

    def _register(self, conn: Connection, netns: Any) -> None:
        """A connection has its addresses, beside those that have them as well."""
        key = _key(netns, conn.client, conn.service)
        self._tuples.setdefault(key, []).append(conn)
        conn.keys.append(key)

    def _displace(self, conn: Connection, netns: Any, index: int | None = None) -> None:
        """In one namespace one connection has these addresses: this one, from now on.

        Args:
            conn: The connection.
            netns: The namespace.
            index: The end whose socket is there; None where a packet is.
        """
        known = self._tuples.get(_key(netns, conn.client, conn.service), ())
        if len(known) < 2:  # noqa: PLR2004 - itself
            return
        for one in list(known):
            if one is conn or one.replaced:
                continue
            conn.heir = conn.heir or one.over
            if one.is_in(netns, index):
                conn.heir = True
                self._replace(one)
            elif not one.over:
                self._doubt(one)
                if conn.flows[CLIENT].syn < 0:
                    conn.doubtful = True

    def _doubt(self, conn: Connection) -> None:
        """Another connection has its addresses at the same time, elsewhere."""
        if conn.flows[CLIENT].syn < 0 or conn.unsure:
            conn.doubtful = True
        if conn.unsure:
            # What was joined may be of two. Each row finds its own connection from now on.
            self._finish(conn, "given up")
            self._release(conn)

    def _replace(self, conn: Connection) -> None:
        """Another connection has its addresses. Its sockets may live on, and read what came."""
        conn.replaced = True
        if not conn.over and any(end.sock and not end.closed_ns for end in conn.ends):
            self._leave_ways(conn)
            return
        if not conn.over:
            self._finish(conn, "port reused")
        self._release(conn)

    def _release(self, conn: Connection) -> None:
        """Its addresses are free for another connection."""
        for key in conn.keys:
            known = self._tuples.get(key, [])
            if conn in known:
                known.remove(conn)
                if not known:
                    del self._tuples[key]
        conn.keys = []
        self._leave_ways(conn)

    def _leave_ways(self, conn: Connection) -> None:
        """No packet finds it any more by where it is seen."""
        for key in conn.ways:
            way = self._ways.get(key)
            if way is not None and way[0] is conn:
                del self._ways[key]
        conn.ways = []

    def _turn(self, conn: Connection) -> None:
        """Which end is the client was guessed, and wrong."""
        namespaces = {key[0] for key in conn.keys}
        self._release(conn)
        conn.client, conn.service = conn.service, conn.client
        conn.flows = (conn.flows[1], conn.flows[0])
        conn.guessed = False
        conn.answered, conn.replying = -1, None
        conn.ask_ns = conn.ask_by = None
        conn.came, conn.doubt = -1, None
        conn.waiting.clear()
        for netns in namespaces:
            self._register(conn, netns)

    def _is_new(self, conn: Connection, row: Any) -> bool:
        """A SYN begins another connection by the same addresses."""
        if conn.over:
            return True
        flow = conn.flows[CLIENT]
        return flow.syn != row.seq and (flow.syn >= 0 or flow.begin >= 0)

    def _route(self, row: Any, key: tuple[Any, ...]) -> tuple[Connection, int] | None:
        """Connection and direction of a packet that comes by this way for the first time."""
        source, target = (row.saddr, row.sport), (row.daddr, row.dport)
        flags = row.flags or ""
        opens = _opens(flags)
        there = self._find(row.netns, source, target)
        back = self._find(row.netns, target, source)
        if opens:
            conn, index = self._of_syn(row, there), CLIENT
        else:
            conn, index = self._of_packet(row, there, back, flags)
        if conn is None:
            # What does not begin a connection and carries nothing is the rest of an old one.
            if not row.bytes and "SYN" not in flags:
                return None
            guessed = False
            if "SYN" in flags:
                index = CLIENT if opens else SERVICE
            elif row.point == "rx_ip":
                index = CLIENT
            else:
                guessed = True
                index = CLIENT if (row.dport or 0) < (row.sport or 0) else SERVICE
            conn = self._new(row, turned=index == SERVICE)
            if not row.bytes:
                self._keep_bare(conn)
            conn.guessed = guessed
            self._register(conn, row.netns)
            # Before it has a number: what is not known to begin may be of another, elsewhere.
            if opens:
                self._began_with(conn, row.seq)
        if opens:
            for one in [one for one in back if one.lives and one.is_in(row.netns)]:
                self._replace(one)
        self._displace(conn, row.netns)
        key = _own(key, conn, index)
        way = self._ways[key] = (conn, index)
        conn.ways.append(key)
        return way

    def _of_syn(self, row: Any, known: Sequence[Connection]) -> Connection | None:
        """The connection that a SYN begins, if anything is known of it."""
        likely = []
        for conn in reversed(known):
            flow = conn.flows[CLIENT]
            if flow.syn == row.seq and not conn.over:
                return conn
            if conn.lives and flow.syn < 0 and flow.begin < 0:
                likely.append(conn)
        # In the namespace of its socket, or where that is the only one that has not begun.
        return self._likeliest(likely, likely, None, row.netns)

    def _of_packet(
        self, row: Any, there: Sequence[Connection], back: Sequence[Connection], flags: str
    ) -> tuple[Connection | None, int]:
        """The connection of a packet that does not begin one, and its direction."""
        ack = whole(row, "ack")
        if "SYN" in flags and ack is not None:
            for one in back:
                if one.flows[CLIENT].syn == (ack - 1) & 0xFFFFFFFF and not one.over:
                    return one, SERVICE
        known = [*there, *back]
        likely = [conn for conn in known if conn.lives]
        conn = self._likeliest(likely, known, None, row.netns)
        if conn is None and not likely:
            # The last packets of one that is over.
            conn = next((one for one in reversed(known) if one.over and not one.replaced), None)
        return conn, CLIENT if conn in there else SERVICE

    def _older(self, conn: Connection, index: int, row: Any, flags: str) -> Connection | None:
        """Return the connection of a packet, which may be of the one before by the same addresses.

        A port that is used again begins with a number beyond all of those used before (RFC 6528).
        """
        own, other = conn.flows[index].syn, conn.flows[1 - index].syn
        ack = whole(row, "ack") if "ACK" in flags else None
        if "SYN" in flags:
            return conn
        if (
            (own >= 0 and _before(row.seq, own) and not (row.seq == 0 and "RST" in flags))
            or (other >= 0 and ack is not None and _before(ack, other + 1))
            or (own < 0 and other < 0 and not conn.connected and conn.flows[index].begin < 0)
        ):
            known = self._find(row.netns, conn.client, conn.service)
            return next((one for one in reversed(known) if one.replaced and not one.over), None)
        return conn

    # --- sockets

    def _connect(self, end: End, row: Any, ts_ns: int) -> None:
        conn = end.conn
        end.called = True
        if conn.stamps[CONNECT_CALLED] is None:
            conn.stamps[CONNECT_CALLED] = ts_ns
        conn.began, conn.cut = True, False
        if row.connect_us is not None:
            conn.connect_us, conn.error, conn.error_ns = row.connect_us, row.desc, ts_ns

    def _accept(self, end: End, row: Any, ts_ns: int) -> None:
        self._used(end, row)
        end.conn.stamps[ACCEPTED] = ts_ns
        end.conn.accept_us = real(row, "accept_us")

    def _state(self, end: End, row: Any, ts_ns: int) -> None:
        old, new = row.old_state, row.state
        if old is None:
            return
        end.state = shared(new)
        syn = _syn_of(row)
        if syn >= 0:
            self._identify(end, row, syn)
        conn = end.conn
        if row.connect_us is not None:
            conn.connect_us = row.connect_us
        if new == "TCP_ESTABLISHED":
            conn.began, conn.cut = True, False
            conn.stamps[CONNECTED if end.index == CLIENT else HANDSHAKE_DONE] = ts_ns
        elif new in ("TCP_FIN_WAIT1", "TCP_LAST_ACK"):
            self._fin(conn, end.index)
        elif new == "TCP_CLOSE_WAIT":
            # The other end closed first, whether or not it is watched.
            self._fin(conn, 1 - end.index)
            if end.index == CLIENT:
                conn.left_ns = ts_ns
        elif new == "TCP_CLOSE" and row.desc != "closed":
            self._fail(conn, end.index, row.desc, ts_ns)

    def _fail(self, conn: Connection, index: int, error: str, ts_ns: int) -> None:
        """An end's socket fails. What failed first is why; all else follows from it."""
        if error == "ECONNRESET":
            self._reset(conn, 1 - index)
        elif error == "refused":
            self._reset(conn, SERVICE)
        elif conn.reset_by == index:
            # A socket that gives up says so to the other end, by a RST that leaves before this row.
            conn.reset_by = conn.reset_why = None
        if conn.error is None:
            conn.error, conn.error_ns = error, ts_ns

    def _send(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: C901 - called for each send
        conn = end.conn
        index = end.index
        flow = conn.flows[index]
        count = row.bytes or 0
        at = flow.at(row.seq)
        if flow.begin < 0:
            flow.begin = at
        missed = conn.missed
        if missed:
            known = flow.sent if flow.sent >= 0 else flow.begin
            self._resumes(conn, 1 << index, gap=at != known >= 0)
        finish = at + count
        flow.send(at, finish, ts_ns)
        who = end.who
        if who.pid != row.pid or who.comm != row.comm:
            who = self._used(end, row)
        senders = flow.senders
        if not senders or senders[-1][1] != who:
            if senders:
                senders.append((at, who))
            else:
                flow.senders = [(at, who)]
        if index == SERVICE:
            self._reply(conn, at, ts_ns)
        else:
            if conn.answered < 0:
                conn.answered = at
            if conn.ask_ns is None and finish > conn.answered:
                conn.ask_ns, conn.ask_by = ts_ns, who
                if not missed & (1 << CLIENT | 1 << _READS + CLIENT):
                    conn.think_ns += self._thought(conn, ts_ns)
        if len(flow.sends) > _LONG:
            self._prune(conn, index)

    def _send_short(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: ARG002 - as all of them
        """The last call's bytes end where this row's begin."""
        conn = end.conn
        flow = conn.flows[end.index]
        at = flow.at(row.seq)
        flow.sent = at
        if not flow.sends:
            return
        _, when = flow.sends.pop()
        if at > flow.last_send:
            flow.sends.append((at, when))
        elif end.index == CLIENT and conn.ask_ns == when:
            conn.ask_ns = reached(flow.sends, conn.answered + 1)
            conn.ask_by = caller(flow.senders, conn.answered)
            conn.think_ns -= self._thought(conn, when)

    def _thought(self, conn: Connection, ts_ns: int | None) -> int:
        """So long (ns) the client took to ask again, at an instant, after it had read a reply."""
        read_ns = conn.flows[SERVICE].read_ns
        return ts_ns - read_ns if ts_ns and read_ns else 0

    def _ready(self, end: End, row: Any, ts_ns: int) -> None:
        conn = end.conn
        flow = conn.flows[1 - end.index]
        ready = flow.ready
        if ready is NOWHERE:
            ready = flow.ready = Reach()
        copied = flow.at(row.seq)
        flow.copied = max(flow.copied, copied)
        if flow.begin < 0:
            flow.begin = copied
        if end.index == SERVICE and conn.answered < 0:
            conn.answered = flow.begin
        # It begins with what is unread, not with what is new.
        if ready.pass_by(0, copied + (row.bytes or 0), ts_ns) and len(ready.log) > _LONG:
            self._prune(conn, 1 - end.index)

    def _recv(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: C901 - one row in four is one
        count = row.bytes
        conn = end.conn
        index = end.index
        if not count:
            if count == 0 and index == CLIENT:
                conn.eof_ns = ts_ns
            return
        flow = conn.flows[1 - index]
        at = flow.at(row.seq)
        if flow.begin < 0:
            flow.begin = at
        if conn.missed:
            gap = at > (flow.read if flow.read >= 0 else flow.begin)
            self._resumes(conn, 1 << _READS + index, gap=gap)
        finish = at + count
        if finish <= flow.read:
            return
        if at != flow.read or conn.doubt is not None:
            self._skipped(conn, index, at)
        flow.take(finish, ts_ns)
        who = end.who
        if who.pid != row.pid or who.comm != row.comm:
            self._used(end, row)
        if index == CLIENT:
            if finish > flow.sent >= 0 and conn.replying and conn.ends[SERVICE].streams:
                conn.replying.beyond = True
            self._replied(conn, at, finish)
        elif conn.answered < 0:
            conn.answered = flow.begin
        if len(flow.reads) > _LONG:
            self._prune(conn, 1 - index)

    def _resumes(self, conn: Connection, kind: int, *, gap: bool) -> None:
        """The first row of its kind behind a loss; `gap` says that bytes have passed in between.

        Then turns may have passed, too: where the reply before ended is not known, nor where
        what is under way began.
        """
        if conn.missed & kind:
            conn.missed &= ~kind
            if gap:
                conn.torn = True
                self._tear(conn)

    def _tear(self, conn: Connection) -> None:
        """What is replied, or on its way to the client, was not seen whole."""
        for exchange in conn.waiting:
            exchange.missed = True
        if conn.replying is not None:
            conn.replying.missed = True

    def _skipped(self, conn: Connection, index: int, at: int) -> None:
        """An end reads from `at` on: of what it had not read before, a row was missing."""
        flow = conn.flows[1 - index]
        if not conn.ends[1 - index].streams:
            flow.skip_urgent(flow.read, at)
        if at > flow.read >= 0:
            # At an instant that is not this one.
            flow.note_read(at, None)
            flow.unseen = True
        if index == CLIENT:
            return
        known = flow.read if flow.read >= 0 else conn.answered
        if at > known >= 0:
            flow.copied = max(flow.copied, at)
            self._settle(conn)
        elif conn.doubt is not None and at < conn.doubt[2]:
            conn.doubt = None  # it had not read that when it sent

    def _replied(self, conn: Connection, at: int, finish: int) -> None:
        """Bytes of the service's stream are seen, behind the service."""
        flow = conn.flows[SERVICE]
        # Where nobody watches its socket, this is how we learn that it replies.
        if finish > flow.sent and not conn.ends[SERVICE].sock:
            # A packet may carry what was sent before along with what was not.
            at = max(at, flow.sent)
            flow.sent = finish
            self._reply(conn, at, None)
        if conn.waiting:
            self._come(conn)

    def _close(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: ARG002 - as all of them
        self._retire(end, ts_ns)

    def _stats(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: ARG002 - as all of them
        end.stats = {name: whole(row, name) for name in STATS}

    # --- packets

    def _packet(
        self, conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str
    ) -> None:
        flow = conn.flows[index]
        netns = row.netns
        leaves = point == "nic_tx"
        # Elsewhere it is on its way only: a bridge, a router, the other end of a veth.
        if leaves:
            if netns != flow.tx_netns:
                if flow.tx_netns is not None:
                    return
                flow.tx_netns = netns
        elif netns != flow.rx_netns:
            if flow.rx_netns is not None:
                return
            flow.rx_netns = netns
        if flags not in _PLAIN:
            self._flags(conn, index, row, ts_ns, point, flags)
        if point != "rx_ip" and (leaves or flow.tx_netns is None):
            self._window(conn, flow, row, flags)
        count = row.bytes
        if count:
            # A SYN has a number of its own, before that of the first byte.
            at = flow.at(row.seq + 1 if "SYN" in flags else row.seq)
            ack = whole(row, "ack")
            if ack is not None and "ACK" in flags:
                self._acked(conn, index, ack)
            self._data(conn, index, row, ts_ns, at, at + count)

    def _acked(self, conn: Connection, index: int, ack: int) -> None:
        """What an end acknowledges has come to it, whether or not its rows have."""
        flow = conn.flows[1 - index]
        if flow.ref < 0:
            return
        acked = flow.at(ack)
        if flow.fin >= 0:
            acked = min(acked, flow.fin)
        for reach in (flow.nic, flow.ip):
            if 0 <= reach.position < acked:
                reach.skip(acked)
        if index == CLIENT and conn.waiting:
            self._come(conn)

    def _data(  # noqa: C901, PLR0912 - three points, each with the same few steps
        self, conn: Connection, index: int, row: Any, ts_ns: int, at: int, finish: int
    ) -> None:
        """A packet's payload, from `at` to `finish`."""
        flow = conn.flows[index]
        point = row.point
        if flow.begin < 0:
            flow.begin = at
        if conn.missed:
            number = _KINDS.index(point)
            before = (flow.tx, flow.nic, flow.ip)[number].position
            # Where sockets tell of both ends, the turns are theirs.
            alone = not (conn.ends[CLIENT].sock and conn.ends[SERVICE].sock)
            kind = 1 << _PACKET_ROWS + len(_KINDS) * index + number
            self._resumes(conn, kind, gap=alone and at > before >= 0)
        if point == "nic_tx":
            reach = flow.tx
            if reach is NOWHERE:
                reach = flow.tx = Reach()
            device = _device(row)
            flow.tx_dev = flow.tx_dev or shared(device)
            if not reach.pass_by(at, finish, ts_ns) and flow.tx_dev == device:
                self._again(conn, index, at)
        elif point == "nic_rx":
            reach = flow.nic
            if reach is NOWHERE:
                reach = flow.nic = Reach()
            flow.rx_if = flow.rx_if or shared(row.ifname)
            come = reach.arrive(at, finish, ts_ns, flow.begin)
            if not come and flow.tx_netns is None and flow.rx_if == row.ifname:
                self._again(conn, index, at)
        else:
            reach = flow.ip
            if reach is NOWHERE:
                reach = flow.ip = Reach()
            reach.arrive(at, finish, ts_ns, flow.begin)
        if len(reach.log) > _LONG:
            self._prune(conn, index)
        if index == SERVICE:
            # Of what is new, a later packet may come first.
            self._replied(conn, flow.sent if flow.sent >= 0 else at, finish)
        elif conn.answered < 0:
            conn.answered = flow.begin  # not `at`: a later packet may come first

    def _flags(
        self, conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str
    ) -> None:
        if "SYN" in flags:
            self._syn(conn, index, row, ts_ns, point, flags)
        if "FIN" in flags:
            flow = conn.flows[index]
            flow.fin = flow.at(row.seq) + (row.bytes or 0)
            self._fin(conn, index)
            if len(conn.fins) > 1:
                conn.closing_ns = ts_ns
        if "RST" in flags:
            self._reset(conn, index)
            conn.closing_ns = ts_ns

    def _syn(
        self, conn: Connection, index: int, row: Any, ts_ns: int, point: str, flags: str
    ) -> None:
        flow = conn.flows[index]
        conn.began, conn.cut = True, False
        if index == CLIENT:
            self._began_with(conn, row.seq)
        elif flow.syn < 0:
            flow.syn = row.seq
            if flow.begin < 0:
                flow.begin = flow.at(row.seq) + 1
        if _opens(flags):
            number = SYN_TX if point == "nic_tx" else SYN_RX
        else:
            number = SYNACK_TX if point == "nic_tx" else SYNACK_RX
        if conn.stamps[number] is None:
            conn.stamps[number] = ts_ns
            if point == "nic_tx":
                flow.tx_dev = shared(_device(row))
            elif point == "nic_rx":
                flow.rx_if = shared(row.ifname)
        elif index == CLIENT and (
            (point == "nic_tx" and flow.tx_dev == _device(row))
            or (point == "nic_rx" and flow.tx_dev is None and flow.rx_if == row.ifname)
        ):
            conn.syns += 1

    def _window(self, conn: Connection, flow: Flow, row: Any, flags: str) -> None:
        window = whole(row, "window")
        if window is None or "RST" in flags:
            return
        if window:
            if flow.zero:
                flow.zero = False
                self._closed_windows -= 1
        elif not flow.zero:
            flow.zero = True
            self._closed_windows += 1
            flow.zero_windows += 1
            if conn.replying is not None:
                conn.replying.zero_windows += 1
            else:
                conn.ask_zeros += 1

    def _again(self, conn: Connection, index: int, at: int) -> None:
        """Bytes from `at` on are sent once more."""
        conn.flows[index].retransmits += 1
        under_way = [*conn.waiting, *([conn.replying] if conn.replying else ())]
        for exchange in under_way:
            if index == CLIENT and exchange.request_begin <= at < exchange.request_end:
                exchange.retransmits += 1
                return
            if (
                index == SERVICE
                and exchange.reply_begin <= at
                and (exchange.reply_end < 0 or at < exchange.reply_end)
            ):
                exchange.retransmits += 1
                return
        if index == CLIENT:
            conn.ask_retransmits += 1

    def _fin(self, conn: Connection, index: int) -> None:
        if index not in conn.fins:
            conn.fins.append(index)
            conn.fin_ns[index] = conn.last_ns

    def _reset(self, conn: Connection, index: int) -> None:
        """An end resets the connection; not where it had failed already."""
        if conn.reset_by is not None or conn.error is not None:
            return
        conn.reset_by, conn.reset_ns = index, conn.last_ns
        end = conn.ends[index]
        inbound = conn.flows[1 - index]
        known = max(inbound.read, inbound.begin)
        if (
            index == SERVICE
            and conn.began
            and conn.stamps[CONNECTED] is None
            and conn.flows[SERVICE].begin < 0
        ):
            conn.reset_why = "nobody listens there"
        elif end.sock:
            if inbound.arrived() > known and not (index in conn.fins and end.closed_ns):
                conn.reset_why = "it closed with unread data"
            elif index in conn.fins or end.closed_ns:
                conn.reset_why = "data came after it had closed"
            elif inbound.sent <= known:  # else some of it may have come, and not been read
                conn.reset_why = "it aborted"

    # --- turns

    def _reply(self, conn: Connection, at: int, ts_ns: int | None) -> None:
        """The service sends from `at` on. It answers what it has read and not answered before."""
        watched = conn.ends[SERVICE].sock
        if watched and conn.flows[CLIENT].copied > conn.answered:
            self._settle(conn)
        asked = self._asked(conn)
        if asked > conn.answered >= 0:
            conn.doubt = None
            self._answer(conn, at, ts_ns, asked)
            conn.came = self._has_got(conn) if watched else asked
            return
        if conn.replying is None:
            conn.replying = exchange = Exchange(conn, "push")
            exchange.reply_begin = at
            exchange.stamps[REPLY_SENT] = ts_ns
            exchange.by[SERVICE] = caller(conn.flows[SERVICE].senders, at)
        if conn.missed:
            # It may answer what it read, or what was asked, where rows were lost.
            asking = 1 << _READS + SERVICE if watched else _ASKING_ROWS
            if conn.missed & asking == asking:
                self._tear(conn)
        if watched and conn.doubt is None:
            came = self._has_got(conn)
            if came > max(conn.answered, conn.came) and conn.answered >= 0:
                conn.doubt = (at, ts_ns, came)

    def _answer(self, conn: Connection, at: int, ts_ns: int | None, asked: int) -> None:
        """A reply to all up to `asked` begins at `at`."""
        request, old = conn.flows[CLIENT], conn.replying
        if old is not None and old.reply_begin < at:
            self._end_reply(old, at, "turn")
        exchange = self._begin(conn, "exchange", asked)
        exchange.reply_begin = at
        exchange.stamps[REPLY_SENT] = ts_ns
        exchange.by[SERVICE] = caller(conn.flows[SERVICE].senders, at)
        self._ask_from(conn, asked)
        request.forget(asked + 1)
        conn.replying = exchange

    def _ask_from(self, conn: Connection, asked: int) -> None:
        """What comes behind `asked` is another request."""
        conn.answered = asked
        request = conn.flows[CLIENT]
        conn.ask_ns = reached(request.sends, asked + 1)
        conn.ask_by = caller(request.senders, asked)

    def _settle(self, conn: Connection, why: str = "") -> None:
        """Decide what the service had read, where calls that have no rows may have read it.

        A wake-up tells how far it had come by then; the next wake-up comes with the next request.

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
            self._arrived(replying, copied)
            self._ask_from(conn, copied)
            flow.forget(copied + 1)

    def _has_got(self, conn: Connection) -> int:
        """How far the client's stream has come to the service's socket; -1 if it is not known."""
        flow = conn.flows[CLIENT]
        arrived = flow.arrived()
        if arrived >= 0:
            return arrived
        ready = flow.ready.position  # a FIN counts there
        for end in (flow.fin, flow.sent):
            if end >= 0:
                ready = min(ready, end)
        return ready

    def _asked(self, conn: Connection) -> int:
        """How far the service has read; where its socket is not watched, how far it can have."""
        flow = conn.flows[CLIENT]
        if conn.ends[SERVICE].sock:
            return flow.read
        arrived = flow.arrived()
        if arrived >= 0:
            return arrived
        return flow.tx.position if flow.tx.position >= 0 else flow.sent

    def _begin(self, conn: Connection, kind: str, end: int) -> Exchange:
        """An exchange, and what is known of its request's way."""
        exchange = Exchange(conn, kind)
        if conn.breaks != self._breaks:
            self._break(conn)
        exchange.request_begin, exchange.request_end = conn.answered, end
        exchange.stamps[CLIENT_SENT] = conn.ask_ns
        exchange.by[CLIENT] = conn.ask_by
        unsent = conn.ask_ns is None and conn.missed & 1 << CLIENT and conn.ends[CLIENT].streams
        exchange.missed = conn.torn or bool(unsent)
        conn.torn = False
        self._arrived(exchange, end)
        exchange.retransmits, conn.ask_retransmits = conn.ask_retransmits, 0
        exchange.zero_windows, conn.ask_zeros = conn.ask_zeros, 0
        return exchange

    def _arrived(self, exchange: Exchange, end: int) -> None:
        """When the last byte of a request, which ends at `end`, came how far."""
        flow, stamps = exchange.conn.flows[CLIENT], exchange.stamps
        stamps[REQUEST_TX] = reached(flow.tx.log, end)
        stamps[REQUEST_RX] = reached(flow.nic.log, end)
        stamps[REQUEST_IP] = reached(flow.ip.log, end)
        stamps[REQUEST_READY] = reached(flow.ready.log, end)
        stamps[REQUEST_READ] = reached(flow.reads, end)

    def _end_reply(self, exchange: Exchange, end: int, why: str) -> None:
        conn = exchange.conn
        conn.replying = None
        exchange.reply_end = max(end, exchange.reply_begin)
        exchange.ended = why
        if conn.waiting or not self._has_come(conn, end):
            if conn.waiting is NONE_WAIT:
                conn.waiting = deque()
            conn.waiting.append(exchange)
            self._come(conn)
        else:
            self._complete(exchange)

    def _has_come(self, conn: Connection, end: int) -> bool:
        """As far as anybody watches, the reply is there up to `end`."""
        flow = conn.flows[SERVICE]
        if conn.ends[CLIENT].sock:
            # Of splice() there may be no rows: then nobody will ever know when it was read.
            return flow.read >= end or len(conn.waiting) > _LONGEST
        arrived = flow.arrived()
        if arrived >= 0:
            return arrived >= end
        return flow.tx.position < 0 or flow.tx.position >= end

    def _come(self, conn: Connection) -> None:
        while conn.waiting and self._has_come(conn, conn.waiting[0].reply_end):
            self._complete(conn.waiting.popleft())

    def _complete(self, exchange: Exchange, why: str = "") -> None:
        """The way of the reply is known as far as it ever will be; `why` the connection ends."""
        conn = exchange.conn
        flow = conn.flows[SERVICE]
        end = exchange.reply_end
        stamps = exchange.stamps
        stamps[REPLY_TX] = reached(flow.tx.log, end)
        stamps[REPLY_RX] = reached(flow.nic.log, end)
        stamps[REPLY_IP] = reached(flow.ip.log, end)
        stamps[REPLY_READY] = reached(flow.ready.log, end)
        stamps[REPLY_READ] = reached(flow.reads, end)
        flow.forget(end + 1)
        if why:
            self._cut_short(exchange, why)
        self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        conn = exchange.conn
        request, reply = conn.flows
        exchange.urgent = (
            request.take_urgent(exchange.request_begin, exchange.request_end),
            reply.take_urgent(exchange.reply_begin, exchange.reply_end),
        )
        cut, conn.cut = conn.cut, False
        if cut and (
            exchange.kind == "push"
            or (conn.ends[CLIENT].sock and exchange.stamps[CLIENT_SENT] is None)
        ):
            self.cut += 1
            conn.untold += 1
            return
        known = sum(at is not None for at in exchange.stamps)
        # What was not answered has waited until something ended it: one instant will do.
        if known < (1 if exchange.kind == "request" or exchange.over_ns is not None else 2):
            self.untimed += 1
            conn.untold += 1
            return
        if self._gaps and self._spans_loss(exchange):
            self.missed += 1
            conn.untold += 1
            conn.spans_loss += 1
            return
        # Whoever uses the connection afterwards, this exchange was not theirs.
        exchange.by = [exchange.who(CLIENT), exchange.who(SERVICE)]
        conn.told += 1
        exchange.number = conn.told
        outcome, outcomes = exchange.outcome, conn.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome == ANSWERED:
            total_ns = exchange.split.total_ns
            conn.longest_ns = max(conn.longest_ns, total_ns)
            if total_ns > self._longest.get(conn.service, 0) and (
                len(self._longest) < _MOST_SERVICES or conn.service in self._longest
            ):
                self._longest[conn.service] = total_ns
        self._told.append(exchange)

    def _spans_loss(self, exchange: Exchange) -> bool:
        """Rows were lost between its first instant and its last, as far as these are known."""
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
            return True  # its end is not known: what would tell may be among what was lost
        return exchange.beyond or self._gaps[first][0] < max(*known, exchange.over_ns or 0)

    # --- what ended without a reply, or before the end of one

    def _cut_short(self, exchange: Exchange, why: str) -> None:
        """Its connection ends while its reply is sent, or on its way: was it answered?"""
        conn = exchange.conn
        if exchange.kind == "push":
            return
        left = self._client_left(conn)
        sent_ns = exchange.stamps[REPLY_SENT]
        came = self._has_come_whole(conn, exchange)
        if left and sent_ns is not None and left[0] < sent_ns and not self._was_read(exchange):
            exchange.outcome = UNANSWERED
            exchange.over_ns, exchange.over_by = left
        elif not came:
            over = self._over_at(conn)
            if over is None:
                exchange.outcome = OPEN
                exchange.over_ns, exchange.over_by = self._stopped(conn, why)
            elif conn.reset_by is not None or conn.error:
                exchange.outcome = CUT
                exchange.over_ns, exchange.over_by = over

    def _was_read(self, exchange: Exchange) -> bool:
        """The client got a byte of the reply, as far as its calls tell."""
        return exchange.conn.flows[SERVICE].read > exchange.reply_begin

    def _has_come_whole(self, conn: Connection, exchange: Exchange) -> bool:
        """Nothing says that some of the reply did not come to the client."""
        flow, end = conn.flows[SERVICE], exchange.reply_end
        if not conn.ends[CLIENT].streams:
            return not 0 <= flow.arrived() < end
        if flow.read >= end:
            return True
        # By calls that have no rows it may have read what has come.
        return (flow.read < 0 or flow.unseen) and flow.arrived() >= end

    def _unanswered(self, exchange: Exchange, why: str) -> None:
        """A request that no byte of a reply followed: what is it?"""
        conn, stamps = exchange.conn, exchange.stamps
        began_ns = next((at for at in stamps if at is not None), None)
        if began_ns is None:
            return
        request = conn.flows[CLIENT]
        sent = reached(request.sends, exchange.request_end)
        come = [at for at in stamps[:REQUEST_READ] if at is not None]
        last_ns = sent or max(come, default=began_ns)
        over, left = self._over_at(conn), self._client_left(conn)
        patience_ns = conn.patience_ns
        gone_ns = conn.left_ns or (conn.fin_ns[SERVICE] and conn.fin_ns[SERVICE] + patience_ns)
        if self._replied_unseen(conn, began_ns):
            exchange.outcome = UNKNOWN
        elif over is None:
            exchange.outcome = OPEN
            exchange.over_ns, exchange.over_by = self._stopped(conn, why)
            if why == "end of run":
                self._undecided.append(exchange)
        elif (
            (left and left == over and left[0] - last_ns < patience_ns)
            or self._parted(exchange, last_ns)
            or (gone_ns and gone_ns < began_ns)
        ):
            # It left at once; or the service had closed its side before, and could not answer.
            exchange.outcome = ONE_WAY
        else:
            exchange.outcome = UNANSWERED
            exchange.over_ns, exchange.over_by = over

    def _replied_unseen(self, conn: Connection, since_ns: int) -> bool:
        """Whether the service sent, since an instant, what no row of its calls tells.

        Of MPTCP there are no such rows: the calls are another socket's. Rows may be lost, too.
        """
        end, flow = conn.ends[SERVICE], conn.flows[SERVICE]
        if not end.streams:
            return False
        told = max(flow.sent, flow.begin)
        for reach in (flow.tx, flow.nic, flow.ip):
            at_ns = reach.log[-1][1] if reach.log else None
            if reach.position > told >= 0 and at_ns is not None and at_ns > since_ns:
                return True
        if not conn.began:
            return False
        # The kernel counts a SYN and a FIN as well.
        count = max(flow.sent - flow.begin, 0) if flow.sent >= 0 else 0
        acked = (end.stats or {}).get("bytes_acked") or 0
        received = (conn.ends[CLIENT].stats or {}).get("bytes_received") or 0
        if max(acked - 2, received - 1) > count:
            return True
        # What was never accepted is reset, not closed: so its calls have no rows.
        return bool(
            flow.sent < 0
            and conn.flows[CLIENT].read < 0
            and conn.stamps[HANDSHAKE_DONE] is not None
            and conn.stamps[ACCEPTED] is None
            and conn.fin_ns[SERVICE]
            and conn.reset_by is None
        )

    def _parted(self, exchange: Exchange, last_ns: int) -> bool:
        """Whether a last message was a farewell: the client closed for itself, right behind it.

        A service that reads a farewell closes as well, and its FIN may be there first: on a busy
        host the client has not come to its close() yet. Who waits for a reply reads the end of
        the service's stream before it closes.

        Args:
            exchange: A request without a reply.
            last_ns: When its last byte was sent.
        """
        conn = exchange.conn
        left_ns, gone_ns = conn.fin_ns
        if conn.reset_by is not None or conn.error or not left_ns or not self._by_itself(conn):
            return False
        if left_ns - last_ns < conn.patience_ns:
            return True
        # Later: only where both ends close in order, the service has read it, and has answered
        # before.
        unread = conn.ends[SERVICE].streams and exchange.stamps[REQUEST_READ] is None
        if not gone_ns or not conn.longest_ns or unread:
            return False
        if gone_ns < left_ns and self._sees_reads(conn):
            parting_ns = _LONGEST_PARTING_NS  # it was not waiting: it would have read the end
        else:
            # No client gives up sooner than it has waited for another answer.
            parting_ns = max(_PARTING_NS, min(conn.longest_ns, _LONGEST_PARTING_NS))
        return left_ns - last_ns < parting_ns and gone_ns - last_ns < _LONGEST_PARTING_NS

    def _by_itself(self, conn: Connection) -> bool:
        """The client closed its socket without having seen that the service had closed its side."""
        left_ns, gone_ns = conn.fin_ns
        if conn.eof_ns:
            return False  # before it closed; or it closed its side alone, and went on waiting
        if not gone_ns or left_ns <= gone_ns or self._sees_reads(conn):
            return True
        # Nothing tells what it read: its FIN left before the service's could have come to it.
        trip_ns = conn.trip_ns
        return trip_ns is not None and left_ns - gone_ns < trip_ns

    def _sees_reads(self, conn: Connection) -> bool:
        """Whatever the client reads, its rows tell: also the end of the service's stream."""
        return conn.ends[CLIENT].streams and not conn.flows[SERVICE].unseen

    def _client_left(self, conn: Connection) -> tuple[int, str] | None:
        """When the client closed its socket, or aborted; None where it only closed its side."""
        found = []
        if conn.reset_by == CLIENT:
            found.append((conn.reset_ns, "reset by the client"))
        half = conn.eof_ns > conn.fin_ns[CLIENT]  # it went on reading to the end
        if conn.fin_ns[CLIENT] and not half:
            found.append((conn.fin_ns[CLIENT], "closed by the client"))
        return min(found, default=None)

    def _over_at(self, conn: Connection) -> tuple[int, str] | None:
        """What ended the waiting on a connection first, and when; None where nothing did."""
        found = []
        left = self._client_left(conn)
        if left is not None:
            found.append(left)
        if conn.reset_by == SERVICE:
            found.append((conn.reset_ns, "reset by the service"))
        elif conn.error and conn.reset_by is None:
            found.append((conn.error_ns, conn.error))
        if conn.fin_ns[SERVICE]:
            found.append((conn.fin_ns[SERVICE], "closed by the service"))
        if not found:
            closed = [(end.closed_ns, end.index) for end in conn.ends if end.closed_ns]
            found = [(at, f"closed by the {_NAMES[index]}") for at, index in closed]
        return min(found, default=None)

    def _stopped(self, conn: Connection, why: str) -> tuple[int, str]:
        """Until when a connection was followed, of which no end was seen."""
        return (self._last_ns if why == "end of run" else conn.last_ns), why

    def _decide(self, exchange: Exchange) -> None:
        """At the end of the run: it may yet be answered, or has waited longer than any that was."""
        conn, waited_ns = exchange.conn, exchange.waited_ns or 0
        if not exchange.number:  # it is not told
            return
        if waited_ns < _PATIENT_NS or waited_ns <= self._longest.get(conn.service, 0):
            return
        exchange.outcome = UNANSWERED
        conn.outcomes[OPEN] -= 1
        conn.outcomes[UNANSWERED] = conn.outcomes.get(UNANSWERED, 0) + 1

    # --- ends

    def _finish(self, conn: Connection, why: str) -> None:
        """The connection is over, or is not followed any longer."""
        if conn.ends[SERVICE].sock:
            self._settle(conn, why)
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
            end = max(request.read, self._asked(conn), self._has_got(conn))
        if end > conn.answered >= 0:
            exchange = self._begin(conn, "request", end)
            exchange.ended = why
            self._unanswered(exchange, why)
            self._tell(exchange)
        conn.ended = why
        conn.over = True
        self._bare.pop(conn.number, None)
        self._last_ns = max(self._last_ns, conn.last_ns)
        self._told.append(conn)
        del self._conns[conn.number]
        for one in conn.ends:
            self._let_go(one)
            del one.conn  # a cycle, and the collector comes seldom: see spare_the_collector()
        self._over.append(conn)
        if len(self._over) > _MOST_OVER:
            self._release(self._over.popleft())
        # Its addresses stay for a while; what its streams held goes now.
        for flow in conn.flows:
            self._closed_windows -= flow.zero
            flow.zero = False
            flow.drop_logs()

    def _let_go(self, end: End) -> None:
        """Its connection is told. A socket that is not closed begins no other by what is left."""
        sock = end.sock
        if not sock or self._socks.get(sock) is not end:
            return
        del self._socks[sock]
        if end.conn.replaced:
            self._done[sock] = None
            if len(self._done) > _MOST_DONE:
                del self._done[next(iter(self._done))]

    def _pass(self, ts_ns: int) -> None:
        """Each step of the time up to now at which something may be over, one after the other."""
        at = self._next_sweep_ns
        while at <= ts_ns:
            due_ns = self._sweep(at)
            if due_ns is None:
                break
            at = max(at + _STEP_NS, _step(due_ns))
        # What a row begins from now on is over after so long, at the earliest.
        soonest_ns = _step(ts_ns + min(_SECOND_NS, self._idle_ns))
        self._next_sweep_ns = soonest_ns if at <= ts_ns else min(at, soonest_ns)

    def _sweep(self, now_ns: int) -> int | None:
        """Tell what has been silent for long.

        What is told, and in which order, must not depend on how often this is called: so
        `now_ns` is a whole step, and there is none between two calls at which something were over.

        Returns:
            When something will be over next; None for never, if no row comes.
        """
        over, due = self._over, []
        while over and over[0].last_ns + _STRAGGLERS_NS < now_ns:
            self._release(over.popleft())
        if over:
            due.append(over[0].last_ns + _STRAGGLERS_NS + 1)
        ended = []
        for conn in self._conns.values():
            at, why = self._silent(conn)
            if at is None:
                continue
            if at > now_ns:
                due.append(at)
            elif why == "idle":
                self._end_idle(conn)
            else:
                ended.append((conn, why))
        for conn, why in ended:
            self._finish(conn, why)
        return min(due, default=None)

    def _silent(self, conn: Connection) -> tuple[int | None, str]:
        """When silence will end a connection, or its reply, and what it is called then."""
        if conn.replaced:
            return conn.last_ns + self._idle_ns + 1, "port reused"
        if conn.closing_ns and not conn.ends[CLIENT].sock and not conn.ends[SERVICE].sock:
            return conn.last_ns + _SECOND_NS, "closed"
        if conn.replying is not None:
            return conn.last_ns + self._idle_ns + 1, "idle"
        return None, ""

    def _end_idle(self, conn: Connection) -> None:
        """Nothing has moved for long: a reply that has come is taken to be complete."""
        reply = conn.flows[SERVICE]
        if conn.replying is not None and self._has_come(conn, reply.sent):
            if conn.ends[SERVICE].sock:
                self._settle(conn, "idle")
            self._end_reply(conn.replying, reply.sent, "idle")

    def _prune(self, conn: Connection, index: int) -> None:
        """A message of many packets: forget the instants that no longer can be its last byte's."""
        flow = conn.flows[index]
        if index == CLIENT:
            needed = max(self._asked(conn), conn.answered)
        elif conn.ends[CLIENT].sock:
            needed = flow.read
        else:
            needed = conn.waiting[0].reply_end if conn.waiting else flow.sent
        if index == SERVICE and conn.doubt is not None:
            needed = min(needed, conn.doubt[0])
        flow.forget(needed)
        if len(flow.senders) > _LONG:
            flow.senders[: _LONG // 2] = [(flow.senders[0][0], NOBODY)]
        for log in flow.logs():
            if len(log) > _LONGEST:
                # Every other one stays: an instant is then off by one of them, not by all.
                del log[:-1:2]


def _step(ts_ns: int) -> int:
    """The first whole step that is not before."""
    return -(-ts_ns // _STEP_NS) * _STEP_NS


def _opens(flags: str) -> bool:
    """A SYN, whatever it says besides (ECN), and no answer to one."""
    return "SYN" in flags and "ACK" not in flags


def _device(row: Any) -> str | None:
    """What a packet leaves by; a probe that is not ours may call it otherwise."""
    device: str | None = row.ifname
    named = getattr(row, "dev", None)
    return named if isinstance(named, str) and named else device


def _calls(row: Any) -> bool:
    """A row by which a socket begins to connect."""
    if row.point == "connect":
        return True
    return (row.point, row.old_state, row.state) == ("state", "TCP_CLOSE", "TCP_SYN_SENT")


def _listens(row: Any) -> bool:
    return "TCP_LISTEN" in (row.state, row.old_state)


def _goes_again(end: End, row: Any) -> bool:
    """Whether a socket that is known does something with which a connection cannot go on."""
    if row.point == "connect":
        # Its change of state may be told first, where both have the same instant.
        return end.called or end.state != "TCP_SYN_SENT"
    if _listens(row):
        return True
    return _calls(row) and not (end.called and end.state is None)


def _syn_of(row: Any) -> int:
    """Number of the client's SYN, as a change of state tells it; else -1."""
    if row.point != "state" or row.seq is None:
        return -1
    return int(row.seq - 1) & 0xFFFFFFFF


def _before(seq: int, other: int) -> bool:
    """Whether a sequence number comes before another."""
    return bool((seq - other) & 0x80000000)


def _own(key: tuple[Any, ...], conn: Connection, index: int) -> tuple[Any, ...]:
    """The key of a packet's way, of the connection's own texts and numbers where they are the same.

    Those of a row are others, which would stay in memory as long as the key does.
    """
    ends = (conn.client, conn.service) if index == CLIENT else (conn.service, conn.client)
    own = (key[0], *ends[0], *ends[1])
    return own if own == key else key


def _key(netns: Any, client: Any, service: Any) -> tuple[Any, ...]:
    return (netns if _is_loopback(client[0], service[0]) else None, *client, *service)


def _is_loopback(address: str, other: str) -> bool:
    """Both ends are in one namespace, and every namespace has the same addresses."""
    return address == other or address.startswith("127.") or address == "::1"
