"""What ended without a reply, or before the end of one: was it answered (D69, D70, D117)?"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from .chain import ACCEPTED, HANDSHAKE_DONE, REQUEST_READ
from .closing import in_words
from .connection import Connection
from .exchange import CUT, ONE_WAY, OPEN, UNANSWERED, UNKNOWN, Exchange
from .stream import CLIENT, SERVICE, Flow, Log, reached

_NAMES = ("client", "service")
_PARTING_NS = 5_000_000
"""On a busy host a program may take so long from its farewell to its close()."""
_LONGEST_PARTING_NS = 50_000_000
"""Within so long of a farewell both ends have closed: a request that hangs takes longer."""
_LONGEST_FAREWELL = 512
"""Bytes: TLS's alert takes 31, with an HTTP/2 GOAWAY or a QUIT before it, less than 200."""


class Pause(NamedTuple):
    """Where a client stopped sending, had no reply, and went on with a short message.

    Args:
        at: Position of the first byte after the pause.
        resumed_ns: When it was sent, by the first point that shows it.
        farewell: The client went right after it: it is a message of its own.
    """

    at: int
    resumed_ns: int
    farewell: bool


def pause_in(conn: Connection, end: int) -> Pause | None:
    """Find the longest pause before a short last part of what the client sent.

    Args:
        conn: A connection.
        end: Where the bytes end that were not answered.

    Returns:
        None if they are one message, or if nothing shows when a part of them was sent.
    """
    flow, begin = conn.flows[CLIENT], conn.answered
    log, least_ns = _sent_when(conn, flow)
    left = _client_left(conn)
    left_ns = left[0] if left else None
    found: tuple[int, Pause] | None = None
    for (at, before_ns), (_, after_ns) in pairwise(log):
        if not begin < at < end <= at + _LONGEST_FAREWELL or before_ns is None or after_ns is None:
            continue
        # What waits for room in the sender's buffer or in its queueing discipline has not paused.
        stopped_ns = max(before_ns, reached(flow.tx.log, at) or 0)
        pause_ns = after_ns - stopped_ns
        if pause_ns < least_ns or (found and pause_ns <= found[0]):
            continue
        if left_ns is not None and _went_at_once(conn, before_ns, reached(flow.reads, at)):
            continue  # on a busy host: both parts are the farewell
        stayed_ns = None if left_ns is None else left_ns - after_ns
        patience_ns = max(_LONGEST_PARTING_NS, conn.patience_ns)
        farewell = stayed_ns is not None and stayed_ns < min(pause_ns, patience_ns)
        found = pause_ns, Pause(at, after_ns, farewell)
    return found[1] if found else None


def _sent_when(conn: Connection, flow: Flow) -> tuple[Log, int]:
    """Return by which log a pause of the client shows best, and how long (ns) one is at least."""
    if flow.sends:
        return flow.sends, conn.patience_ns
    # Nagle's algorithm and a delayed ACK, or a small congestion window, space packets too.
    least_ns = max(_LONGEST_PARTING_NS, 2 * conn.patience_ns)
    logs = (flow.tx.log, flow.nic.log, flow.ip.log, flow.ready.log, flow.reads)
    return next((log for log in logs if log), flow.sends), least_ns


def judge_cut_short(exchange: Exchange, stopped: tuple[int, str]) -> None:
    """Set the outcome of an exchange whose connection ends before its reply has come."""
    conn = exchange.conn
    if exchange.kind == "push":
        return
    left = _client_left(conn)
    came = _has_come_whole(conn, exchange)
    if left and left[0] < exchange.replied_ns and _was_refused(exchange):
        exchange.outcome = UNANSWERED
        exchange.over_ns, exchange.over_by = left
    elif not came:
        over = _over_at(conn)
        if over is None:
            exchange.outcome = OPEN
            exchange.over_ns, exchange.over_by = stopped
        elif conn.reset_by is not None or conn.error:
            exchange.outcome = CUT
            exchange.over_ns, exchange.over_by = over


def _was_refused(exchange: Exchange) -> bool:
    """Return whether no byte of a reply, which came after the client's FIN, was read.

    Where its reads have no rows, a RST shows it: a kernel without a reader answers data by one, at
    once. A client that has only closed its side goes on reading.
    """
    conn = exchange.conn
    if conn.flows[SERVICE].read > exchange.reply_begin:
        return False
    if _sees_reads(conn):
        return True
    at_once_ns = max(_PARTING_NS, 2 * conn.patience_ns)
    return conn.reset_by == CLIENT and conn.reset_ns - exchange.replied_ns < at_once_ns


def _has_come_whole(conn: Connection, exchange: Exchange) -> bool:
    """Return whether no row shows that part of the reply did not come to the client."""
    flow, end = conn.flows[SERVICE], exchange.reply_end
    if not conn.ends[CLIENT].streams:
        return not 0 <= flow.arrived() < end
    if flow.read >= end:
        return True
    # By calls that have no rows it may have read what has come.
    return (flow.read < 0 or flow.unseen) and flow.arrived() >= end


