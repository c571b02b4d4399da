"""Intervals of a run: when it polls rings, checks processes and serves sinks."""

from __future__ import annotations

import math

import attrs

HOLD_S = 0.003
"""Default time that a row is held back for an older one, s."""
POLL_S = 0.003
"""Poll interval of the rings while events come; a wake-up by a handler would cost 5 µs."""
BUSY_POLL_S = 0.01
"""Poll interval after MANY rows: a wake-up costs as much as a hundred rows."""
MANY = 300
IDLE_POLL_S = 0.02
"""Longest poll interval: a ring of 8 MiB holds the events of 20 ms at 2.9 M events per second.

Instead of a longer one, the session sleeps until a record wakes it, if it may.
"""
IDLE_BACKOFF = 0.03
"""The poll interval grows by 3 % of the time since the last row."""
INTERFACE_CHECK_S = 1.0
"""Interval of the checks that interfaces still exist."""
TRACEE_CHECK_S = 0.1
"""Interval of the checks that the traced processes are alive."""
TICK_S = 0.25
"""Interval at which sinks receive the time while no rows come."""
LATE_S = 0.1
"""Age at which an instant is reported to sinks as complete: no older row comes any more."""
LINGER_S = 0.1
"""Time from the end of the traced processes to the end of the run: the kernel still closes
connections after the process has ended."""


@attrs.define(eq=False)
class Pace:
    """When each activity of a session is due. Pure arithmetic, in seconds of one clock.

    Args:
        began: When the run began.
        duration_s: End after so long; 0 for no limit.
        show_s: Interval at which the kernel's histograms are shown.
        reports_time: Some sink receives the time while no rows come.
    """

    began: float
    duration_s: float = 0
    show_s: float = math.inf
    reports_time: bool = False
    end: float = attrs.field(init=False)
    """When the run ends."""
    _next_interfaces: float = attrs.field(default=-math.inf, init=False)
    _next_tracees: float = attrs.field(default=-math.inf, init=False)
    _next_histograms: float = attrs.field(init=False)
    _next_time: float = attrs.field(init=False)
    _last_row: float = attrs.field(init=False)
    """When the last row came."""

    def __attrs_post_init__(self) -> None:
        self.end = self.began + self.duration_s if self.duration_s else math.inf
        self._next_histograms = self.began + self.show_s
        self._next_time = -math.inf if self.reports_time else math.inf
        self._last_row = self.began

    def interfaces_due(self, now: float) -> bool:
        """Return whether interfaces and maps are to be checked, every INTERFACE_CHECK_S."""
        due = now >= self._next_interfaces
        if due:
            self._next_interfaces = now + INTERFACE_CHECK_S
        return due

    def tracees_due(self, now: float) -> bool:
        """Return whether processes are to be checked, every TRACEE_CHECK_S and after each sleep."""
        due = now >= self._next_tracees
        if due:
            self._next_tracees = now + TRACEE_CHECK_S
        return due

    def histograms_due(self, now: float) -> bool:
        """Return whether histograms are to be shown; a missed interval is skipped."""
        due = now >= self._next_histograms
        if due:
            self._next_histograms += self.show_s * (
                (now - self._next_histograms) // self.show_s + 1
            )
        return due

    def time_due(self, now: float) -> bool:
        """Return whether sinks are to receive the time, every TICK_S."""
        due = now >= self._next_time
        if due:
            self._next_time = now + TICK_S
        return due

    def traced_ended(self, now: float) -> None:
        """End the run LINGER_S from now, because the traced processes have ended."""
        self.end = min(self.end, now + LINGER_S)

    def pause_s(self, now: float, rows: int | None) -> float:
        """Return how long to wait before the rings are polled again, s.

        Args:
            now: When the rings were polled.
            rows: Number of rows delivered; None if the rings were empty and nothing was delivered.
        """
        if rows is None:
            return POLL_S + IDLE_BACKOFF * (now - self._last_row)
        self._last_row = now
        return POLL_S if rows < MANY else BUSY_POLL_S

    def nap_s(self, now: float, pause_s: float) -> float:
        """Return how long to pause, s, if the session may not sleep until a record comes."""
        return max(0.0, min(pause_s, IDLE_POLL_S, self.end - now))

    def sleep_s(self, now: float, *, pending: bool) -> float:
        """Return how long to sleep at most, s, for a record; afterwards tracees_due() is true.

        Args:
            now: When the session falls asleep.
            pending: The ready file is a pipe without a reader, and is retried every TRACEE_CHECK_S.
        """
        self._next_tracees = -math.inf
        until = min(self._next_interfaces, self._next_histograms, self._next_time, self.end)
        return max(0.0, min(until - now, TRACEE_CHECK_S if pending else math.inf))
