"""Captures of two hosts, joined into one by the clock of the first."""

from __future__ import annotations

import heapq
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import msgspec

from tcplat_core import (
    HOST_BITS,
    SCHEMA_VERSION,
    Event,
    Loss,
    Merge,
    Reader,
    Sampled,
    UsageError,
    add_reports,
    say,
    share_text,
    whole_file,
)

from .clocks import Offset, PacketMatcher, together

_SOCK_BITS = 59
"""A socket's number is a time since boot: below this bit for eighteen years."""
_MOST_HOSTS = 16
_BATCH = 10_000
_TIME = operator.itemgetter(0)


def _opened(first: str, second: str, output: str, *, quiet: bool) -> list[Reader]:
    for where in (first, second):
        if where == "-" or where.startswith(("unix:", "tcp:")):
            raise UsageError(f"{where} cannot be read twice: keep it in a file")
    readers = [Reader.open(where, quiet=quiet) for where in (first, second)]
    if Path(first).samefile(second):
        raise UsageError(
            f"{first} and {second} are one file: merge joins the captures of two hosts"
        )
    for reader in readers:
        reader.check_output(output)
    return readers


def join_captures(first: str, second: str, output: str, *, quiet: bool) -> None:
    """Run the command.

    Raises:
        UsageError: A capture cannot be read twice, or both are the same file.
        UnboundedError: The packets do not bound the offset of the clocks.
    """
    readers = _opened(first, second, output, quiet=quiet)
    sightings = PacketMatcher()
    unix_ns: int | None = None
    for host, rows in together(readers[0].batches(), readers[1].batches()):
        if unix_ns is None and host == 0:
            unix_ns = rows[0].time_ns - rows[0].ts_ns
        sightings.feed(host, rows)
    offset = sightings.corridor.offset()
    own, joined = _hosts(readers, offset)
    shift = _Shift(offset, joined[0].host, unix_ns or 0)
    again = [Reader.open(where, quiet=quiet, again=True) for where in (first, second)]
    with whole_file(output) as file:
        _write(file, [*own, *joined], _all_of(readers, own, joined), again, shift)
    if not quiet:
        for reader in readers:
            for sentence in reader.remarks():
                say(sentence)
        for sentence in _unlike(readers):
            say(sentence)
        say(words(joined[0], own[0]))


def _all_of(readers: list[Reader], own: list[Merge], joined: list[Merge]) -> list[Sampled]:
    """Return the share of hosts that have rows of all connections, if the others have not."""
    lacking = [reader.shares.one_in is None for reader in readers]
    if all(lacking):
        return []
    groups = zip(lacking, (own, joined), strict=True)
    return [Sampled(1, host=host.host) for lacks, hosts in groups if lacks for host in hosts]


def _unlike(readers: list[Reader]) -> Iterator[str]:
    """Say what it means if the two hosts have rows of different connections."""
    one, other = (reader.report.one_in for reader in readers)
    if one != other:
        a, b = (share_text(*share) for share in (one, other))
        yield (
            f"{readers[0].name} has rows of {a} of the connections, {readers[1].name} of {b}: "
            "those that only one has are seen from one end; "
            "they are whole with the same --sample on both hosts"
        )


def words(host: Merge, first: Merge) -> str:
    """Describe a host's clock."""
    return (
        f"clock of {host.name}: {host.offset_ns / 1e9:+.9f} s from that of {first.name}, "
        f"± {host.bound_ns / 1000:.1f} µs, drift {host.drift_ppm:+.1f} "
        f"± {host.drift_bound_ppm:.1f} ppm (from {host.packets} packets); "
        "wire times are right within that bound"
    )


