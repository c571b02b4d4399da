"""Puts rows of all probes in order of time, and hands them to the sinks in batches."""

from __future__ import annotations

import functools
import gc
import operator
from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from .errors import ReaderGoneError
from .histogram import Aggregates
from .model import Loss, Merge, RunReport, Sink
from .schema import Event


def spare_the_collector() -> None:
    """Have Python's collector of cycles come seldom, where rows by the million go through.

    Rows are in no cycle, and it would walk through every batch of them. What a sink
    keeps in cycles may stay for long, so it should not.
    """
    gc.set_threshold(100_000, 50, 50)


_BY_TIME = operator.attrgetter("ts_ns")
_HOOK = operator.attrgetter("probe", "point", "func")


@attrs.define(eq=False)
class Router:
    """Everything downstream of the rings: needs no kernel and no root.

    Args:
        sinks: By the name the user gave them.
        limit: End after so many rows; 0 for no limit.
    """

    sinks: dict[str, Sink]
    limit: int = 0
    late: int = 0
    """Rows that were older than one delivered before them."""
    switched_off: dict[str, str] = attrs.field(factory=dict)
    reader_gone: bool = False
    _waiting: list[Event] = attrs.field(factory=list, init=False)
    _cut: Counter[tuple[str, str, str]] = attrs.field(factory=Counter, init=False)
    _losses: list[tuple[int, Loss]] = attrs.field(factory=list, init=False)
    """Youngest row that was here when a loss was noticed, and the loss."""
    _last_ns: int = attrs.field(default=0, init=False)
    _total: int = attrs.field(default=0, init=False)

    @property
    def done(self) -> bool:
        """The limit is reached, or nobody is left to write to."""
        return self.reader_gone or not self.sinks or (0 < self.limit <= self._total)

    def feed(self, rows: Sequence[Event]) -> None:
        """Take rows of one probe, as they came out of its ring."""
        self._waiting += rows

    def flush(self, before_ns: int | None = None) -> None:
        """Deliver what is older than `before_ns`, or everything.

        A handler stamps its record before it submits it, and may be interrupted
        in between: what is younger waits, an older one may still turn up.
        """
        rows = self._waiting
        rows.sort(key=_BY_TIME)
        if before_ns is None:
            ready, self._waiting = rows, []
        else:
            cut = _first_from(rows, before_ns)
            ready, self._waiting = rows[:cut], rows[cut:]
        if self.done or self.limit:
            room = 0 if self.done else self.limit - self._total
            self._cut.update(map(_HOOK, ready[room:]))
            ready = ready[:room]
        if ready:
            self.deliver(ready)
        oldest_ns = self._waiting[0].ts_ns if self._waiting else None
        while self._losses and (oldest_ns is None or oldest_ns > self._losses[0][0]):
            self._each("lost", self._losses.pop(0)[1])

    def deliver(self, ready: Sequence[Event]) -> None:
        """Hand over rows that are in order already."""
        for row in ready:  # sorted: what is late stands first
            if row.ts_ns >= self._last_ns:
                break
            self.late += 1
        self._last_ns = max(self._last_ns, ready[-1].ts_ns)
        self._total += len(ready)
        self._each("write", ready)

    def undelivered(self) -> Counter[tuple[str, str, str]]:
        """Rows that were fed and reached no sink, by probe, point and func."""
        return self._cut + Counter(map(_HOOK, self._waiting))

    def lost(self, loss: Loss) -> None:
        """Say in the stream that events were lost, behind the rows that are here already."""
        if self._waiting:
            self._losses.append((max(row.ts_ns for row in self._waiting), loss))
        else:
            self._each("lost", loss)

    def merged(self, merge: Merge) -> None:
        """Tell the sinks that want to know that the rows are of several hosts."""
        for name, sink in list(self.sinks.items()):
            if hasattr(sink, "merged"):
                self._call(name, functools.partial(sink.merged, merge))

    def idle(self) -> None:
        """Let sinks notice that their reader has gone, also while nothing happens."""
        self._those_with("idle")

    def poll(self) -> None:
        """Let sinks serve their readers, also while nothing happens."""
        self._those_with("poll")

    def _those_with(self, method: str) -> None:
        for name, sink in list(self.sinks.items()):
            if hasattr(sink, method):
                self._call(name, getattr(sink, method))

    def aggregates(self, them: Aggregates) -> None:
        """Show the sinks that asked for it what the kernel has counted."""
        for name, sink in list(self.sinks.items()):
            if hasattr(sink, "aggregates"):
                self._call(name, functools.partial(sink.aggregates, them))

    def close(self, report: RunReport) -> None:
        """End every sink, those that were switched off before excepted."""
        self._each("close", report)

    def _each(self, method: str, argument: object) -> None:
        for name, sink in list(self.sinks.items()):
            self._call(name, functools.partial(getattr(sink, method), argument))

    def _call(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except ReaderGoneError:
            self.reader_gone = True
            del self.sinks[name]
        except Exception as error:  # noqa: BLE001 - one sink must not stop the others
            self.switched_off[name] = str(error) or type(error).__name__
            del self.sinks[name]


def _first_from(rows: list[Event], ns: int) -> int:
    """Index of the first row that is not older than `ns`."""
    index = len(rows)
    while index and rows[index - 1].ts_ns >= ns:
        index -= 1
    return index
