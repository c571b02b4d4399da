"""How the two streams of a connection moved, as far as a graph shows it."""

from __future__ import annotations

from array import array
from typing import Any

from tcplat_stages.connection import Connection
from tcplat_stages.row_fields import device
from tcplat_stages.stream import CLIENT, SERVICE

KINDS = ("send", "nic_tx", "nic_rx", "rx_ip", "ready", "recv", "again")
"""Points of the graph; `again` is a `nic_tx` of bytes that had left before."""
_CODES = {name: code for code, name in enumerate(KINDS)}
_LEAVES, _AGAIN = _CODES["nic_tx"], _CODES["again"]
_OF_THE_OTHER = frozenset({"ready", "recv"})
"""Rows of a socket, of bytes that its other end has sent."""
FIELDS = 4
"""Of a point: ts_ns, code * 2 + direction, position in the stream, bytes."""
MOST_POINTS = 400
"""Of one connection; then every second one goes."""
_MOST_OPEN = 2_000_000
"""Points of all connections that are not over: 64 MB."""
_HALF = 1 << 31
_WHOLE = 1 << 32


class Course:
    """Of one connection.

    Attributes:
        near: Address and port of the end that direction 0 flows from.
        points: FIELDS numbers each.
        every: One row in so many was kept.
        short: There was no room for what came later.
    """

    __slots__ = ("_furthest", "_last", "_seen", "every", "near", "points", "short")

    def __init__(self, near: tuple[str, int | None]) -> None:
        self.near = near
        self.points = array("q")
        self.every = 1
        self.short = False
        self._seen = 0
        self._last: list[tuple[int, int] | None] = [None, None]
        """Sequence number and position of the furthest byte, per direction."""
        self._furthest = [0, 0]

    def add(self, row: Any, direction: int, code: int, *, passes_by: bool = False) -> int:
        """Note a row; return by how many points the graph grew."""
        seq, count = row.seq, row.bytes
        last = self._last[direction]
        position = 0 if last is None else last[1] + (seq - last[0] + _HALF) % _WHOLE - _HALF
        if last is None or position > last[1]:
            self._last[direction] = (seq, position)
        if code == _LEAVES:
            if position + count <= self._furthest[direction]:
                if passes_by:
                    return 0  # it has left already, by the stream's own device
                code = _AGAIN
            else:
                self._furthest[direction] = position + count
        self._seen += 1
        if self._seen % self.every and code != _AGAIN:
            return 0
        points = self.points
        points.extend((row.ts_ns, code * 2 + direction, position, count))
        if len(points) < MOST_POINTS * FIELDS:
            return 1
        self.every *= 2
        self.points = array("q")
        for at in range(0, len(points), 2 * FIELDS):
            self.points.extend(points[at : at + FIELDS])
        return 1 - (len(points) - len(self.points)) // FIELDS


def _passes_by(conn: Connection, row: Any, source: tuple[str, int | None]) -> bool:
    """Return whether a packet leaves by another device than its stream: a bridge, a veth."""
    flow = conn.flows[CLIENT if source == conn.client else SERVICE]
    return flow.tx_netns not in (None, row.netns) or flow.tx_dev not in (None, device(row))


class Courses:
    """Of all connections that are open. Whose a row is, the joiner says: see note()."""

    def __init__(self) -> None:
        self._courses: dict[int, Course] = {}
        self._count = 0
        self.refused = False
        """There were more points than there is room for."""

    def note(self, conn: Connection, row: Any) -> None:
        """Note a row of a connection, if a graph shows it; Joiner.watch."""
        code = _CODES.get(row.point)
        if code is None or row.seq is None or row.sport is None:
            return
        near = (row.saddr, row.sport)
        course = self._courses.get(conn.number)
        if self._count >= _MOST_OPEN:
            self.refused = True
            if course is not None:
                course.short = True
            return
        if course is None:
            course = self._courses[conn.number] = Course(near)
        direction = (near != course.near) ^ (row.point in _OF_THE_OTHER)
        passes_by = code == _LEAVES and _passes_by(conn, row, near)
        self._count += course.add(row, direction, code, passes_by=passes_by)

    def take(self, conn: Connection) -> Course | None:
        """Return what is noted of a connection that is over, and drop it."""
        course = self._courses.pop(conn.number, None)
        if course is not None:
            self._count -= len(course.points) // FIELDS
        return course
