"""A capture, boiled down to what one page can show. Memory is bounded, however large it is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import attrs
import msgspec
from tcplat_stages.chain import CONNECT_STAGES, CONNECTED, STAGES
from tcplat_stages.closing import in_words
from tcplat_stages.connection import Connection, Finished
from tcplat_stages.duration_histogram import DurationHistogram
from tcplat_stages.exchange import FAILED, OUTCOMES, Exchange
from tcplat_stages.formatting import duration
from tcplat_stages.hosts import Hosts, crosses
from tcplat_stages.join import Joiner
from tcplat_stages.samples import samples
from tcplat_stages.stages import order, weight_of
from tcplat_stages.stream import CLIENT, SERVICE
from tcplat_stages.waterfall import Rank, as_json, rank

from tcplat_core import Event, Loss, Merge, Reader, Sampled, Shares, micros, say, whole_file

from .common import remarks
from .courses import FIELDS, KINDS, MOST_POINTS, Course, Courses
from .page import page
from .perfetto import Trace

CONNECT = "connect"
_MOST_WINDOWS = 240
_FIRST_WINDOW_NS = 1 << 20
_PER_OCTAVE = 4
"""Rows of the heat map for each doubling of the latency."""
_MOST_POINTS_SHOWN = 150_000


class Timeline:
    """Latency over time: a histogram per window. Windows grow with the capture."""

    def __init__(self) -> None:
        self.window_ns = _FIRST_WINDOW_NS
        self.windows: dict[int, DurationHistogram] = {}
        self._low = self._high = 0

    def add(self, ts_ns: int, ns: int) -> None:
        """Count an exchange that began at `ts_ns`."""
        window = ts_ns // self.window_ns
        if not self.windows:
            self._low = self._high = window
        while max(window, self._high) - min(window, self._low) >= _MOST_WINDOWS:
            self._widen()
            window = ts_ns // self.window_ns
        self._low, self._high = min(window, self._low), max(window, self._high)
        histogram = self.windows.get(window)
        if histogram is None:
            histogram = self.windows[window] = DurationHistogram()
        histogram.add(ns)

    def _widen(self) -> None:
        windows, self.windows = self.windows, {}
        self.window_ns *= 2
        self._low //= 2
        self._high //= 2
        for window, histogram in windows.items():
            there = self.windows.get(window // 2)
            if there is None:
                self.windows[window // 2] = histogram
            else:
                there.merge(histogram)

    def as_json(self, start_ns: int) -> dict[str, Any]:
        """Percentiles by window, and the heat map's cells: window, row and count."""
        series, cells = [], []
        for window in sorted(self.windows):
            histogram = self.windows[window]
            at = micros(window * self.window_ns - start_ns)
            series.append([at, histogram.count, *_percentiles(histogram)])
            rows: dict[int, int] = {}
            for ns, count in histogram.buckets():
                row = math.floor(math.log2(max(ns, 1) / 1000) * _PER_OCTAVE)
                rows[row] = rows.get(row, 0) + count
            cells += [[window - self._low, row, count] for row, count in sorted(rows.items())]
        return {
            "window_us": micros(self.window_ns),
            "from_us": micros(self._low * self.window_ns - start_ns),
            "windows": self._high - self._low + 1 if self.windows else 0,
            "series": series,
            "cells": cells,
            "per_octave": _PER_OCTAVE,
        }


def _percentiles(histogram: DurationHistogram) -> list[float]:
    """p50, p90, p99 and the maximum, in µs."""
    shown = [micros(histogram.percentile(percent)) for percent in (50, 90, 99)]
    return [*shown, micros(histogram.max_ns)]


@attrs.define
class _Busy:
    """What is known of a connection that is not over."""

    exchanges: int = 0
    sum_ns: int = 0
    slowest_ns: int = 0
    rank: Rank = (False, 0)
    """Of the worst of its requests, answered or not."""


