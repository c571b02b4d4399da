"""The report of a run, from the books of its probes."""

from __future__ import annotations

from collections.abc import Sequence

from tcplat_core.deliver.sequencer import Sequencer
from tcplat_core.plugin.aggregates import Distribution
from tcplat_core.plugin.report import Counted, HookReport, ProbeReport, RunReport
from tcplat_core.plugin.sampling import Shares

from .probe_run import POLLED, ProbeRun


def _counted(found: Sequence[Distribution]) -> dict[str, Counted]:
    """Return the books of each histogram."""
    books = {}
    for name in dict.fromkeys(one.histogram.name for one in found):
        groups = [one for one in found if one.histogram.name == name]
        books[name] = Counted(
            samples=sum(one.count for one in groups),
            unmeasured=sum(one.unmeasured for one in groups),
            rest=sum(one.count + one.unmeasured for one in groups if one.group.rest),
        )
    return books


def report_of(
    runs: Sequence[ProbeRun],
    sequencer: Sequencer,
    duration_s: float,
    shares: Shares,
    ended_ns: int,
) -> RunReport:
    """Return the report of a run, from its probes' books; `ended_ns`: its programs stopped then."""
    probes = {}
    router, undelivered = sequencer.router, sequencer.undelivered.copy()
    for run in runs:
        hooks = []
        consumed = run.ring.taken
        unsampled = run.books.unsampled()
        for number, (fired, (produced, dropped)) in enumerate(
            zip(run.hooks, run.books.read(), strict=True)
        ):
            if fired.program not in run.loaded.programs:
                continue
            # If two hooks share point and func, either may account for a row.
            lacking = undelivered[run.spec.name, fired.point, fired.func]
            delivered = max(0, consumed[number] - lacking)
            undelivered[run.spec.name, fired.point, fired.func] -= consumed[number] - delivered
            left = run.abandoned[number] if run.abandoned else 0
            hooks.append(
                HookReport(
                    *(fired.point, fired.func, fired.attach),
                    *(produced, dropped + left, delivered, unsampled[number]),
                )
            )
        func, attach = POLLED
        for point, made in run.polled.items():
            delivered = max(0, made - undelivered[run.spec.name, point, func])
            hooks.append(HookReport(point, func, attach, made, 0, delivered))
        probes[run.spec.name] = ProbeReport(
            hooks=tuple(hooks),
            missing=run.loaded.missing,
            untracked=run.books.untracked(),
            bare_acks=run.books.bare_acks(),
            interfaces={one.name: one.mode for one in run.loaded.interfaces},
            skipped=run.skipped(),
            silent=run.silent,
            interfaces_gone=run.interfaces_gone,
            counted=_counted(run.counters.read()) if run.counters else None,
            uncounted=_uncounted(run) if run.counters else {},
            poll_error=run.poll_error,
        )
    return RunReport(
        probes=probes,
        duration_s=duration_s,
        late=router.late,
        switched_off=dict(router.switched_off),
        until_ns=0 if router.done else ended_ns,
        one_in=shares.union(None),
    )


def _uncounted(run: ProbeRun) -> dict[str, str]:
    """Return histogram -> why this host does not have it."""
    reasons = {
        one.name: one.missing(run.loaded.taken, run.loaded.missing) for one in run.spec.histograms
    }
    return {name: why for name, why in reasons.items() if why}
