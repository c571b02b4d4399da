"""Percentiles within a percent, of 1 µs to 60 s."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from tcplat_stages.duration_histogram import DurationHistogram

DURATIONS = st.lists(st.integers(0, 60_000_000_000), min_size=1, max_size=200)
PERCENTS = (0.1, 50, 90, 99, 99.9, 100)


def filled(durations: list[int]) -> DurationHistogram:
    histogram = DurationHistogram()
    for ns in durations:
        histogram.add(ns)
    return histogram


@given(DURATIONS)
def test_percentile_error_is_below_1_percent(durations: list[int]) -> None:
    histogram = filled(durations)
    ordered = sorted(durations)
    for percent in PERCENTS:
        true = ordered[math.ceil(len(ordered) * percent / 100) - 1]
        assert abs(histogram.percentile(percent) - true) <= true * 0.005
    assert (histogram.max_ns, histogram.min_ns) == (ordered[-1], ordered[0])
    assert (histogram.count, histogram.sum_ns) == (len(ordered), sum(ordered))


@given(DURATIONS, DURATIONS)
def test_merged_histograms_equal_one_of_all_samples(some: list[int], others: list[int]) -> None:
    merged = filled(some)
    merged.merge(filled(others))
    whole = filled(some + others)
    assert merged.counts == whole.counts
    assert (merged.count, merged.min_ns, merged.max_ns, merged.sum_ns) == (
        whole.count,
        whole.min_ns,
        whole.max_ns,
        whole.sum_ns,
    )


def test_empty_histogram_has_no_percentiles() -> None:
    assert DurationHistogram().percentile(99) == 0


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    histogram = filled(
        [ns for exponent in range(36) for ns in range(2**exponent, 2**exponent + 500)]
    )
    assert len(histogram.counts) < 36 * 128


def test_percentile_rank_is_exact() -> None:
    histogram = DurationHistogram()
    for ns in range(1, 41_001):
        histogram.add(1 if ns <= 40_959 else 200)
    assert histogram.percentile(99.9) == 1