def _hosts(readers: list[Reader], offset: Offset) -> tuple[list[Merge], list[Merge]]:
    """Return the hosts of A and B by new numbers; each capture may have been merged itself."""
    own, others = (reader.merges or [Merge(0, reader.name)] for reader in readers)
    base = max(host.host for host in own) + 1
    joined = [
        attrs.evolve(
            host,
            host=base + host.host,
            offset_ns=offset.first_ns + host.offset_ns,
            drift_ppm=round(offset.drift_ppm + host.drift_ppm, 3),
            drift_bound_ppm=round(offset.drift_bound_ppm + host.drift_bound_ppm, 3),
            bound_ns=offset.bound_ns + host.bound_ns,
            packets=host.packets or offset.packets,
        )
        for host in others
    ]
    if joined[-1].host >= _MOST_HOSTS:
        raise UsageError(f"more than {_MOST_HOSTS} hosts do not fit into one capture")
    return own, joined


@attrs.frozen
class _Shift:
    """Makes rows of B look as if they had been captured beside A's.

    Args:
        offset: Of B's clock.
        host: The number of B's first host.
        unix_ns: Unix time minus A's clock.
    """

    offset: Offset
    host: int
    unix_ns: int

    def __call__(self, row: Event) -> Event:
        """Return the row by A's clock, with numbers that are unique over both hosts."""
        row.ts_ns -= self.offset.at(row.ts_ns)
        row.time_ns = row.ts_ns + self.unix_ns
        if row.netns is not None:
            row.netns += self.host << HOST_BITS
        if row.sock:
            row.sock += self.host << _SOCK_BITS
        return row

    def loss(self, loss: Loss) -> Loss:
        """Return the loss by A's clock; times that it lacks stay unknown."""
        since_ns, until_ns = self.instant(loss.since_ns), self.instant(loss.until_ns)
        return attrs.evolve(loss, since_ns=since_ns, until_ns=until_ns)

    def share(self, share: Sampled) -> Sampled:
        """Return B's share of the connections by A's clock."""
        since_ns = self.instant(share.since_ns)
        return attrs.evolve(share, host=self.host + share.host, since_ns=since_ns)

    def instant(self, ts_ns: int) -> int:
        """Return an instant of B's clock by A's; 0, which is unknown, stays so."""
        return min(max(0, ts_ns - self.offset.at(ts_ns)), sys.maxsize) if ts_ns > 0 else 0


def _write(
    file: BinaryIO,
    hosts: list[Merge],
    shares: list[Sampled],
    readers: list[Reader],
    shift: _Shift,
) -> None:
    encoder = msgspec.json.Encoder()

    def line(**value: Any) -> None:
        file.write(encoder.encode({"v": SCHEMA_VERSION, **value}) + b"\n")

    for host in hosts:
        line(merge=attrs.asdict(host))
    for share in shares:
        line(sampled=attrs.asdict(share))
    first, second = readers
    batch: list[Event] = []
    for _, item in heapq.merge(_timed(first), _timed(second, shift), key=_TIME):
        if isinstance(item, Event):
            batch.append(item)
        if len(batch) >= _BATCH or not isinstance(item, Event):
            file.write(encoder.encode_lines(batch))
            batch.clear()
        if isinstance(item, Loss):
            line(lost=attrs.asdict(item))
        elif isinstance(item, Sampled):
            line(sampled=attrs.asdict(item))
    file.write(encoder.encode_lines(batch))
    reports = first.report, second.report
    ends = reports[0].until_ns, shift.instant(reports[1].until_ns)
    report = attrs.evolve(add_reports(*reports), until_ns=min(ends))
    line(report=report.as_json())


def _timed(
    reader: Reader, shift: _Shift | None = None
) -> Iterator[tuple[int, Event | Loss | Sampled]]:
    """Rows, losses and shares, with the time that gives them their place."""
    ts_ns = 0
    for item in reader.items():
        if isinstance(item, Loss):
            yield ts_ns, shift.loss(item) if shift else item
        elif isinstance(item, Sampled):
            yield ts_ns, shift.share(item) if shift else item
        elif not isinstance(item, Merge):
            for one in item:
                row = shift(one) if shift else one
                # Rows that came late in the run stay where they are.
                ts_ns = max(ts_ns, row.ts_ns)
                yield ts_ns, row
