"""When the turns of a connection are plain, so that it may be on the fast path (D139)."""

from __future__ import annotations

from .connection import Connection
from .losses import Losses
from .row_fields import Process
from .stream import NOT_SEEN, Flow, Log, Reach

FIRST = 2
"""Exchanges of a connection before it is on the fast path."""
NO_INSTANT = -1


def may_begin(  # noqa: C901, PLR0911, PLR0912 - case by case
    conn: Connection, losses: Losses
) -> bool:
    """Return whether a connection's turns are plain, and a reply is under way or was read.

    Everything that is not looked at there has to be as it is in a connection to which nothing
    has happened.
    """
    pending = conn.replying
    if pending is None or conn.fast_path is not None or conn.reported < max(conn.fast_from, FIRST):
        return False
    if (
        (pending.kind, pending.parted, pending.missed, pending.beyond)
        != ("exchange", None, False, False)
        or pending.retransmits
        or pending.zero_windows
        or pending.over_ns is not None
    ):
        return False
    if conn.cut or conn.torn or conn.missed or conn.breaks != losses.count or conn.waiting:
        return False
    if conn.over or conn.replaced or conn.successor or conn.closing_ns or conn.fins:
        return False
    if conn.doubt is not None or conn.error is not None or conn.eof_ns or conn.left_ns:
        return False
    if conn.reset_by is not None or conn.reset_seen is not None or conn.ask_ns is not None:
        return False
    if conn.ask_retransmits or conn.ask_zeros or conn.answered != pending.request_end:
        return False
    client, service = conn.ends
    request, reply = conn.flows
    if not (service.sock and service.streams) or service.closed_ns or client.closed_ns:
        return False
    if client.sock:
        if not client.streams or not _is_last(request, client.process):
            return False
        if request.sent != conn.answered or not 0 <= reply.read <= reply.sent:
            return False
    elif request.sent >= 0 or request.senders or reply.read >= 0:
        return False
    if not _is_last(reply, service.process) or reply.ready is not NOT_SEEN:
        return False
    if request.read != conn.answered or request.copied > conn.answered:
        return False
    return (
        is_at(request, conn.answered)
        and is_in(request.ready, conn.answered)
        and _is_tidy(request)
        and _is_tidy(reply)
        and not (reply.tx.position > reply.sent or has_more(reply, reply.sent))
        and _ends_with(reply.tx.log, reply.tx.position, pending.reply_begin)
        and _ends_with(reply.nic.log, reply.nic.position, pending.reply_begin)
        and _ends_with(reply.ip.log, reply.ip.position, pending.reply_begin)
        and _ends_with(reply.sends, reply.sent, pending.reply_begin)
        and _ends_with(reply.reads, reply.read, pending.reply_begin)
    )


def _is_last(flow: Flow, process: Process) -> bool:
    """Return whether a process was the last to send."""
    return bool(flow.senders) and flow.senders[-1][1] == process


def _is_tidy(flow: Flow) -> bool:
    return (
        flow.fin < 0
        and not (flow.unseen or flow.urgent or flow.zero or flow.strays)
        and not (flow.tx.late or flow.nic.late or flow.ip.late or flow.ready.late)
    )


def _ends_with(log: Log, position: int, begin: int) -> bool:
    """Return whether a log of a reply that begins at `begin` knows when it reached `position`."""
    if not log:
        return position <= begin
    return log[-1][0] == position and log[-1][1] is not None


def last(log: Log) -> int:
    """Return the last instant of a log."""
    at = log[-1][1] if log else None
    return NO_INSTANT if at is None else at


def is_in(reach: Reach, position: int) -> bool:
    """Return whether a stream has come to `position` at a point, if it is seen there."""
    return reach.position < 0 or reach.position == position


def is_at(flow: Flow, position: int) -> bool:
    """Return whether a stream has come to `position` wherever its packets are seen."""
    return is_in(flow.tx, position) and is_in(flow.nic, position) and is_in(flow.ip, position)


def has_more(flow: Flow, position: int) -> bool:
    """Return whether packets show bytes behind `position`."""
    return (
        flow.tx.position > position or flow.nic.position > position or flow.ip.position > position
    )


def lacks(flow: Flow, position: int) -> bool:
    """Return whether packets that bring bytes up to `position` were not seen where others are."""
    return 0 <= flow.nic.position < position or 0 <= flow.ip.position < position
