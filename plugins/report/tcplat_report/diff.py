"""Two captures, compared stage by stage.

The interval of a change is a bootstrap's. The k-th smallest value of a resample of n values
is ``F^-1(U)``, where F is the sample's own distribution and U the k-th smallest of n uniform
numbers, which is Beta(k, n + 1 - k) distributed. So a resample's percentile is drawn at
once, out of the histogram, without making the resample: exactly the bootstrap's
distribution, in time that does not depend on n.

Requests of one capture are not independent: slow ones come in bursts. Each capture is
divided into blocks of consecutive requests; where the share of requests above the percentile
varies more from block to block than chance would have it, the sample counts for as many
independent requests as explain that (the design effect of survey statistics).
"""

from __future__ import annotations

import math
import random
import re
import sys
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Any

import attrs
import click
import msgspec
from tcplat_stages.chain import CONNECTED, STAGES, UNEXPLAINED
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import ANSWERED, CUT, ONE_WAY, OPEN, PUSH, UNANSWERED, UNKNOWN, Exchange
from tcplat_stages.histogram import Histogram
from tcplat_stages.join import Joiner
from tcplat_stages.plugin import parse_groups
from tcplat_stages.stages import GROUPINGS, OTHERS, TOTAL, samples
from tcplat_stages.stream import SERVICE
from tcplat_stages.text import duration, micros, nanos

from tcplat_core import Reader, UsageError, columns, say

from .common import remarks, told

CONNECT = "connect"
PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
CONFIDENCE = 0.99
"""Of the interval: one in 200 lies above the truth by chance, one in 200 below."""
_DRAWS = 2000
_BLOCKS = 64
_FEWEST_BLOCKS = 12
"""Of fewer, how much they differ says little."""
_LEAST = 20
"""Requests, below which nothing is judged."""
_MOST_GROUPS = 256
_MOST_SERVICES = 65_536
_Z = 2.5758
"""So many standard deviations to either side are 99 % of a normal distribution."""
SHARE = "share"
"""Stands for a percentile where the share of requests with an outcome is compared."""
_SHARES = (UNANSWERED, CUT)
"""Outcomes that can fail a comparison."""
_COUNTED = (OPEN, ONE_WAY, UNKNOWN, PUSH)
"""Outcomes that are no fault: how many there were is told."""

Key = tuple[tuple[Any, ...], str]
"""Group and stage."""


class Sample:
    """Durations of one stage: histograms of 64 blocks of consecutive ones, at most."""

    __slots__ = ("_room", "blocks", "size")

    def __init__(self) -> None:
        self.blocks: list[Histogram] = []
        self.size = 1
        """Durations in a block."""
        self._room = 0

    def add(self, ns: int) -> None:
        """Count a duration."""
        if not self._room:
            if len(self.blocks) == _BLOCKS:
                for even, odd in zip(self.blocks[::2], self.blocks[1::2], strict=True):
                    even.merge(odd)
                del self.blocks[1::2]
                self.size *= 2
            self.blocks.append(Histogram())
            self._room = self.size
        self.blocks[-1].add(ns)
        self._room -= 1

    def whole(self) -> Histogram:
        """All of them."""
        whole = Histogram()
        for block in self.blocks:
            whole.merge(block)
        return whole


