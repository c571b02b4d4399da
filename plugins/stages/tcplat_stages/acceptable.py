"""Which packets their receiver cannot have accepted (D118)."""

from __future__ import annotations

from typing import Any

from tcplat_core import HOST_BITS

from .connection import Connection, End
from .row_fields import whole
from .stream import CLIENT, MOST_URGENT, SERVICE, Flow

_LARGEST_SCALE = 14
"""A window is shifted by so many bits at most (RFC 7323); rows do not have the scale."""
LARGEST_WINDOW = 0xFFFF
_MOST_STRAYS = 16
"""Rows of packets beyond the window, with none inside it: the stream is there by now."""


def is_stray(conn: Connection, index: int, row: Any) -> bool:
    """Whether a packet with data or a FIN lies beyond any window of its receiver.

    Bytes that no row shows may lie in between: where rows were lost, or many such packets come in
    a row, the stream goes on there.
    """
    flow = conn.flows[index]
    if flow.ref < 0:
        return False
    ahead = flow.near(row.seq) - flow.ref
    window = conn.flows[1 - index].widest or LARGEST_WINDOW
    if ahead <= window << _LARGEST_SCALE or conn.missed:
        flow.strays = 0
        return False
    flow.strays += 1
    return flow.strays <= _MOST_STRAYS


def disown(end: End, flow: Flow, at: int) -> None:
    """Take back bytes from `at` on that were seen before the call that sends them.

    Hosts of a merged capture have clocks of their own: there, bytes may seem to come too soon.
    """
    for reach, netns in (
        (flow.tx, flow.tx_netns),
        (flow.nic, flow.rx_netns),
        (flow.ip, flow.rx_netns),
    ):
        if (
            netns is not None
            and end.netns is not None
            and netns >> HOST_BITS == end.netns >> HOST_BITS
        ):
            reach.cut(at)


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
