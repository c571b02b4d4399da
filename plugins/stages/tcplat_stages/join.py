"""Rows of all probes and both ends -> connections and their exchanges, by TCP's own numbers.

A row belongs to a connection by its socket, or by its addresses, ports and network
namespace; within the connection, to the bytes that its sequence number names.
Never to "the next packet": segmentation, GRO, delayed ACKs, retransmits and
pipelining move packets about, and leave the numbers of bytes alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from .model import CLIENT, SERVICE, STATS, Connection, End, Exchange, Flow, Reach, reached
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
_ROLES = {"tcp_client": CLIENT, "tcp_service": SERVICE, "client": CLIENT, "service": SERVICE}
"""Whose socket it is, by the probe, or by what tcp_stats says."""
_STREAM = frozenset({"send", "send_short", "recv", "ready"})
_PLAIN = frozenset({"ACK", "PSH|ACK"})
_PACKETS = frozenset({"nic_tx", "nic_rx", "rx_ip"})
_STRAGGLERS_NS = 2 * _SECOND_NS
"""So long a connection that is over still takes what belongs to it."""
_MOST_OVER = 8_192
"""Connections that are over and still take what belongs to them."""
_LONG = 256
"""Entries of a log that are kept without looking whether they are needed."""
_LONGEST = 16_384
"""Entries that are kept at all: 16,384 packets that nobody has read yet."""


class Joiner:
    """Joins rows; see feed().

    Args:
        idle_ns: A reply is taken to be complete when all of it was read, and nothing
            more has come for so long.
        most: Connections that are remembered; the one that was silent for longest goes.

    Attributes:
        given_up: Connections that went for want of room.
        cut: Exchanges that were under way when the capture began: they are not told.
        untimed: Messages of which only one instant is known.
    """

    def __init__(self, *, idle_ns: int = 10 * _SECOND_NS, most: int = 65_536) -> None:
        self.given_up = 0
        self.cut = 0
        self.untimed = 0
        self._idle_ns = idle_ns
        self._most = most
        self._number = 0
        self._told: list[Told] = []
        self._conns: dict[int, Connection] = {}
        self._socks: dict[int, End] = {}
        self._tuples: dict[tuple[Any, ...], Connection] = {}
        self._ways: dict[tuple[Any, ...], tuple[Connection, int]] = {}
        self._over: deque[Connection] = deque()
        self._next_sweep_ns = 0
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

    def feed(self, rows: Iterable[Any]) -> list[Told]:  # noqa: C901 - one pass over a million rows
        """Take rows in order of time; what became complete by them.

        An exchange is complete when the next one's reply begins, when its connection
        is over, or when nothing moves any more. What comes out is a function of the
        rows alone, however they are divided into batches.
        """
        told = self._told = []
        socks, points, ways = self._socks, self._points, self._ways
        for row in rows:
            ts_ns = row.ts_ns
            if ts_ns >= self._next_sweep_ns:
                self._sweep(ts_ns)
            point = row.point
            sock = row.sock
            if sock:
                handler = points.get(point)
                # A null says that nobody can know: then there is nothing to join by.
                if handler is None or (point in _STREAM and row.seq is None):
                    continue
                end = socks.get(sock) or self._bind(row)
                if end is None:
                    continue
                if not end.named and row.sport:
                    self._name(end, row)
                end.conn.last_ns = ts_ns
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
                if conn.over:
                    continue
                conn.last_ns = ts_ns
                self._packet(conn, index, row, ts_ns, point, flags)
        return told

    def finish(self) -> list[Told]:
        """The rows have ended: tell of what is still open."""
        told = self._told = []
        for conn in list(self._conns.values()):
            self._finish(conn, "end of run")
        return told

    def untold(self) -> list[str]:
        """What was left out, in plain words; nothing if nothing was."""
        counts = (
            (self.cut, "that were under way when the capture began"),
            (self.untimed, "of which one instant alone is known"),
        )
        found = [f"without {count} exchanges {which}" for count, which in counts if count]
        if self.given_up:
            found.append(f"{self.given_up} connections were given up: too many at a time")
        return found

    # --- whose row it is

    def _new(self, row: Any, *, turned: bool = False) -> Connection:
        if len(self._conns) >= self._most:
            oldest = sorted(self._conns.values(), key=lambda conn: conn.last_ns)
            for conn in oldest[: max(1, self._most // 16)]:
                self.given_up += 1
                self._finish(conn, "given up")
        self._number += 1
        conn = self._conns[self._number] = Connection(self._number, row, turned=turned)
        return conn

    def _bind(self, row: Any) -> End | None:
        """A socket that has not been seen before."""
        index = _ROLES.get(row.probe)
        if index is None:
            role = getattr(row, "role", None)  # what an unknown probe calls so may be anything
            index = _ROLES.get(role) if isinstance(role, str) else None
        if index is None or row.dport is None or "TCP_LISTEN" in (row.state, row.old_state):
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

    def _own(self, end: End, row: Any) -> None:
        end.conn.guessed = False
        end.sock = row.sock
        end.netns, end.pid, end.comm = row.netns, row.pid, row.comm
        # What was taken for this end's from packets, was not: of a router between, say.
        sends, receives = end.conn.flows[end.index], end.conn.flows[1 - end.index]
        if sends.tx_netns not in (None, row.netns):
            sends.tx, sends.tx_dev = Reach(), None
        sends.tx_netns = row.netns
        if receives.rx_netns not in (None, row.netns):
            receives.nic, receives.ip, receives.rx_if = Reach(), Reach(), None
        receives.rx_netns = row.netns

    def _connection_of(self, row: Any, index: int) -> Connection:
        """The connection of a socket: known by its packets or its other end, or new."""
        near, far = (row.saddr, row.sport), (row.daddr, row.dport)
        client, service = (near, far) if index == CLIENT else (far, near)
        conn = self._find(row.netns, client, service)
        if conn is None:
            turned = self._find(row.netns, service, client)
            if turned is not None and turned.guessed and not turned.over:
                self._turn(turned)
                conn = turned
        strange = False
        if conn is not None:
            end = conn.ends[index]
            strange = bool(end.sock) and not conn.over and end.netns != row.netns
            if not conn.over and not end.sock:
                return conn
            if not strange:
                self._replace(conn)
        conn = self._new(row, turned=index == SERVICE)
        self._register(conn, row.netns, apart=strange)
        return conn

    def _name(self, end: End, row: Any) -> None:
        """The source port is chosen. Its packets may have been there before this row."""
        own = end.conn
        end.named = True
        conn = self._find(row.netns, (row.saddr, row.sport), (row.daddr, row.dport))
        own.client = (row.saddr, row.sport)
        own.service = (row.daddr, row.dport)
        if conn is None or conn.over or conn.ends[CLIENT].sock:
            if conn is not None:
                self._replace(conn)
            self._register(own, row.netns)
            return
        conn.ends = (end, conn.ends[SERVICE])
        end.conn = conn
        conn.stamps[CONNECT_CALLED] = own.stamps[CONNECT_CALLED]
        conn.first_ns = own.first_ns
        conn.began = conn.began or own.began
        conn.cut = conn.cut and own.cut
        del self._conns[own.number]
        del own.ends[1 - end.index].conn  # as in _finish
        self._own(end, row)

    def _find(self, netns: Any, client: Any, service: Any) -> Connection | None:
        key = (*client, *service)
        return self._tuples.get((netns, *key)) or self._tuples.get(
            (netns if _is_loopback(client[0], service[0]) else None, *key)
        )

    def _register(self, conn: Connection, netns: Any, *, apart: bool = False) -> None:
        apart = apart or _is_loopback(conn.client[0], conn.service[0])
        key = (netns if apart else None, *conn.client, *conn.service)
        self._tuples[key] = conn
        conn.keys.append(key)

    def _replace(self, conn: Connection) -> None:
        """Another connection has its addresses."""
        if not conn.over:
            self._finish(conn, "port reused")
        self._release(conn)

    def _release(self, conn: Connection) -> None:
        """Its addresses are free for another connection."""
        for key in conn.keys:
            if self._tuples.get(key) is conn:
                del self._tuples[key]
        for key in conn.ways:
            way = self._ways.get(key)
            if way is not None and way[0] is conn:
                del self._ways[key]

    def _turn(self, conn: Connection) -> None:
        """Which end is the client was guessed, and wrong."""
        conn.client, conn.service = conn.service, conn.client
        conn.flows = (conn.flows[1], conn.flows[0])
        conn.guessed = False
        conn.answered, conn.ask_ns, conn.replying = -1, None, None
        conn.waiting.clear()
        for key in conn.ways:
            self._ways.pop(key, None)
        for key in conn.keys:
            self._tuples.pop(key, None)
        conn.ways = []
        conn.keys = [(key[0], *conn.client, *conn.service) for key in conn.keys]
        for key in conn.keys:
            self._tuples[key] = conn

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
        index = CLIENT
        conn = self._find(row.netns, source, target)
        if conn is None:
            conn = self._find(row.netns, target, source)
            index = SERVICE if conn is not None else CLIENT
        if conn is not None and opens and self._is_new(conn, row):
            self._replace(conn)
            conn = None
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
            conn.guessed = guessed
            self._register(conn, row.netns)
        way = self._ways[key] = (conn, index)
        conn.ways.append(key)
        return way

    # --- sockets

    def _connect(self, end: End, row: Any, ts_ns: int) -> None:
        conn = end.conn
        if conn.stamps[CONNECT_CALLED] is None:
            conn.stamps[CONNECT_CALLED] = ts_ns
        conn.began, conn.cut = True, False
        if row.connect_us is not None:
            conn.connect_us, conn.error = row.connect_us, row.desc

    def _accept(self, end: End, row: Any, ts_ns: int) -> None:
        end.pid, end.comm = row.pid, row.comm
        end.conn.stamps[ACCEPTED] = ts_ns
        end.conn.accept_us = getattr(row, "accept_us", None)

    def _state(self, end: End, row: Any, ts_ns: int) -> None:
        old, new = row.old_state, row.state
        if old is None:
            return
        conn = end.conn
        if row.connect_us is not None:
            conn.connect_us = row.connect_us
        if new == "TCP_ESTABLISHED":
            conn.began, conn.cut = True, False
            conn.stamps[CONNECTED if end.index == CLIENT else HANDSHAKE_DONE] = ts_ns
        elif new in ("TCP_FIN_WAIT1", "TCP_LAST_ACK"):
            self._fin(conn, end.index)
        elif new == "TCP_CLOSE" and row.desc != "closed":
            conn.error = row.desc
            if row.desc == "ECONNRESET":
                self._reset(conn, 1 - end.index)
            elif row.desc == "refused":
                self._reset(conn, SERVICE)

    def _send(self, end: End, row: Any, ts_ns: int) -> None:
        conn = end.conn
        index = end.index
        flow = conn.flows[index]
        count = row.bytes or 0
        at = flow.at(row.seq)
        if flow.begin < 0:
            flow.begin = at
        finish = at + count
        flow.sends.append((finish, ts_ns))
        flow.last_send = at
        flow.sent = max(flow.sent, finish)
        if end.pid != row.pid and row.pid is not None:
            end.pid, end.comm = row.pid, row.comm
        if index == SERVICE:
            self._reply(conn, at, ts_ns)
        else:
            if conn.answered < 0:
                conn.answered = at
            if conn.ask_ns is None and finish > conn.answered:
                conn.ask_ns = ts_ns
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
            conn.think_ns -= self._thought(conn, when)

    def _thought(self, conn: Connection, ts_ns: int | None) -> int:
        """So long (ns) the client took to ask again, at an instant, after it had read a reply."""
        read_ns = conn.flows[SERVICE].read_ns
        return ts_ns - read_ns if ts_ns and read_ns else 0

    def _ready(self, end: End, row: Any, ts_ns: int) -> None:
        flow = end.conn.flows[1 - end.index]
        ready = flow.ready
        if ready.pass_by(flow.at(row.seq) + (row.bytes or 0), ts_ns) and len(ready.log) > _LONG:
            self._prune(end.conn, 1 - end.index)

    def _recv(self, end: End, row: Any, ts_ns: int) -> None:
        count = row.bytes
        if not count:
            return
        conn = end.conn
        index = end.index
        flow = conn.flows[1 - index]
        at = flow.at(row.seq)
        if flow.begin < 0:
            flow.begin = at
        finish = at + count
        if finish <= flow.read:
            return
        flow.read = finish
        flow.read_ns = ts_ns
        if end.pid != row.pid and row.pid is not None:
            end.pid, end.comm = row.pid, row.comm
        # What was read has come, whether or not its rows have.
        if 0 <= flow.nic.position < finish:
            flow.nic.skip(finish)
        if 0 <= flow.ip.position < finish:
            flow.ip.skip(finish)
        if index == SERVICE:
            if conn.answered < 0:
                conn.answered = at
        else:
            self._replied(conn, at, finish)

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

    def _close(self, end: End, row: Any, ts_ns: int) -> None:
        end.closed_ns = ts_ns
        self._socks.pop(row.sock, None)
        other = end.conn.ends[1 - end.index]
        if not other.sock or other.closed_ns:
            self._finish(end.conn, "closed")

    def _stats(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: ARG002 - as all of them
        end.stats = {name: getattr(row, name, None) for name in STATS}

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
            ack = getattr(row, "ack", None)
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

    def _data(
        self, conn: Connection, index: int, row: Any, ts_ns: int, at: int, finish: int
    ) -> None:
        """A packet's payload, from `at` to `finish`."""
        flow = conn.flows[index]
        point = row.point
        if flow.begin < 0:
            flow.begin = at
        if point == "nic_tx":
            reach = flow.tx
            device = _device(row)
            flow.tx_dev = flow.tx_dev or device
            if not reach.pass_by(finish, ts_ns) and flow.tx_dev == device:
                self._again(conn, index, at)
        elif point == "nic_rx":
            reach = flow.nic
            flow.rx_if = flow.rx_if or row.ifname
            come = reach.arrive(at, finish, ts_ns, flow.begin)
            if not come and flow.tx_netns is None and flow.rx_if == row.ifname:
                self._again(conn, index, at)
        else:
            reach = flow.ip
            reach.arrive(at, finish, ts_ns, flow.begin)
        if len(reach.log) > _LONG:
            self._prune(conn, index)
        if index == SERVICE:
            self._replied(conn, at, finish)
        elif conn.answered < 0:
            conn.answered = at

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
        if flow.syn < 0:
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
                flow.tx_dev = _device(row)
            elif point == "nic_rx":
                flow.rx_if = row.ifname
        elif index == CLIENT and (
            (point == "nic_tx" and flow.tx_dev == _device(row))
            or (point == "nic_rx" and flow.tx_dev is None and flow.rx_if == row.ifname)
        ):
            conn.syns += 1

    def _window(self, conn: Connection, flow: Flow, row: Any, flags: str) -> None:
        window = getattr(row, "window", None)
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

    def _reset(self, conn: Connection, index: int) -> None:
        """An end resets the connection."""
        if conn.reset_by is not None:
            return
        conn.reset_by = index
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
        request = conn.flows[CLIENT]
        asked = self._asked(conn)
        old = conn.replying
        if asked > conn.answered >= 0:
            if old is not None:
                self._end_reply(old, at, "turn")
            exchange = self._begin(conn, "exchange", asked)
            exchange.reply_begin = at
            exchange.stamps[REPLY_SENT] = ts_ns
            conn.answered = asked
            conn.ask_ns = reached(request.sends, asked + 1)
            request.forget(asked + 1)
            conn.replying = exchange
        elif old is None:
            conn.replying = exchange = Exchange(conn, "push")
            exchange.reply_begin = at
            exchange.stamps[REPLY_SENT] = ts_ns

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
        flow = conn.flows[CLIENT]
        exchange.request_begin, exchange.request_end = conn.answered, end
        stamps = exchange.stamps
        stamps[CLIENT_SENT] = conn.ask_ns
        stamps[REQUEST_TX] = reached(flow.tx.log, end)
        stamps[REQUEST_RX] = reached(flow.nic.log, end)
        stamps[REQUEST_IP] = reached(flow.ip.log, end)
        stamps[REQUEST_READY] = reached(flow.ready.log, end)
        if flow.read >= end:
            stamps[REQUEST_READ] = flow.read_ns
        exchange.retransmits, conn.ask_retransmits = conn.ask_retransmits, 0
        exchange.zero_windows, conn.ask_zeros = conn.ask_zeros, 0
        return exchange

    def _end_reply(self, exchange: Exchange, end: int, why: str) -> None:
        conn = exchange.conn
        conn.replying = None
        exchange.reply_end = max(end, exchange.reply_begin)
        exchange.ended = why
        if conn.waiting or not self._has_come(conn, end):
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

    def _complete(self, exchange: Exchange) -> None:
        """The way of the reply is known as far as it ever will be."""
        conn = exchange.conn
        flow = conn.flows[SERVICE]
        end = exchange.reply_end
        stamps = exchange.stamps
        stamps[REPLY_TX] = reached(flow.tx.log, end)
        stamps[REPLY_RX] = reached(flow.nic.log, end)
        stamps[REPLY_IP] = reached(flow.ip.log, end)
        stamps[REPLY_READY] = reached(flow.ready.log, end)
        if conn.ends[CLIENT].sock and flow.read >= end:
            stamps[REPLY_READ] = flow.read_ns
        flow.forget(end + 1)
        self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        conn = exchange.conn
        cut, conn.cut = conn.cut, False
        if cut and (
            exchange.kind == "push"
            or (conn.ends[CLIENT].sock and exchange.stamps[CLIENT_SENT] is None)
        ):
            self.cut += 1
            conn.untold += 1
            return
        if sum(at is not None for at in exchange.stamps) < 2:  # noqa: PLR2004 - no time between
            self.untimed += 1
            conn.untold += 1
            return
        conn.exchanges += 1
        exchange.number = conn.exchanges
        self._told.append(exchange)

    # --- ends

    def _finish(self, conn: Connection, why: str) -> None:
        """The connection is over, or is not followed any longer."""
        replying = conn.replying
        for exchange in conn.waiting:
            self._complete(exchange)
        conn.waiting.clear()
        if replying is not None:
            conn.replying = None
            replying.reply_end = max(conn.flows[SERVICE].sent, replying.reply_begin)
            replying.ended = why
            self._complete(replying)
        request = conn.flows[CLIENT]
        end = request.sent if request.sent >= 0 else max(request.read, self._asked(conn))
        if end > conn.answered >= 0:
            exchange = self._begin(conn, "request", end)
            exchange.ended = why
            self._tell(exchange)
        conn.ended = why
        conn.over = True
        self._told.append(conn)
        del self._conns[conn.number]
        for one in conn.ends:
            if one.sock and self._socks.get(one.sock) is one:
                del self._socks[one.sock]
            del one.conn  # a cycle, and the collector comes seldom: see spare_the_collector()
        self._over.append(conn)
        if len(self._over) > _MOST_OVER:
            self._release(self._over.popleft())
        # Its addresses stay for a while; what its streams held goes now.
        for flow in conn.flows:
            self._closed_windows -= flow.zero
            flow.zero = False
            for log in flow.logs():
                log.clear()

    def _sweep(self, ts_ns: int) -> None:
        """Once a second of the rows' time: what has been silent for long."""
        self._next_sweep_ns = (ts_ns // _SECOND_NS + 1) * _SECOND_NS
        over = self._over
        while over and over[0].last_ns + _STRAGGLERS_NS < ts_ns:
            self._release(over.popleft())
        ended = []
        for conn in self._conns.values():
            silent_ns = ts_ns - conn.last_ns
            if silent_ns < _SECOND_NS:
                continue
            if conn.closing_ns and not conn.ends[CLIENT].sock and not conn.ends[SERVICE].sock:
                ended.append(conn)
            elif conn.replying is not None and silent_ns > self._idle_ns:
                reply = conn.flows[SERVICE]
                if self._has_come(conn, reply.sent):
                    self._end_reply(conn.replying, reply.sent, "idle")
        for conn in ended:
            self._finish(conn, "closed")

    def _prune(self, conn: Connection, index: int) -> None:
        """A message of many packets: forget the instants that no longer can be its last byte's."""
        flow = conn.flows[index]
        if index == CLIENT:
            needed = self._asked(conn)
        elif conn.ends[CLIENT].sock:
            needed = flow.read
        else:
            needed = conn.waiting[0].reply_end if conn.waiting else flow.sent
        flow.forget(needed)
        for log in flow.logs():
            if len(log) > _LONGEST:
                # Every other one stays: an instant is then off by one of them, not by all.
                del log[:-1:2]


def _opens(flags: str) -> bool:
    """A SYN, whatever it says besides (ECN), and no answer to one."""
    return "SYN" in flags and "ACK" not in flags


def _device(row: Any) -> str | None:
    """What a packet leaves by; a probe that is not ours may call it otherwise."""
    device: str | None = getattr(row, "dev", None) or row.ifname
    return device


def _is_loopback(address: str, other: str) -> bool:
    """Both ends are in one namespace, and every namespace has the same addresses."""
    return address == other or address.startswith("127.") or address == "::1"
