"""Which end closed, reset or failed first, and why: later events are consequences (D76)."""

from __future__ import annotations

from .chain import CONNECTED
from .connection import Connection
from .stream import SERVICE


def note_failure(conn: Connection, index: int, error: str, ts_ns: int) -> None:
    """Note that an end's socket failed, unless something failed before."""
    if error == "ECONNRESET":
        note_reset(conn, 1 - index)
    elif conn.reset_by == index:
        # A socket that gives up says so to the other end, by a RST that leaves before this row.
        conn.reset_by = conn.reset_why = None
    if conn.error is None:
        conn.error, conn.error_ns = error, ts_ns


def note_fin(conn: Connection, index: int) -> None:
    """Note that an end has closed its side, by the connection's latest row."""
    if index not in conn.fins:
        conn.fins.append(index)
        conn.fin_ns[index] = conn.last_ns


def note_reset(conn: Connection, index: int) -> None:
    """Note that an end reset the connection, unless it had failed already."""
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
        conn.reset_why = "no listener at that port"
    elif end.sock:
        if inbound.arrived() > known and not (index in conn.fins and end.closed_ns):
            conn.reset_why = "it closed with unread data"
        elif index in conn.fins or end.closed_ns:
            conn.reset_why = "data came after it had closed"
        elif inbound.sent <= known:  # else some of it may have come, and not been read
            conn.reset_why = "it aborted"
