"""Rows and losses of all probes, on their way to the router in order of time."""

from __future__ import annotations

import bisect
import operator
from collections import Counter

import attrs

from tcplat_core.plugin.specs import Loss

from .reorder import FOREVER, ReorderBuffer
from .router import Router

_SINCE = operator.attrgetter("since_ns")
_HOOK = operator.attrgetter("probe", "point", "func")


@attrs.define(eq=False)
class Sequencer:
    """Between the rings and the router.

    Args:
        router: Gets rows in order, with each loss at its place.
        buffer: Where rows wait for older ones.
    """

    router: Router
    buffer: ReorderBuffer
    undelivered: Counter[tuple[str, str, str]] = attrs.field(factory=Counter, init=False)
    """Rows that reach no sink, by probe, point and func: behind the limit, or with no sink left."""
    _losses: list[Loss] = attrs.field(factory=list, init=False)
    """Those that wait for their place, in order."""

    @property
    def waiting(self) -> bool:
        """Whether something is here that was not delivered yet."""
        return bool(self._losses or self.buffer.waiting)

    def lose(self, loss: Loss) -> None:
        """Take a loss: its place is behind the last row that is not younger than its beginning."""
        bisect.insort(self._losses, loss, key=_SINCE)

    def flush(self, before_ns: int = FOREVER) -> None:
        """Deliver what is older than `before_ns`; everything if it is not given."""
        while self._losses and self._losses[0].since_ns < before_ns:
            loss = self._losses.pop(0)
            self._flush_rows(loss.since_ns + 1)
            self.router.lost(loss)
        self._flush_rows(before_ns)

    def _flush_rows(self, before_ns: int) -> None:
        rows, router = self.buffer.leave(before_ns), self.router
        if rows and (router.done or router.limit):
            most = 0 if router.done else router.limit - router.total
            self.undelivered.update(map(_HOOK, rows[most:]))
            rows = rows[:most]
        if rows:
            router.deliver(rows)
