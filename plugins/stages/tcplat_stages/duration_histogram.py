"""Percentiles of durations, with less than half a percent of error and little memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

_BITS = 7
"""128 buckets for each power of two: a bucket's middle is off by 1/256 at most."""


class DurationHistogram:
    """Counts of durations in log-linear buckets (as HdrHistogram), from 1 ns to whatever comes.

    Up to 255 ns a bucket is one nanosecond wide. A duration may have a weight, as where it stands
    for others that were not sampled: percentiles and the mean heed it, `count` and `sum_ns` do not.
    """

    __slots__ = ("count", "counts", "max_ns", "min_ns", "sum_ns", "weight", "weighted_ns")

    def __init__(self) -> None:
        self.counts: defaultdict[int, int] = defaultdict(int)
        """Bucket -> the sum of the weights of its durations."""
        self.count = 0
        self.weight = 0
        self.sum_ns = 0
        self.weighted_ns = 0
        self.max_ns = 0
        self.min_ns = 0

    def add(self, ns: int, weight: int = 1) -> None:
        """Count a duration."""
        shift = ns.bit_length() - _BITS - 1
        self.counts[ns if shift <= 0 else (shift << _BITS) + (ns >> shift)] += weight
        if not self.count:
            self.min_ns = self.max_ns = ns
        elif ns < self.min_ns:
            self.min_ns = ns
        elif ns > self.max_ns:
            self.max_ns = ns
        self.count += 1
        self.weight += weight
        self.sum_ns += ns
        self.weighted_ns += ns * weight

    def merge(self, other: DurationHistogram) -> None:
        """Count all that another one has counted."""
        for bucket, count in other.counts.items():
            self.counts[bucket] += count
        if other.count:
            self.min_ns = min(self.min_ns, other.min_ns) if self.count else other.min_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count
        self.weight += other.weight
        self.sum_ns += other.sum_ns
        self.weighted_ns += other.weighted_ns

    def buckets(self) -> Iterator[tuple[int, int]]:
        """Yield the middle (ns) and weight of each bucket, in order."""
        for bucket in sorted(self.counts):
            yield _middle(bucket), self.counts[bucket]

    def percentile(self, percent: float) -> int:
        """Return the least duration (ns) that so many percent do not exceed; 0 without any."""
        # Of integers: 99.9 % of 41,000 is 40,959, and by floats a little more.
        rank = -(-self.weight * round(percent * 1000) // 100_000)
        for middle, count in self.buckets():
            rank -= count
            if rank <= 0:
                return min(max(middle, self.min_ns), self.max_ns)
        return self.max_ns


def _middle(bucket: int) -> int:
    shift = max((bucket >> _BITS) - 1, 0)
    lowest = (bucket - (shift << _BITS)) << shift
    return lowest + (1 << shift >> 1)