def judge_unanswered(
    exchange: Exchange, stopped: tuple[int, str], resumed_ns: int | None = None
) -> None:
    """Set the outcome of a request that no byte of a reply followed.

    Args:
        exchange: The request.
        stopped: Until when its connection was followed, and why not for longer.
        resumed_ns: When the client sent its farewell, if it sent one after a pause.
    """
    conn, stamps = exchange.conn, exchange.stamps
    began_ns = next((at for at in stamps if at is not None), None)
    if began_ns is None:
        return
    request = conn.flows[CLIENT]
    sent = reached(request.sends, exchange.request_end)
    come = [at for at in stamps[:REQUEST_READ] if at is not None]
    last_ns = sent or max(come, default=began_ns)
    over, left = _over_at(conn), _client_left(conn)
    patience_ns = conn.patience_ns
    gone_ns = conn.left_ns or (conn.fin_ns[SERVICE] and conn.fin_ns[SERVICE] + patience_ns)
    if _replied_unseen(conn, began_ns):
        exchange.outcome = UNKNOWN
    elif over is None:
        exchange.outcome = OPEN
        exchange.over_ns, exchange.over_by = stopped
    elif (
        (left and left == over and left[0] - last_ns < patience_ns)
        or _went_at_once(conn, last_ns, stamps[REQUEST_READ])
        or (gone_ns and gone_ns < began_ns)
    ):
        # It left at once; or the service had closed its side before, and could not answer.
        exchange.outcome = ONE_WAY
    else:
        exchange.outcome = UNANSWERED
        # A service that reads a farewell closes too: the client has given up before.
        if left and resumed_ns is not None and over[0] > resumed_ns:
            over = left
        exchange.over_ns, exchange.over_by = over


def _replied_unseen(conn: Connection, since_ns: int) -> bool:
    """Return whether the service sent, since an instant, bytes that are in no row of its calls.

    Of MPTCP there are no such rows: the calls are another socket's. Rows may be lost, too.
    """
    end, flow = conn.ends[SERVICE], conn.flows[SERVICE]
    if not end.streams:
        return False
    known = max(flow.sent, flow.begin)
    for reach in (flow.tx, flow.nic, flow.ip):
        at_ns = reach.log[-1][1] if reach.log else None
        if reach.position > known >= 0 and at_ns is not None and at_ns > since_ns:
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


def _went_at_once(conn: Connection, last_ns: int, read_ns: int | None) -> bool:
    """Return whether the client closed on its own, right behind a last message.

    A service that reads a farewell closes as well, and its FIN may be there first: on a busy
    host the client has not come to its close() yet. Who waits for a reply reads the end of
    the service's stream before it closes.

    Args:
        conn: Whose last message it is.
        last_ns: When its last byte was sent.
        read_ns: When the service read that; None if it did not, or if no row shows it.
    """
    left_ns, gone_ns = conn.fin_ns
    if conn.reset_by is not None or conn.error or not left_ns or not _by_itself(conn):
        return False
    if left_ns - last_ns < conn.patience_ns:
        return True
    # Later: only where both ends close in order, the service has read it, and has answered
    # before.
    unread = conn.ends[SERVICE].streams and read_ns is None
    if not gone_ns or not conn.longest_ns or unread:
        return False
    if gone_ns < left_ns and _sees_reads(conn):
        parting_ns = _LONGEST_PARTING_NS  # it was not waiting: it would have read the end
    else:
        # No client gives up sooner than it has waited for another answer.
        parting_ns = max(_PARTING_NS, min(conn.longest_ns, _LONGEST_PARTING_NS))
    return left_ns - last_ns < parting_ns and gone_ns - last_ns < _LONGEST_PARTING_NS


def _by_itself(conn: Connection) -> bool:
    """Return whether the client closed before it knew that the service had closed."""
    left_ns, gone_ns = conn.fin_ns
    if conn.eof_ns:
        return False  # before it closed; or it closed its side alone, and went on waiting
    if not gone_ns or left_ns <= gone_ns or _sees_reads(conn):
        return True
    # No row shows what it read: its FIN left before the service's could have come to it.
    trip_ns = conn.trip_ns
    return trip_ns is not None and left_ns - gone_ns < trip_ns


def _sees_reads(conn: Connection) -> bool:
    """Return whether rows show all that the client reads, including the end of the stream."""
    return conn.ends[CLIENT].streams and not conn.flows[SERVICE].unseen


def _client_left(conn: Connection) -> tuple[int, str] | None:
    """Return when the client closed its socket, or aborted; None if only its side."""
    found = []
    if conn.reset_by == CLIENT:
        found.append((conn.reset_ns, "reset by the client"))
    half = conn.eof_ns > conn.fin_ns[CLIENT]  # it went on reading to the end
    if conn.fin_ns[CLIENT] and not half:
        found.append((conn.fin_ns[CLIENT], "closed by the client"))
    return min(found, default=None)


def _over_at(conn: Connection) -> tuple[int, str] | None:
    """Return what ended the waiting on a connection first, and when; None if nothing did."""
    found = []
    left = _client_left(conn)
    if left is not None:
        found.append(left)
    if conn.reset_by == SERVICE:
        found.append((conn.reset_ns, "reset by the service"))
    elif conn.error and conn.reset_by is None:
        found.append((conn.error_ns, in_words(conn.error)))
    if conn.fin_ns[SERVICE]:
        found.append((conn.fin_ns[SERVICE], "closed by the service"))
    if not found:
        closed = [(end.closed_ns, end.index) for end in conn.ends if end.closed_ns]
        found = [(at, f"closed by the {_NAMES[index]}") for at, index in closed]
    return min(found, default=None)
