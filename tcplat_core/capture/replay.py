"""One replay from start to end: a capture, filters, sinks, and the report of it."""

from __future__ import annotations

import operator
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from tcplat_core.deliver.fast.lines import Lines
from tcplat_core.deliver.fast.slim import ends_ns
from tcplat_core.deliver.router import Router
from tcplat_core.errors import TcplatError, UsageError
from tcplat_core.event.fields import Event
from tcplat_core.loader.filter import Filter
from tcplat_core.plugin.output import Output
from tcplat_core.plugin.progress import Bar
from tcplat_core.plugin.report import HookReport, ProbeReport, RunReport, add_reports
from tcplat_core.plugin.sampling import Sampled, Shares
from tcplat_core.plugin.specs import Item, Loss, Merge, SinkLike

from .row_filter import RowFilter
from .rows import GAP, Capture
from .source import Source

_HOOK = operator.attrgetter("probe", "point", "func", "attach")
_TIME = operator.attrgetter("ts_ns")
_READER_CHECK_S = 1.0
"""Interval of the checks that the sinks' readers are there."""

RowsByHook = Counter[tuple[str, str, str, str]]
"""Rows by probe, point, func and attach."""
UNREAD = "of the run's rows are not in what was read (damaged, or cut off)"
"""Behind a number of rows of a probe."""


