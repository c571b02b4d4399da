"""Of which durations an exchange is a sample."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from .chain import MILESTONES, NAMES, UNEXPLAINED
from .duration_histogram import DurationHistogram
from .exchange import ANSWERED, Exchange

TOTAL = "total"


def samples(exchange: Exchange) -> list[tuple[str, int]]:
    """Of what an exchange is a sample: name and ns.

    Each stage that was gone through to its end; ``total``, if it was answered; else its
    outcome, and how long it waited or was on its way.
    """
    split = exchange.divide()
    parts = list(split.stages)
    if split.unexplained_ns:
        parts.append((UNEXPLAINED, split.unexplained_ns))
    name = TOTAL if exchange.outcome == ANSWERED else exchange.outcome
    parts.append((name, exchange.lasted_ns))
    return parts


def count(exchange: Exchange, histograms: dict[str, DurationHistogram], weight: int) -> None:
    """Count the durations of an exchange, with its weight, each in the histogram of its name."""
    for name, ns in samples(exchange):
        histogram = histograms.get(name)
        if histogram is None:
            histogram = histograms[name] = DurationHistogram()
        histogram.add(ns, weight)


class Tally:
    """Counts plain exchanges by the instants alone, as count() would count each.

    Args:
        find: Returns the histograms of an exchange's group, by name; None where the exchange itself
            is needed.

    Attributes:
        version: To be changed when `find` returns other histograms from now on.
    """

    def __init__(self, find: Callable[[Exchange], dict[str, DurationHistogram] | None]) -> None:
        self.version = 0
        self._find = find

    def histograms(self, exchange: Exchange, known: int) -> list[DurationHistogram]:
        """Return where the stages of an answered exchange are counted, and last, its total.

        Args:
            exchange: One of the group.
            known: Bits, one for each instant of chain.MILESTONES that is known.

        Returns:
            Nothing where the exchange itself is needed.
        """
        numbers = [number for number in range(len(MILESTONES)) if known >> number & 1]
        if len(numbers) < 2 or numbers == [0, len(MILESTONES) - 1]:  # noqa: PLR2004 - no stage
            return []
        found = self._find(exchange)
        if found is None:
            return []
        names = [NAMES[first][last] for first, last in itertools.pairwise(numbers)]
        return [found.setdefault(name, DurationHistogram()) for name in (*names, TOTAL)]

    def add(self, histogram: DurationHistogram, ns: int) -> None:
        """Count a duration."""
        histogram.add(ns)
