"""The report of a run: event counts of hooks, probes and the whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Self

import attrs
import msgspec

from tcplat_core.event.fields import Count, Positive
from tcplat_core.event.text import cleaned

from .sampling import ALL, OneIn, both, share_text


@attrs.frozen
class HookReport:
    """The event counts of one hook: produced = delivered + dropped + unread."""

    point: str
    func: str
    attach: str
    produced: Count
    dropped: Count
    delivered: Count
    unsampled: Count = 0
    """Rows that were not made, because ``--sample`` left their connection out; not produced."""

    @property
    def unread(self) -> int:
        """Events left in the ring because the run ended (``--count``)."""
        return self.produced - self.dropped - self.delivered


@attrs.frozen(kw_only=True)
class Counted:
    """The counts of one histogram, over all groups.

    Args:
        samples: Durations in it.
        unmeasured: Durations whose length is unknown.
        rest: Those of both that came when all groups were in use.
    """

    samples: Count
    unmeasured: Count
    rest: Count


@attrs.frozen(kw_only=True)
class ProbeReport:
    """The event counts of one probe."""

    hooks: tuple[HookReport, ...]
    """The counts of each hook."""
    missing: Mapping[str, str] = attrs.field(factory=dict)
    """Point -> why this host does not have it."""
    untracked: Count = 0
    """Sockets that were not tracked, because the socket table was full."""
    bare_acks: Count = 0
    """Packets that only acknowledge, and have no row because no sink uses it."""
    interfaces: Mapping[str, str] = attrs.field(factory=dict)
    """Interface with an XDP program of the probe -> native or generic."""
    skipped: Mapping[str, Count] = attrs.field(factory=dict)
    """Function or tracepoint -> how often the kernel did not run the program there, because
    it interrupted itself: at most this many rows are missing. Kernels since 5.12 count
    it for fentry and tracepoints, since 6.7 for kprobes."""
    silent: Mapping[str, str] = attrs.field(factory=dict)
    """Interface -> why no rows come from it, or no more rows."""
    interfaces_gone: bool = False
    """The probe has only XDP programs, and all their interfaces are gone: no rows can come."""
    counted: Mapping[str, Counted] | None = None
    """Histogram -> its counts; None if no sink uses histograms."""
    uncounted: Mapping[str, str] = attrs.field(factory=dict)
    """Histogram -> why this host does not have it."""
    poll_error: str = ""
    """Why poll() is no longer called; empty if it is."""

    @property
    def delivered(self) -> int:
        """Rows that were handed to the sinks."""
        return sum(hook.delivered for hook in self.hooks)

    @property
    def dropped(self) -> int:
        """Events dropped because the ring was full."""
        return sum(hook.dropped for hook in self.hooks)


@attrs.frozen(kw_only=True)
class RunReport:
    """The event counts of a run, and what went wrong."""

    probes: Mapping[str, ProbeReport]
    duration_s: Positive
    late: Count = 0
    """Rows that came after a younger row was delivered."""
    switched_off: Mapping[str, str] = attrs.field(factory=dict)
    """Sink -> why it was switched off."""
    until_ns: int = 0
    """All rows up to this instant (CLOCK_MONOTONIC, ns) are present; 0 if unknown."""
    incomplete: str = ""
    """Why the counts do not cover the whole run; empty if they do."""
    one_in: tuple[OneIn, OneIn] = ALL
    """Rows are those of one connection in so many: the least and the greatest such number."""

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Return the inverse of as_json().

        Raises:
            ValueError: The value is not a report.
        """
        report = msgspec.convert(_with_field_names(value), cls)
        for stated, found in ((value, report), *_of_probes(value, report)):
            for name in ("delivered", "dropped"):
                if stated.get(name, getattr(found, name)) != getattr(found, name):
                    raise ValueError(f"{name} is not the sum of what its hooks have")
        return report

    def as_json(self) -> dict[str, Any]:
        """Return the last line of a capture: ``{"v":2,"report":...}``."""
        line: dict[str, Any] = cleaned(
            {
                "delivered": self.delivered,
                "dropped": self.dropped,
                "late": self.late,
                "duration_s": round(self.duration_s, 6),
                "probes": {
                    name: {
                        "delivered": probe.delivered,
                        "dropped": probe.dropped,
                        "untracked": probe.untracked,
                        "missing": dict(probe.missing),
                        "interfaces": dict(probe.interfaces),
                        "skipped": dict(probe.skipped),
                        "silent": dict(probe.silent),
                        **_extras(probe),
                        "hooks": [self._hook(hook) for hook in probe.hooks],
                    }
                    for name, probe in self.probes.items()
                },
                "switched_off": dict(self.switched_off),
                **({"until_ns": self.until_ns} if self.until_ns else {}),
                **({"incomplete": self.incomplete} if self.incomplete else {}),
                **({"one_in": list(self.one_in)} if self.sampled else {}),
            }
        )
        return line

    def _hook(self, hook: HookReport) -> dict[str, Any]:
        values = {**attrs.asdict(hook), "unread": hook.unread}
        if not self.sampled:
            del values["unsampled"]
        return values

    @property
    def sampled(self) -> str:
        """The share of the connections that have rows: 1/64, or 1/1 to 1/64; empty if all have."""
        return share_text(*self.one_in) if self.one_in != ALL else ""

    @property
    def interfaces_gone(self) -> bool:
        """Whether the run ended because all interfaces of all probes were gone."""
        return bool(self.probes) and all(probe.interfaces_gone for probe in self.probes.values())

    @property
    def delivered(self) -> int:
        """Rows of all probes."""
        return sum(probe.delivered for probe in self.probes.values())

    @property
    def dropped(self) -> int:
        """Lost events of all probes."""
        return sum(probe.dropped for probe in self.probes.values())

    @property
    def unsampled(self) -> int:
        """Rows of all probes that were not made, because ``--sample`` left them out."""
        return sum(hook.unsampled for probe in self.probes.values() for hook in probe.hooks)