@attrs.define(eq=False)
class Replay:
    """One replay.

    Args:
        source: The bytes of the capture.
        capture: The decoder of the bytes.
        sinks: Open sinks, by name.
        wanted: Filter for rows.
        probes: Only rows of these probes; of all if empty.
        points: Only rows of these points; of all if empty.
        count: End after so many rows; 0 for no limit.
        stopping: Returns whether the user has ended the replay.
        bar: The progress bar.
        outputs: Files of the sinks, created or truncated once something was read.
    """

    source: Source
    capture: Capture
    sinks: Mapping[str, SinkLike]
    wanted: Filter = attrs.field(factory=Filter)
    probes: Sequence[str] = ()
    points: Sequence[str] = ()
    count: int = 0
    stopping: Callable[[], bool] = lambda: False
    bar: Bar = attrs.field()

    @bar.default
    def _no_bar(self) -> Bar:
        return Bar(self.source, shown=False)

    outputs: Sequence[Output] = ()
    router: Router = attrs.field(init=False)
    delivered: RowsByHook = attrs.field(factory=Counter, init=False)
    filtered: RowsByHook = attrs.field(factory=Counter, init=False)
    """Rows that did not pass the filter."""
    lost: Counter[tuple[str, str]] = attrs.field(factory=Counter, init=False)
    """Lost events that the capture records, by probe and point."""
    shares: Shares = attrs.field(factory=Shares, init=False)
    gaps: int = attrs.field(default=0, init=False)
    """Rows that the msgpack sink did not send to its slow reader."""
    late: int = attrs.field(default=0, init=False)
    whole: bool = attrs.field(default=False, init=False)
    """Whether the capture was read to its end."""
    _begun: bool = attrs.field(default=False, init=False)
    """Whether the sinks have begun."""
    _first_ns: int = attrs.field(default=-1, init=False)
    _last_ns: int = attrs.field(default=0, init=False)
    _filter: RowFilter = attrs.field(init=False)
    _filtering: bool = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.router = Router(self.sinks, self.count, self.outputs)
        self._filter = RowFilter(self.wanted)
        self._filtering = bool(self.wanted != Filter() or self.probes or self.points)

    def run(self) -> RunReport:
        """Replay until the capture, the limit or the user ends it.

        Raises:
            TcplatError: It contains nothing readable.
        """
        try:
            self._check_outputs()
            self._read()
            return self._end()
        except BaseException:
            self.router.cancel()
            raise
        finally:
            self.bar.close()

    def _read(self) -> None:
        # The owner of packets in one batch may only be known from the next.
        waiting: deque[Item] = deque()
        next_check = time.monotonic() + _READER_CHECK_S
        for item in self.capture.items(self.source.chunks()):
            if self.stopping():
                break
            if isinstance(item, Sequence) and not item:
                continue
            self.bar.hide()
            self._begin()
            if isinstance(item, Sequence) and self.wanted.by_task:
                self._filter.learn(item)
                self._deliver(waiting)
            if item is not None:
                waiting.append(item)
            if item is None or not self.wanted.by_task:
                self._deliver(waiting)
            self.router.poll()
            if self._begun and (item is None or time.monotonic() >= next_check):
                next_check = time.monotonic() + _READER_CHECK_S
                self.router.idle()
            if self.router.done:
                break
            self.bar.update()
        else:
            self._begin()
            self._deliver(waiting)
            self.whole = not self.router.done

    def _end(self) -> RunReport:
        if self.whole and not self.capture.read:
            raise TcplatError(self.capture.refusal(self.source.name))
        report = self.report()
        if self._begun:
            self.router.close(report)
        else:
            self.router.cancel()
        return report

    def _check_outputs(self) -> None:
        there = os.fstat(self.source.fd)
        if any(output.is_at(there) for output in self.outputs):
            raise UsageError(f"{self.source.name} is the input: a sink must write to another file")

    def _begin(self) -> None:
        """Let the sinks begin, once a capture was recognized."""
        if not self._begun and self.capture.read:
            self._begun = True
            self.router.begin()

    def _deliver(self, waiting: deque[Item]) -> None:
        while waiting and not self.router.done:
            item = waiting.popleft()
            if isinstance(item, Merge):
                self.router.merged(item)
                continue
            if isinstance(item, Sampled):
                self.shares.add(item)
                self.router.sampled(item)
                continue
            if isinstance(item, Loss):
                if self._is_chosen(item.probe, item.point):
                    if (item.probe, item.point) == GAP:  # rows that the run had delivered
                        self.gaps += item.count
                    else:
                        self.lost[item.probe, item.point] += item.count
                    self.router.lost(item)
                continue
            rows = self._passing(item) if self._filtering else item
            if self.count:
                rows = rows[: self.count - self.delivered.total()]
            if rows:
                self._keep_books(rows)
                self.router.deliver(rows)

    def _is_chosen(self, probe: str, point: str) -> bool:
        return (not self.probes or probe in self.probes) and (
            not self.points or point in self.points
        )

    def _passing(self, rows: Sequence[Event]) -> Sequence[Event]:
        passing = [
            row
            for row in rows
            if self._is_chosen(row.probe, row.point) and self._filter.passes(row)
        ]
        if len(passing) < len(rows):
            self.filtered += Counter(map(_HOOK, rows))
            self.filtered -= Counter(map(_HOOK, passing))
        return passing

    def _keep_books(self, rows: Sequence[Event]) -> None:
        self.delivered.update(count_hooks(rows))
        first_ns, last_ns = ends_ns(rows)
        if self._first_ns < 0:
            self._first_ns = self._last_ns = first_ns
        times = [] if isinstance(rows, Lines) and rows.ordered else list(map(_TIME, rows))
        if first_ns < self._last_ns or times != sorted(times):
            for time in times or map(_TIME, rows):
                self.late += time < self._last_ns
                self._last_ns = max(self._last_ns, time)
        self._last_ns = max(self._last_ns, last_ns)

    def left(self) -> dict[str, int]:
        """Return how many events were left in the rings when the run ended, by probe."""
        found: Counter[str] = Counter()
        for report in self.capture.reports:
            for name, probe in report.probes.items():
                found[name] += sum(
                    hook.unread for hook in probe.hooks if self._is_chosen(name, hook.point)
                )
        return found

    def summary(self, report: RunReport) -> Iterator[str]:
        """Yield warnings about a capture: damage, losses, a missing end."""
        if self.capture.left_out:
            yield self.capture.skipped(self.source.name)
        if self.gaps:
            yield f"{self.gaps} rows were missed, because this reader was too slow"
        seen = [*self.delivered, *self.filtered, *self.lost]
        for place, what, names in ((0, "probe", self.probes), (1, "point", self.points)):
            for name in names:
                if self.whole and all(hook[place] != name for hook in seen):
                    there = ", ".join(dict.fromkeys(hook[place] for hook in seen)) or "none"
                    yield f"{self.source.name} has no row of {what} {name}; it has {there}"
        if self.whole and self.filtered and not self.delivered:
            yield f"no row passed the filters ({self.filtered.total()} read)"
        if self.whole and not self.capture.ended:
            yield f"{self.source.name} is truncated: its run was killed, or the file was cut off"
        elif self.whole and report.incomplete:
            yield f"{self.source.name}: the books are {report.incomplete}"

    def report(self) -> RunReport:
        """Return the run's report for the replayed rows; without a report, from counting.

        `delivered` is what the sinks of this replay were given. Rows that a filter
        left out are taken from `produced`, as if the kernel had not made them; what
        was in the run and is not in the capture, or is damaged there, is `unread`.
        """
        report = RunReport(probes={}, duration_s=0)
        for number, one in enumerate(self.capture.reports):
            report = add_reports(report, one) if number else one
        delivered, filtered, lost = self.delivered.copy(), self.filtered.copy(), self.lost.copy()
        probes = {
            name: attrs.evolve(
                probe,
                hooks=tuple(
                    _adjusted(name, hook, delivered, filtered, lost)
                    for hook in probe.hooks
                    if self._is_chosen(name, hook.point)
                ),
            )
            for name, probe in report.probes.items()
            if not self.probes or name in self.probes
        }
        report = attrs.evolve(
            report,
            probes=probes,
            switched_off={**report.switched_off, **self.router.switched_off},
            one_in=self.shares.union(report.one_in if report.probes else None),
        )
        if self.whole and self.capture.ended and not +delivered:
            return report
        reason = "the replay ended before the capture did"
        if self.whole:
            reason = "the run did not end, or the capture lacks its beginning or end"
        return attrs.evolve(
            add_reports(report, _counted(+delivered, +lost)),
            one_in=report.one_in,
            duration_s=max(0, self._last_ns - self._first_ns) / 1e9,
            late=self.late,
            incomplete=f"counted from the rows: {reason}",
        )


