"""Which connection a packet belongs to: by its addresses, its SYN's number, its namespace (D73)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .binding import set_syn
from .connection import Connection
from .directory import Addresses, Directory, Way, likeliest
from .row_fields import opens, whole
from .stream import CLIENT, SERVICE


class PacketRouter:
    """Finds the connection of a packet that comes by a way for the first time."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def route(self, row: Any, key: Addresses) -> Way | None:  # noqa: C901 - case by case
        """Return the connection and direction of a packet whose key is new."""
        source, target = (row.saddr, row.sport), (row.daddr, row.dport)
        flags = row.flags or ""
        begins = opens(flags)
        there = self._directory.find(row.netns, source, target)
        back = self._directory.find(row.netns, target, source)
        if begins and any(_is_open(conn, row) for conn in there):
            return None  # its sender has no socket to send it from: it is forged
        if begins:
            conn, index = _of_syn(row, there), CLIENT
        else:
            conn, index = _of_packet(row, there, back, flags)
        if conn is None:
            # What does not begin a connection and carries nothing is the rest of an old one.
            if not row.bytes and "SYN" not in flags:
                return None
            guessed = False
            if "SYN" in flags:
                index = CLIENT if begins else SERVICE
            elif row.point == "rx_ip":
                index = CLIENT
            else:
                guessed = True
                index = CLIENT if (row.dport or 0) < (row.sport or 0) else SERVICE
            conn = self._directory.new(row, turned=index == SERVICE)
            if not row.bytes:
                self._directory.keep_bare(conn)
            conn.guessed = guessed
            self._directory.register(conn, row.netns)
            # Before it has a number: what is not known to begin may be of another, elsewhere.
            if begins:
                set_syn(conn, row.seq)
        if begins:
            for one in [one for one in back if one.is_open and one.is_in(row.netns)]:
                self._directory.replace(one)
        self._directory.displace(conn, row.netns)
        key = _own_key(key, conn, index)
        way = self._directory.by_packet[key] = (conn, index)
        conn.packet_keys.append(key)
        return way

    def older(self, conn: Connection, index: int, row: Any, flags: str) -> Connection | None:
        """Return the connection of a packet, which may be of the one before by the same addresses.

        A port that is used again begins with a number beyond all of those used before (RFC 6528).
        """
        own, other = conn.flows[index].syn, conn.flows[1 - index].syn
        ack = whole(row, "ack") if "ACK" in flags else None
        if "SYN" in flags:
            return conn
        if (
            (own >= 0 and _before(row.seq, own) and not (row.seq == 0 and "RST" in flags))
            or (other >= 0 and ack is not None and _before(ack, other + 1))
            or (own < 0 and other < 0 and not conn.connected and conn.flows[index].begin < 0)
        ):
            known = self._directory.find(row.netns, conn.client, conn.service)
            return next((one for one in reversed(known) if one.replaced and not one.over), None)
        return conn


def is_new(conn: Connection, row: Any) -> bool:
    """Return whether a SYN begins another connection by the same addresses."""
    if conn.over:
        return True
    flow = conn.flows[CLIENT]
    return flow.syn != row.seq and (flow.syn >= 0 or flow.begin >= 0)


def _is_open(conn: Connection, row: Any) -> bool:
    """Whether the client's socket is open: no other can send the SYN of a row."""
    end = conn.ends[CLIENT]
    return (
        end.state in ("TCP_ESTABLISHED", "TCP_CLOSE_WAIT")
        and end.streams
        and end.netns == row.netns
        and not (end.closed_ns or conn.over or conn.replaced or conn.missed)
        and conn.flows[CLIENT].syn not in (-1, row.seq)
    )


def _of_syn(row: Any, known: Sequence[Connection]) -> Connection | None:
    """Return the connection that a SYN begins, if anything is known of it."""
    likely = []
    for conn in reversed(known):
        flow = conn.flows[CLIENT]
        if flow.syn == row.seq and not conn.over:
            return conn
        if conn.is_open and flow.syn < 0 and flow.begin < 0:
            likely.append(conn)
    # In the namespace of its socket, or where that is the only one that has not begun.
    return likeliest(likely, likely, None, row.netns)


def _of_packet(
    row: Any, there: Sequence[Connection], back: Sequence[Connection], flags: str
) -> tuple[Connection | None, int]:
    """Return the connection of a packet that does not begin one, and its direction."""
    ack = whole(row, "ack")
    if "SYN" in flags and ack is not None:
        for one in back:
            if one.flows[CLIENT].syn == (ack - 1) & 0xFFFFFFFF and not one.over:
                return one, SERVICE
    known = [*there, *back]
    likely = [conn for conn in known if conn.is_open]
    conn = likeliest(likely, known, None, row.netns)
    if conn is None and not likely:
        # The last packets of one that is over.
        conn = next((one for one in reversed(known) if one.over and not one.replaced), None)
    return conn, CLIENT if conn in there else SERVICE


def _before(seq: int, other: int) -> bool:
    """Return whether a sequence number comes before another."""
    return bool((seq - other) & 0x80000000)


def _own_key(key: Addresses, conn: Connection, index: int) -> Addresses:
    """Return the key of a packet's addresses; shares the connection's own objects if equal.

    Those of a row are others, which would stay in memory as long as the key does.
    """
    ends = (conn.client, conn.service) if index == CLIENT else (conn.service, conn.client)
    own = (key[0], *ends[0], *ends[1])
    return own if own == key else key
