"""Which end closed, reset or failed first, and why: later events are consequences (D76)."""

from __future__ import annotations

import errno
import os

from .chain import CONNECTED
from .connection import Connection, End
from .stream import CLIENT, SERVICE

_RESET = ("ECONNRESET", "EPIPE")
"""What a socket fails with that accepts a RST: the second where the other end had closed."""

_LAST = frozenset({"TCP_FIN_WAIT1", "TCP_FIN_WAIT2", "TCP_LAST_ACK", "TCP_CLOSING"})
"""States from which a socket that closes in order is closed."""
_ORDERLY = frozenset({*_LAST, "TCP_CLOSE_WAIT"})


def note_failure(conn: Connection, index: int, error: str, ts_ns: int) -> None:
    """Note that an end's socket failed, unless something failed before."""
    if error in _RESET:
        note_reset(conn, 1 - index)
        conn.reset_seen = None
    elif conn.reset_by == index:
        # A socket that gives up says so to the other end, by a RST that leaves before this row,
        # and the other end may have failed by it already.
        conn.reset_by = conn.reset_why = conn.error = None
    if conn.error is None:
        conn.error, conn.error_ns = error, ts_ns


def in_words(error: str) -> str:
    """Return a connection's error for people: `error` may be the name of an errno.

    Rows have the name, ``EHOSTUNREACH``, where there is no word of one's own for it (`refused`).
    """
    number = getattr(errno, error, None) if error.isupper() else None
    return error if number is None else f"{os.strerror(number).lower()} ({error})"


def note_fin(conn: Connection, index: int) -> None:
    """Note that an end has closed its side, by the connection's latest row."""
    if index not in conn.fins:
        conn.fins.append(index)
        conn.fin_ns[index] = conn.last_ns


def note_rst(conn: Connection, index: int) -> None:
    """Note a packet by which an end resets the connection; see take_back()."""
    if conn.reset_by is None and conn.error is None:
        note_reset(conn, index)
        conn.reset_seen = (conn.flows[CLIENT].furthest, conn.flows[SERVICE].furthest)
        conn.went_on = 0


def note_bytes(conn: Connection, index: int, finish: int) -> None:
    """Note new bytes of an end; after a RST, those of both ends show that it was ignored."""
    if conn.reset_seen is not None and finish > conn.reset_seen[index] >= 0:
        conn.went_on |= 1 << index
        if conn.went_on == 1 << CLIENT | 1 << SERVICE:
            take_back(conn)


def take_back(conn: Connection) -> None:
    """Drop the RST that was seen: the connection goes on, so it was ignored."""
    if conn.reset_seen is None:
        return
    conn.reset_seen = conn.reset_by = conn.reset_why = None
    conn.reset_ns = 0
    if len(conn.fins) < 2:  # noqa: PLR2004 - both ends
        conn.closing_ns = 0


def note_change(conn: Connection, old: str, new: str, desc: str) -> None:
    """Note a change of state: a socket that closes in order was not reset, nor did it abort."""
    if new in _ORDERLY or (new == "TCP_CLOSE" and old in _LAST and desc == "closed"):
        take_back(conn)


def settle_rst(conn: Connection) -> None:
    """Drop, at the end of a connection, a RST of which the open socket has no row."""
    if conn.reset_seen is None or conn.reset_by is None or conn.missed:
        return
    sender, receiver = conn.ends[conn.reset_by], conn.ends[1 - conn.reset_by]
    if receiver.streams and receiver.state and not _gone(receiver) and not _gone(sender):
        take_back(conn)


def _gone(end: End) -> bool:
    return end.state == "TCP_CLOSE" or bool(end.closed_ns)


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