class Quantiles:
    """What a sample's percentiles may be."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample
        self.whole = sample.whole()
        self.count = self.whole.count
        buckets = list(self.whole.buckets())
        self._values = [min(max(ns, self.whole.min_ns), self.whole.max_ns) for ns, _ in buckets]
        self._ranks = list(accumulate(count for _, count in buckets))

    def value(self, share: float) -> int:
        """The least duration (ns) that so great a share does not exceed."""
        return self._values[bisect_left(self._ranks, share * self.count - 1e-9)]

    def independent(self, share: float) -> float:
        """For how many independent durations it counts, at this percentile."""
        return self.independent_above(self.value(share))

    def independent_above(self, limit: int) -> float:
        """For how many independent ones it counts, where how many are above a limit matters."""
        parts = [
            (sum(n for ns, n in one.buckets() if ns > limit), one.count)
            for one in self._sample.blocks
        ]
        p = sum(above for above, _ in parts) / self.count if self.count else 0
        if not 0 < p < 1:
            return self.count
        # A burst may be longer than a block: the same for blocks twice and four times as long.
        effect = 1.0
        while len(parts) >= _FEWEST_BLOCKS:
            excess = sum((above - p * size) ** 2 / (p * (1 - p) * size) for above, size in parts)
            effect = max(effect, excess / (len(parts) - 1))
            pairs = zip_longest(parts[::2], parts[1::2], fillvalue=(0, 0))
            parts = [(one[0] + other[0], one[1] + other[1]) for one, other in pairs]
        return self.count / effect

    def draw(self, share: float, chance: random.Random) -> list[int]:
        """The percentile of so many resamples."""
        n = max(self.independent(share), 1.0)
        alpha, beta = n * share, n * (1 - share) + 1
        top = len(self._values) - 1
        return [
            self._values[
                min(bisect_left(self._ranks, chance.betavariate(alpha, beta) * self.count), top)
            ]
            for _ in range(_DRAWS)
        ]


@attrs.frozen
class Change:
    """Of one percentile of one stage.

    Args:
        base: ns; None where there is too little.
        interval: Of `change`, as shares: 0.1 is +10 %.
        interval_ns: The same as a difference.
        too_little: Why it is not judged; empty where it is.
    """

    group: tuple[Any, ...]
    stage: str
    percentile: str
    counts: tuple[int, int]
    base: int | None = None
    new: int | None = None
    interval: tuple[float, float] | None = None
    interval_ns: tuple[int, int] | None = None
    too_little: str = ""

    @property
    def change(self) -> float | None:
        """As a share of the base; None where that is nothing."""
        return self.new / self.base - 1 if self.base and self.new is not None else None

    @property
    def certain(self) -> bool:
        """The interval has no zero in it."""
        return self.interval_ns is not None and (self.interval_ns[0] > 0 or self.interval_ns[1] < 0)


@attrs.frozen
class Share:
    """How many requests of a group had an outcome, of how many.

    Args:
        counts: With that outcome, in BASE and in NEW.
        requests: Answered or not; None for what is no part of these.
        interval: Of the change of the share: 0.01 is one percentage point.
    """

    group: tuple[Any, ...]
    stage: str
    counts: tuple[int, int]
    requests: tuple[int, int] | None = None
    interval: tuple[float, float] | None = None
    too_little: str = ""
    percentile: str = SHARE

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """In BASE and in NEW; None where there are no requests."""
        base, new = self.requests or (0, 0)
        return (
            self.counts[0] / base if base else None,
            self.counts[1] / new if new else None,
        )

    @property
    def change(self) -> float | None:
        """Of the share."""
        base, new = self.shares
        return None if base is None or new is None else new - base

    @property
    def certain(self) -> bool:
        """The interval has no zero in it."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


Compared = Change | Share


