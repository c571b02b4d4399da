"""Rows of all probes and both ends -> connections and their exchanges, by TCP's own numbers.

A row belongs to a connection by its socket, or by its addresses, ports and network
namespace; within the connection, to the bytes that its sequence number names.
Never to "the next packet": segmentation, GRO, delayed ACKs, retransmits and
pipelining move packets about, and leave the numbers of bytes alone.

Here rows are handed on, and time passes. Whose row it is, `binding` (sockets) and `routing`
(packets) find in the `directory`; `socket_rows` and `packet_rows` note what it has; `turns` makes
exchanges of that, `outcomes` says what became of them, `losses` which ones were not seen whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tcplat_core import Loss

from .binding import Binder, goes_again
from .connection import Connection, Finished
from .directory import Directory
from .losses import MOVES, PACKETS, STREAM, Losses
from .packet_rows import PLAIN, PacketRows
from .routing import PacketRouter, is_new
from .row_fields import opens
from .socket_rows import SocketRows
from .stream import CLIENT, SERVICE
from .turns import END_OF_RUN, Turns, has_come

_SECOND_NS = 1_000_000_000
_STEP_NS = _SECOND_NS // 2
"""Silence ends at whole steps of the rows' clock."""


class Joiner:
    """Joins rows; see feed().

    Args:
        idle_ns: A reply is taken to be complete when all of it was read, and nothing
            more has come for so long.
        most: Most connections that are kept; see Directory.

    Attributes:
        directory: The connections.
        watch: Called with a connection and each row that is of bytes of its streams.
    """

    def __init__(self, *, idle_ns: int = 10 * _SECOND_NS, most: int = 32_768) -> None:
        self.watch: Callable[[Connection, Any], None] | None = None
        self._idle_ns = idle_ns
        self._next_sweep_ns = 0
        self._pending: list[Loss] = []
        self._losses = Losses()
        self._turns = Turns(self._losses)
        self.directory = Directory(self._turns, self._losses, most)
        self._binder = Binder(self.directory)
        self._router = PacketRouter(self.directory)
        self._sockets = SocketRows(self.directory, self._binder, self._turns)
        self._packets = PacketRows(self.directory, self._turns)

    @property
    def given_up(self) -> int:
        """Connections that were given up because there were too many."""
        return self.directory.given_up

    @property
    def cut(self) -> int:
        """Exchanges that were under way when the capture began: they are not reported."""
        return self._turns.cut

    @property
    def untimed(self) -> int:
        """Messages of which only one instant is known."""
        return self._turns.untimed

    @property
    def missed(self) -> int:
        """Messages that were under way where rows were lost: they are not reported."""
        return self._turns.missed

    def feed(self, rows: Sequence[Any]) -> list[Finished]:  # noqa: C901, PLR0912, PLR0915 - one pass over a million rows
        """Take rows in order of time, and return what became complete by them.

        An exchange is complete when the next one's reply begins, when its connection
        is over, or when nothing moves any more. What comes out is a function of the
        rows alone, however they are divided into batches.
        """
        finished = self._turns.finished = []
        directory, binder, router = self.directory, self._binder, self._router
        losses, packets, watch = self._losses, self._packets, self.watch
        if self._pending and rows:
            self._add_losses(rows[0].ts_ns)
        by_sock, by_packet, points = directory.by_sock, directory.by_packet, self._sockets.handlers
        for row in rows:
            ts_ns = row.ts_ns
            if ts_ns >= self._next_sweep_ns:
                self._pass(ts_ns)
            if losses.ends and ts_ns >= losses.ends[0]:
                losses.end(ts_ns)
            point = row.point
            sock = row.sock
            if sock:
                handler = points.get(point)
                # A null is unknown: there is nothing to join by.
                if handler is None or (point in STREAM and row.seq is None):
                    continue
                end = by_sock.get(sock)
                if end is None or (point in MOVES and goes_again(end, row)):
                    end = binder.bind(row) if end is None else binder.begin_anew(end, row)
                    if end is None:
                        continue
                if not end.named and row.sport:
                    binder.learn_port(end, row)
                conn = end.conn
                conn.last_ns = ts_ns
                if conn.breaks != losses.count:
                    losses.mark(conn)
                if watch is not None and row.bytes:
                    watch(conn, row)
                handler(end, row, ts_ns)
            elif point in PACKETS:
                flags = row.flags or ""
                if row.seq is None:
                    continue
                # Half of all packets: an ACK without news, while no window is closed.
                if (
                    flags == "ACK"
                    and not row.bytes
                    and not directory.closed_windows
                    and (point == "rx_ip" or getattr(row, "window", 1))
                ):
                    continue
                key = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
                way = by_packet.get(key)
                if way is None or (flags not in PLAIN and opens(flags) and is_new(way[0], row)):
                    way = router.route(row, key)
                    if way is None:
                        continue
                conn, index = way
                if conn.successor:
                    found = router.older(conn, index, row, flags)
                    if found is None:
                        continue
                    conn = found
                if conn.over:
                    continue
                conn.last_ns = ts_ns
                if conn.breaks != losses.count:
                    losses.mark(conn)
                if watch is not None and row.bytes:
                    watch(conn, row)
                packets.take(conn, index, row, ts_ns, point, flags)
            losses.row_ns = ts_ns
        return finished

    def lost(self, loss: Loss) -> None:
        """Take a loss: its place is before the next row, and after what time has ended by then."""
        self._pending.append(loss)

    def _add_losses(self, ts_ns: int) -> None:
        """Take the losses that were reported since the last row; the next one is of `ts_ns`."""
        self._pass(ts_ns)
        for loss in self._pending:
            self._losses.add(loss)
        self._pending.clear()

    def pass_time(self, ts_ns: int) -> list[Finished]:
        """Return what is over by `ts_ns`: no older row comes any more.

        It is what feed() would have reported before the next row: where time passes without
        rows, it is reported sooner, and in the same order.
        """
        finished = self._turns.finished = []
        self._pass(ts_ns)
        return finished

    def due_ns(self, ts_ns: int) -> int | None:
        """Return when time alone will end something next, after pass_time(); None for never."""
        due_ns = self._sweep(ts_ns - ts_ns % _STEP_NS)
        return None if due_ns is None else _step(due_ns)

    def finish(self, until_ns: int = 0) -> list[Finished]:
        """Return what is still open when the rows have ended.

        Args:
            until_ns: No row is missing up to this instant, see RunReport.until_ns; 0 if unknown.
        """
        turns = self._turns
        finished = turns.finished = []
        self._add_losses(until_ns)
        conns = list(self.directory.conns.values())
        turns.last_ns = max((turns.last_ns, until_ns, *(conn.last_ns for conn in conns)))
        for conn in conns:
            self.directory.finish(conn, "port reused" if conn.replaced else END_OF_RUN)
        turns.decide()
        return finished

    def left_out(self) -> list[str]:
        """Return sentences about what was left out."""
        counts = (
            (self.cut, "that were under way when the capture began"),
            (self.untimed, "of which one instant alone is known"),
            (self.missed, "that were under way where events were lost"),
        )
        found = [f"without {count} exchanges {which}" for count, which in counts if count]
        if self.given_up:
            found.append(f"{self.given_up} connections were given up: too many at a time")
        return found

    def _pass(self, ts_ns: int) -> None:
        """Sweep at each step up to now at which something may be over, in order."""
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

        What is reported, and in which order, must not depend on how often this is called: so
        `now_ns` is a whole step, and there is none between two calls at which something were over.

        Returns:
            When something will be over next; None for never, if no row comes.
        """
        free_ns = self.directory.release_over(now_ns)
        due = [] if free_ns is None else [free_ns]
        ended = []
        for conn in self.directory.conns.values():
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
            self.directory.finish(conn, why)
        return min(due, default=None)

    def _silent(self, conn: Connection) -> tuple[int | None, str]:
        """Return when silence will end a connection, or its reply, and what to call that."""
        if conn.replaced:
            return conn.last_ns + self._idle_ns + 1, "port reused"
        if conn.closing_ns and not conn.ends[CLIENT].sock and not conn.ends[SERVICE].sock:
            return conn.last_ns + _SECOND_NS, "closed"
        if conn.replying is not None:
            return conn.last_ns + self._idle_ns + 1, "idle"
        return None, ""

    def _end_idle(self, conn: Connection) -> None:
        """Complete the reply of a connection that was silent for long, if it has come."""
        reply = conn.flows[SERVICE]
        if conn.replying is not None and has_come(conn, reply.sent):
            if conn.ends[SERVICE].sock:
                self._turns.settle(conn, "idle")
            self._turns.end_reply(conn.replying, reply.sent, "idle")


def _step(ts_ns: int) -> int:
    """Return the first whole step that is not before an instant."""
    return -(-ts_ns // _STEP_NS) * _STEP_NS
