"""Percentiles and bars of the kernel's histograms: per interval, and for the whole run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import msgspec

from tcplat_core import (
    SCHEMA_VERSION,
    Aggregates,
    Distribution,
    Event,
    Group,
    Loss,
    Output,
    RunReport,
    Sink,
    printable,
)

PERCENTILES = (50.0, 90.0, 99.0, 99.9)
_BAR = 40


@attrs.define(eq=False)
class Histograms(Sink):
    """Histograms as text or JSON lines.

    Args:
        output: The output.
        as_json: One object per histogram and group.
        every_s: Show what happened since the last time; 0 for the whole run at its end alone.
    """

    output: Output
    as_json: bool
    every_s: float
    _before: dict[tuple[str, str, Group], Distribution] = attrs.field(factory=dict, init=False)
    _before_s: float = attrs.field(default=0, init=False)
    _encoder: msgspec.json.Encoder = attrs.field(factory=msgspec.json.Encoder, init=False)

    def write(self, batch: Sequence[Event]) -> None:
        """Ignore rows."""

    def lost(self, loss: Loss) -> None:
        """Ignore losses of rows: durations counted in the kernel are never lost."""

    def idle(self) -> None:
        """Check whether the reader is gone."""
        self.output.look()

    def aggregates(self, them: Aggregates) -> None:
        """Show the durations since the last call and, at the end, all of them."""
        if self.every_s:
            came = [one.since(self._before.get(_key(one))) for one in them.distributions]
            self._show(came, them, them.elapsed_s - self._before_s, "interval")
            self._before = {_key(one): one for one in them.distributions}
            self._before_s = them.elapsed_s
        if them.final:
            self._show(them.distributions, them, them.elapsed_s, "run")

    def close(self, report: RunReport) -> None:
        """Write which histograms this host lacks; in JSON, the whole report. Idempotent."""
        if self.output.closed:
            return
        if self.as_json:
            self.output.write(
                self._encoder.encode({"v": SCHEMA_VERSION, "report": report.as_json()}) + b"\n"
            )
        else:
            lines = [
                f"{name} {histogram}: not measured: {why}\n"
                for name, probe in report.probes.items()
                for histogram, why in probe.uncounted.items()
            ]
            self.output.write("".join(lines).encode())
        self.output.close()

    def _show(
        self, found: Sequence[Distribution], them: Aggregates, over_s: float, window: str
    ) -> None:
        found = sorted(
            (one for one in found if one.count or one.unmeasured),
            key=lambda one: (one.probe, one.histogram.name, one.group.rest, -one.count),
        )
        if self.as_json:
            data = self._encoder.encode_lines([as_json(one, them, over_s, window) for one in found])
        else:
            what = "the whole run, " if window == "run" else ""
            clock = time.strftime("%H:%M:%S", time.localtime(them.time_ns // 10**9))
            lines = [line for one in found for line in ("", *as_text(one))]
            data = "\n".join([f"-- {clock}, {what}{over_s:.1f} s", *lines, "", ""]).encode()
        if found:
            self.output.write(data)


def _key(one: Distribution) -> tuple[str, str, Group]:
    return one.probe, one.histogram.name, one.group


def as_json(one: Distribution, them: Aggregates, over_s: float, window: str) -> dict[str, Any]:
    """Return one histogram of one group; a value beyond 68.7 s is null, and counted in `over`.

    `buckets` holds from (µs), below (µs) and how many, of those that are not empty.
    """
    figures: dict[str, Any] = {
        f"p{percent:g}_us": _or_none(one, percent) for percent in PERCENTILES
    }
    return {
        "v": 1,
        "histogram": one.histogram.name,
        "probe": one.probe,
        "window": window,
        "ts_ns": them.ts_ns,
        "time_ns": them.time_ns,
        "seconds": round(over_s, 6),
        **attrs.asdict(one.group),
        "count": one.count,
        **figures,
        "max_us": _or_none(one, 100),
        "over": one.over,
        "not_measured": one.unmeasured,
        "buckets": [(low / 1000, high / 1000, count) for low, high, count in one.filled()],
    }


def _or_none(one: Distribution, percent: float) -> float | None:
    value = one.percentile_us(percent) if one.count else math.inf
    return None if math.isinf(value) else value


def as_text(one: Distribution) -> Iterator[str]:
    """Yield a title, a line of percentiles, and bars, one per power of two."""
    yield f"{one.probe} {one.histogram.name} ({one.histogram.help}){_of(one.group)}"
    figures = [f"count {one.count:,}"]
    if one.count:
        figures += [f"p{percent:g} {_or_more(one, percent)}" for percent in PERCENTILES]
        figures.append(f"max {_or_more(one, 100)}")
    if one.unmeasured:
        figures.append(f"not measured {one.unmeasured:,}")
    yield "  ".join(figures)
    octaves: dict[int, int] = {}
    for low, _, count in one.filled():
        octaves[low.bit_length()] = octaves.get(low.bit_length(), 0) + count
    most = max([*octaves.values(), one.over, 1])
    for octave in range(min(octaves), max(octaves) + 1) if octaves else ():
        count = octaves.get(octave, 0)
        low, high = (1 << octave >> 1), 1 << octave
        yield _bar(f"{human(low / 1000)} .. {human(high / 1000)}", count, most)
    if one.over:
        yield _bar("68.7 s and more", one.over, most)


def _bar(label: str, count: int, most: int) -> str:
    stars = "*" * math.ceil(count * _BAR / most)
    return f"{label:>20} {count:>12,} |{stars:<{_BAR}}|"


def _or_more(one: Distribution, percent: float) -> str:
    value = one.percentile_us(percent)
    return "more than 68.7 s" if math.isinf(value) else human(value)


def human(us: float) -> str:
    """Return a duration with three digits and its unit."""
    scaled = ((us * 1000, "ns"), (us, "µs"), (us / 1e3, "ms"), (us / 1e6, "s"))
    # 999.5 would round to 1000.
    value, unit = next((one for one in scaled if one[0] < 999.5), scaled[-1])  # noqa: PLR2004
    digits = 0 if value >= 100 or unit == "ns" else 1 if value >= 10 else 2  # noqa: PLR2004 - three
    return f"{value:.{digits}f} {unit}"


def _of(group: Group) -> str:
    if group.rest:
        return " of others"
    if group.address is not None:
        host = f"[{group.address}]" if ":" in group.address and group.port else group.address
        return f" of {host}:{group.port}" if group.port else f" of {host}"
    if group.port is not None:
        return f" of port {group.port}"
    if group.pid is not None:
        return f" of {printable(str(group.comm))} ({group.pid})"
    return ""
