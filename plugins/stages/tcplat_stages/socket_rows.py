"""What rows of sockets show: calls, wake-ups, changes of state."""

from __future__ import annotations

from typing import Any

from .acceptable import disown
from .binding import Binder, update_user
from .chain import ACCEPTED, CONNECT_CALLED, CONNECTED, HANDSHAKE_DONE
from .closing import note_change, note_failure, note_fin, take_back
from .connection import STATS, Connection, End
from .directory import Directory
from .losses import READS, resumes
from .row_fields import real, shared, syn_of, whole
from .stream import CLIENT, NOT_SEEN, SERVICE, Reach, caller, reached
from .turns import LONG, Turns, prune

_OPEN = frozenset({"TCP_ESTABLISHED", "TCP_CLOSE_WAIT"})
"""States in which a program may send."""
POINTS = frozenset(
    {"send", "send_short", "recv", "ready", "connect", "state", "accept", "close", "stats"}
)
"""Of the rows of sockets of which something follows."""


class SocketRows:
    """What follows from the rows of sockets."""

    def __init__(self, directory: Directory, binder: Binder, turns: Turns) -> None:
        self._directory = directory
        self._binder = binder
        self._turns = turns

    def take(self, end: End, row: Any, ts_ns: int, point: str) -> None:
        """Take a row of a socket's end, of one of POINTS; the most frequent ones first."""
        if point == "send":
            self._send(end, row, ts_ns)
        elif point == "recv":
            self._recv(end, row, ts_ns)
        elif point == "ready":
            _ready(end, row, ts_ns)
        elif point == "state":
            self._state(end, row, ts_ns)
        elif point == "close":
            self._directory.retire(end, ts_ns)
        elif point == "connect":
            _connect(end, row, ts_ns)
        elif point == "accept":
            _accept(end, row, ts_ns)
        elif point == "send_short":
            _send_short(end, row)
        elif point == "stats":
            end.stats = {name: whole(row, name) for name in STATS}

    def _state(self, end: End, row: Any, ts_ns: int) -> None:
        old, new = row.old_state, row.state
        if old is None:
            return
        end.state = shared(new)
        syn = syn_of(row)
        if syn >= 0:
            self._binder.identify(end, row, syn)
        conn = end.conn
        if row.connect_us is not None:
            conn.connect_us = row.connect_us
        note_change(conn, old, new, row.desc)
        if new == "TCP_ESTABLISHED":
            conn.began, conn.cut = True, False
            conn.stamps[CONNECTED if end.index == CLIENT else HANDSHAKE_DONE] = ts_ns
        elif new in ("TCP_FIN_WAIT1", "TCP_LAST_ACK"):
            note_fin(conn, end.index)
        elif new == "TCP_CLOSE_WAIT":
            # The other end closed first, whether or not it is watched.
            note_fin(conn, 1 - end.index)
            if end.index == CLIENT:
                conn.left_ns = ts_ns
        elif new == "TCP_CLOSE" and row.desc != "closed":
            note_failure(conn, end.index, row.desc, ts_ns)

    def _send(self, end: End, row: Any, ts_ns: int) -> None:  # noqa: C901, PLR0912 - called for each send
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
            resumes(conn, 1 << index, gap=at != known >= 0)
        finish = at + count
        if conn.reset_by is not None and row.state in _OPEN:
            take_back(conn)
        if flow.tx.position > at or flow.nic.position > at or flow.ip.position > at:
            disown(end, flow, at)
        flow.send(at, finish, ts_ns)
        process = end.process
        if process.pid != row.pid or process.comm != row.comm:
            process = update_user(end, row)
        senders = flow.senders
        if not senders or senders[-1][1] != process:
            if senders:
                senders.append((at, process))
            else:
                flow.senders = [(at, process)]
        if index == SERVICE:
            self._turns.reply(conn, at, ts_ns)
        else:
            if conn.answered < 0:
                conn.answered = at
            if conn.ask_ns is None and finish > conn.answered:
                conn.ask_ns, conn.ask_by = ts_ns, process
                conn.thought_ns = 0
                if not missed & (1 << CLIENT | 1 << READS + CLIENT):
                    think(conn, ts_ns)
        if len(flow.sends) > LONG:
            prune(conn, index)

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
            resumes(conn, 1 << READS + index, gap=gap)
        finish = at + count
        if finish <= flow.read:
            return
        if at != flow.read or conn.doubt is not None:
            self._skipped(conn, index, at)
        flow.take(finish, ts_ns)
        process = end.process
        if process.pid != row.pid or process.comm != row.comm:
            update_user(end, row)
        if index == CLIENT:
            if finish > flow.sent >= 0 and conn.replying and conn.ends[SERVICE].streams:
                conn.replying.beyond = True
            self._turns.replied(conn, at, finish)
        elif conn.answered < 0:
            conn.answered = flow.begin
        if len(flow.reads) > LONG:
            prune(conn, 1 - index)

    def _skipped(self, conn: Connection, index: int, at: int) -> None:
        """Note that rows of reads are missing before `at`."""
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
            self._turns.settle(conn)
        elif conn.doubt is not None and at < conn.doubt[2]:
            conn.doubt = None  # it had not read that when it sent


def _connect(end: End, row: Any, ts_ns: int) -> None:
    conn = end.conn
    end.called = True
    if conn.stamps[CONNECT_CALLED] is None:
        conn.stamps[CONNECT_CALLED] = ts_ns
    conn.began, conn.cut = True, False
    if row.connect_us is not None:
        conn.connect_us, conn.error, conn.error_ns = row.connect_us, row.desc, ts_ns


def _accept(end: End, row: Any, ts_ns: int) -> None:
    update_user(end, row)
    accept_us = end.conn.accept_us = real(row, "accept_us")
    # Else the row may be that of the first use.
    if accept_us is not None:
        end.conn.stamps[ACCEPTED] = ts_ns


def _send_short(end: End, row: Any) -> None:
    """Correct the last call: its bytes end where this row's begin."""
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
        conn.think_ns -= conn.thought_ns
        conn.thought_ns, conn.thinks_from_ns = 0, conn.thought_from_ns


def think(conn: Connection, ts_ns: int) -> None:
    """Add the time from the client's last read to its request, once for each time it reads."""
    read_ns = conn.flows[SERVICE].read_ns
    conn.thought_ns = ts_ns - read_ns if read_ns > conn.thinks_from_ns else 0
    conn.think_ns += conn.thought_ns
    conn.thought_from_ns, conn.thinks_from_ns = conn.thinks_from_ns, read_ns


def _ready(end: End, row: Any, ts_ns: int) -> None:
    conn = end.conn
    flow = conn.flows[1 - end.index]
    ready = flow.ready
    if ready is NOT_SEEN:
        ready = flow.ready = Reach()
    copied = flow.at(row.seq)
    flow.copied = max(flow.copied, copied)
    if flow.begin < 0:
        flow.begin = copied
    if end.index == SERVICE and conn.answered < 0:
        conn.answered = flow.begin
    # It begins with what is unread, not with what is new.
    if ready.pass_by(0, copied + (row.bytes or 0), ts_ns) and len(ready.log) > LONG:
        prune(conn, 1 - end.index)
