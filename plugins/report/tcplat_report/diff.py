"""Two captures, compared stage by stage: the command."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import click
import msgspec
from tcplat_stages.chain import CONNECTED
from tcplat_stages.connection import Connection
from tcplat_stages.exchange import ANSWERED, UNANSWERED, Exchange
from tcplat_stages.join import Joiner
from tcplat_stages.plugin import parse_groups
from tcplat_stages.samples import samples
from tcplat_stages.stages import GROUPINGS, OTHERS

from tcplat_core import Reader, UsageError, say, share_text

from .changes import CONNECT, Change, Key, changes
from .common import finished, remarks
from .comparison import as_json as to_json
from .comparison import table, verdict
from .condition import Compared, Condition
from .sample import Sample, group_order
from .shares import Outcomes, Share, shares

_MOST_GROUPS = 256


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
    """Return a capture's durations and outcomes."""
    joiner = Joiner()
    groupings = [GROUPINGS[name] for name in group_by]
    found: dict[Key, Sample] = {}
    outcomes = Outcomes()
    groups: set[tuple[Any, ...]] = set()
    for one in finished(reader, joiner):
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


def ordered(changed: Iterable[Change], apart: Iterable[Share]) -> list[Compared]:
    """Group by group: stages, then what became of the requests."""
    return sorted(
        [*changed, *apart],
        key=lambda one: (group_order(one.group), isinstance(one, Share)),
    )


def _unlike(base: Reader, new: Reader) -> str:
    """Return of which connections each has rows; empty if it is the same share."""
    one, other = (share_text(*reader.report.one_in) for reader in (base, new))
    return "" if one == other else f"BASE has {one} of the connections, NEW {other}"


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
    unlike = _unlike(*readers)
    verdicts = [verdict(condition, found, unlike) for condition in wanted]
    if as_json:
        encoder = msgspec.json.Encoder()
        lines = [to_json(one, groupings, wanted) for one in found]
        click.echo(encoder.encode_lines(lines), nl=False)
    else:
        click.echo(table(found, groupings), nl=False)
    if not quiet:
        beyond = [f"{unlike}: compare durations and shares, not counts"] if unlike else []
        for sentence in [*beyond, *before.remarks, *after.remarks]:
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
