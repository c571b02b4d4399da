"""Percentiles of each stage, by groups of exchanges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs

from tcplat_core import Event, Loss, Sampled, Shares, columns, micros, printable, slim_rows

from .chain import STAGES, UNEXPLAINED
from .connection import Finished
from .duration_histogram import DurationHistogram
from .exchange import OUTCOMES, Exchange
from .formatting import duration, moment
from .hosts import crosses
from .joined import Joined
from .samples import TOTAL, Tally, count
from .stream import CLIENT

PERCENTILES = ((50.0, "p50"), (90.0, "p90"), (99.0, "p99"), (99.9, "p99_9"))
_MOST_GROUPS = 4096
OTHERS = "(others)"

Group = tuple[Any, ...]


def _process(exchange: Exchange) -> Any:
    return exchange.process(exchange.end.index).comm


def _remote(exchange: Exchange) -> Any:
    conn = exchange.conn
    return conn.service[0] if exchange.end.index == CLIENT else conn.client[0]


def _port(exchange: Exchange) -> Any:
    return exchange.conn.service[1]


GROUPINGS: dict[str, Callable[[Exchange], Any]] = {
    "process": _process,  # name of the client's process; the service's, where that is unknown
    "remote": _remote,  # address of the other end, as that process sees it
    "port": _port,  # of the service
}


_BEHIND = (UNEXPLAINED, TOTAL, *OUTCOMES)


def weight_of(exchange: Exchange, shares: Shares) -> int:
    """Return for how many exchanges one stands, where not all connections were sampled."""
    if shares.one_in is None:
        return 1
    began_ns = exchange.began_ns
    return shares.weight(began_ns, began_ns + exchange.lasted_ns)


def order(name: str) -> tuple[int, int]:
    """Stages in the order of their chain, then what is no stage."""
    first = name.partition("+")[0]
    if first in STAGES:
        return STAGES.index(first), name.count("+")
    return len(STAGES) + (_BEHIND.index(name) if name in _BEHIND else -1), 0


@attrs.define(eq=False)
class Stages(Joined):
    """Percentiles per group and stage.

    Args:
        output: Where to.
        group_by: Names of GROUPINGS.
        every_ns: Also every so often, by the rows' time; 0 for at the end alone.
        as_json: One JSON object per group and stage.
    """

    group_by: tuple[str, ...] = ("process", "port")
    every_ns: int = 0
    _now: dict[Group, dict[str, DurationHistogram]] = attrs.field(factory=dict, init=False)
    _all: dict[Group, dict[str, DurationHistogram]] = attrs.field(factory=dict, init=False)
    _next_ns: int = attrs.field(default=0, init=False)
    _until_ns: int = attrs.field(default=0, init=False)
    _offset_ns: int = attrs.field(default=0, init=False)
    """Unix time minus the rows' clock, as the last row has it."""
    _lost: int = attrs.field(default=0, init=False)
    _tally: Tally = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._tally = Tally(self._histograms)
        self.joiner.count_with(self._tally)

    def feed(self, batch: Sequence[Event]) -> None:
        """Take rows; at the end of an interval, write its stages."""
        if not self.every_ns:
            super().feed(batch)
            return
        rows = batch
        while (cut := self._end_in(rows)) is not None:
            self._take(rows[:cut])
            ts_ns = rows[cut].ts_ns
            if not self._next_ns:
                self._next_ns = (ts_ns // self.every_ns + 1) * self.every_ns
            self._end_intervals(ts_ns)
            rows = rows[cut:]
        self._take(rows)

    def _take(self, rows: Sequence[Event]) -> None:
        """Take rows of one interval."""
        super().feed(rows)
        if rows:
            last = rows[-1]
            self._offset_ns = last.time_ns - last.ts_ns

    def passed(self, ts_ns: int) -> None:
        """No older row comes any more: intervals end, and what has been silent for long is over."""
        if self.every_ns and self._next_ns:
            self._end_intervals(ts_ns)
        super().passed(ts_ns)

    def write_loss(self, loss: Loss) -> None:
        """Said with the figures; as JSON at the place of the gap."""
        self._lost += loss.count
        if self.as_json:
            super().write_loss(loss)

    def write_share(self, share: Sampled) -> None:
        """Say it with the figures; as JSON where it changes."""
        self._tally.version += 1
        if self.as_json:
            super().write_share(share)

    def finish(self, finished: list[Finished]) -> None:
        """Write the figures of the whole run."""
        self.write_finished(finished)
        self._add_up()
        self._write(self._all, "")
        if self.as_json:
            self.output.write(self.spans_loss())

    def write_finished(self, finished: list[Finished]) -> None:
        """Count what is over."""
        groups = self._now
        for one in finished:
            if not isinstance(one, Exchange):
                continue
            group = self._group(one)
            found = groups.get(group)
            if found is None:
                if len(groups) >= _MOST_GROUPS:
                    group = tuple(OTHERS for _ in group)
                found = groups.setdefault(group, {})
            weight = weight_of(one, self.shares)
            count(one, found, weight)

    def _group(self, exchange: Exchange) -> Group:
        return tuple([GROUPINGS[name](exchange) for name in self.group_by])

    def _histograms(self, exchange: Exchange) -> dict[str, DurationHistogram] | None:
        """Return where a plain exchange is counted, if its group has any and its weight is 1."""
        return self._now.get(self._group(exchange)) if self.shares.one_in is None else None

    def _end_intervals(self, ts_ns: int) -> None:
        """Tell of those that are over by now, but for those in which nothing was complete."""
        while self._next_ns <= ts_ns:
            super().passed(self._next_ns)
            if self._now:
                self._until_ns = self._next_ns + self._offset_ns
                self._write(self._now, f"until {moment(self._until_ns)}")
                self._add_up()
            # Until then nothing can be over.
            due_ns = self.joiner.due_ns(self._next_ns)
            quiet_ns = ts_ns + 1 if due_ns is None else min(due_ns, ts_ns + 1)
            self._next_ns = max(self._next_ns + 1, quiet_ns) + self.every_ns - 1
            self._next_ns -= self._next_ns % self.every_ns

    def _end_in(self, rows: Sequence[Event]) -> int | None:
        """Return the first row of the next interval; a late row may follow it in its batch."""
        slim = slim_rows(rows)
        if slim is not None:
            times = slim.numbers[:: slim.width].tolist()
        else:
            times = [row.ts_ns for row in rows]
        return next((i for i, ts_ns in enumerate(times) if ts_ns >= self._next_ns), None)

    def _add_up(self) -> None:
        for group, found in self._now.items():
            there = self._all.get(group)
            if there is None and len(self._all) >= _MOST_GROUPS:
                there = self._all.setdefault(tuple(OTHERS for _ in group), {})
            elif there is None:
                there = self._all.setdefault(group, {})
            for name, histogram in found.items():
                there.setdefault(name, DurationHistogram()).merge(histogram)
        self._now = {}
        self._tally.version += 1

    def _write(self, groups: dict[Group, dict[str, DurationHistogram]], when: str) -> None:
        rows = [
            (group, name, groups[group][name])
            for group in sorted(groups, key=_as_text)
            for name in sorted(groups[group], key=order)
        ]
        if self.as_json:
            times = {"until_ns": self._next_ns, "until_time_ns": self._until_ns}
            until = times if when else {}
            self.output.write(
                self.encoder.encode_lines(
                    [
                        {**as_json(self.group_by, *row), **self._bound(row[1]), **until}
                        for row in rows
                    ]
                )
            )
            return
        self.output.write(self._table(rows, when).encode())

    def _bound(self, stage: str) -> dict[str, float]:
        bound_ns = self.hosts.worst_ns()
        return {} if bound_ns is None or not crosses(stage) else {"wire_bound_us": micros(bound_ns)}

    def _table(self, rows: list[tuple[Group, str, DurationHistogram]], when: str) -> str:
        lines = [f"-- {when}"] if when else []
        bound_ns = self.hosts.worst_ns()
        if bound_ns is not None:
            lines.append(f"-- between hosts, wire and wire_back are right ± {duration(bound_ns)}")
        if self.shares.text:
            lines.append(f"-- {self.shares.text} of the connections: counts are of this sample")
        if self._lost:
            lines.append(f"-- {self._lost} events were lost: figures of what was seen")
        if not when:
            lines += [f"-- {words}" for words in self.joiner.left_out()]
        heads = [*(name.upper() for name in self.group_by), "STAGE", "COUNT"]
        heads += ["P50", "P90", "P99", "P99.9", "MAX"]
        cells = [
            [
                *("-" if value is None else str(value) for value in group),
                name,
                str(histogram.count),
                *(duration(histogram.percentile(percent)) for percent, _ in PERCENTILES),
                duration(histogram.max_ns),
            ]
            for group, name, histogram in rows
        ]
        lines += columns([heads, *cells], right=range(len(self.group_by) + 1, len(heads)))
        return "\n".join([*map(printable, lines), ""])


def _as_text(group: Group) -> tuple[str, ...]:
    return tuple("" if value is None else str(value) for value in group)


def as_json(
    group_by: tuple[str, ...], group: Group, name: str, histogram: DurationHistogram
) -> dict[str, Any]:
    """Return a stage of a group as an object; keys that are not grouped by are null."""
    values = dict(zip(group_by, group, strict=True))
    return {
        "v": 1,
        **{grouping: values.get(grouping) for grouping in GROUPINGS},
        "stage": name,
        "count": histogram.count,
        **{f"{key}_us": micros(histogram.percentile(percent)) for percent, key in PERCENTILES},
        "max_us": micros(histogram.max_ns),
        "mean_us": round(histogram.weighted_ns / histogram.weight / 1000, 3),
    }
