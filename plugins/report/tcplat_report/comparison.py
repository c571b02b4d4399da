"""How changes look: as a table, as JSON, and in the words of a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tcplat_stages.formatting import duration
from tcplat_stages.stages import GROUPINGS

from tcplat_core import columns, micros

from .changes import CONFIDENCE, Change
from .condition import Compared, Condition
from .shares import SHARE, Share


def verdict(condition: Condition, found: Sequence[Compared], unlike: str = "") -> tuple[bool, str]:
    """Return whether a condition is met by what was found, and a sentence that says so.

    Args:
        condition: The condition.
        found: All changes.
        unlike: Why counts of the two captures cannot be compared; empty if they can.
    """
    if condition.count is not None and unlike:
        share = f"{condition.stage}:+1%"
        return False, (
            f"{condition.text}: not judged, so it passes: {unlike}: "
            f"counts cannot be compared, shares can ({share})"
        )
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
        return False, f"{condition.text}: not judged, so it passes: too little data: {whose}"
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
    """Return a line: COUNT requests with that outcome, BASE and NEW their shares."""
    base, new = ("-" if share is None else f"{share:.2%}" for share in one.shares)
    change = "-" if one.change is None else _points(one.change)
    note = f"too little data: {one.too_little}" if one.too_little else "*" if one.certain else ""
    counts = f"{one.counts[0]}/{one.counts[1]}"
    return [one.stage, "", counts, base, new, change, _points_interval(one), note]


def table(found: Sequence[Compared], group_by: Sequence[str]) -> str:
    """Return a line for each change, under a head."""
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


def as_json(
    change: Compared, group_by: Sequence[str], conditions: Sequence[Condition]
) -> dict[str, Any]:
    """Return a change as one object; `failed` are the conditions that it meets."""
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
