"""Which packets their receiver cannot have accepted (D118)."""

from __future__ import annotations

from typing import Any

from .connection import Connection
from .rows import whole
from .stream import CLIENT, MOST_URGENT, SERVICE


def may_reset(conn: Connection, index: int, row: Any) -> bool:
    """Whether the RST of a row, from the end `index`, has a number that its receiver accepts.

    It accepts the number of the next byte that it expects, and no other (RFC 5961, 3.2): after a
    FIN the FIN's own as well, and the end of what came behind a hole (SACK). Where packets of the
    sender are on their way, any number of theirs may be the next. Where nothing is known of the
    stream, or rows of it are lost, the RST is believed.
    """
    flow, ack = conn.flows[index], whole(row, "ack")
    asked = conn.flows[CLIENT].syn
    if index == SERVICE and flow.begin < 0 and not conn.connected:
        # The answer to a SYN acknowledges it; it has no number of its own (RFC 9293, 3.10.7.1).
        return ack is None or asked < 0 or ack == (asked + 1) & 0xFFFFFFFF
    known = flow.furthest
    if flow.ref < 0 or known < 0 or conn.missed:
        return True
    at = flow.near(row.seq)
    expected = max(flow.arrived(), flow.read)
    if expected < 0:
        expected = flow.begin
    if flow.fin >= 0:
        expected = min(expected, flow.fin)
    for reach in (flow.nic, flow.ip):
        if reach.late:
            known = max(known, *(finish for _, finish in reach.late))
    if flow.tx.position < 0 and conn.ends[index].streams:
        known += MOST_URGENT  # rows of calls leave urgent bytes out
    return expected <= at <= known
