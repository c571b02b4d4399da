"""The two byte streams of a connection: how far each had come where, and when.

Plain classes with slots: some of these are touched for each of a million rows.
Sequence numbers are unwrapped: they go on growing where TCP's begin anew at 2^32.
"""

from __future__ import annotations

from .row_fields import Process

_TURN, _HALF = 1 << 32, 1 << 31
"""Where sequence numbers begin anew, and half of it."""
CLIENT, SERVICE = 0, 1
"""Numbers of the ends. Stream 0 flows from the client, stream 1 from the service."""

Callers = list[tuple[int, Process]]
"""From which position on, and by which process: an entry wherever that is another one."""


def caller(callers: Callers, position: int) -> Process | None:
    """Return the process that sent the byte at `position`; None if no row shows it."""
    found = None
    for begin, process in reversed(callers):
        if begin <= position:
            found = process
            break
    return found


Log = list[tuple[int, int | None]]
"""Position reached, and when: None if the rows that had it were missed."""


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


def before(log: Log, position: int) -> int:
    """Return how many entries of a log end before `position`.

    As bisect_left(log, (position,)), which is a call of Python where this is compiled.
    """
    first, last = 0, len(log)
    while first < last:
        middle = (first + last) // 2
        entry = log[middle]
        if entry[0] < position:
            first = middle + 1
        else:
            last = middle
    return first


def reached(log: Log, position: int) -> int | None:
    """Return when a log has the stream up to `position`; None if no row shows it."""
    first = before(log, position)
    return log[first][1] if first < len(log) else None


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
        """Keep bytes that came before what precedes them."""
        if self.late is None:
            self.late = []
        self.late.append((at, finish))
        if len(self.late) > _MOST_LATE:
            # No hole is so wide: the rows that would fill it are missing.
            self.skip(min(self.late)[0])

    def skip(self, finish: int) -> None:
        """Bytes up to `finish` have come, and no row shows when."""
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

    def cut(self, position: int) -> None:
        """Take back bytes from `position` on: they had not been sent when they were seen."""
        if self.position <= position:
            return
        self.position = position
        self.log = [one for one in self.log if one[0] <= position] or NO_LOG
        if self.late:
            self.late = [one for one in self.late if one[1] <= position]

    def trim(self, position: int) -> None:
        """Drop what is only of bytes before `position`."""
        log = self.log
        if log and before(log, position):
            del log[: before(log, position)]
            if not log:
                self.log = NO_LOG


NOT_SEEN = Reach()
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
        copied: How far its receiver had read when it was last notified of more: by whatever call.
        urgent: From where to where the rows of its calls left out urgent bytes, in exchanges
            that are not reported yet.
        beside: How many such bytes there were.
        unseen: Some of it was read by calls that have no rows (splice() by tracepoint).
        tx: At the sender's device, in namespace tx_netns; device tx_dev is the first.
        nic: At the receiver's interface, in namespace rx_netns; rx_if is the first.
        ip: At the receiver's IP.
        ready: In the receiver's socket.
        read: How far the receiver's calls have come, the last of them at read_ns.
        reads: End and instant of each of those calls; no instant of what no row reported.
        retransmits: Packets seen that carry what was sent before.
        zero_windows: How often the sender of this stream closed its own window.
        zero: It is closed.
        widest: The largest window, unscaled, that the sender of this stream advertised.
        strays: Packets in a row that lie beyond the window.
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
        "strays",
        "syn",
        "tx",
        "tx_dev",
        "tx_netns",
        "unseen",
        "urgent",
        "widest",
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
        self.tx = self.nic = self.ip = self.ready = NOT_SEEN
        self.tx_netns: int | None = None
        self.tx_dev: str | None = None
        self.rx_netns: int | None = None
        self.rx_if: str | None = None
        self.retransmits = self.zero_windows = 0
        self.widest = self.strays = 0
        self.zero = False

    def at(self, seq: int) -> int:
        """Return a sequence number, unwrapped."""
        ref = self.ref
        if ref < 0:
            self.ref = seq + _TURN
            return self.ref
        at = ref + ((seq - ref + _HALF) & (_TURN - 1)) - _HALF
        if at > ref:
            self.ref = at
        return at

    def near(self, seq: int) -> int:
        """Unwrap the sequence number of a packet that may not belong to this stream.

        Unlike at(), it does not unwrap later numbers by this one. Some number must be known.
        """
        return self.ref + ((seq - self.ref + _HALF) & (_TURN - 1)) - _HALF

    @property
    def furthest(self) -> int:
        """How far the stream is known to go, its FIN included; -1 for unknown."""
        fin = self.fin + 1 if self.fin >= 0 else -1
        return max(self.begin, self.sent, self.tx.position, self.arrived(), self.read, fin)

    def send(self, at: int, finish: int, ts_ns: int) -> None:
        """Note a call of the sender, for bytes from `at` to `finish`."""
        self.sends = added(self.sends, finish, ts_ns)
        self.last_send = at
        if at > self.sent:
            self.skip_urgent(self.sent, at)
        self.sent = max(self.sent, finish)

    def take(self, finish: int, ts_ns: int) -> None:
        """Note that the receiver has read up to `finish`: all of that has come."""
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
        """Drop all instants and senders; keep how far the stream has come."""
        self.drop_instants()
        self.senders = NO_SENDERS
        self.urgent = ()

    def drop_instants(self) -> None:
        """Drop when the stream had come how far."""
        self.sends = self.reads = NO_LOG
        for reach in (self.tx, self.nic, self.ip, self.ready):
            if reach.log:
                reach.log = NO_LOG

    def skip_urgent(self, before: int, at: int) -> None:
        """Rows of calls go on at `at`, and the last one ended at `before`.

        A byte that was sent with MSG_OOB has a number, and is beside the stream. Where more
        are missing than a few, it is rows that are.
        """
        if 0 <= before < at <= before + MOST_URGENT:
            self.urgent = (*self.urgent[-MOST_URGENT_KEPT:], (before, at))
            self.beside += at - before

    def take_urgent(self, begin: int, end: int) -> int:
        """Return how many urgent bytes lie between two positions; drop those before `end`."""
        if not self.urgent:
            return 0
        found = sum(max(min(last, end) - max(at, begin), 0) for at, last in self.urgent)
        self.urgent = tuple(one for one in self.urgent if one[1] > end)
        return found

    def arrived(self) -> int:
        """Return how far it has come at the receiver's host."""
        return max(self.ip.position, self.nic.position)

    def trim(self, position: int) -> None:
        """Drop what is only of bytes before `position`."""
        sends, reads, senders = self.sends, self.reads, self.senders
        if sends and before(sends, position):
            del sends[: before(sends, position)]
        if reads and before(reads, position):
            del reads[: before(reads, position)]
        while len(senders) > 1 and senders[1][0] < position:
            del senders[0]
        self.tx.trim(position)
        self.nic.trim(position)
        self.ip.trim(position)
        self.ready.trim(position)

    def logs(self) -> tuple[Log, ...]:
        """Return all that grows with the stream."""
        return (self.sends, self.reads, self.tx.log, self.nic.log, self.ip.log, self.ready.log)
