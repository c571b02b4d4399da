"""Declarations of plugins, and the values that a run passes to them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Generic, Protocol, TypeVar

import attrs
import msgspec

from tcplat_core.event.fields import Count, Event, Moment, Number, Positive, Real
from tcplat_core.event.validation import checked_event

from .aggregates import Aggregates, Aggregation, Histogram
from .hookpoints import HookPoint, Interfaces, checked_name
from .maps import Maps, ReadableMap
from .options import Option, Options
from .report import RunReport
from .sampling import Sampled


@attrs.frozen(kw_only=True)
class ProbeSpec:
    """A probe: declarations and one C file. It never calls bcc.

    Args:
        name: As in ``--probe NAME``.
        summary: One line.
        source: The C text.
        points: Hook points.
        types: Kernel types that the C needs: ``"tcp_sock"``, ``"net:ns"`` for single members.
        event: Class of the rows, :class:`tcplat_core.Event` or a subclass.
        describe: Returns the description of a row, from a :class:`tcplat_core.Moment`.
        options: Options that ``name:key=value`` sets.
        defines: Returns C constants, from the options.
        interfaces: Returns the interfaces for XDP programs, from the options. Required if the
            probe has XDP programs.
        track: Have the core track the owner of each socket. For probes whose handlers all run
            in softirq, see include/tcplat/owner.bpf.h.
        maps: Arrays of the C that poll() reads.
        poll: Makes rows from these arrays, with ``maps.row()``. Called once a second while the
            probe is attached, and once after that, without any privilege. If it raises, the
            error is reported and it is not called again.
        histograms: Durations that the probe can count in the kernel for a sink
            (include/tcplat/histogram.bpf.h).
    """

    name: str = attrs.field(validator=checked_name)
    summary: str
    source: str
    points: tuple[HookPoint, ...]
    types: tuple[str, ...] = ()
    event: type[Event] = attrs.field(default=Event, validator=checked_event)
    describe: Callable[[Moment], str] = lambda moment: moment.point
    options: tuple[Option, ...] = ()
    defines: Callable[[Options], Mapping[str, int | str]] = lambda _: {}
    interfaces: Callable[[Options], Interfaces] | None = None
    track: bool = False
    maps: tuple[ReadableMap, ...] = ()
    poll: Callable[[Maps], Iterable[Event] | None] | None = None
    histograms: tuple[Histogram, ...] = ()


class SinkLike(Protocol):
    """A sink whose class is not derived from :class:`Sink`.

    It needs these three methods. The other methods of Sink are optional; which of them it has is
    looked up once, when the run begins.
    """

    def write(self, batch: Sequence[Event]) -> None:
        """See :meth:`Sink.write`."""

    def lost(self, loss: Loss) -> None:
        """See :meth:`Sink.lost`."""

    def close(self, report: RunReport) -> None:
        """See :meth:`Sink.close`."""


class Sink(ABC):
    """Consumes batches of rows: the base class of sinks.

    If a method raises, the sink is switched off; the run goes on. A sink must have `write`, `lost`
    and `close`; the other methods do nothing here. A class with these three methods that is not
    derived from this one is a sink too.

    Attributes:
        joins: Set it to True if the sink combines many rows: then the conformance kit does not
            expect every row in the output.
    """

    __slots__ = ()

    joins: bool = False

    def begin(self) -> None:
        """Start the output. Called once, before the first row.

        In a run, that is when everything is attached; in a replay, when something was read.
        poll() may be called earlier. Replace files here and not in the factory: then a start that
        is refused keeps the old file. :class:`Output` does this itself.
        """

    @abstractmethod
    def write(self, batch: Sequence[Event]) -> None:
        """Take a batch of rows, sorted by time. Flush the output before returning.

        The batch is immutable. Do not change its rows: other sinks get them too. Batch
        boundaries depend on timing; the output must not depend on them.
        """

    @abstractmethod
    def lost(self, loss: Loss) -> None:
        """Take a loss: events are missing from here on, until `loss.until_ns`."""

    def merged(self, merge: Merge) -> None:
        """Take a host of a merged capture. Called for each host, before the rows."""

    def sampled(self, share: Sampled) -> None:
        """Take the share of the connections of which rows follow; see :class:`Sampled`.

        Called before the first row of a run with ``--sample``, wherever ``--max-overhead`` changes
        it, and alike in a replay.
        """

    def aggregates(self, them: Aggregates) -> None:
        """Take the counts since the start of the run; the last ones, `final`, before close().

        Called if the spec has `aggregate`, as often as its Aggregation says.
        """

    def idle(self) -> None:
        """Check the reader. Called once a second, also without rows.

        Raises:
            ReaderGoneError: The reader has closed the output: the run ends.
        """

    def poll(self) -> None:
        """Serve readers without blocking.

        Called after each poll of the rings, every 3 to 20 ms, also without rows; in a replay at
        least every 100 ms. If a sink overrides this method, the session does not sleep.
        """

    def passed(self, ts_ns: int) -> None:
        """Learn that no older row will come.

        Called several times a second while no rows come, and never in a replay, not even of a live
        socket: rows may be in flight there. What it writes must be what the next row or close()
        would have written; `RunReport.until_ns` is the last such instant.
        """

    @abstractmethod
    def close(self, report: RunReport) -> None:
        """End the output. Idempotent. Not called if a method has failed before."""

    def cancel(self) -> None:
        """Remove what the factory created outside the process, such as a socket.

        Called instead of close() if there was no run or it ended with an error.
        """


AggregateSink = Sink
"""Alias of :class:`Sink`, for older plugins."""


@attrs.frozen(kw_only=True)
class SinkSpec:
    """A sink.

    Args:
        name: As in ``--sink NAME``.
        summary: One line.
        factory: Creates the sink from its options, before anything is attached. Raises if that
            is impossible, and keeps existing files.
        options: Options that ``name:key=value`` sets.
        aggregate: Returns what the kernel shall count, from the options. Such a sink needs no
            rows: if no other sink does, none are made. aggregates() is called with the counts.
        points: Points whose rows the sink uses; empty for all. Other points of a probe are not
            attached, unless another sink uses their rows, or this one uses none of the probe's.
            More rows than these must not change what the sink writes: a replay may have them.
        acks: The sink uses rows of packets that only acknowledge: half of all packets. If no sink
            does, `rx_ip` does not make them; the report has their number. The same rule.
    """

    name: str = attrs.field(validator=checked_name)
    summary: str
    factory: Callable[[Options, RunInfo], SinkLike]
    options: tuple[Option, ...] = ()
    aggregate: Callable[[Options], Aggregation] | None = None
    points: tuple[str, ...] = ()
    acks: bool = True


S = TypeVar("S", ProbeSpec, SinkSpec)


@attrs.frozen
class Chosen(Generic[S]):
    """A probe or sink that the user has chosen, with its options converted."""

    spec: S
    options: Options


@attrs.frozen
class RunInfo:
    """What a sink can know about the run before it begins.

    Args:
        probes: Names of the probes.
        stopping: Returns whether the user has ended the run; blocked writes then give up.
        events: Probe -> class of its rows; see :func:`tcplat_core.fields`.
        live: False in a replay: then the probes, the host and its clocks are unknown.
        say: Prints a sentence on standard error, unless ``--quiet`` is given.
    """

    probes: tuple[str, ...]
    stopping: Callable[[], bool] = lambda: False
    events: Mapping[str, type[Event]] = attrs.field(factory=dict)
    live: bool = True
    say: Callable[[str], None] = lambda _: None


@attrs.frozen
class Loss:
    """Events of a hook that were lost since the previous loss.

    Args:
        probe: The probe whose ring was full.
        point: Hook point of the events.
        count: Number of events.
        since_ns: No lost event is older. The loss has this place in the stream.
        until_ns: No lost event is younger. Both are 0 if unknown.
    """

    probe: str
    point: str
    count: Count
    since_ns: Count = 0
    until_ns: Count = 0


HOST_BITS = 32
"""In a merged capture, `netns` is the host's own number plus `host << HOST_BITS`."""


@attrs.frozen
class Merge:
    """A host of a merged capture; comes before the rows.

    Args:
        host: Number of the host. All rows have the clock of host 0.
        name: Name of its capture, as the user gave it.
        offset_ns: Its CLOCK_MONOTONIC minus that of host 0, at the first packet that both saw.
        drift_ppm: How much faster its clock runs, over the whole capture.
        drift_bound_ppm: Largest possible error of `drift_ppm`.
        bound_ns: Largest possible error of the offset that was subtracted from its rows, at any
            time at which a packet between the two hosts was seen.
        packets: Number of packets that gave this bound.
    """

    host: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    name: str
    offset_ns: Number = 0
    drift_ppm: Real = 0.0
    drift_bound_ppm: Positive = 0.0
    bound_ns: Count = 0
    packets: Count = 0


Item = Sequence[Event] | Loss | Merge | Sampled
"""What a capture consists of, besides its report: batches of rows, and what stands between them."""