def count_hooks(rows: Sequence[Event]) -> RowsByHook:
    """Return the number of rows of each hook."""
    return rows.hooks() if isinstance(rows, Lines) else Counter(map(_HOOK, rows))


def compare(report: RunReport, read: RowsByHook) -> tuple[dict[str, int], int]:
    """Return by how much the rows of a capture differ from its report.

    Args:
        report: The report.
        read: All rows of the capture, by hook.

    Returns:
        Rows by probe that were in the run, and were not read; rows that are in no books.
    """
    left = read.copy()
    unread = {
        name: sum(
            _adjusted(name, hook, left, Counter(), Counter()).unread - hook.unread
            for hook in probe.hooks
        )
        for name, probe in report.probes.items()
    }
    return {name: count for name, count in unread.items() if count > 0}, (+left).total()


def _adjusted(
    probe: str,
    hook: HookReport,
    delivered: RowsByHook,
    filtered: RowsByHook,
    lost: Counter[tuple[str, str]],
) -> HookReport:
    """Return a hook's report for its replayed rows; remove these from the counters."""
    key = (probe, hook.point, hook.func, hook.attach)
    got = min(delivered[key], hook.delivered)
    left = min(filtered[key], hook.delivered - got)
    delivered[key] -= got
    filtered[key] -= left
    lost[probe, hook.point] -= hook.dropped
    return attrs.evolve(hook, produced=hook.produced - left, delivered=got)


def _counted(delivered: RowsByHook, lost: Counter[tuple[str, str]]) -> RunReport:
    """Return a report of rows and losses that are in no report."""
    hooks: dict[str, list[HookReport]] = {}
    for (probe, point, func, attach), count in delivered.items():
        row = HookReport(point, func, attach, count, 0, count)
        hooks.setdefault(probe, []).append(row)
    for (probe, point), count in lost.items():
        of_probe = hooks.setdefault(probe, [])
        # A loss does not name the hook of the point.
        known = next((hook for hook in of_probe if hook.point == point), None)
        if known:
            of_probe.remove(known)
        func, attach, got = (known.func, known.attach, known.delivered) if known else ("", "", 0)
        of_probe.append(HookReport(point, func, attach, got + count, count, got))
    return RunReport(
        probes={probe: ProbeReport(hooks=tuple(each)) for probe, each in hooks.items()},
        duration_s=0,
    )
