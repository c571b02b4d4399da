"""Messages about a run, on standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from tcplat_core.event import terminal
from tcplat_core.plugin.hookpoints import SKIPPED_FUNCS
from tcplat_core.run.signals import NOTHING_RECORDED

if TYPE_CHECKING:
    from tcplat_core.plugin.output import Output
    from tcplat_core.plugin.report import Counted, ProbeReport, RunReport


def print_report(report: RunReport, *, dry_run: bool, quiet: bool) -> None:
    """Report the result of a run; if quiet, errors only."""
    if dry_run:
        _attached(report)
    elif not quiet:
        summary(report)
        if report.dropped:
            terminal.say(_advice(report))
    failures(report.switched_off)
    if not (report.probes or quiet):
        terminal.say(NOTHING_RECORDED)


def failures(switched_off: Mapping[str, str]) -> None:
    """Report the sinks that failed, which make the exit status 1."""
    for sink, reason in switched_off.items():
        terminal.say(f"sink {sink} was switched off: {reason}")


def removals(outputs: Iterable[Output]) -> bool:
    """Report files of sinks that are gone, which makes the exit status 1; return whether any is."""
    gone = [path for output in outputs if (path := output.removed())]
    for path in gone:
        terminal.say(f"{path} is gone: it was removed or replaced while it was written")
    return bool(gone)


def _attached(report: RunReport) -> None:
    for name, probe in report.probes.items():
        for hook in probe.hooks:
            terminal.write(f"{name}: {hook.point} by {hook.attach}:{hook.func}")
        for point, reason in probe.missing.items():
            terminal.write(f"{name}: no {point}: {reason}")


LEFT = "more events were in the ring when the run ended"


def summary(
    report: RunReport, unread: str = LEFT, left: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Report delivered, lost and missing events.

    Args:
        report: The report.
        unread: What the unread events of a probe are.
        left: Probe -> how many of them are what LEFT says instead.
    """
    for name, probe in report.probes.items():
        sentences = _probe_summary(probe, unread, left.get(name, 0), complete=not report.incomplete)
        for words in sentences:
            terminal.say(f"{name}: {words}")
    if report.sampled:
        terminal.say(
            f"{report.sampled} of the connections sampled: "
            f"{report.unsampled} rows of the others were not made"
        )
    if report.late:
        terminal.say(f"{report.late} rows came out of order")


_MANY_LOST = 0.01
"""Part of the events; fewer are those of a burst."""


def _advice(report: RunReport) -> str:
    """Return how more events would have been kept."""
    came = report.delivered + report.dropped
    part = report.dropped / came
    if part < _MANY_LOST:
        return "events were lost: a larger --ring-size keeps more of a burst"
    # With a margin: what was lost took no time of the session.
    fewer = 2 << max(1, math.ceil(math.log2(came / max(report.delivered, 1))))
    one_in = report.one_in[0] * fewer
    return (
        f"{part:.0%} of the events were lost: --sample 1/{one_in} keeps all events of one "
        f"connection in {one_in}; a larger --ring-size keeps more of a burst"
    )


def _probe_summary(
    probe: ProbeReport, unread_text: str, left: int, *, complete: bool
) -> Iterator[str]:
    if probe.counted is not None:
        yield from _counted_summary(probe.counted)
    if probe.counted is None or probe.delivered or probe.dropped:
        yield _rows_summary(probe, complete=complete)
    for what, reason in {**probe.uncounted, **_rows_missing(probe)}.items():
        yield f"no {what}: {reason}"
    for interface, reason in probe.silent.items():
        if interface not in probe.interfaces:  # otherwise it was reported when it disappeared
            yield f"no rows from {interface}: {reason}"
    if probe.untracked:
        yield (
            f"socket table full: {probe.untracked} sockets were not tracked, their rows are missing"
        )
    funcs = {hook.func for hook in probe.hooks if hook.attach == "kprobe"} & SKIPPED_FUNCS
    if funcs:
        names = ", ".join(sorted(funcs))
        yield f"rows of {names} may be missing: the kernel skips a kprobe that interrupts another"
    for func, count in probe.skipped.items():
        yield f"the kernel skipped {func} {count} times: as many rows may be missing"
    yield from _unread(sum(hook.unread for hook in probe.hooks), unread_text, left)


def _unread(count: int, text: str, left: int) -> Iterator[str]:
    left = min(left, count)
    if left:
        yield f"{left} {LEFT}"
    if count > left:
        yield f"{count - left} {text}"


def _rows_missing(probe: ProbeReport) -> dict[str, str]:
    return {f"{point} rows": reason for point, reason in probe.missing.items()}


def _rows_summary(probe: ProbeReport, *, complete: bool) -> str:
    by_point: dict[str, int] = {}
    for hook in probe.hooks:
        by_point[hook.point] = by_point.get(hook.point, 0) + hook.delivered
    points = ", ".join(f"{point} {n}" for point, n in by_point.items())
    lost = f"{probe.dropped} lost" if complete else f"{probe.dropped} known to be lost"
    acks = f", {probe.bare_acks} bare ACKs not recorded" if probe.bare_acks else ""
    return f"{probe.delivered} rows, {lost} ({points}){acks}"


def _counted_summary(counted: Mapping[str, Counted]) -> Iterator[str]:
    histograms = ", ".join(f"{name} {one.samples}" for name, one in counted.items())
    yield f"{sum(one.samples for one in counted.values())} counted ({histograms or 'none'})"
    for name, one in counted.items():
        if one.unmeasured:
            yield f"{name}: {one.unmeasured} more durations could not be measured"
        if one.rest:
            yield f"{name}: {one.rest} came when all groups were in use: raise groups="


def nothing(_: str) -> None:
    """Print nothing; replaces say() under -q."""


def json_text(value: object) -> str:
    """Return a value as JSON, escaped for a terminal."""
    from tcplat_core.event.text import cleaned  # noqa: PLC0415 - see __init__.py

    return json.dumps(cleaned(value), indent=2)