@attrs.define(eq=False)
class Story:
    """Everything on the page.

    Args:
        slow: So many exchanges are shown one by one.
        most_connections: So many connections.
    """

    slow: int = 50
    most_connections: int = 2000
    joiner: Joiner = attrs.field(factory=Joiner)
    hosts: Hosts = attrs.field(factory=Hosts)
    merges: list[Merge] = attrs.field(factory=list)
    shares: Shares = attrs.field(factory=Shares)
    timeline: Timeline = attrs.field(factory=Timeline)
    stages: dict[str, DurationHistogram] = attrs.field(factory=dict)
    exchanges: int = 0
    outcomes: dict[str, int] = attrs.field(factory=lambda: dict.fromkeys(OUTCOMES, 0))
    """How many exchanges had which outcome."""
    connections: int = 0
    retransmits: int = 0
    resets: int = 0
    first_ns: int = -1
    last_ns: int = 0
    offset_ns: int = 0
    """Unix time minus the rows' clock."""
    _courses: Courses = attrs.field(factory=Courses)
    _slowest: list[tuple[Rank, int, dict[str, Any]]] = attrs.field(factory=list)
    _kept: list[tuple[Rank, int, dict[str, Any], Course | None]] = attrs.field(factory=list)
    _busy: dict[int, _Busy] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.joiner.watch = self._courses.note

    def write(self, rows: Sequence[Event]) -> None:
        """Take rows."""
        if self.first_ns < 0:
            self.first_ns = rows[0].ts_ns
            self.offset_ns = rows[0].time_ns - rows[0].ts_ns
        self.last_ns = max(self.last_ns, rows[-1].ts_ns)
        self._take(self.joiner.feed(rows))

    def merged(self, merge: Merge) -> None:
        """Note that the capture has several hosts."""
        self.hosts.learn(merge)
        self.merges.append(merge)

    def sampled(self, share: Sampled) -> None:
        """Note of which connections the rows are."""
        self._take(self.joiner.sampled(share))
        self.shares.add(share)

    def close(self, until_ns: int = 0) -> None:
        """Note that the capture has ended; it is complete up to `until_ns`, 0 if unknown."""
        self._take(self.joiner.finish(until_ns))

    def _take(self, finished: list[Finished]) -> None:
        for one in finished:
            if isinstance(one, Exchange):
                self._exchange(one)
            else:
                self._connection(one)

    def _count(self, name: str, ns: int, weight: int) -> None:
        histogram = self.stages.get(name)
        if histogram is None:
            histogram = self.stages[name] = DurationHistogram()
        histogram.add(ns, weight)

    def _exchange(self, exchange: Exchange) -> None:
        self.exchanges += 1
        self.outcomes[exchange.outcome] += 1
        weight = weight_of(exchange, self.shares)
        for name, ns in samples(exchange):
            self._count(name, ns, weight)
        busy = self._busy.get(exchange.conn.number)
        if busy is None:
            busy = self._busy[exchange.conn.number] = _Busy()
        how_slow = rank(exchange)
        busy.rank = max(busy.rank, how_slow)
        if exchange.measured:
            total_ns = exchange.total_ns
            self.timeline.add(exchange.began_ns, total_ns)
            busy.exchanges += 1
            busy.sum_ns += total_ns
            busy.slowest_ns = max(busy.slowest_ns, total_ns)
        # Of two that took equally long, the earlier one stays.
        if len(self._slowest) < self.slow:
            heapq.heappush(self._slowest, (how_slow, -self.exchanges, self._shown(exchange)))
        elif how_slow > self._slowest[0][0]:
            heapq.heapreplace(self._slowest, (how_slow, -self.exchanges, self._shown(exchange)))

    def _shown(self, exchange: Exchange) -> dict[str, Any]:
        shown = as_json(exchange, self.hosts)
        shown["lasted_us"] = micros(exchange.lasted_ns)
        shown["stages"] = list(shown["stages"].items())
        if shown["connect"]:
            shown["connect"]["stages"] = list(shown["connect"]["stages"].items())
        return shown

    def _connection(self, conn: Connection) -> None:
        self.connections += 1
        self.retransmits += conn.retransmits
        self.resets += conn.reset_by is not None
        busy = self._busy.pop(conn.number, None) or _Busy()
        handshake = conn.handshake
        if conn.stamps[CONNECTED] is not None and handshake.total_ns:
            until_ns = conn.first_ns + handshake.total_ns
            self._count(CONNECT, handshake.total_ns, self.shares.weight(conn.first_ns, until_ns))
        course = self._courses.take(conn)
        item = (busy.rank, -self.connections)
        if len(self._kept) < self.most_connections:
            heapq.heappush(self._kept, (*item, self._summary(conn, busy), course))
        elif item > self._kept[0][:2]:
            heapq.heapreplace(self._kept, (*item, self._summary(conn, busy), course))

    def _summary(self, conn: Connection, busy: _Busy) -> dict[str, Any]:
        client, service = conn.ends
        stats = client.stats or {}
        return {
            "n": conn.number,
            "saddr": conn.client[0],
            "sport": conn.client[1],
            "daddr": conn.service[0],
            "dport": conn.service[1],
            "pid": client.pid,
            "comm": client.comm,
            "service_pid": service.pid,
            "service_comm": service.comm,
            "at_us": micros(conn.first_ns - self.first_ns),
            "for_us": micros(conn.duration_ns),
            "connect_us": micros(conn.handshake.total_ns)
            if conn.stamps[CONNECTED] is not None and conn.handshake.total_ns
            else conn.connect_us,
            "exchanges": busy.exchanges,
            "unanswered": sum(conn.outcomes.get(name, 0) for name in FAILED),
            "mean_us": micros(busy.sum_ns) / busy.exchanges if busy.exchanges else None,
            "slowest_us": micros(busy.slowest_ns) if busy.exchanges else None,
            "sent": conn.bytes_of(CLIENT),
            "received": conn.bytes_of(SERVICE),
            "retransmits": conn.retransmits,
            "rtt_us": stats.get("srtt_us"),
            "ended": _ended(conn),
        }

    def as_json(self, name: str, words: list[str]) -> dict[str, Any]:
        """Return what the page draws. Times are µs from the capture's first row."""
        kept = sorted(self._kept, key=lambda one: one[:2], reverse=True)
        courses: dict[int, Any] = {}
        points_left = _MOST_POINTS_SHOWN
        without = 0
        for _, _, summary, course in kept:
            if course is None:
                continue
            count = len(course.points) // FIELDS
            if count > points_left:
                without += 1
                continue
            points_left -= count
            courses[summary["n"]] = self._course(course, summary)
        said = list(words)
        if self.connections > len(kept):
            said.append(
                f"the table has {len(kept)} of {self.connections} connections: "
                "those with the slowest requests (--connections N for more)"
            )
        if without or self._courses.refused:
            said.append(
                f"packets are kept for {len(courses)} connections; "
                "for others, or for all of theirs, there was no room"
            )
        bound_ns = self.hosts.worst_ns()
        if bound_ns is not None:
            said.append(f"between hosts, wire times are right within ± {duration(bound_ns)}")
        slowest = sorted(self._slowest, key=lambda one: one[:2], reverse=True)
        return {
            "name": name,
            "time_ns": str(self.first_ns + self.offset_ns),
            "span_us": micros(max(0, self.last_ns - self.first_ns)),
            "remarks": said,
            "exchanges": self.outcomes["answered"],
            "outcomes": self.outcomes,
            "connections": self.connections,
            "retransmits": self.retransmits,
            "resets": self.resets,
            "order": [*CONNECT_STAGES, *STAGES],
            "timeline": self.timeline.as_json(max(self.first_ns, 0)),
            "stages": [
                [
                    stage,
                    histogram.count,
                    *_percentiles(histogram),
                    micros(histogram.sum_ns),
                    bound_ns is not None and crosses(stage),
                ]
                for stage, histogram in sorted(self.stages.items(), key=_order)
            ],
            "slowest": [
                {**one, "at_us": micros(one["ts_ns"] - self.first_ns)} for _, _, one in slowest
            ],
            "table": [summary for _, _, summary, _ in kept],
            "kinds": KINDS,
            "most_points": MOST_POINTS,
            "courses": courses,
        }

    def _course(self, course: Course, summary: dict[str, Any]) -> dict[str, Any]:
        """Flat: µs from the connection's first point, code * 2 + direction, position, bytes."""
        points = course.points
        turned = course.near != (summary["saddr"], summary["sport"])
        start_ns = points[0] if points else 0
        least = [0, 0]
        for way in (0, 1):
            at = [points[n + 2] for n in range(0, len(points), FIELDS) if points[n + 1] % 2 == way]
            least[way] = min(at, default=0)
        flat: list[float] = []
        for n in range(0, len(points), FIELDS):
            ts_ns, code, position, count = points[n : n + FIELDS]
            flat += (micros(ts_ns - start_ns), code ^ turned, position - least[code % 2], count)
        return {
            "from_us": micros(start_ns - self.first_ns),
            "every": course.every,
            "short": course.short,
            "points": flat,
        }


