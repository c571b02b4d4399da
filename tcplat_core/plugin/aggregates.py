"""Histograms of durations, made in the kernel: declarations, requests and results.

The buckets are log-linear, as HDR histograms have them: up to 15 ns one each, then 16 of
equal width per power of two, up to 2^36 ns (68.7 s). include/tcplat/bucket.bpf.h is the
same in C. The middle of a bucket is less than 1/32 (3.2 %) off whatever fell into it.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping, Sequence

import attrs

from tcplat_core.event.text import address, name, process

from .hookpoints import MECHANISMS, checked_name
from .maps import mapped

SUB_BITS = 4
"""Each power of two has 2^SUB_BITS buckets."""
TOP_BITS = 36
"""Durations of 2^TOP_BITS ns and more have no bucket."""
BUCKETS = (TOP_BITS - SUB_BITS + 1) << SUB_BITS
CELLS = BUCKETS + 2
"""Per bucket, then what was longer, then what could not be measured."""
GROUPINGS = ("all", "process", "remote", "port")
MOST_GROUPS = 4096
_BUDGET = 64 << 20
"""Bytes that the stripes of one probe may take: see stripes()."""
_GROUP = struct.Struct("=16s16sIHBB")
"""struct tcplat_group."""
COUNTERS = {"group_keys": _GROUP.size, "durations": 8}
"""Maps of include/tcplat/histogram.bpf.h, and the bytes of an entry."""


def bucket(ns: int) -> int:
    """Return the bucket of a duration; BUCKETS if it has none."""
    if ns >> TOP_BITS:
        return BUCKETS
    shift = max(0, ns.bit_length() - SUB_BITS - 1)
    return (shift << SUB_BITS) + (ns >> shift)


def bounds_ns(number: int) -> tuple[int, int]:
    """Return the shortest and the longest duration of a bucket."""
    shift = max(0, (number >> SUB_BITS) - 1)
    low = number - (shift << SUB_BITS) << shift
    return low, low + (1 << shift) - 1


def middle_us(number: int) -> float:
    """Return the value that represents a bucket, µs; infinite for the last, BUCKETS."""
    return math.inf if number == BUCKETS else sum(bounds_ns(number)) / 2000


@attrs.frozen
class Histogram:
    """A kind of duration that a probe can count in the kernel.

    Args:
        name: HIST_<name> is its number in C.
        help: The first and the last instant of the duration.
        points: Hook points that it needs. If no sink needs rows, hook points that no histogram
            needs are not attached.
        mechanisms: Mechanisms by which it can be measured. By others, the report says that it
            is missing.
    """

    name: str = attrs.field(validator=checked_name)
    help: str
    points: tuple[str, ...]
    mechanisms: tuple[str, ...] = MECHANISMS

    def missing(self, taken: Mapping[str, str], reasons: Mapping[str, str]) -> str | None:
        """Why it is not counted, if it is not.

        Args:
            taken: Point -> the mechanism that serves it.
            reasons: Point -> why it is not served.
        """
        for point in self.points:
            if point not in taken:
                return f"no {point}: {reasons.get(point, 'it is not attached')}"
            if taken[point] not in self.mechanisms and point == self.points[-1]:
                return f"{point} by {taken[point]} cannot measure it"
        return None


@attrs.frozen
class Aggregation:
    """What a sink asks all probes to count.

    Args:
        by: Grouping of the durations: process, remote, port, or all.
        groups: Maximum number of groups, at most MOST_GROUPS.
        every_s: Interval in which the sink gets the counts; it gets them at the end, too.
    """

    by: str = attrs.field(validator=attrs.validators.in_(GROUPINGS))
    groups: int = attrs.field(validator=attrs.validators.le(MOST_GROUPS))
    every_s: float

    @property
    def numbers(self) -> int:
        """Groups besides the one for all the rest."""
        return 0 if self.by == "all" else self.groups

    def stripes(self, cpus: int, histograms: int) -> int:
        """Return how many copies of the counters, a power of two: one per CPU if memory allows."""
        most = _BUDGET // ((self.numbers + 1) * histograms * CELLS * 8)
        wanted = 1 << (cpus - 1).bit_length()
        return min(wanted, 1 << max(0, most.bit_length() - 1))

    def defines(self, cpus: int, histograms: int) -> dict[str, int | str]:
        """C constants for include/tcplat/histogram.bpf.h."""
        return {
            "TCPLAT_HISTOGRAMS": histograms,
            # keyed.bpf.h needs at least one, even if it is unused.
            "TCPLAT_GROUPS": max(1, self.numbers),
            "TCPLAT_STRIPES": self.stripes(cpus, histograms),
            "TCPLAT_SUB_BITS": SUB_BITS,
            "TCPLAT_TOP_BITS": TOP_BITS,
            "TCPLAT_BUCKETS": BUCKETS,
            f"TCPLAT_BY_{self.by.upper()}": 1,
        }


@attrs.frozen
class Group:
    """A group of durations. Fields that the grouping does not use are None.

    For an unknown process, `pid` and `comm` are None. `rest` is true for the group of the
    durations that came when all groups were in use.
    """

    pid: int | None = None
    comm: str | None = None
    address: str | None = None
    port: int | None = None
    rest: bool = False


@attrs.frozen(kw_only=True)
class Distribution:
    """One histogram of one group, since the start of the run.

    Args:
        probe: Name of the probe.
        histogram: What was measured.
        group: The group.
        counts: Samples per bucket: BUCKETS numbers.
        over: Samples above the last bucket.
        unmeasured: Durations that could not be measured; they are not samples.
    """

    probe: str
    histogram: Histogram
    group: Group
    counts: Sequence[int]
    over: int = 0
    unmeasured: int = 0

    @property
    def count(self) -> int:
        """Number of samples."""
        return sum(self.counts) + self.over

    def filled(self) -> list[tuple[int, int, int]]:
        """Return from (ns), below (ns) and count of each bucket that is not empty."""
        found = []
        for number, count in enumerate(self.counts):
            if count:
                low, high = bounds_ns(number)
                found.append((low, high + 1, count))
        return found

    def since(self, before: Distribution | None) -> Distribution:
        """Return the difference to an earlier one of the same histogram and group."""
        if before is None:
            return self
        return attrs.evolve(
            self,
            counts=[now - then for now, then in zip(self.counts, before.counts, strict=True)],
            over=self.over - before.over,
            unmeasured=self.unmeasured - before.unmeasured,
        )

    def percentile_us(self, percent: float) -> float:
        """Return a percentile (nearest rank), µs.

        It is the middle of a bucket: less than 3.2 % off. Infinite above 68.7 s. 100 is the
        longest sample. There must be a sample.
        """
        rank = max(1, math.ceil(self.count * percent / 100))
        for number, so_far in enumerate(itertools.accumulate(self.counts)):
            if so_far >= rank:
                return middle_us(number)
        return math.inf


@attrs.frozen(kw_only=True)
class Aggregates:
    """What the kernel has counted so far.

    Args:
        ts_ns: When the counters were read, CLOCK_MONOTONIC.
        time_ns: The same instant as Unix time.
        elapsed_s: Time since everything was attached.
        distributions: Those that are not empty.
        final: The run is over.
    """

    ts_ns: int
    time_ns: int
    elapsed_s: float
    distributions: Sequence[Distribution]
    final: bool


def _group(by: str, raw: bytes) -> Group:
    addr, comm, pid, port, ip, _ = _GROUP.unpack(raw)
    if by == "process":
        return Group(pid=process(pid) or None, comm=name(comm))
    return Group(address=address(addr) if ip else None, port=port or None)


@attrs.define(eq=False)
class Counters:
    """A probe's `keys` and `durations`, mapped: reading needs no rights.

    Args:
        probe: Its name.
        histograms: In the order of their numbers.
        aggregation: What was asked for.
        stripes: Copies of the counters.
        keys_fd: Of the probe's `keys`.
        durations_fd: Of its `durations`.
    """

    probe: str
    histograms: Sequence[Histogram]
    aggregation: Aggregation
    stripes: int
    keys_fd: int
    durations_fd: int
    _keys: mmap.mmap = attrs.field(init=False)
    _durations: mmap.mmap = attrs.field(init=False)
    _cells: memoryview = attrs.field(init=False)
    _stripe: int = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        groups = max(1, self.aggregation.numbers) + 1
        self._stripe = groups * len(self.histograms) * CELLS
        self._keys = mapped(self.keys_fd, groups * _GROUP.size)
        self._durations = mapped(self.durations_fd, self.stripes * self._stripe * 8)
        self._cells = memoryview(self._durations).cast("Q")

    def read(self) -> list[Distribution]:
        """Return each histogram of each group that has samples."""
        rest = Group(rest=self.aggregation.by != "all")
        groups = [(0, rest)]
        for number in range(1, self.aggregation.numbers + 1):
            raw = self._keys[number * _GROUP.size : (number + 1) * _GROUP.size]
            if not any(raw):
                continue  # numbers are assigned in order, but one in between may stay unused
            groups.append((number, _group(self.aggregation.by, raw)))
        return [
            found
            for number, group in groups
            for found in self._of_group(number, group)
            if found.count or found.unmeasured
        ]

    def _of_group(self, number: int, group: Group) -> list[Distribution]:
        found = []
        for index, histogram in enumerate(self.histograms):
            at = (number * len(self.histograms) + index) * CELLS
            copies = [
                self._cells[start : start + CELLS].tolist()
                for start in range(at, self.stripes * self._stripe, self._stripe)
            ]
            *counts, over, unmeasured = map(sum, zip(*copies, strict=True))
            found.append(
                Distribution(
                    probe=self.probe,
                    histogram=histogram,
                    group=group,
                    counts=counts,
                    over=over,
                    unmeasured=unmeasured,
                )
            )
        return found

    def close(self) -> None:
        """Unmap. The caller closes the fds."""
        self._cells.release()
        self._durations.close()
        self._keys.close()
