"""Moves records from the rings to the sequencer, in bounded batches."""

from __future__ import annotations

import time
from collections.abc import Sequence

import attrs

from tcplat_core.deliver.reorder import FOREVER
from tcplat_core.deliver.ring import BATCH
from tcplat_core.deliver.router import Router
from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.event.clock import clock_offset_ns, kernel_ns
from tcplat_core.plugin.aggregates import Aggregates

from .pace import POLL_S
from .probe_run import ProbeRun

SETTLE_S = 0.5
"""Time limit for records that are reserved and not submitted yet, after detaching; after Ctrl-C for
all that are in the rings: a run must end within 1 s of it."""
DRAIN_S = 3.0
"""Time limit for what is in the rings at the end of a run that the user has not interrupted."""

HELPING = 8
"""Batches taken from one ring before rows are delivered: bounds memory under overload."""
_GUARD_NS = 1_000_000
"""Records in a ring are out of order by at most the length of an interrupt, which is shorter."""


@attrs.define(eq=False)
class Clock:
    """Unix time minus CLOCK_MONOTONIC, measured again each second: NTP may slew one of them."""

    _offset_ns: int = 0
    _until: float = 0

    def offset_ns(self) -> int:
        """Return the current offset, ns."""
        now = time.monotonic()
        if now >= self._until:
            self._offset_ns, self._until = clock_offset_ns(), now + 1
        return self._offset_ns


@attrs.define(eq=False)
class Drain:
    """Takes records out of the rings.

    Args:
        runs: The probes, in the order of the sources of the sequencer's buffer.
        sequencer: Where rows and losses go.
    """

    runs: Sequence[ProbeRun]
    sequencer: Sequencer
    _clock: Clock = attrs.field(factory=Clock, init=False)

    def rest(self, *, hurry: bool) -> None:
        """Take all records after detaching; wait for those reserved and not submitted yet.

        What is not there in time, or too much to be taken in time, is lost.

        Args:
            hurry: The user has interrupted the run.
        """
        end = time.monotonic() + (SETTLE_S if hurry else DRAIN_S)
        deadline, before = end, -1
        while not self.sequencer.router.done:
            horizon_ns = self.take(FOREVER)
            for run in self.runs:
                self._lose(run)
            now, taken = time.monotonic(), sum(run.ring.taken.total() for run in self.runs)
            if taken != before:
                before, deadline = taken, min(now + SETTLE_S, end)
            unsettled = [run for run in self.runs if not run.settled()]
            if not unsettled or now > deadline:
                for run in unsettled:
                    for loss in run.abandon():
                        self.sequencer.lose(loss)
                self.sequencer.flush()
                return
            self.sequencer.flush(min(horizon_ns, kernel_ns() - _GUARD_NS))
            time.sleep(0 if horizon_ns < FOREVER else POLL_S)

    def deliver(self, settled_ns: int) -> bool:
        """Take at most HELPING batches of each ring, and deliver rows older than `settled_ns`.

        Returns:
            Whether the rings were emptied.
        """
        horizon_ns = self.take(settled_ns)
        self.sequencer.flush(horizon_ns)
        return horizon_ns >= settled_ns

    def take(self, horizon_ns: int) -> int:
        """Take at most HELPING batches of each ring.

        Losses are counted before a ring is drained. Until then it was full, and every event after
        its last record is missing, which gives the beginning of the loss.

        Returns:
            The instant up to which the rows are complete: `horizon_ns`, or earlier if a ring held
            more.
        """
        offset_ns = self._clock.offset_ns()
        for source, run in enumerate(self.runs):
            now_ns = kernel_ns()
            if not run.ring.pending():
                if not run.lost_none(now_ns):
                    self._lose(run)
                continue
            crowded = run.ring.crowded
            self._lose(run)
            last_ns = self.sequencer.buffer.take(source, HELPING * BATCH, offset_ns)
            run.drained()
            if crowded:
                self._lose(run)
            if last_ns and run.ring.pending():
                horizon_ns = min(horizon_ns, last_ns - _GUARD_NS)
        return horizon_ns

    def pending(self) -> bool:
        """Return whether a ring has records."""
        return any(run.ring.pending() for run in self.runs)

    def _lose(self, run: ProbeRun) -> None:
        for loss in run.losses():
            self.sequencer.lose(loss)


def show_counted(
    runs: Sequence[ProbeRun], router: Router, began: float, *, final: bool = False
) -> None:
    """Pass the kernel's histograms to the sinks that use them."""
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