def _order(item: tuple[str, DurationHistogram]) -> tuple[int, int]:
    return (-1, 0) if item[0] == CONNECT else order(item[0])


def _ended(conn: Connection) -> str:
    """Return how a connection ended, in a few words."""
    if conn.reset_by is not None:
        return conn.reset_why or "reset"
    return in_words(conn.error) if conn.error else conn.ended


def write_report(
    capture: str, output: str, form: str, *, slow: int, most_connections: int, quiet: bool
) -> None:
    """Run the command."""
    reader = Reader.open(capture, quiet=quiet)
    reader.check_output(output)
    if form == "perfetto":
        words = _write_trace(reader, output)
    else:
        story = Story(slow, most_connections)
        for item in reader.items():
            if isinstance(item, Merge):
                story.merged(item)
            elif isinstance(item, Loss):
                story.joiner.lost(item)
            elif isinstance(item, Sampled):
                story.sampled(item)
            elif isinstance(item, Sequence):
                story.write(item)
        story.close(reader.report.until_ns)
        words = list(remarks(reader, story.joiner))
        data = story.as_json(reader.name, words)
        with whole_file(output) as file:
            file.write(page(reader.name, msgspec.json.encode(data).decode()))
    if not quiet:
        for sentence in words:
            say(sentence)


def _write_trace(reader: Reader, output: str) -> list[str]:
    """Write it as a trace for Perfetto; what has to be said."""
    joiner = Joiner()
    with whole_file(output) as file:
        trace = Trace(file)
        for item in reader.items():
            if isinstance(item, Merge):
                trace.merged(item)
            elif isinstance(item, Loss):
                joiner.lost(item)
            elif isinstance(item, Sampled):
                trace.add(joiner.sampled(item))
            elif isinstance(item, Sequence):
                trace.add(joiner.feed(item))
        trace.add(joiner.finish(reader.report.until_ns))
        trace.close()
    return list(remarks(reader, joiner))
