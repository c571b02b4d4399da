"""From the rings to the router, one helping after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs

from tcplat_core.deliver.fast.records import FOREVER
from tcplat_core.deliver.ring import BATCH
from tcplat_core.deliver.router import Router
from tcplat_core.errors import blaming
from tcplat_core.event.clock import clock_offset_ns, kernel_ns
from tcplat_core.plugin.histogram import Aggregates

from .pace import POLL_S
from .probe_run import ProbeRun

SETTLE_S = 0.5
"""How long the last records may take after everything is detached: Ctrl-C has a second in all."""

HELPING = 8
"""Batches taken from one ring before the sinks get their turn: bounds memory under overload."""
_GUARD_NS = 1_000_000
"""Records in a ring are in order but for interrupts, which take less than this."""


def drain_rest(runs: Sequence[ProbeRun], router: Router) -> None:
    """After detaching: what handlers have reserved must still turn up."""
    deadline = time.monotonic() + SETTLE_S
    clock = Clock()
    while not router.done:
        horizon_ns = drain(runs, router, clock, FOREVER)
        for run in runs:
            _tell_losses(run, router)
        settled = all(run.settled() for run in runs)
        if settled or time.monotonic() > deadline:
            router.flush()
            return
        router.flush(min(horizon_ns, kernel_ns() - _GUARD_NS))
        time.sleep(0 if horizon_ns < FOREVER else POLL_S)


def drain(runs: Sequence[ProbeRun], router: Router, clock: Clock, horizon_ns: int) -> int:
    """Feed the router one helping of each ring.

    What was lost is counted before a ring is drained: until then it was full, and everything
    behind its last record is missing. Then that is known by the instant.

    Returns:
        Up to which instant the rows are complete: `horizon_ns`, or earlier where a ring held
        more than one helping.
    """
    offset_ns = clock.offset_ns()
    for source, run in enumerate(runs):
        now_ns = kernel_ns()
        if not run.ring.pending():
            if not run.lost_none(now_ns):
                _tell_losses(run, router)
            continue
        crowded = run.ring.crowded
        _tell_losses(run, router)
        if router.room:
            router.room.offset_ns = offset_ns
            last_ns = router.room.take(source, HELPING * BATCH)
        else:
            last_ns = _feed(run, router, offset_ns)
        run.drained()
        if crowded:
            _tell_losses(run, router)
        if last_ns and run.ring.pending():
            horizon_ns = min(horizon_ns, last_ns - _GUARD_NS)
    return horizon_ns


def _tell_losses(run: ProbeRun, router: Router) -> None:
    for loss in run.losses():
        router.feed_loss(loss)


def _feed(run: ProbeRun, router: Router, offset_ns: int) -> int:
    """One helping, as rows; when the last was, or 0 where that was all."""
    for number, records in enumerate(run.ring.drain(), 1):
        with blaming(f"probe {run.spec.name}: making a row of a record"):
            rows = run.decode(records, offset_ns)
        router.feed(rows)
        if rows and number == HELPING:
            return rows[-1].ts_ns
    return 0


def show_counted(
    runs: Sequence[ProbeRun], router: Router, began: float, *, final: bool = False
) -> None:
    """Show the sinks that asked for it what the kernel has counted."""
    counters = [run.counters for run in runs if run.counters]
    if not counters:
        return
    ts_ns = kernel_ns()
    router.aggregates(
        Aggregates(
            ts_ns=ts_ns,
            time_ns=ts_ns + clock_offset_ns(),
            elapsed_s=time.monotonic() - began,
            distributions=[found for one in counters for found in one.read()],
            final=final,
        )
    )


@attrs.define(eq=False)
class Clock:
    """Unix time minus CLOCK_MONOTONIC, measured anew each second: NTP may slew one of them."""

    _offset_ns: int = 0
    _until: float = 0

    def offset_ns(self) -> int:
        """By now."""
        now = time.monotonic()
        if now >= self._until:
            self._offset_ns, self._until = clock_offset_ns(), now + 1
        return self._offset_ns