@attrs.frozen
class Condition:
    """``queue.p99:+10%``: a change beyond `limit` fails, if the whole interval lies there.

    ``unanswered:+0``: so many more fail, if they are a larger share of the requests, too.
    ``unanswered:+1%``: a share greater by so much fails, as with percentiles.
    """

    text: str
    stage: str
    percentile: str
    share: float | None
    ns: int | None
    rises: bool
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> Condition:
        """From the command line.

        Raises:
            UsageError: It is not of that form.
        """
        if apart := re.fullmatch(
            rf"({'|'.join(_SHARES)}):\+(?:(\d+)|(\d+(?:\.\d+)?)%)", text, re.ASCII
        ):
            stage, count, points = apart.groups()
            most = float(points) / 100 if points else None
            return cls(
                text, stage, SHARE, most, None, rises=True, count=int(count) if count else None
            )
        limit = r"(?:(\d+(?:\.\d+)?)%|(\d+(?:\.\d+)?(?:ns|us|ms|s)))"
        found = re.fullmatch(rf"([a-z_+]+)\.(p\d+):([+-]){limit}", text, re.ASCII)
        if not found:
            raise UsageError(
                f"--fail-on {text!r} is not of the form STAGE.PCT:LIMIT; "
                "write queue.p99:+10%, total.p50:+2ms, unanswered:+0 or unanswered:+1%"
            )
        stage, percentile, sign, share, absolute = found.groups()
        names = (*STAGES, TOTAL, CONNECT, UNEXPLAINED)
        for name in stage.split("+"):
            if name not in names:
                raise UsageError(
                    f"--fail-on {text!r}: there is no stage {name!r}; "
                    f"it must be one of {', '.join(names)}"
                )
        if percentile not in PERCENTILES:
            raise UsageError(f"--fail-on {text!r}: it must be one of {', '.join(PERCENTILES)}")
        factor = 1 if sign == "+" else -1
        return cls(
            text,
            stage,
            percentile,
            factor * float(share) / 100 if share else None,
            factor * nanos(absolute) if absolute else None,
            sign == "+",
        )

    def met_by(self, change: Compared) -> bool:
        """The whole interval lies beyond the limit; of a number, it is beyond."""
        if isinstance(change, Share):
            return self._met_by_share(change)
        interval = change.interval_ns if self.share is None else change.interval
        limit = self.ns if self.share is None else self.share
        if interval is None or limit is None:
            return False
        return interval[0] > limit if self.rises else interval[1] < limit

    def _met_by_share(self, change: Share) -> bool:
        if self.count is not None:
            more = change.counts[1] - change.counts[0]
            base, new = (share or 0.0 for share in change.shares)
            return more > self.count and new > base
        return (
            change.interval is not None
            and self.share is not None
            and change.interval[0] > self.share
        )


Service = tuple[str, int | None]


@attrs.define(eq=False)
class Outcomes:
    """What became of a capture's requests, by group.

    Args:
        samples: Group and outcome -> 1 for each request that had it, 0 for each other, in order.
        counts: Group and outcome -> how many; of what is no request that awaits a reply.
        spoke: Services that sent a byte, on whatever connection.
        mute: Group, outcome and service -> how many it had while the service had not sent one.
    """

    samples: dict[Key, Sample] = attrs.field(factory=dict)
    counts: dict[Key, int] = attrs.field(factory=dict)
    spoke: set[Service] = attrs.field(factory=set)
    mute: dict[tuple[tuple[Any, ...], str, Service], int] = attrs.field(factory=dict)

    def add(self, group: tuple[Any, ...], exchange: Exchange) -> None:
        """Count one."""
        outcome, conn = exchange.outcome, exchange.conn
        service = conn.service
        if conn.bytes_of(SERVICE) and len(self.spoke) < _MOST_SERVICES:
            self.spoke.add(service)
        if outcome in _COUNTED:
            self.counts[group, outcome] = self.counts.get((group, outcome), 0) + 1
        elif service in self.spoke or len(self.spoke) >= _MOST_SERVICES:
            self._add(group, outcome)
        else:
            key = (group, outcome, service)
            self.mute[key] = self.mute.get(key, 0) + 1

    def _add(self, group: tuple[Any, ...], outcome: str) -> None:
        for name in _SHARES:
            self.samples.setdefault((group, name), Sample()).add(int(outcome == name))

    def settle(self, spoke: set[Service]) -> int:
        """Count requests to services that did speak, elsewhere or later; how many are left out."""
        left_out = 0
        for (group, outcome, service), count in self.mute.items():
            if service in spoke:
                for _ in range(count):
                    self._add(group, outcome)
            else:
                left_out += count
        self.mute.clear()
        return left_out


@attrs.frozen
class Collected:
    """What a capture has to be compared.

    Args:
        remarks: What has to be said about it.
    """

    samples: dict[Key, Sample]
    outcomes: Outcomes
    remarks: list[str]


