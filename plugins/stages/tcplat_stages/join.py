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

from tcplat_core import Loss, Sampled, connection_hash, ends_ns, is_in_share, slim_rows

from .binding import Binder, goes_again
from .connection import Connection, Finished
from .directory import Directory
from .fast_path import FastPath
from .fast_rows import FastPaths
from .losses import MOVES, PACKETS, STREAM, Losses
from .packet_rows import PLAIN, PacketRows
from .plain import may_begin
from .routing import PacketRouter, is_new
from .row_fields import BEYOND_NS, COMPILED, Slim, opens, shows_window
from .samples import Tally
from .socket_rows import POINTS, SocketRows
from .stream import CLIENT, SERVICE
from .turns import END_OF_RUN, UNSAMPLED, Turns, end_idle

MOST = 32_768
"""Connections that are kept."""
_SECOND_NS = 1_000_000_000
_STEP_NS = _SECOND_NS // 2
"""Silence ends at whole steps of the rows' clock."""
_MOST_BYTES = (1 << 32) - 1
"""Sequence numbers and counts of bytes have 32 bits."""


class Joiner:
    """Joins rows; see feed().

    Args:
        idle_ns: A reply is taken to be complete when all of it was read, and nothing
            more has come for so long.
        most: Most connections that are kept, see Directory; 0 for MOST.

    Attributes:
        directory: The connections.
        watch: Called with a connection and each row that is of bytes of its streams.
    """

    def __init__(self, *, idle_ns: int = 10 * _SECOND_NS, most: int = 0) -> None:
        self.watch: Callable[[Connection, Any], None] | None = None
        self._idle_ns = idle_ns
        self._next_sweep_ns = 0
        self._pending: list[Loss] = []
        self._losses = Losses()
        self._turns = Turns(self._losses)
        self.directory = Directory(self._turns, self._losses, most or MOST)
        self._binder = Binder(self.directory)
        self._router = PacketRouter(self.directory)
        self._sockets = SocketRows(self.directory, self._binder, self._turns)
        self._packets = PacketRows(self.directory, self._turns)
        self._slim = Slim()
        self._fast_paths = FastPaths()

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
    def unsampled(self) -> int:
        """Messages that were under way when their connection left the sample: not reported."""
        return self._turns.unsampled

    @property
    def missed(self) -> int:
        """Messages that were under way where rows were lost: they are not reported."""
        return self._turns.missed

    def count_with(self, tally: Tally) -> None:
        """Count plain exchanges with a tally; feed() does not return those."""
        self._turns.tally = tally

    def feed(self, rows: Sequence[Any]) -> list[Finished]:
        """Take rows in order of time, and return what became complete by them.

        An exchange is complete when the next one's reply begins, when its connection
        is over, or when nothing moves any more. What comes out is a function of the
        rows alone, however they are divided into batches.
        """
        finished = self._turns.finished = []
        if self._pending and rows:
            self._add_losses(ends_ns(rows)[0])
        slim = self._slim
        slim_batch = slim_rows(rows) if COMPILED else None
        if slim_batch is not None:
            slim.begin(slim_batch)
            self._fast_paths.begin(slim_batch)
            plain = self.watch is None
            for index in range(len(rows)):
                if plain and self._take_plain(index):
                    continue
                slim.turn_to(index)
                self._take(slim)
            slim.begin(None)
            return finished
        for row in rows:
            if COMPILED:
                slim.load(row)
                self._take(slim)
            else:
                self._take(row)
        return finished

    def _take_plain(self, index: int) -> bool:
        """Take a row of a plain turn by its numbers, as _take() would; False if it is none."""
        look, fast_paths = self._slim.look, self._fast_paths
        look.turn_to(index)
        if not fast_paths.may_take(look):
            return False
        self._come_to(look.ts_ns)
        return fast_paths.take(look, self.directory, self._losses)

    def _come_to(self, ts_ns: int) -> None:
        """End what is over by the instant of the next row."""
        losses = self._losses
        if ts_ns >= self._next_sweep_ns:
            self._pass(ts_ns)
        if losses.ends and ts_ns >= losses.ends[0]:
            losses.end(ts_ns)

    def _take(self, row: Any) -> None:
        """Take a row: of a socket, or a packet."""
        ts_ns = row.ts_ns
        if ts_ns >= BEYOND_NS:
            return
        self._come_to(ts_ns)
        if row.sock:
            self._take_of_socket(row, ts_ns)
        else:
            self._take_packet(row, ts_ns)

    def _take_of_socket(self, row: Any, ts_ns: int) -> None:
        point = row.point
        # A null is unknown: there is nothing to join by.
        if point not in POINTS or (point in STREAM and not _has_number(row)):
            return
        end = self.directory.by_sock.get(row.sock)
        if end is None or (point in MOVES and goes_again(end, row)):
            end = self._binder.bind(row) if end is None else self._binder.begin_anew(end, row)
            if end is None:
                return
        if not end.named and row.sport:
            self._binder.learn_port(end, row)
        conn = end.conn
        conn.leave_fast_path()
        conn.last_ns = ts_ns
        if conn.breaks != self._losses.count:
            self._losses.mark(conn)
        if self.watch is not None and row.bytes:
            self.watch(conn, row)
        self._sockets.take(end, row, ts_ns, point)
        self._losses.row_ns = ts_ns
        if COMPILED and point in ("send", "recv") and may_begin(conn, self._losses):
            FastPath(conn, self._turns, self._losses)

    def _take_packet(self, row: Any, ts_ns: int) -> None:
        point = row.point
        if point not in PACKETS or not _has_number(row):
            return
        flags = row.flags or ""
        # Half of all packets: an ACK that tells nothing, while no window is closed.
        if (
            flags == "ACK"
            and not row.bytes
            and not self.directory.closed_windows
            and (point == "rx_ip" or shows_window(row))
        ):
            return
        key = (row.netns, row.saddr, row.sport, row.daddr, row.dport)
        way = self.directory.by_packet.get(key)
        if way is None or (flags not in PLAIN and opens(flags) and is_new(way[0], row)):
            way = self._router.route(row, key)
            if way is None:
                return
        conn, index = way
        if conn.successor:
            found = self._router.older(conn, index, row, flags)
            if found is None:
                return
            conn = found
        if conn.over:
            return
        conn.leave_fast_path()
        conn.last_ns = ts_ns
        if conn.breaks != self._losses.count:
            self._losses.mark(conn)
        if self.watch is not None and row.bytes:
            self.watch(conn, row)
        self._packets.take(conn, index, row, ts_ns, point, flags)
        self._losses.row_ns = ts_ns

    def lost(self, loss: Loss) -> None:
        """Take a loss: its place is before the next row, and after what time has ended by then."""
        self._pending.append(loss)

    def sampled(self, share: Sampled) -> list[Finished]:
        """Take a new share of the connections; return those that are not in it, and so end here.

        What is under way on them is left out: how it ends is not seen. Those that are in a larger
        share begin in their middle, as connections that are older than the capture do.
        """
        finished = self._turns.finished = []
        if not share.since_ns:  # from the first row on: none is open
            return finished
        self._add_losses(share.since_ns)
        self._turns.resampled = True
        for conn in list(self.directory.conns.values()):
            if not _is_in(conn, share.one_in):
                self.directory.finish(conn, UNSAMPLED)
                self.directory.release(conn)
        return finished

    def _add_losses(self, ts_ns: int) -> None:
        """Take the losses that were reported since the last row; the next one is of `ts_ns`."""
        self._pass(min(ts_ns, BEYOND_NS))
        for loss in self._pending:
            self._losses.add(loss)
        self._pending.clear()

    def pass_time(self, ts_ns: int) -> list[Finished]:
        """Return what is over by `ts_ns`: no older row comes any more.

        It is what feed() would have reported before the next row: where time passes without
        rows, it is reported sooner, and in the same order.
        """
        finished = self._turns.finished = []
        self._pass(min(ts_ns, BEYOND_NS))
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
        until_ns = min(until_ns, BEYOND_NS)
        self._add_losses(until_ns)
        turns.last_ns = max(turns.last_ns, until_ns)
        conns = list(self.directory.conns.values())
        for conn in conns:
            turns.last_ns = max(turns.last_ns, conn.last_ns)
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
            (self.unsampled, "that were under way when their connection left the sample"),
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
                end_idle(self._turns, conn)
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
        if conn.replying is not None or conn.fast_path is not None:
            return conn.last_ns + self._idle_ns + 1, "idle"
        return None, ""


def _has_number(row: Any) -> bool:
    """Return whether a row names bytes of a stream, as TCP can."""
    seq, count = row.seq, row.bytes
    return seq is not None and seq <= _MOST_BYTES and (count is None or count <= _MOST_BYTES)


def _is_in(conn: Connection, one_in: int) -> bool:
    """Return whether a connection is in a share, as far as its ends are known."""
    (address, port), (other, service) = conn.client, conn.service
    if port is None or service is None:
        return True
    try:
        number = connection_hash(address, port, other, service)
    except ValueError:  # no address: a capture that tcplat has not written
        return True
    return is_in_share(number, one_in)


def _step(ts_ns: int) -> int:
    """Return the first whole step that is not before an instant."""
    return -(-ts_ns // _STEP_NS) * _STEP_NS
