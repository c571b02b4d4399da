"""Of which durations an exchange is a sample."""

from __future__ import annotations

from .chain import UNEXPLAINED
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
