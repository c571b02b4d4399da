"""One loaded probe: its ring, its books, its maps, and the request to the loader."""

from __future__ import annotations

import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import attrs

from tcplat_core.deliver.books import Books
from tcplat_core.deliver.fast.codec import Codec
from tcplat_core.deliver.reorder import RingSource
from tcplat_core.deliver.ring import Ring
from tcplat_core.errors import blaming, is_the_users, named
from tcplat_core.event.clock import clock_offset_ns, kernel_ns
from tcplat_core.event.fields import Event, FiredBy, Moment, row
from tcplat_core.event.record import Record
from tcplat_core.event.terminal import printable
from tcplat_core.kernel.fdinfo import misses
from tcplat_core.loader.protocol import LoadedProbe, ProbeRequest, Request
from tcplat_core.plugin.aggregates import COUNTERS, Aggregation, Counters
from tcplat_core.plugin.hookpoints import reporting
from tcplat_core.plugin.maps import Maps, MapView
from tcplat_core.plugin.specs import Loss, ProbeSpec


@attrs.define(eq=False)
class ProbeRun:
    """One loaded probe: its ring and books, and the functions that read them."""

    spec: ProbeSpec
    hooks: Sequence[FiredBy]
    ring: Ring
    books: Books
    decode: Callable[[Any, int], list[Event]]
    codec: Codec | None
    """Codec of deliver/fast/records.c; None without it."""
    loaded: LoadedProbe
    reported_lost: list[int]
    silent: dict[str, str]
    """Interface -> why no rows come from it, or no more."""
    maps: Maps
    """The maps that poll() reads."""
    counters: Counters | None
    """The kernel's histograms, if a sink uses them."""
    abandoned: list[int] = attrs.field(factory=list, init=False)
    """Records that were left in the ring when the run ended, by hook; they count as dropped."""
    polled: Counter[str] = attrs.field(factory=Counter)
    """Rows that poll() made, by point."""
    poll_error: str = ""
    _counted_ns: int = attrs.field(default=0, init=False)
    """Losses before this instant have been reported."""
    _undrained: bool = attrs.field(default=True, init=False)
    """The ring was not drained since then: if it was full, it is full still."""

    @classmethod
    def open(cls, spec: ProbeSpec, loaded: LoadedProbe, request: Request, cpus: int) -> Self:
        """Map the loader's file descriptors."""
        hooks = [attrs.evolve(one, describe=_guarded(one.describe)) for one in fired_by(spec)]
        record = Record(spec.event)
        reading = (spec.name, hooks, _ifname(loaded))
        return cls(
            spec,
            hooks,
            Ring(
                *(loaded.ring_fd, request.ring_bytes, record.layout),
                tag_at=record.offset("hook"),
                ts_at=record.offset("ts_ns"),
            ),
            Books(loaded.books_fd, cpus, len(hooks)),
            record.decoder(*reading),
            Codec.of(record, *reading),
            loaded,
            [0] * len(hooks),
            dict(loaded.skipped),
            _maps(spec, loaded),
            _counters(spec, loaded, request.aggregation, cpus),
        )

    @property
    def source(self) -> RingSource:
        """The ring, for the reorder buffer."""
        return RingSource(self.spec.name, self.ring, self.decode, self.codec)

    def poll(self) -> list[Event]:
        """Return the rows that the probe makes of its maps; if that raises, make none any more."""
        if self.spec.poll is None or self.poll_error:
            return []
        try:
            rows = list(self.spec.poll(self.maps) or ())
            _check_rows(rows, self.spec.event)
        except BaseException as error:
            # Also SystemExit: the run continues without this poll().
            if is_the_users(error):
                raise
            self.poll_error = printable(named(error))
            return []
        self.polled.update(one.point for one in rows)
        return rows

    @property
    def interfaces_gone(self) -> bool:
        """Whether all its hooks are XDP programs, and all their interfaces are gone."""
        names = {one.name for one in self.loaded.interfaces}
        return set(self.loaded.taken.values()) == {"xdp"} and names <= self.silent.keys()

    def skipped(self) -> dict[str, int]:
        """Return how often the kernel did not run our program, by function."""
        funcs = {
            hook.program: hook.func
            for point in self.spec.points
            for way in point.ways
            for hook in way.hooks
        }
        counts: Counter[str] = Counter()
        for program, fd in self.loaded.program_fds.items():
            counts[funcs[program]] += misses(fd)
        return {func: count for func, count in counts.items() if count}

    def losses(self) -> list[Loss]:
        """Return the losses since the last call, each with its beginning and end."""
        now_ns = kernel_ns()
        full_ns = self.ring.full_since_ns() if self._undrained else 0
        since_ns, self._counted_ns, self._undrained = self._counted_ns, now_ns, True
        if self.books.dropped() == sum(self.reported_lost):
            return []
        counts = [dropped for _, dropped in self.books.read()]
        place = max(since_ns, full_ns), kernel_ns()
        found = [
            Loss(self.spec.name, fired.point, count - reported, *place)
            for fired, count, reported in zip(self.hooks, counts, self.reported_lost, strict=True)
            if count > reported
        ]
        self.reported_lost = counts
        return found

    def abandon(self) -> list[Loss]:
        """Give up the records that are left in the ring at the end of the run.

        Returns:
            Them as losses, from the oldest of them on.
        """
        since_ns, until_ns, taken = self.ring.oldest_ns(), kernel_ns(), self.ring.taken
        self.abandoned = [
            max(0, made - lost - taken[number])
            for number, (made, lost) in enumerate(self.books.read())
        ]
        return [
            Loss(self.spec.name, fired.point, count, since_ns, until_ns)
            for fired, count in zip(self.hooks, self.abandoned, strict=True)
            if count
        ]

    def lost_none(self, now_ns: int) -> bool:
        """Return whether the empty ring proves that nothing was lost before an instant."""
        if self._undrained:
            self._counted_ns = now_ns
        return self._undrained

    def drained(self) -> None:
        """Note a drain: the ring may have been full since losses were counted, but is not now."""
        self._undrained = False

    def settled(self) -> bool:
        """Return whether every produced record was either dropped or taken."""
        # A record is counted after it was reserved in the ring, and before it is submitted.
        if self.ring.pending():
            return False
        return sum(made - lost for made, lost in self.books.read()) == self.ring.taken.total()

    def close(self) -> None:
        """Unmap, and close the loader's fds."""
        self.ring.close()
        self.books.close()
        self.maps.close()
        if self.counters:
            self.counters.close()
        links = {one.link_fd for one in self.loaded.interfaces}  # closed to detach
        for fd in self.loaded.fds:
            if fd not in links:
                os.close(fd)


