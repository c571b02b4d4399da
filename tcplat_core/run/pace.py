"""How often a run looks at what, and how long it waits."""

from __future__ import annotations

import math

import attrs

HOLD_S = 0.003
"""How long a row waits, unless told otherwise, for an older one that may still turn up."""
POLL_S = 0.003
"""Between two looks at the rings while events come. Handlers never wake us: that costs 5 µs."""
BUSY_POLL_S = 0.01
"""The same where a look brings MANY rows: to wake up costs as much as a hundred of them."""
MANY = 300
IDLE_POLL_S = 0.02
"""The same, at most, where nobody may sleep: a ring of 8 MiB takes 2.9 M events per second so long.

Elsewhere it is from here on that the session sleeps until a record wakes it.
"""
PATIENCE = 0.03
"""How fast that grows: by so much of the time since something came."""
LOOK_S = 1.0
"""Between two looks at whether interfaces are still there."""
GLANCE_S = 0.1
"""Between two looks at whether what is traced still lives."""
TICK_S = 0.25
"""How often sinks are told that time passes while nothing comes."""
LATE_S = 0.1
"""So late a row may come that was stamped before; by then, it is told that none is missing."""
LINGER_S = 0.1
"""How long the run outlives what it traces: closing handshakes go on without the process."""


@attrs.define(eq=False)
class Pace:
    """When the session does what: a policy of instants alone, in seconds of one clock.

    Args:
        began: When the run began.
        duration_s: End after so long; 0 for no limit.
        show_s: Interval between two looks at what the kernel counts.
        telling: Some sink wants to know that time passes.
    """

    began: float
    duration_s: float = 0
    show_s: float = math.inf
    telling: bool = False
    end: float = attrs.field(init=False)
    """When the run ends."""
    _look: float = attrs.field(default=-math.inf, init=False)
    _glance: float = attrs.field(default=-math.inf, init=False)
    _show: float = attrs.field(init=False)
    _tick: float = attrs.field(init=False)
    _came: float = attrs.field(init=False)
    """When a row came last."""

    def __attrs_post_init__(self) -> None:
        self.end = self.began + self.duration_s if self.duration_s else math.inf
        self._show = self.began + self.show_s
        self._tick = -math.inf if self.telling else math.inf
        self._came = self.began

    def looks(self, now: float) -> bool:
        """Return whether interfaces and maps are due, every LOOK_S."""
        due = now >= self._look
        if due:
            self._look = now + LOOK_S
        return due

    def glances(self, now: float) -> bool:
        """Return whether what is traced is due, every GLANCE_S and after each sleep."""
        due = now >= self._glance
        if due:
            self._glance = now + GLANCE_S
        return due

    def shows(self, now: float) -> bool:
        """Return whether what the kernel counts is due; an interval that was missed is skipped."""
        due = now >= self._show
        if due:
            self._show += self.show_s * ((now - self._show) // self.show_s + 1)
        return due

    def tells(self, now: float) -> bool:
        """Return whether sinks are due to be told that time passes, every TICK_S."""
        due = now >= self._tick
        if due:
            self._tick = now + TICK_S
        return due

    def traced_ended(self, now: float) -> None:
        """Have the run end soon: what it traces has ended."""
        self.end = min(self.end, now + LINGER_S)

    def pause_s(self, now: float, rows: int | None) -> float:
        """Return how long to wait before the next look at the rings.

        Args:
            now: When the rings were looked at.
            rows: Number of rows delivered; None if the rings were empty and nothing was delivered.
        """
        if rows is None:
            return POLL_S + PATIENCE * (now - self._came)
        self._came = now
        return POLL_S if rows < MANY else BUSY_POLL_S

    def nap_s(self, now: float, pause_s: float) -> float:
        """Return how long to wait where the session may not sleep until a record comes."""
        return max(0.0, min(pause_s, IDLE_POLL_S, self.end - now))

    def sleep_s(self, now: float, *, pending: bool) -> float:
        """Return how long to sleep at most, until a record comes; then glances() is due.

        Args:
            now: When the session falls asleep.
            pending: Something waits for its reader, and is tried again every GLANCE_S.
        """
        self._glance = -math.inf
        until = min(self._look, self._show, self._tick, self.end)
        return max(0.0, min(until - now, GLANCE_S if pending else math.inf))