def collect(reader: Reader, group_by: Sequence[str]) -> Collected:
    """A capture's durations and outcomes."""
    joiner = Joiner()
    groupings = [GROUPINGS[name] for name in group_by]
    found: dict[Key, Sample] = {}
    outcomes = Outcomes()
    groups: set[tuple[Any, ...]] = set()
    for one in told(reader, joiner):
        if isinstance(one, Connection):
            split = one.handshake
            parts = [(CONNECT, split.total_ns)] if one.stamps[CONNECTED] and split.total_ns else []
            exchange = Exchange(one, "exchange")
        else:
            # Of what was not answered, the stages that were gone through.
            parts = samples(one)
            if one.outcome != ANSWERED:
                parts.pop()
            exchange = one
        group = tuple([grouping(exchange) for grouping in groupings])
        if group not in groups:
            if len(groups) >= _MOST_GROUPS:
                group = tuple(OTHERS for _ in groupings)
            groups.add(group)
        if exchange is one:
            outcomes.add(group, exchange)
        for name, ns in parts:
            sample = found.get((group, name))
            if sample is None:
                sample = found[group, name] = Sample()
            sample.add(ns)
    return Collected(found, outcomes, list(remarks(reader, joiner)))


def shares(base: Outcomes, new: Outcomes, groups: Iterable[tuple[Any, ...]]) -> list[Share]:
    """Of every group: what was not answered, always; what else there was, where there was any."""
    found = []
    for group in groups:
        for name in _SHARES:
            pair = [one.samples.get((group, name), Sample()) for one in (base, new)]
            if name == UNANSWERED or any(one.whole().sum_ns for one in pair):
                found.append(_share(group, name, pair))
        for name in _COUNTED:
            before, after = (one.counts.get((group, name), 0) for one in (base, new))
            if before or after:
                found.append(Share(group, name, (before, after)))
    return found


def _share(group: tuple[Any, ...], name: str, pair: Sequence[Sample]) -> Share:
    wholes = [one.whole() for one in pair]
    counts = (wholes[0].sum_ns, wholes[1].sum_ns)
    requests = (wholes[0].count, wholes[1].count)
    short = [f"{n} in {which}" for n, which in zip(requests, _NAMES, strict=True) if n < _LEAST]
    if short:
        words = f"{', '.join(short)}; it takes {_LEAST}"
        return Share(group, name, counts, requests, too_little=words)
    (p1, low1, high1), (p2, low2, high2) = (
        _wilson(count / n, Quantiles(one).independent_above(0))
        for count, n, one in zip(counts, requests, pair, strict=True)
    )
    # Newcombe's interval of a difference, of Wilson's for each: good also for shares near 0.
    low = p2 - p1 - math.hypot(p2 - low2, high1 - p1)
    high = p2 - p1 + math.hypot(high2 - p2, p1 - low1)
    return Share(group, name, counts, requests, (low, high))


def _wilson(p: float, n: float) -> tuple[float, float, float]:
    """A share, and the interval in which it lies."""
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return p, max(middle - half, 0.0), min(middle + half, 1.0)


def changes(base: dict[Key, Sample], new: dict[Key, Sample], seed: int) -> list[Change]:
    """Of every group, stage and percentile, in order."""
    found = []
    for key in sorted(base.keys() | new.keys(), key=_order):
        group, stage = key
        before, after = (Quantiles(one.get(key, Sample())) for one in (base, new))
        counts = (before.count, after.count)
        for name, share in PERCENTILES.items():
            least = max(_LEAST, round(1 / (1 - share)))
            short = [
                f"{n} in {which}" for n, which in zip(counts, _NAMES, strict=True) if n < least
            ]
            if short:
                words = f"{', '.join(short)}; it takes {least}"
                old_ns, new_ns = (
                    one.value(share) if one.count else None for one in (before, after)
                )
                found.append(Change(group, stage, name, counts, old_ns, new_ns, too_little=words))
                continue
            # Each of its own, so that a stage's figures do not hang on what else there is.
            label = f"{seed} {group!r} {stage} {name}"
            chance = random.Random(zlib.crc32(label.encode()))  # noqa: S311 - statistics
            old, fresh = before.draw(share, chance), after.draw(share, chance)
            differences = sorted(b - a for a, b in zip(old, fresh, strict=True))
            ratios = sorted(
                b / a - 1 if a else (math.inf if b else 0.0)
                for a, b in zip(old, fresh, strict=True)
            )
            low = round(_DRAWS * (1 - CONFIDENCE) / 2)
            found.append(
                Change(
                    group,
                    stage,
                    name,
                    counts,
                    before.value(share),
                    after.value(share),
                    (ratios[low], ratios[-1 - low]),
                    (differences[low], differences[-1 - low]),
                )
            )
    return found


