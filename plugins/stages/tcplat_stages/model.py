"""What the joiner makes of rows: connections, their two ends, their two byte streams, exchanges.

Plain classes with slots: some of these are touched for each of a million rows.
Sequence numbers are unwrapped: they go on growing where TCP's begin anew at 2^32.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import Any

from .stages import (
    CONNECT_MILESTONES,
    CONNECT_STAGES,
    CONNECTED,
    MILESTONES,
    Split,
    split,
)

CLIENT, SERVICE = 0, 1
"""Numbers of the ends. Stream 0 flows from the client, stream 1 from the service."""

STATS = ("srtt_us", "min_rtt_us", "rto_us", "retransmits", "bytes_acked", "bytes_received")
"""What probe tcp_stats tells of a socket that closes."""

Log = list[tuple[int, int | None]]
"""Position reached, and when: None where the rows that would tell were missed."""


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
        self.log: Log = []
        self.late: list[tuple[int, int]] | None = None
        """What came behind a hole: from where to where. Seldom there."""

    def pass_by(self, finish: int, ts_ns: int) -> bool:
        """Bytes up to `finish` come, whatever is missing before. False if they had come already."""
        if finish <= self.position:
            return False
        self.position = finish
        self.log.append((finish, ts_ns))
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
        self.log.append((finish, ts_ns))
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
        self.log.append((finish, None))

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


class Flow:
    """One direction of a connection.

    Attributes:
        ref: The highest sequence number seen: others are unwrapped by it.
        begin: First byte.
        syn: The SYN's own number, as on the wire.
        sent: How far the sender's calls have come.
        sends: End and instant of each of those calls.
        last_send: Where the last one's bytes begin.
        fin: Where it ends: the FIN's number; -1 until a packet has it.
        tx: At the sender's device, in namespace tx_netns; device tx_dev is the first.
        nic: At the receiver's interface, in namespace rx_netns; rx_if is the first.
        ip: At the receiver's IP.
        ready: In the receiver's socket.
        read: How far the receiver's calls have come, the last of them at read_ns.
        retransmits: Packets seen that carry what was sent before.
        zero_windows: How often the sender of this stream closed its own window.
        zero: It is closed.
    """

    __slots__ = (
        "begin",
        "fin",
        "ip",
        "last_send",
        "nic",
        "read",
        "read_ns",
        "ready",
        "ref",
        "retransmits",
        "rx_if",
        "rx_netns",
        "sends",
        "sent",
        "syn",
        "tx",
        "tx_dev",
        "tx_netns",
        "zero",
        "zero_windows",
    )

    def __init__(self) -> None:
        self.ref = self.begin = self.syn = self.fin = -1
        self.sent = self.last_send = self.read = -1
        self.sends: Log = []
        self.read_ns = 0
        self.tx, self.nic, self.ip, self.ready = Reach(), Reach(), Reach(), Reach()
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

    def arrived(self) -> int:
        """How far it has come at the receiver's host."""
        return max(self.ip.position, self.nic.position)

    def forget(self, position: int) -> None:
        """Drop what only tells of bytes before `position`."""
        sends = self.sends
        if sends and sends[0][0] < position:
            del sends[: bisect_left(sends, (position,))]
        self.tx.forget(position)
        self.nic.forget(position)
        self.ip.forget(position)
        self.ready.forget(position)

    def logs(self) -> tuple[Log, ...]:
        """All that grows with the stream."""
        return (self.sends, self.tx.log, self.nic.log, self.ip.log, self.ready.log)


