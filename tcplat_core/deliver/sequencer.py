"""Merges rows and losses of all probes in order of time."""

from __future__ import annotations

import bisect
import operator
from collections import Counter

import attrs

from tcplat_core.plugin.sampling import Sampled
from tcplat_core.plugin.specs import Loss

from .reorder import FOREVER, ReorderBuffer
from .router import Router

_SINCE = operator.attrgetter("since_ns")
_HOOK = operator.attrgetter("probe", "point", "func")


@attrs.define(eq=False)
class Sequencer:
    """Delivers rows and losses to the router in order of time.

    Args:
        router: Receives rows and losses.
        buffer: Holds rows until no older one can follow.
    """

    router: Router
    buffer: ReorderBuffer
    undelivered: Counter[tuple[str, str, str]] = attrs.field(factory=Counter, init=False)
    """Rows that reach no sink, by probe, point and func: beyond the limit, or without a sink."""
    _losses: list[Loss] = attrs.field(factory=list, init=False)
    """Losses not reported yet, in order of their beginning."""
    _shares: list[Sampled] = attrs.field(factory=list, init=False)
    """Shares of the connections that do not hold yet, in order."""

    @property
    def waiting(self) -> bool:
        """Whether a row or loss is held that was not delivered yet."""
        return bool(self._losses or self._shares or self.buffer.waiting)

    def lose(self, loss: Loss) -> None:
        """Take a loss; it is reported after the last row not younger than its beginning."""
        bisect.insort(self._losses, loss, key=_SINCE)

    def share(self, share: Sampled) -> None:
        """Take a share; it is reported before the first row not older than its beginning."""
        self._shares.append(share)

    def flush(self, before_ns: int = FOREVER) -> None:
        """Deliver rows, losses and shares older than `before_ns`; default: all."""
        while self._shares and self._shares[0].since_ns < before_ns:
            share = self._shares.pop(0)
            self._flush(share.since_ns)
            self.router.sampled(share)
        self._flush(before_ns)

    def _flush(self, before_ns: int) -> None:
        """Deliver rows and losses older than `before_ns`."""
        while self._losses and self._losses[0].since_ns < before_ns:
            loss = self._losses.pop(0)
            self._flush_rows(loss.since_ns + 1)
            self.router.lost(loss)
        self._flush_rows(before_ns)

    def _flush_rows(self, before_ns: int) -> None:
        rows, router = self.buffer.pop(before_ns), self.router
        if rows and (router.done or router.limit):
            most = 0 if router.done else router.limit - router.total
            self.undelivered.update(map(_HOOK, rows[most:]))
            rows = rows[:most]
        if rows:
            router.deliver(rows)