def _check_rows(rows: Sequence[object], event: type[Event]) -> None:
    for one in rows:
        if not isinstance(one, event):
            raise TypeError(f"a {type(one).__name__} is no row: maps.row() makes them")


_ATTACH = {"kretprobe": "kprobe", "fexit": "fentry"}
"""Mechanism of a hook -> `attach` of its rows, where they differ."""


def fired_by(spec: ProbeSpec) -> list[FiredBy]:
    """Return the hooks that make rows, of all ways, by their number in a record."""
    return [
        FiredBy(
            point,
            hook.func,
            _ATTACH.get(hook.mechanism, hook.mechanism),
            spec.describe,
            hook.program,
        )
        for point, hook in reporting(spec.points)
    ]


def _guarded(describe: Callable[[Moment], str]) -> Callable[[Moment], str]:
    """Wrap describe(): if it raises, the description is the error, and the row is delivered."""

    def described(moment: Moment) -> str:
        try:
            text: object = describe(moment)
        except BaseException as error:
            if is_the_users(error):
                raise
            return f"{moment.point} (describe() failed: {named(error)})"
        if isinstance(text, str):
            return text
        return f"{moment.point} (describe() gave a {type(text).__name__})"

    return described


POLLED = ("poll", "map")
"""`func` and `attach` of rows that poll() makes."""


def _maps(spec: ProbeSpec, loaded: LoadedProbe) -> Maps:
    func, attach = POLLED

    def make_row(point: str, **fields: Any) -> Event:
        fields.setdefault("ts_ns", kernel_ns())
        fields.setdefault("time_ns", fields["ts_ns"] + clock_offset_ns())
        fields.setdefault("desc", point)
        return row(spec.event, probe=spec.name, point=point, func=func, attach=attach, **fields)

    views = {}
    for one in spec.maps:
        found = loaded.maps[one.name]
        views[one.name] = MapView(found.fd, struct.Struct(one.layout), found.entries)
    return Maps(views, make_row)


def _counters(
    spec: ProbeSpec, loaded: LoadedProbe, aggregation: Aggregation | None, cpus: int
) -> Counters | None:
    if aggregation is None:
        return None
    return Counters(
        spec.name,
        spec.histograms,
        aggregation,
        aggregation.stripes(cpus, len(spec.histograms)),
        *(loaded.maps[name].fd for name in COUNTERS),
    )


def probe_request(
    spec: ProbeSpec,
    options: Mapping[str, Any],
    *,
    events: bool = True,
    used: frozenset[str] = frozenset(),
    aggregation: Aggregation | None = None,
) -> ProbeRequest:
    """Return the request for one probe.

    Args:
        spec: The probe.
        options: Its options.
        events: Some sink uses rows.
        used: The points whose rows some sink uses; empty for all.
        aggregation: The histograms that some sink uses.
    """
    listen = _listened(spec, events=events, used=used, counted=aggregation is not None)
    maps = {one.name: one.size for one in spec.maps}
    with blaming(f"probe {spec.name}: defines()"):
        defines = spec.defines(options)
    with blaming(f"probe {spec.name}: interfaces()"):
        interfaces = spec.interfaces(options) if spec.interfaces else None
    return ProbeRequest(
        name=spec.name,
        source=spec.source,
        struct=Record(spec.event).c_struct(),
        points=spec.points,
        types=spec.types,
        defines=defines,
        interfaces=interfaces,
        track=spec.track,
        listen=listen,
        maps=maps | COUNTERS if aggregation else maps,
        histograms=tuple(histogram.name for histogram in spec.histograms),
    )


def _listened(
    spec: ProbeSpec, *, events: bool, used: frozenset[str], counted: bool
) -> tuple[str, ...] | None:
    """Return the points to attach; None for all."""
    measured = {point for histogram in spec.histograms for point in histogram.points}
    if not events:
        return tuple(sorted(measured))
    rows = {point.point for point in spec.points} & used
    if not rows:
        return None
    return tuple(sorted(rows | measured if counted else rows))


def _ifname(loaded: LoadedProbe) -> Callable[[int], str]:
    """Return a function from ifindex to name; the loader knows other network namespaces' names."""
    names = {one.index: one.name for one in loaded.interfaces}

    def ifname(index: int) -> str:
        try:
            return names.get(index) or socket.if_indextoname(index)
        except OSError:  # it is gone by now
            return f"if{index}"

    return ifname