class End:
    """One end of a connection: a socket, and the process that has it."""

    __slots__ = ("closed_ns", "comm", "conn", "index", "named", "netns", "pid", "sock", "stats")

    def __init__(self, conn: Connection, index: int) -> None:
        self.conn = conn
        self.index = index
        self.sock = 0
        """0 where no probe watches this end."""
        self.named = False
        """Its connection is known by its addresses."""
        self.netns: int | None = None
        self.pid: int | None = None
        self.comm: str | None = None
        self.closed_ns = 0
        self.stats: dict[str, int | None] | None = None
        """What the kernel's socket had counted when it closed, by the names of STATS."""


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
        ended: Why it is told of: closed, idle, given up, end of run.
    """

    __slots__ = (
        "accept_us",
        "answered",
        "ask_ns",
        "ask_retransmits",
        "ask_zeros",
        "began",
        "client",
        "closing_ns",
        "connect_us",
        "cut",
        "ended",
        "ends",
        "error",
        "exchanges",
        "fins",
        "first_ns",
        "flows",
        "guessed",
        "ip",
        "keys",
        "last_ns",
        "number",
        "offset_ns",
        "over",
        "replying",
        "reset_by",
        "reset_why",
        "service",
        "stamps",
        "syns",
        "think_ns",
        "untold",
        "waiting",
        "ways",
    )

    def __init__(self, number: int, row: Any, *, turned: bool = False) -> None:
        self.number = number
        self.client: tuple[str, int | None] = (row.saddr, row.sport)
        self.service: tuple[str, int | None] = (row.daddr, row.dport)
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
        self.think_ns = 0
        """Between the client's reading of a reply and its next request, in all."""
        self.exchanges = 0
        self.untold = 0
        """Exchanges of it that are left out: cut by the capture's beginning, or of one instant."""
        self.ended = ""
        self.over = False
        self.closing_ns = 0
        """When its packets ended it."""
        self.cut = True
        """Its first exchange may have begun before we looked."""
        self.keys: list[tuple[Any, ...]] = []
        self.ways: list[tuple[Any, ...]] = []
        """By which the joiner finds it: by addresses, and for packets."""
        self.answered = -1
        """Bytes of the client's stream before this position belong to exchanges that have begun."""
        self.ask_ns: int | None = None
        """When the first byte that nobody has answered was sent."""
        self.ask_retransmits = 0
        self.ask_zeros = 0
        self.replying: Exchange | None = None
        """Its reply is being sent."""
        self.waiting: deque[Exchange] = deque()
        """Their replies are sent, and on their way."""

    @property
    def handshake(self) -> Split:
        """How the time from connect() until the client may send divides into stages.

        Where the client is not watched: as far as is known, up to accept().
        """
        if self.stamps[CONNECTED] is None:
            return split(self.stamps, CONNECT_STAGES)
        return split(self.stamps[: CONNECTED + 1], CONNECT_STAGES[:CONNECTED])

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
        """Bytes that an end sent, as far as any point tells; None where none does."""
        flow = self.flows[index]
        # Not `ready`: a FIN counts there.
        furthest = max(flow.sent, flow.tx.position, flow.arrived(), flow.read)
        return furthest - flow.begin if furthest >= flow.begin >= 0 else None


class Exchange:
    """A request and its reply, or a message that has none.

    Attributes:
        conn: Whose.
        number: Counts exchanges of the connection, from 1.
        kind: ``exchange``; ``request`` for one that got no reply; ``push`` for what
            the service sent without being asked.
        request: First byte of the request, and the one after its last; unwrapped.
        reply: Of the reply.
        stamps: Instants, see stages.MILESTONES.
        retransmits: Segments of it that were sent again, as seen in packets.
        zero_windows: How often one end closed its window meanwhile.
        ended: How its end was known: ``turn``, ``closed``, ``idle``, ``given up``, ``end of run``.
    """

    __slots__ = (
        "_split",
        "conn",
        "ended",
        "kind",
        "number",
        "reply_begin",
        "reply_end",
        "request_begin",
        "request_end",
        "retransmits",
        "stamps",
        "zero_windows",
    )

    def __init__(self, conn: Connection, kind: str) -> None:
        self.conn = conn
        self.kind = kind
        self.number = 0
        self.request_begin = self.request_end = -1
        self.reply_begin = self.reply_end = -1
        self.stamps: list[int | None] = [None] * len(MILESTONES)
        self.retransmits = 0
        self.zero_windows = 0
        self.ended = ""
        self._split: Split | None = None

    @property
    def split(self) -> Split:
        """How its time divides into stages."""
        if self._split is None:
            self._split = split(self.stamps)
        return self._split

    @property
    def total_ns(self) -> int:
        """From its first known instant to its last."""
        return self.split.total_ns

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
        return self.request_end - self.request_begin

    @property
    def reply_bytes(self) -> int:
        """Of the reply; 0 for a request without one."""
        return self.reply_end - self.reply_begin

    @property
    def end(self) -> End:
        """The end that it is told for: the client's, if that is known, else the service's."""
        client, service = self.conn.ends
        return client if client.pid is not None or service.pid is None else service
