"""How the shares of requests with an outcome changed from one capture to another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from tcplat_stages.exchange import CUT, ONE_WAY, OPEN, PUSH, UNANSWERED, UNKNOWN, Exchange
from tcplat_stages.stream import SERVICE

from .changes import Key
from .sample import LEAST, Quantiles, Sample, too_few

SHARE = "share"
"""Stands for a percentile where the share of requests with an outcome is compared."""
SHARES = (UNANSWERED, CUT)
"""Outcomes that can fail a comparison."""
_COUNTED = (OPEN, ONE_WAY, UNKNOWN, PUSH)
"""Outcomes that are no fault: how many there were is reported."""
_MOST_SERVICES = 65_536
_Z = 2.5758
"""So many standard deviations to either side are 99 % of a normal distribution."""


@attrs.frozen
class Share:
    """How many requests of a group had an outcome, of how many.

    Args:
        counts: With that outcome, in BASE and in NEW.
        requests: Answered or not; None for what is no part of these.
        interval: Of the change of the share: 0.01 is one percentage point.
    """

    group: tuple[Any, ...]
    stage: str
    counts: tuple[int, int]
    requests: tuple[int, int] | None = None
    interval: tuple[float, float] | None = None
    too_little: str = ""
    percentile: str = SHARE

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """In BASE and in NEW; None where there are no requests."""
        base, new = self.requests or (0, 0)
        return (
            self.counts[0] / base if base else None,
            self.counts[1] / new if new else None,
        )

    @property
    def change(self) -> float | None:
        """Of the share."""
        base, new = self.shares
        return None if base is None or new is None else new - base

    @property
    def certain(self) -> bool:
        """The interval has no zero in it."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


Service = tuple[str, int | None]


@attrs.define(eq=False)
class Outcomes:
    """What became of a capture's requests, by group.

    Args:
        samples: Group and outcome -> 1 for each request that had it, 0 for each other, in order.
        counts: Group and outcome -> how many; of what is no request that awaits a reply.
        spoke: Services that sent a byte, on whatever connection.
        mute: Group, outcome and service -> how many it had while the service had not sent one.
    """

    samples: dict[Key, Sample] = attrs.field(factory=dict)
    counts: dict[Key, int] = attrs.field(factory=dict)
    spoke: set[Service] = attrs.field(factory=set)
    mute: dict[tuple[tuple[Any, ...], str, Service], int] = attrs.field(factory=dict)

    def add(self, group: tuple[Any, ...], exchange: Exchange) -> None:
        """Count one."""
        outcome, conn = exchange.outcome, exchange.conn
        service = conn.service
        if conn.bytes_of(SERVICE) and len(self.spoke) < _MOST_SERVICES:
            self.spoke.add(service)
        if outcome in _COUNTED:
            self.counts[group, outcome] = self.counts.get((group, outcome), 0) + 1
        elif service in self.spoke or len(self.spoke) >= _MOST_SERVICES:
            self._add(group, outcome)
        else:
            key = (group, outcome, service)
            self.mute[key] = self.mute.get(key, 0) + 1

    def _add(self, group: tuple[Any, ...], outcome: str) -> None:
        for name in SHARES:
            self.samples.setdefault((group, name), Sample()).add(int(outcome == name))

    def settle(self, spoke: set[Service]) -> int:
        """Count requests to services that sent a byte later; return how many are left out."""
        left_out = 0
        for (group, outcome, service), count in self.mute.items():
            if service in spoke:
                for _ in range(count):
                    self._add(group, outcome)
            else:
                left_out += count
        self.mute.clear()
        return left_out


def shares(base: Outcomes, new: Outcomes, groups: Iterable[tuple[Any, ...]]) -> list[Share]:
    """Of every group: what was not answered, always; what else there was, where there was any."""
    found = []
    for group in groups:
        for name in SHARES:
            pair = [one.samples.get((group, name), Sample()) for one in (base, new)]
            if name == UNANSWERED or any(one.whole().sum_ns for one in pair):
                found.append(_share(group, name, pair))
        for name in _COUNTED:
            before, after = (one.counts.get((group, name), 0) for one in (base, new))
            if before or after:
                found.append(Share(group, name, (before, after)))
    return found


def _share(group: tuple[Any, ...], name: str, pair: Sequence[Sample]) -> Share:
    wholes = [one.whole() for one in pair]
    counts = (wholes[0].sum_ns, wholes[1].sum_ns)
    requests = (wholes[0].count, wholes[1].count)
    words = too_few(requests, LEAST)
    if words:
        return Share(group, name, counts, requests, too_little=words)
    (p1, low1, high1), (p2, low2, high2) = (
        _wilson(count / n, Quantiles(one).independent_above(0))
        for count, n, one in zip(counts, requests, pair, strict=True)
    )
    # Newcombe's interval of a difference, of Wilson's for each: good also for shares near 0.
    low = p2 - p1 - math.hypot(p2 - low2, high1 - p1)
    high = p2 - p1 + math.hypot(high2 - p2, p1 - low1)
    return Share(group, name, counts, requests, (low, high))


def _wilson(p: float, n: float) -> tuple[float, float, float]:
    """Return a share and its confidence interval."""
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return p, max(middle - half, 0.0), min(middle + half, 1.0)