def _of_probes(
    value: Mapping[str, Any], report: RunReport
) -> Iterator[tuple[Mapping[str, Any], ProbeReport]]:
    """Yield each probe of a report's JSON, and its values."""
    for name, probe in report.probes.items():
        yield value["probes"][name], probe


_COUNTED, _UNCOUNTED, _INTERFACES_GONE = "histograms", "no_histograms", "deaf"
"""JSON keys of `counted`, `uncounted` and `interfaces_gone`. Captures have them: they stay."""
FIELDS = {_COUNTED: "counted", _UNCOUNTED: "uncounted", _INTERFACES_GONE: "interfaces_gone"}
"""JSON key of a probe -> its field in ProbeReport, where they differ."""


def _with_field_names(value: Any) -> Any:
    """Return a report's JSON with the field names of the class."""
    probes = value.get("probes") if isinstance(value, dict) else None
    if not isinstance(probes, dict):
        return value
    named = {
        name: {FIELDS.get(key, key): one for key, one in probe.items() if key not in _OURS}
        if isinstance(probe, dict)
        else probe
        for name, probe in probes.items()
    }
    return {**value, "probes": named}


_OURS = frozenset(FIELDS.values())


def _extras(probe: ProbeReport) -> dict[str, Any]:
    """Return the entries that are written only if they have a value."""
    extras: dict[str, Any] = {}
    if probe.counted is not None:
        extras[_COUNTED] = {name: attrs.asdict(one) for name, one in probe.counted.items()}
    if probe.counted is not None or probe.uncounted:
        extras[_UNCOUNTED] = dict(probe.uncounted)
    if probe.poll_error:
        extras["poll_error"] = probe.poll_error
    if probe.bare_acks:
        extras["bare_acks"] = probe.bare_acks
    if probe.interfaces_gone:
        extras[_INTERFACES_GONE] = True
    return extras


def add_reports(one: RunReport, other: RunReport) -> RunReport:
    """Return the sum of two reports: of consecutive captures, or of two hosts."""
    probes = dict(one.probes)
    for name, probe in other.probes.items():
        if name not in probes:
            probes[name] = probe
            continue
        hooks: dict[tuple[str, str, str], HookReport] = {}
        for hook in (*probes[name].hooks, *probe.hooks):
            key = (hook.point, hook.func, hook.attach)
            known = hooks.get(key, HookReport(*key, 0, 0, 0))
            hooks[key] = HookReport(
                *key,
                known.produced + hook.produced,
                known.dropped + hook.dropped,
                known.delivered + hook.delivered,
                known.unsampled + hook.unsampled,
            )
        probes[name] = ProbeReport(
            hooks=tuple(hooks.values()),
            missing={**probes[name].missing, **probe.missing},
            untracked=probes[name].untracked + probe.untracked,
            bare_acks=probes[name].bare_acks + probe.bare_acks,
            interfaces={**probes[name].interfaces, **probe.interfaces},
            skipped=Counter(probes[name].skipped) + Counter(probe.skipped),
            silent={**probes[name].silent, **probe.silent},
            interfaces_gone=probes[name].interfaces_gone and probe.interfaces_gone,
            counted=_both_counted(probes[name].counted, probe.counted),
            uncounted={**probes[name].uncounted, **probe.uncounted},
            poll_error=probes[name].poll_error or probe.poll_error,
        )
    return RunReport(
        probes=probes,
        duration_s=one.duration_s + other.duration_s,
        late=one.late + other.late,
        switched_off={**one.switched_off, **other.switched_off},
        incomplete=one.incomplete or other.incomplete,
        one_in=both(one.one_in, other.one_in),
    )


def _both_counted(
    one: Mapping[str, Counted] | None, other: Mapping[str, Counted] | None
) -> Mapping[str, Counted] | None:
    if one is None or other is None:
        return one or other
    return {**one, **other} | {
        name: Counted(
            samples=one[name].samples + other[name].samples,
            unmeasured=one[name].unmeasured + other[name].unmeasured,
            rest=one[name].rest + other[name].rest,
        )
        for name in one.keys() & other.keys()
    }
