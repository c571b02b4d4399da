"""Durations of one stage, and how sure their percentiles are.

The interval of a change is a bootstrap's. The k-th smallest value of a resample of n values
is ``F^-1(U)``, where F is the sample's own distribution and U the k-th smallest of n uniform
numbers, which is Beta(k, n + 1 - k) distributed. So a resample's percentile is drawn at
once, out of the histogram, without making the resample: exactly the bootstrap's
distribution, in time that does not depend on n.

Requests of one capture are not independent: slow ones come in bursts. Each capture is
divided into blocks of consecutive requests; where the share of requests above the percentile
varies more from block to block than chance would have it, the sample counts for as many
independent requests as explain that (the design effect of survey statistics).
"""

from __future__ import annotations

import random
from bisect import bisect_left
from itertools import accumulate, zip_longest
from typing import Any

from tcplat_stages.duration_histogram import DurationHistogram

DRAWS = 2000
"""Resamples."""
LEAST = 20
"""Requests, below which nothing is judged."""
NAMES = ("BASE", "NEW")
_BLOCKS = 64
_FEWEST_BLOCKS = 12
"""Of fewer, how much they differ says little."""


class Sample:
    """Durations of one stage: histograms of 64 blocks of consecutive ones, at most."""

    __slots__ = ("_room", "blocks", "size")

    def __init__(self) -> None:
        self.blocks: list[DurationHistogram] = []
        self.size = 1
        """Durations in a block."""
        self._room = 0

    def add(self, ns: int) -> None:
        """Count a duration."""
        if not self._room:
            if len(self.blocks) == _BLOCKS:
                for even, odd in zip(self.blocks[::2], self.blocks[1::2], strict=True):
                    even.merge(odd)
                del self.blocks[1::2]
                self.size *= 2
            self.blocks.append(DurationHistogram())
            self._room = self.size
        self.blocks[-1].add(ns)
        self._room -= 1

    def whole(self) -> DurationHistogram:
        """All of them."""
        whole = DurationHistogram()
        for block in self.blocks:
            whole.merge(block)
        return whole


class Quantiles:
    """What a sample's percentiles may be."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self.whole = sample.whole()
        self.count = self.whole.count
        buckets = list(self.whole.buckets())
        self._values = [min(max(ns, self.whole.min_ns), self.whole.max_ns) for ns, _ in buckets]
        self._ranks = list(accumulate(count for _, count in buckets))

    def value(self, share: float) -> int:
        """Return the least duration (ns) that so great a share does not exceed."""
        return self._values[bisect_left(self._ranks, share * self.count - 1e-9)]

    def independent(self, share: float) -> float:
        """For how many independent durations it counts, at this percentile."""
        return self.independent_above(self.value(share))

    def independent_above(self, limit: int) -> float:
        """For how many independent ones it counts, where how many are above a limit matters."""
        parts = [
            (sum(n for ns, n in one.buckets() if ns > limit), one.count)
            for one in self._sample.blocks
        ]
        p = sum(above for above, _ in parts) / self.count if self.count else 0
        if not 0 < p < 1:
            return self.count
        # A burst may be longer than a block: the same for blocks twice and four times as long.
        effect = 1.0
        while len(parts) >= _FEWEST_BLOCKS:
            excess = sum((above - p * size) ** 2 / (p * (1 - p) * size) for above, size in parts)
            effect = max(effect, excess / (len(parts) - 1))
            pairs = zip_longest(parts[::2], parts[1::2], fillvalue=(0, 0))
            parts = [(one[0] + other[0], one[1] + other[1]) for one, other in pairs]
        return self.count / effect

    def draw(self, share: float, chance: random.Random) -> list[int]:
        """Return the percentile of each of DRAWS resamples."""
        n = max(self.independent(share), 1.0)
        alpha, beta = n * share, n * (1 - share) + 1
        top = len(self._values) - 1
        return [
            self._values[
                min(bisect_left(self._ranks, chance.betavariate(alpha, beta) * self.count), top)
            ]
            for _ in range(DRAWS)
        ]


def too_few(counts: tuple[int, int], least: int) -> str:
    """Return why two counts are too small to be judged; empty where they are not."""
    short = [f"{n} in {which}" for n, which in zip(counts, NAMES, strict=True) if n < least]
    return f"{', '.join(short)}; it takes {least}" if short else ""


def group_order(group: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the key that sorts groups."""
    return tuple("" if one is None else str(one) for one in group)
