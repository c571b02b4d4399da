"""How the two streams of a connection moved, as far as a graph shows it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from tcplat_stages.model import Connection

from tcplat_core import Event

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
_MOST_WAYS = 262_144
_HALF = 1 << 31
_WHOLE = 1 << 32


class Course:
    """Of one connection.

    Attributes:
        near: Address and port of the end that direction 0 flows from.
        points: FIELDS numbers each.
        every: One row in so many was kept.
        ways: By which it is found.
        short: There was no room for what came later.
    """

    __slots__ = ("_furthest", "_last", "_seen", "every", "near", "points", "short", "ways")

    def __init__(self, near: tuple[str, int | None]) -> None:
        self.near = near
        self.points = array("q")
        self.every = 1
        self.ways: list[Any] = []
        self.short = False
        self._seen = 0
        self._last: list[tuple[int, int] | None] = [None, None]
        """Sequence number and position of the furthest byte, per direction."""
        self._furthest = [0, 0]

    def add(self, row: Any, direction: int, code: int) -> int:
        """Note a row; how many points there are more by it."""
        seq, count = row.seq, row.bytes
        last = self._last[direction]
        position = 0 if last is None else last[1] + (seq - last[0] + _HALF) % _WHOLE - _HALF
        if last is None or position > last[1]:
            self._last[direction] = (seq, position)
        if code == _LEAVES:
            if position + count <= self._furthest[direction]:
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

    def cut(self, ts_ns: int) -> Course | None:
        """Keep what is not younger; what is, is another connection's by the same addresses."""
        points = self.points
        at = len(points)
        while at and points[at - FIELDS] > ts_ns:
            at -= FIELDS
        if at == len(points):
            return None
        rest = Course(self.near)
        rest.points, self.points = points[at:], points[:at]
        rest.every, rest._last, rest._furthest = self.every, self._last, [0, 0]
        return rest


class Courses:
    """Of all connections that are open, by their addresses."""

    def __init__(self) -> None:
        self._ways: dict[Any, tuple[Course, int]] = {}
        self._courses: dict[Any, Course] = {}
        self._count = 0
        self.refused = False
        """There were more points than there is room for."""

    def feed(self, rows: Sequence[Event]) -> None:
        """Note what of these rows a graph shows."""
        ways, codes = self._ways, _CODES
        for row in rows:
            code = codes.get(row.point)
            if code is None or not row.bytes or row.seq is None or row.sport is None:
                continue
            way = ways.get((row.netns, row.saddr, row.sport, row.daddr, row.dport))
            if way is None:
                way = self._way(row)
                if way is None:
                    continue
            if self._count >= _MOST_OPEN:
                self.refused = way[0].short = True
                continue
            direction = way[1] ^ (row.point in _OF_THE_OTHER)
            self._count += way[0].add(row, direction, code)

    def _way(self, row: Any) -> tuple[Course, int] | None:
        near, far = (row.saddr, row.sport), (row.daddr, row.dport)
        key = _key(row.netns, near, far)
        course = self._courses.get(key)
        if course is None:
            if self._count >= _MOST_OPEN:
                self.refused = True
                return None
            course = self._courses[key] = Course(near)
        if len(self._ways) >= _MOST_WAYS:
            self._ways.clear()
        name = (row.netns, *near, *far)
        course.ways.append(name)
        way = self._ways[name] = (course, int(near != course.near))
        return way

    def take(self, conn: Connection) -> Course | None:
        """What is noted of a connection that is over."""
        flow = conn.flows[0]
        for netns in (conn.ends[0].netns, conn.ends[1].netns, flow.tx_netns, flow.rx_netns):
            key = _key(netns, conn.client, conn.service)
            course = self._courses.pop(key, None)
            if course is not None:
                break
        else:
            return None
        for way in course.ways:
            self._ways.pop(way, None)
        rest = course.cut(conn.last_ns)
        if rest is not None:
            self._courses[key] = rest
        self._count -= len(course.points) // FIELDS
        return course


def _key(netns: int | None, one: tuple[Any, Any], other: tuple[Any, Any]) -> Any:
    """The same for both directions; loopback addresses are in every namespace."""
    low, high = (one, other) if (one[0], one[1] or 0) <= (other[0], other[1] or 0) else (other, one)
    local = low[0] == high[0] or low[0].startswith("127.") or low[0] == "::1"
    return (netns if local else None, low, high)
