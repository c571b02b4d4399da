"""When a session does what, and how long it waits, without a clock."""

from __future__ import annotations

import math

import pytest

from tcplat_core.run.pace import (
    BUSY_POLL_S,
    IDLE_POLL_S,
    INTERFACE_CHECK_S,
    LINGER_S,
    MANY,
    POLL_S,
    TICK_S,
    TRACEE_CHECK_S,
    Pace,
)

BEGAN = 1000.0


def test_interfaces_are_checked_at_the_start_and_every_second() -> None:
    pace = Pace(BEGAN)
    assert [
        s for s in (0, 0.5, 0.99, INTERFACE_CHECK_S, 1.5) if pace.interfaces_due(BEGAN + s)
    ] == [0, INTERFACE_CHECK_S]


def test_traced_processes_are_checked_ten_times_a_second() -> None:
    pace = Pace(BEGAN)
    assert [pace.tracees_due(BEGAN + s) for s in (0, 0.05, TRACEE_CHECK_S, 0.15)] == [
        True,
        False,
        True,
        False,
    ]


def test_traced_processes_are_checked_after_each_sleep() -> None:
    pace = Pace(BEGAN)
    assert pace.tracees_due(BEGAN)
    pace.sleep_s(BEGAN, pending=False)
    assert pace.tracees_due(BEGAN)


def test_interval_counts_keep_their_grid_and_skip_missed_ones() -> None:
    pace = Pace(BEGAN, show_s=2)
    shown = [s for s in (0, 1.9, 2.1, 3.9, 4, 9, 9.9, 10) if pace.histograms_due(BEGAN + s)]
    assert shown == [2.1, 4, 9, 10]


def test_interval_counts_without_a_sink_are_never_due() -> None:
    assert not Pace(BEGAN).histograms_due(BEGAN + 1e9)


@pytest.mark.parametrize(("reports_time", "times"), [(True, [0, TICK_S, 0.6]), (False, [])])
def test_sinks_receive_the_time_four_times_a_second(
    times: list[float], *, reports_time: bool
) -> None:
    pace = Pace(BEGAN, reports_time=reports_time)
    assert [s for s in (0, 0.2, TICK_S, 0.4, 0.6) if pace.time_due(BEGAN + s)] == times


def test_a_run_without_a_duration_does_not_end() -> None:
    assert Pace(BEGAN).end == math.inf
    assert Pace(BEGAN, 5).end == BEGAN + 5


def test_run_outlives_its_traced_processes_briefly() -> None:
    pace = Pace(BEGAN)
    pace.traced_ended(BEGAN + 3)
    assert pace.end == BEGAN + 3 + LINGER_S


def test_run_never_outlives_its_duration() -> None:
    pace = Pace(BEGAN, 3)
    pace.traced_ended(BEGAN + 3)
    assert pace.end == BEGAN + 3


@pytest.mark.parametrize(
    ("rows", "pause_s"), [(0, POLL_S), (MANY - 1, POLL_S), (MANY, BUSY_POLL_S), (9999, BUSY_POLL_S)]
)
def test_pause_is_longer_while_hundreds_of_rows_arrive(rows: int, pause_s: float) -> None:
    assert Pace(BEGAN).pause_s(BEGAN + 60, rows) == pause_s


def test_pause_grows_in_silence_and_resets_with_a_row() -> None:
    pace = Pace(BEGAN)
    assert pace.pause_s(BEGAN, None) == POLL_S
    assert pace.pause_s(BEGAN + 0.1, None) == pytest.approx(0.006)
    assert pace.pause_s(BEGAN + 10, None) > IDLE_POLL_S
    pace.pause_s(BEGAN + 10, 1)
    assert pace.pause_s(BEGAN + 10, None) == POLL_S


def test_a_nap_is_short_and_no_longer_than_the_run() -> None:
    pace = Pace(BEGAN, 1)
    assert pace.nap_s(BEGAN, 0.005) == 0.005
    assert pace.nap_s(BEGAN, 5) == IDLE_POLL_S
    assert pace.nap_s(BEGAN + 0.99, 5) == pytest.approx(0.01)
    assert pace.nap_s(BEGAN + 2, 5) == 0


@pytest.mark.parametrize(
    ("given", "pending", "most_s"),
    [
        ({}, False, INTERFACE_CHECK_S),
        ({}, True, TRACEE_CHECK_S),
        ({"duration_s": 0.5}, False, 0.5),
        ({"show_s": 0.3}, False, 0.3),
        ({"reports_time": True}, False, TICK_S),
    ],
)
def test_a_sleep_ends_when_the_next_thing_is_due(
    given: dict[str, float], most_s: float, *, pending: bool
) -> None:
    pace = Pace(BEGAN, **given)  # type: ignore[arg-type] # one of them is a bool
    pace.interfaces_due(BEGAN)
    pace.time_due(BEGAN)
    assert pace.sleep_s(BEGAN, pending=pending) == pytest.approx(most_s)


def test_a_sleep_is_never_negative() -> None:
    pace = Pace(BEGAN, 1)
    pace.interfaces_due(BEGAN)
    assert pace.sleep_s(BEGAN + 5, pending=False) == 0