_NAMES = ("BASE", "NEW")


def ordered(changed: Iterable[Change], apart: Iterable[Share]) -> list[Compared]:
    """Group by group: stages, then what became of the requests."""
    return sorted(
        [*changed, *apart],
        key=lambda one: (_group_order(one.group), isinstance(one, Share)),
    )


def _group_order(group: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple("" if one is None else str(one) for one in group)


def _order(key: Key) -> tuple[tuple[str, ...], int, int, str]:
    group, stage = key
    first = stage.split("+")[0]
    place = STAGES.index(first) if first in STAGES else len(STAGES) + (stage == TOTAL)
    if stage == CONNECT:
        place = -1
    return _group_order(group), place, stage.count("+"), stage


def compare(
    base: str,
    new: str,
    conditions: Sequence[str],
    group_by: str,
    *,
    as_json: bool,
    seed: int,
    quiet: bool,
) -> None:
    """Run the command; ends the process with status 1 if a condition is met."""
    wanted = [Condition.parse(text) for text in conditions]
    try:
        groupings = parse_groups(group_by)
    except ValueError as error:
        raise UsageError(f"--group-by {error}") from error
    readers = [Reader.open(where, quiet=quiet) for where in (base, new)]
    before, after = (collect(reader, groupings) for reader in readers)
    spoke = before.outcomes.spoke | after.outcomes.spoke
    mute = [one.outcomes.settle(spoke) for one in (before, after)]
    groups = {group for one in (before, after) for group, _ in one.samples}
    for one in (before, after):
        groups |= {group for group, _ in (*one.outcomes.samples, *one.outcomes.counts)}
    apart = shares(before.outcomes, after.outcomes, groups)
    found = ordered(changes(before.samples, after.samples, seed), apart)
    verdicts = [_judge(condition, found) for condition in wanted]
    if as_json:
        encoder = msgspec.json.Encoder()
        lines = [_json(one, groupings, wanted) for one in found]
        click.echo(encoder.encode_lines(lines), nl=False)
    else:
        click.echo(_table(found, groupings), nl=False)
    if not quiet:
        for sentence in [*before.remarks, *after.remarks]:
            say(sentence)
        if any(mute):
            say(
                f"{mute[0]} requests in BASE and {mute[1]} in NEW went to services that sent no "
                f"byte in either: they are not counted as {UNANSWERED}"
            )
    for failed, sentence in verdicts:
        if failed or not quiet:
            say(sentence)
    if any(failed for failed, _ in verdicts):
        sys.exit(1)


def _judge(condition: Condition, found: Sequence[Compared]) -> tuple[bool, str]:
    mine = [
        one
        for one in found
        if one.stage == condition.stage and one.percentile == condition.percentile
    ]
    met = [one for one in mine if condition.met_by(one)]
    if met:
        whose = "; ".join(f"{_whose(one)}{_interval(one)}" for one in met)
        return True, f"{condition.text}: failed: {whose}"
    if not mine and condition.percentile == SHARE:
        return False, f"{condition.text}: not met: none in either"
    if not mine:
        merged = {one.stage for one in found if condition.stage in one.stage.split("+")}
        where = f"; it is part of {', '.join(sorted(merged))}" if merged else ""
        return False, f"{condition.text}: not judged: no {condition.stage} by itself{where}"
    short = [one for one in mine if one.too_little and condition.count is None]
    if short:
        whose = "; ".join(f"{_whose(one)}{one.too_little}" for one in short)
        return False, f"{condition.text}: too little data to judge: {whose}"
    return False, f"{condition.text}: not met: {'; '.join(_whose(o) + _interval(o) for o in mine)}"


def _whose(change: Compared) -> str:
    return f"{'/'.join(map(str, change.group))} " if change.group else ""


def _percent(share: float) -> str:
    return f"{share:+.1%}"


def _points(share: float) -> str:
    return f"{100 * share:+.2f} pp"


def _interval(change: Compared) -> str:
    if isinstance(change, Share):
        counts = f"{change.counts[0]} to {change.counts[1]}"
        if change.requests is None:
            return counts
        counts += f" of {change.requests[0]} and {change.requests[1]} requests"
        return counts if change.interval is None else f"{counts}, {_points_interval(change)}"
    if change.interval is None:
        return ""
    return f"{_percent(change.interval[0])} to {_percent(change.interval[1])}"


def _points_interval(change: Share) -> str:
    return (
        "" if change.interval is None else " to ".join(_points(share) for share in change.interval)
    )


def _share_cells(one: Share) -> list[str]:
    """A line: COUNT is with that outcome, BASE and NEW their shares of the requests."""
    base, new = ("-" if share is None else f"{share:.2%}" for share in one.shares)
    change = "-" if one.change is None else _points(one.change)
    note = f"too little data: {one.too_little}" if one.too_little else "*" if one.certain else ""
    counts = f"{one.counts[0]}/{one.counts[1]}"
    return [one.stage, "", counts, base, new, change, _points_interval(one), note]


def _table(found: Sequence[Compared], group_by: Sequence[str]) -> str:
    heads = [*(name.upper() for name in group_by), "STAGE", "", "COUNT", "BASE", "NEW", "CHANGE"]
    heads += [f"{CONFIDENCE:.0%} INTERVAL", ""]
    cells = [
        [
            *("-" if value is None else str(value) for value in one.group),
            *(_share_cells(one) if isinstance(one, Share) else _cells(one)),
        ]
        for one in found
    ]
    lines = columns([heads, *cells], right=range(len(group_by) + 2, len(heads) - 1))
    return "\n".join([*lines, ""])


def _cells(one: Change) -> list[str]:
    return [
        one.stage,
        one.percentile,
        f"{one.counts[0]}/{one.counts[1]}",
        "-" if one.base is None else duration(one.base),
        "-" if one.new is None else duration(one.new),
        "-" if one.change is None or one.too_little else _percent(one.change),
        _interval(one),
        f"too little data: {one.too_little}" if one.too_little else ("*" if one.certain else ""),
    ]


def _json(
    change: Compared, group_by: Sequence[str], conditions: Sequence[Condition]
) -> dict[str, Any]:
    values = dict(zip(group_by, change.group, strict=True))
    mine = [
        one
        for one in conditions
        if (one.stage, one.percentile) == (change.stage, change.percentile)
    ]
    if isinstance(change, Share):
        base, new = change.requests or (None, None)
        return {
            "v": 1,
            **{grouping: values.get(grouping) for grouping in GROUPINGS},
            "stage": change.stage,
            "percentile": SHARE,
            "base_count": change.counts[0],
            "new_count": change.counts[1],
            "base_requests": base,
            "new_requests": new,
            "base_share": change.shares[0],
            "new_share": change.shares[1],
            "change": change.change,
            "interval": change.interval,
            "confidence": CONFIDENCE,
            "certain": change.certain,
            "too_little": change.too_little or None,
            "failed": [one.text for one in mine if one.met_by(change)],
        }
    return {
        "v": 1,
        **{grouping: values.get(grouping) for grouping in GROUPINGS},
        "stage": change.stage,
        "percentile": change.percentile,
        "base_count": change.counts[0],
        "new_count": change.counts[1],
        "base_us": None if change.base is None else micros(change.base),
        "new_us": None if change.new is None else micros(change.new),
        "change": None if change.too_little else change.change,
        "interval": change.interval,
        "interval_us": change.interval_ns and [micros(ns) for ns in change.interval_ns],
        "confidence": CONFIDENCE,
        "certain": change.certain,
        "too_little": change.too_little or None,
        "failed": [one.text for one in mine if one.met_by(change)],
    }
